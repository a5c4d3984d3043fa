// The contract between the binding and the engines: what one step has to do, in plain data.
//
// The binding fills a Plan from the optimizer's param_groups and state at every step; an engine
// carries it out and assumes that it is valid. An engine can therefore be driven from a test, a
// C++ program or another binding.
#pragma once

#include <stdint.h>

namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16, kInt64, kUInt8 };

constexpr int kMaxStates = 3;
constexpr int kMaxHypers = 8;
constexpr int kMaxDims = 65;  // torch allows 64; a complex tensor adds one

// Where element i of an operand lies when the operand is not dense in its parameter's order: the
// mixed-radix digits of i, outermost first, times the strides (in elements).
struct Layout {
  int ndim;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// Elements are numbered in the memory order of the parameter. With no layout, element i of the
// operand is data[i].
struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  const Layout* layout = nullptr;
};

// How a parameter of 16 bits is written (store.h).
enum class WeightPrecision : uint8_t { kNearest, kMaster, kRemainder, kStochastic, kKahan };

// What only some parameters have.
struct Extras {
  WeightPrecision precision = WeightPrecision::kNearest;
  Operand hidden;            // the hidden part of a master, remainder or kahan weight
  Operand ema;               // the average of the weights
  Operand grad_sum;          // gradients accumulated before this step
  bool accumulated = false;  // grad_sum holds something
  // Of states in 8 bits (DType::kUInt8): a scale to each kBlock elements, and which of the two
  // formats of quantize.h.
  float* scale[kMaxStates] = {};
  bool square[kMaxStates] = {};
  bool random_state = false;  // states in bfloat16 are rounded at random, as those in 8 bits are
  uint64_t seed = 0;          // of the random bits
};

// One parameter. Complex tensors arrive as real ones with twice the elements.
struct Task {
  Operand param;
  Operand grad;               // no data: only what was accumulated
  Operand state[kMaxStates];  // no data: the rule has fewer
  int64_t numel = 0;
  double step = 0;  // 1 at the first update
  int32_t group = 0;
  bool first = false;  // state[0] has never been written (SGD's momentum buffer)
  const Extras* extras = nullptr;
};

// What the parameters of one group share. `rule` indexes the instances of rules.h.
struct Group {
  int rule = 0;
  double hyper[kMaxHypers] = {};
  double sign = 1;  // -1: maximize
  double l1 = 0;    // proximal L1 takes this times the learning rate, hyper[0], from |weight|
};

// What a step does around the rule, the same for all parameters. The defaults do nothing.
struct Stages {
  double grad_multiplier = 1;  // undoes a loss scale, makes the mean of micro-batches
  double max_grad_value = -1;  // negative: no limit
  double clip_coefficient = 1;
  double ema_decay = 0;
  bool ema_warmup = false;
};

struct Plan {
  const Group* groups;
  const Task* const* tasks;
  int64_t n_tasks;
  // begin[i] is the position of task i on a line on which every task takes room in proportion to
  // its cost; begin[n_tasks] is the length of the line. Engines cut the line into equal parts.
  const int64_t* begin;
  Stages stages;
};

// On that line a task takes one unit per element and this much for being a task.
constexpr int64_t kTaskOverhead = 64;

// The elements that share a scale in 8-bit state. Engines cut tensors at multiples of it only.
constexpr int64_t kBlock = 256;

enum class NormType : uint8_t { kNone, kTwo, kInfinity };

// What a norm is made of (norm.h), and what else was seen on the way.
struct Norm {
  double total = 0;             // the squares' sum, or the largest magnitude,
  double scale = 1;             // of gradients times this, a power of two
  int64_t nonfinite_task = -1;  // the first whose gradient holds nan or inf; -1: none
};

}  // namespace fusedopt
