// What the CUDA kernels read: a Plan as it lies in device memory.
//
// Tasks that share a rule, an arithmetic type and, where there are kernels for them, the storage
// formats (cuda_formats.h) share a launch.
//
// For the general kernel the work line of a launch is made of the tasks' spans, one after another,
// and cut into chunks, which the warps take in turn. Kernels for one combination of formats have
// lines of their own, below.
#pragma once

#include "plan.h"

namespace fusedopt {

// A span is what a warp has in a buffer at a time (cuda_buffer.h): so many tiles, of kBlock
// elements, of one task. (Two: with one, what is done once per span would be near half of all
// instructions.)
constexpr int span_tiles(bool in_double) { return in_double ? 1 : 2; }

// An operand in device memory, and where its spans come to lie in the buffer.
struct alignas(16) DeviceOperand {
  void* data = nullptr;            // of the gradient: none, it is in DeviceGrad
  const Layout* layout = nullptr;  // null: the elements lie one after another
  uint32_t place = 0;              // the span's first byte in the buffer
  uint8_t size = 0;                // bytes of an element; 0: there is no such operand
  uint8_t buffered_size = 0;  // in the buffer: as `size`, but a float for a double among floats
  bool dense = false;         // what lies in the buffer is what lies in memory
  uint8_t misaligned = 0;     // the bits of an address that keep four from being one access
};

// No operand is at place 0, which so means that there is none; all are aligned to this.
constexpr uint32_t kBufferBegin = 128;

// Of a tile's scale each lane has a copy.
constexpr uint32_t kScaleBytes = 32 * sizeof(float);

// The first two, which is all that a norm reads; the others are listed without gaps.
constexpr int kGradOperand = 0, kGradSumOperand = 1, kOtherOperands = 2;
constexpr int kMaxOperands = 5 + kMaxStates;

struct DeviceTask {
  // As in the Plan, but for the operands: dense, in the dtypes that they have in the buffer, and
  // their data are places there. With `first`, state[0] has not been written as long as the counter
  // is at `step`.
  Task task;
  Extras extras;
  DeviceOperand operands[kMaxOperands];
  int32_t n_operands = kOtherOperands;
  float* scale[kMaxStates] = {};  // of states in 8 bits, in device memory
  void* step = nullptr;           // the parameter's counter, or null when nothing counts
  DType step_dtype = DType::kFloat32;
  int64_t place = 0;  // among all parameters of the step, for messages
};

// What may change at each step. No data: the parameter does not take part.
struct DeviceGrad {
  const void* data = nullptr;
  uint64_t accumulated = 0;  // 1: extras.grad_sum holds something. (No padding: it is compared)
};

struct DeviceGroup {
  Group group;
  const void* lr = nullptr;  // instead of group.hyper[0], where the learning rate is a tensor
  DType lr_dtype = DType::kFloat32;
};

// The work line of one launch.
struct DeviceLine {
  const DeviceTask* tasks;
  const DeviceGrad* grads;
  const DeviceGroup* groups;
  const int64_t* first_span;  // n_tasks + 1: where each task's spans begin on the line
  const int32_t* chunk_task;  // n_chunks: the task that the chunk's first span belongs to
  int32_t n_tasks;
  int32_t chunk_spans;
  int64_t n_chunks;
  uint32_t grad_bytes;    // of a buffer for any span's gradient and what was accumulated,
  uint32_t buffer_bytes;  // and for all of its operands
};

// A task of known formats, as little of it as the kernels read.
struct alignas(16) DirectTask {
  void* param = nullptr;
  void* hidden = nullptr;
  void* ema = nullptr;
  void* state[kMaxStates] = {};
  float* scale[kMaxStates] = {};
  void* step = nullptr;    // the parameter's counter, or null when nothing counts
  double first_step = -1;  // state[0] has not been written as long as the counter is there
  int64_t numel = 0;
  uint64_t seed = 0;
  int32_t first_chunk = 0;
  int32_t place = 0;  // among all parameters of the step, for messages
  int32_t group = 0;
  DType step_dtype = DType::kFloat32;
  bool one_chunk = false;  // whoever works on it advances the counter, as nobody else reads it
};

// Its work line: each task has chunks of so many tiles, the last of which may have fewer.
struct DirectLine {
  const DirectTask* tasks;
  const DeviceGrad* grads;
  const DeviceGroup* groups;
  const int32_t* chunk_task;  // n_chunks: the task that a chunk is of
  const int32_t* others;      // n_others: the tasks of no chunk, or several
  int32_t n_others;
  int32_t n_chunks;
  int32_t chunk_tiles;
};

// While measuring, non-finite gradients are noted as this less their task's place, so that the
// largest number is the first's.
constexpr uint64_t kFirstPlace = uint64_t(1) << 32;

// Between the launches of a step, and from step to step. All zeros at first.
struct DeviceControl {
  double total;        // the squares' sum, or the largest magnitude, of all gradients
  uint64_t nonfinite;  // while measuring: kFirstPlace less the first's place; 0: none
  uint64_t found;      // 1 + its place; 0: all are finite
  uint64_t skipped;    // counts skipped steps
  // Of the launch that runs:
  uint32_t blocks_ready;
  uint32_t chunks_taken;  // beyond the first two of each warp
};

// Gradients' factors and the step's fate, where only the device knows them.
struct DeviceStages {
  Stages stages;                      // clip_coefficient is computed on the device
  double divisor = 1;                 // by this and the scale gradients are divided
  const float* grad_scale = nullptr;  // of a gradient scaler
  const float* found_inf = nullptr;
  NormType norm = NormType::kNone;
  double max_grad_norm = -1;  // negative: none
  bool skip_nonfinite = false;
};

// `Line`: DeviceLine or DirectLine.
template <class Line>
struct UpdateArguments {
  Line line;
  DeviceStages stages;
  DeviceControl* control;
  bool last_launch;  // of the step
};

template <class Line>
struct MeasureArguments {
  Line line;
  DeviceStages stages;
  DeviceControl* control;
  double* partial;    // one per warp
  double* grad_norm;  // where the norm is reported
  bool first_launch, last_launch;
};

}  // namespace fusedopt
