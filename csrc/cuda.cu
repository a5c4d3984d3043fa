// The CUDA kernels: the bodies of cuda_warp.h on real warps.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.h"

#define FUSEDOPT_ISA cuda
#include "cuda_warp.h"

namespace fusedopt {
namespace cuda {

// Threads keep a tile in registers: so there are few of them, but each has eight accesses of 16
// bytes on the way at a time.
constexpr int kBlockThreads = 128;
constexpr int kBlockWarps = kBlockThreads / kWarpLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

// The lane's state is the thread's registers.
template <class State>
class HardwareWarp {
 public:
  template <class F>
  __device__ void each(F&& f) {
    f(int(threadIdx.x % kWarpLanes), state_);
  }

  template <class F>
  __device__ void once(F&& f) {
    __syncwarp();
    if (threadIdx.x % kWarpLanes == 0) f();
    __syncwarp();
  }

  template <class F>
  __device__ auto largest(F&& f) {
    auto result = f(state_);
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      const auto other = __shfl_xor_sync(kAllLanes, result, distance);
      result = other > result ? other : result;
    }
    return result;
  }

  template <class F>
  __device__ double sum(F&& f) {
    double result = f(state_);
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      result += __shfl_xor_sync(kAllLanes, result, distance);
    }
    return result;
  }

  __device__ void raise(uint64_t* to, uint64_t n) {
    atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
  }

 private:
  State state_;
};

__device__ inline int64_t warp_number() {
  return int64_t(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpLanes;
}

__device__ inline int64_t warp_count() { return int64_t(gridDim.x) * kBlockWarps; }

// Whether this block is the last of the launch to come here: then it sees what all have written.
__device__ inline bool is_last_block(DeviceControl* control) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&control->blocks_ready, 1u) == gridDim.x - 1;
    if (last) control->blocks_ready = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;  // on a multiprocessor

template <class Rule, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    update_kernel(const __grid_constant__ UpdateArguments arguments) {
  __shared__ WarpMemory<Rule, T> memory[kBlockWarps];
  HardwareWarp<LaneTile<T>> warp;
  update_warp<Rule, T>(arguments, warp, memory[threadIdx.x / kWarpLanes], warp_number(),
                       warp_count());
  if (is_last_block(arguments.control)) finish_update(arguments, threadIdx.x, kBlockThreads);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    measure_kernel(const __grid_constant__ MeasureArguments arguments) {
  HardwareWarp<LaneNorm> warp;
  measure_warp<T>(arguments, warp, warp_number(), warp_count());
  if (is_last_block(arguments.control) && threadIdx.x < kWarpLanes) {
    finish_measure(arguments, warp, warp_count());
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    accumulate_kernel(const __grid_constant__ DeviceLine line) {
  HardwareWarp<LaneTile<T>> warp;
  accumulate_warp<T>(line, warp, warp_number(), warp_count());
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "the number of multiprocessors");
  return count;
}

// At most this many threads run on a multiprocessor, whatever its kind.
constexpr int kMaxBlocks = 2048 / kBlockThreads;

// One grid of as many blocks as run at a time, or fewer when there is less to do.
template <class Arguments>
void launch(void (*kernel)(const Arguments), const Arguments& arguments, int64_t n_chunks,
            CudaStream stream) {
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kBlockThreads, 0),
        "the occupancy of a kernel");
  const int64_t wanted = (n_chunks + kBlockWarps - 1) / kBlockWarps;
  const int64_t most = int64_t(processors()) * std::min(std::max(per_processor, 1), kMaxBlocks);
  const unsigned blocks = unsigned(std::max<int64_t>(1, std::min(wanted, most)));
  kernel<<<blocks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), "a launch failed");
}

template <class T>
struct LaunchUpdate {
  const UpdateArguments& arguments;
  CudaStream stream;

  template <class Rule>
  void run() const {
    launch(update_kernel<Rule, T>, arguments, arguments.line.n_chunks, stream);
  }
};

}  // namespace cuda

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();  // so that nobody else finds it
  return 0;
}

int64_t cuda_max_warps() {
  return int64_t(cuda::processors()) * cuda::kMaxBlocks * cuda::kBlockWarps;
}

void cuda_update(int rule, bool in_double, const UpdateArguments& arguments, CudaStream stream) {
  if (in_double) {
    cuda::select_rule<double>(rule, cuda::LaunchUpdate<double>{arguments, stream});
  } else {
    cuda::select_rule<float>(rule, cuda::LaunchUpdate<float>{arguments, stream});
  }
}

void cuda_measure(bool in_double, const MeasureArguments& arguments, CudaStream stream) {
  const auto kernel = in_double ? cuda::measure_kernel<double> : cuda::measure_kernel<float>;
  cuda::launch(kernel, arguments, arguments.line.n_chunks, stream);
}

void cuda_accumulate(bool in_double, const DeviceLine& line, CudaStream stream) {
  const auto kernel = in_double ? cuda::accumulate_kernel<double> : cuda::accumulate_kernel<float>;
  cuda::launch(kernel, line, line.n_chunks, stream);
}

}  // namespace fusedopt
