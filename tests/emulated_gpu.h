// The CUDA engine's kernels without a GPU.
#pragma once

#include <vector>

#include "cpu.h"
#include "cuda_plan.h"

namespace fusedopt::emulated {

// With the interface of the CPU's.
extern const Kernels kKernels;

// What the host does otherwise than on the CPU: it leaves decisions to the device.
struct Options {
  DeviceStages stages;
  std::vector<double> steps;  // the counters, one per task; in float32 if `narrow_steps`
  bool narrow_steps = false;
  const void* lr = nullptr;  // a tensor, for all groups
  DType lr_dtype = DType::kFloat32;
  int64_t n_warps = 5;
  int32_t chunk_spans = 3;
  int depth = 2;
};

// One launch per rule and type, as in a step. `grad_norm` may be null.
void measure(const Plan& plan, const Options& options, DeviceControl* control, double* grad_norm);
void update(const Plan& plan, Options* options, DeviceControl* control);

}  // namespace fusedopt::emulated
