// The CUDA engine: launches of the kernels of cuda.cu.
//
// Nothing here allocates device memory: all of it, and the plan in it (cuda_plan.h), is the
// caller's. And nothing waits, unless it says so: everything happens in the order of a stream.
//
// A build without CUDA has no_cuda.cpp instead; tests have one that runs on the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

#include "cuda_plan.h"

namespace fusedopt {

// What the devices are called.
struct DeviceKind {
  int32_t dlpack;     // in a DLPack description; -1 in a build without CUDA
  const char* torch;  // a torch.device's type; empty in a build without CUDA
};

DeviceKind cuda_kind();

// The architectures that the kernels were compiled for, as setup.py was told.
const char* cuda_architectures();

// Devices that the driver offers; 0 also when there is no driver.
int cuda_device_count();

// Whether the kernels run on a device: not when it is of another architecture, or the driver too
// old for this build.
bool cuda_runs_on(int device);

// Where launches go.
struct CudaQueue {
  int device;
  void* stream;  // a cudaStream_t
};

// A number for the graph that what goes there is recorded into instead of done; 0: none.
uint64_t cuda_capture(const CudaQueue& queue);

// Does what no replay is to repeat, while the thread records a graph, and waits for it. What `work`
// puts into the queue that it is called with happens now; that stream is never recorded, and memory
// may be allocated for it.
void cuda_outside_graphs(int device, const std::function<void(const CudaQueue&)>& work);

// Calls release(what) when the graph that this queue records, and all that was made of it, is gone
// and runs no more: once, on any thread, where it must neither block nor use CUDA. Also when this
// throws.
void cuda_retain(const CudaQueue& queue, void (*release)(void*), void* what);

// Warps that a launch on a device has at most, whatever the kernel. The length of
// MeasureArguments.partial.
int64_t cuda_max_warps(int device);

// Copies to device memory, in multiples of kUploadUnit bytes and aligned to that. The bytes travel
// as arguments of kernels: nothing has to be kept.
constexpr size_t kUploadUnit = 16;
void cuda_upload(const CudaQueue& queue, void* to, const void* from, size_t bytes);

void cuda_update(const CudaQueue& queue, int rule, bool in_double,
                 const UpdateArguments<DeviceLine>& arguments);
void cuda_measure(const CudaQueue& queue, bool in_double,
                  const MeasureArguments<DeviceLine>& arguments);
void cuda_accumulate(const CudaQueue& queue, bool in_double, const DeviceLine& line);

// Of tasks whose formats have that number in kFormats, which is below cuda_direct_formats() of the
// rule.
int cuda_direct_formats(int rule);
void cuda_update_direct(const CudaQueue& queue, int rule, int formats,
                        const UpdateArguments<DirectLine>& arguments);
void cuda_measure_direct(const CudaQueue& queue, int formats,
                         const MeasureArguments<DirectLine>& arguments);

}  // namespace fusedopt
