// The CUDA engine: launches of the kernels of cuda.cu.
//
// Nothing here waits for a device, allocates or copies: all memory, and the plan in it
// (cuda_plan.h), is the caller's, and everything happens in the order of the stream.
#pragma once

#include <stdint.h>

#include "cuda_plan.h"

namespace fusedopt {

// A CUDA stream, of a device that is the current one.
using CudaStream = void*;

// Devices that the driver offers; 0 also when there is no driver.
int cuda_device_count();

// Warps that a launch has at most, on the current device: as many as run at a time. The length of
// MeasureArguments.partial.
int64_t cuda_max_warps();

void cuda_update(int rule, bool in_double, const UpdateArguments& arguments, CudaStream stream);
void cuda_measure(bool in_double, const MeasureArguments& arguments, CudaStream stream);
void cuda_accumulate(bool in_double, const DeviceLine& line, CudaStream stream);

}  // namespace fusedopt
