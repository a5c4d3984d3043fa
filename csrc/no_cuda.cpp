// The CUDA engine of a build without CUDA: there are no devices, so nothing is asked of them.
#include <stdexcept>

#include "cuda.h"

namespace fusedopt {
namespace {

[[noreturn]] void fail() { throw std::logic_error("this build of fusedopt has no CUDA kernels"); }

}  // namespace

DeviceKind cuda_kind() { return {-1, ""}; }

const char* cuda_architectures() { return ""; }

int cuda_device_count() { return 0; }

bool cuda_runs_on(int) { return false; }

uint64_t cuda_capture(const CudaQueue&) { return 0; }

void cuda_outside_graphs(int, const std::function<void(const CudaQueue&)>&) { fail(); }

void cuda_retain(const CudaQueue&, void (*)(void*), void*) { fail(); }

int64_t cuda_max_warps(int) { fail(); }

void cuda_upload(const CudaQueue&, void*, const void*, size_t) { fail(); }

void cuda_update(const CudaQueue&, int, bool, const UpdateArguments<DeviceLine>&) { fail(); }

int cuda_direct_formats(int) { return 0; }

void cuda_update_direct(const CudaQueue&, int, int, const UpdateArguments<DirectLine>&) { fail(); }

void cuda_measure(const CudaQueue&, bool, const MeasureArguments<DeviceLine>&) { fail(); }

void cuda_measure_direct(const CudaQueue&, int, const MeasureArguments<DirectLine>&) { fail(); }

void cuda_accumulate(const CudaQueue&, bool, const DeviceLine&) { fail(); }

}  // namespace fusedopt
