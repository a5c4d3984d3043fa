// The CUDA engine's kernels without a GPU.
#pragma once

#include <utility>
#include <vector>

#include "cpu.h"
#include "cuda_plan.h"

namespace fusedopt::emulated {

// With the interface of the CPU's; and all by the general kernel.
extern const Kernels kKernels, kGeneralKernels;

// What the host does otherwise than on the CPU: it leaves decisions to the device.
struct Options {
  DeviceStages stages;
  std::vector<double> steps;  // the counters, one per task; in float32 if `narrow_steps`
  bool narrow_steps = false;
  const void* lr = nullptr;  // a tensor, for all groups
  DType lr_dtype = DType::kFloat32;
  int64_t n_warps = 5;
  int32_t chunk_spans = 3;  // or tiles
  int depth = 2;
  bool general = false;  // no kernels for known formats
};

// One launch per rule, type and formats, as in a step. `grad_norm` may be null.
void measure(const Plan& plan, const Options& options, DeviceControl* control, double* grad_norm);
void update(const Plan& plan, Options* options, DeviceControl* control);

// The formats of an update's launches: numbers of kFormats, or kAnyFormats.
std::vector<int> formats_of_launches(const Plan& plan, const Options& options);

// How many of kFormats a rule has kernels for.
int count_direct_formats(int rule);

// In Quick numbers (quick.h); the second: whether that is known to be exact.
std::pair<float, bool> quick_root(float x);
std::pair<float, bool> quick_quotient(float a, float b);

// Of eight floats, as a lane adds them up (norm.h).
double sum_of_eight_squares(const float* g);

}  // namespace fusedopt::emulated
