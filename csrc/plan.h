// The contract between the binding and the engines: what one step has to do, in plain data.
//
// The binding fills a Plan from the optimizer's param_groups and state at every step; an engine
// carries it out and assumes that it is valid. An engine can therefore be driven from a test, a
// C++ program or another binding.
#pragma once

#include <stdint.h>

namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

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

// One parameter. Complex tensors arrive as real ones with twice the elements.
struct Task {
  Operand param;
  Operand grad;
  Operand state[kMaxStates];
  int64_t numel = 0;
  double step = 0;  // 1 at the first update
  int32_t group = 0;
  bool first = false;  // state[0] has never been written (SGD's momentum buffer)
};

// What the parameters of one group share. `rule` indexes the instances of rules.h.
struct Group {
  int rule = 0;
  double hyper[kMaxHypers] = {};
  // Gradients are multiplied by this before the rule sees them: -1 maximizes, 1/scale undoes a
  // gradient scaler's factor.
  double grad_multiplier = 1;
};

struct Plan {
  const Group* groups;
  const Task* const* tasks;
  int64_t n_tasks;
  // begin[i] is the position of task i on a line on which every task takes room in proportion to
  // its cost; begin[n_tasks] is the length of the line. Engines cut the line into equal parts.
  const int64_t* begin;
};

// On that line a task takes one unit per element and this much for being a task.
constexpr int64_t kTaskOverhead = 64;

}  // namespace fusedopt
