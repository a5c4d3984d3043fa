// The CUDA kernels: the bodies of cuda_direct.h and cuda_general.h on real warps.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda.h"

#define FUSEDOPT_ISA cuda
#include "cuda_direct.h"
#include "cuda_general.h"

namespace fusedopt {
namespace cuda {

constexpr int kBlockThreads = 128;
constexpr int kBlockWarps = kBlockThreads / kWarpLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

// The lane's state is the thread's registers.
template <class State>
class HardwareWarp {
 public:
  template <class F>
  __device__ void each(F&& f) {
    f(lane(), state_);
  }

  template <class F>
  __device__ void once(F&& f) {
    __syncwarp();
    if (lane() == 0) f();
    __syncwarp();
  }

  template <class F>
  __device__ auto largest(F&& f) {
    return largest_of(f(state_));
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

  template <class F>
  __device__ bool all(F&& f) {
    return __all_sync(kAllLanes, f(state_));
  }

  __device__ void wait_for_lanes() { __syncwarp(); }

  __device__ uint32_t take(uint32_t* counter) { return atomicAdd(counter, 1u); }

  template <class T>
  __device__ void copy(T* to, const T* from) {
    __pipeline_memcpy_async(to, from, sizeof(T));
  }

  __device__ void commit() { __pipeline_commit(); }

  // (The instruction takes a constant.)
  template <int kN = 0>
  __device__ void wait(int n) {
    if constexpr (kN + 1 < kMaxDepth) {
      if (n > kN) return wait<kN + 1>(n);
    }
    __pipeline_wait_prior(kN);
    asm volatile("" ::: "memory");  // the compiler reads nothing before
  }

 private:
  __device__ static int lane() { return threadIdx.x % kWarpLanes; }

  template <class T>
  __device__ static T largest_of(T result) {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, result, distance);
      result = other > result ? other : result;
    }
    return result;
  }
#if __CUDA_ARCH__ >= 800
  __device__ static uint32_t largest_of(uint32_t result) {
    return __reduce_max_sync(kAllLanes, result);
  }
#endif

  State state_;
};

__device__ inline int64_t warp_number() {
  return int64_t(blockIdx.x) * kBlockWarps + threadIdx.x / kWarpLanes;
}

__device__ inline int64_t warp_count() { return int64_t(gridDim.x) * kBlockWarps; }

// An address in shared memory, in a register: else the compiler asks for the block's place in its
// cluster at each access.
__device__ inline uint32_t kept(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// This warp's buffers in the block's dynamic shared memory.
__device__ inline Buffers buffers_of_warp(uint32_t bytes, int depth) {
  extern __shared__ __align__(kBufferBegin) Piece<kLargestPiece> pieces[];
  uint32_t first = uint32_t(__cvta_generic_to_shared(pieces));
  first = kept(first + threadIdx.x / kWarpLanes * (depth * bytes));
  return {static_cast<unsigned char*>(__cvta_shared_to_generic(first)), bytes, depth};
}

// Whether this block is the last of the launch to come here: then it sees what all have written.
__device__ inline bool is_last_block(DeviceControl* control) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // also for what the others wrote before the barrier
    last = atomicAdd(&control->blocks_ready, 1u) == gridDim.x - 1;
    if (last) control->blocks_ready = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <class Line>
__device__ void finish_norm(const MeasureArguments<Line>& arguments) {
  HardwareWarp<LaneNorm<double>> warp;
  if (threadIdx.x < kWarpLanes) finish_measure(arguments, warp, warp_count());
}

template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;  // on a multiprocessor

template <class Rule, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    update_kernel(const __grid_constant__ UpdateArguments<DeviceLine> arguments, int depth) {
  // (Of bytes: what is shared must not be initialized by all threads.)
  using Memory = WarpMemory<Rule, T>;
  __shared__ alignas(Memory) unsigned char memory[kBlockWarps][sizeof(Memory)];
  HardwareWarp<LaneTile<T>> warp;
  update_warp<Rule, T>(
      arguments, warp, *reinterpret_cast<Memory*>(memory[threadIdx.x / kWarpLanes]),
      buffers_of_warp(arguments.line.buffer_bytes, depth), warp_number(), warp_count());
  if (is_last_block(arguments.control)) finish_update(arguments, threadIdx.x, kBlockThreads);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    measure_kernel(const __grid_constant__ MeasureArguments<DeviceLine> arguments, int depth) {
  HardwareWarp<LaneNorm<T>> warp;
  measure_warp<T>(arguments, warp, buffers_of_warp(arguments.line.grad_bytes, depth), warp_number(),
                  warp_count());
  if (is_last_block(arguments.control)) finish_norm(arguments);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    accumulate_kernel(const __grid_constant__ DeviceLine line, int depth) {
  HardwareWarp<LaneTile<T>> warp;
  accumulate_warp<T>(line, warp, buffers_of_warp(line.grad_bytes, depth), warp_number(),
                     warp_count());
}

// Blocks on a multiprocessor: the compiler has to make do with 64, 72 or 80 registers.
constexpr int direct_blocks(const Formats& formats, int states) {
  if (formats.ema || formats.state == DType::kUInt8 || states > 2) return 6;
  return formats.param == DType::kFloat32 ? 8 : 7;
}

template <class Rule, int kFormat>
__global__ void __launch_bounds__(kBlockThreads, direct_blocks(kFormats[kFormat], Rule::kStates))
    direct_update_kernel(const __grid_constant__ UpdateArguments<DirectLine> arguments) {
  using Memory = DirectMemory<Rule>;
  __shared__ alignas(Memory) unsigned char bytes[kBlockWarps][sizeof(Memory)];
  const uint32_t first = uint32_t(__cvta_generic_to_shared(bytes));
  const auto memory_of = [&](int warp) {
    return static_cast<Memory*>(__cvta_shared_to_generic(kept(first + warp * sizeof(Memory))));
  };
  HardwareWarp<DirectTile> warp;
  const int number = threadIdx.x / kWarpLanes;
  // One warp looks for the rule of all: most tasks share it, and its powers of doubles take long
  // where few units work on doubles.
  Memory& memory = *memory_of(number);
  if (number == 0) begin_direct(arguments, warp, memory, warp_number());
  __syncthreads();
  if (number != 0) copy_words(warp, &memory, memory_of(0));
  __syncthreads();  // before the first warp goes on to another rule
  update_direct<Rule, kFormat>(arguments, warp, memory, warp_number(), warp_count());
  if (is_last_block(arguments.control)) finish_update(arguments, threadIdx.x, kBlockThreads);
}

// (The oldest multiprocessors have room for eight.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMeasureBlocks = 8;
#else
constexpr int kMeasureBlocks = 10;
#endif

template <class G>
__global__ void __launch_bounds__(kBlockThreads, kMeasureBlocks)
    direct_measure_kernel(const __grid_constant__ MeasureArguments<DirectLine> arguments) {
  HardwareWarp<LaneNorm<float>> warp;
  measure_direct<G>(arguments, warp, warp_number(), warp_count());
  if (is_last_block(arguments.control)) finish_norm(arguments);
}

// Bytes on their way to the device, as a kernel's arguments: at most 4 KiB of these, or 32 KiB
// with drivers for CUDA 12.1 and later.
template <size_t kBytes>
struct alignas(kUploadUnit) Parcel {
  char bytes[kBytes];
};
constexpr size_t kSmallParcel = 4096 - 64, kLargeParcel = 32768 - 64;

// One unit for each thread.
template <size_t kBytes>
__global__ void upload_kernel(const __grid_constant__ Parcel<kBytes> parcel, uint4* to,
                              unsigned n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = reinterpret_cast<const uint4*>(parcel.bytes)[i];
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that nobody else finds it
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Whether the process has a context on a device. In a new thread the first one is the current one
// without; to make it that would create one, with half a gigabyte of its memory.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);
  static const GetState get_state = [] {
    void* found = nullptr;
    const char* const name = "cuDevicePrimaryCtxGetState";
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult result;
    (void)cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
    (void)cudaGetDriverEntryPoint(name, &found, cudaEnableDefault);
#endif
    return reinterpret_cast<GetState>(found);
  }();
  unsigned flags = 0;
  int active = 1;
  return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
}

// Makes a device the current one, until the end of a block.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "no current device");
    if (before_ == device) before_ = -1;
    if (before_ >= 0) check(cudaSetDevice(device), "choosing a device");
  }
  ~OnDevice() {
    if (before_ >= 0 && has_context(before_)) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_;
};

using Key = std::pair<int, uint32_t>;  // a device, and what else it depends on

// What make(key) returns, asked for only once for each key.
template <class Make>
auto once_per(const Key& key, Make&& make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make(key))> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = make(key);
}

int processors(int device) {
  return once_per({device, 0}, [](const Key& key) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, key.first),
          "the number of multiprocessors");
    return count;
  });
}

// At most this many threads run on a multiprocessor, whatever its kind.
constexpr int kMaxBlocks = 2048 / kBlockThreads;

// How a kernel is launched whose warps need buffers of a certain size.
struct Fit {
  int depth;
  size_t shared_bytes;  // of a block
  int64_t blocks;       // that run at a time on the device
};

// What a warp should have on the way at a time: some dozen warps of a multiprocessor then have more
// than its share of the memory delivers until the first of it comes.
constexpr uint32_t kBytesAhead = 6144;

// How many blocks of a kernel run on a device at a time.
template <auto kKernel>
int64_t blocks_of(int device, size_t shared_bytes) {
  int blocks = 0;
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kBlockThreads, shared_bytes),
      "the occupancy of a kernel");
  return int64_t(processors(device)) * std::min(std::max(blocks, 1), kMaxBlocks);
}

template <auto kKernel>
Fit fit(int device, uint32_t buffer_bytes) {
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "the size of shared memory");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kKernel), "the attributes of a kernel");
  most -= int(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "more shared memory for a kernel");
  // All kernels alike, since a multiprocessor has to stand still to divide its memory anew.
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "the share of shared memory for a kernel");
  const uint32_t ahead = kBytesAhead / std::max<uint32_t>(buffer_bytes, 1);
  Fit fit = {std::min(1 + std::max(int(ahead), 1), kMaxDepth)};
  const auto bytes = [&] { return size_t(kBlockWarps) * fit.depth * buffer_bytes; };
  while (fit.depth > 1 && bytes() > size_t(most)) --fit.depth;
  fit.shared_bytes = bytes();
  fit.blocks = blocks_of<kKernel>(device, fit.shared_bytes);
  return fit;
}

// One grid of as many blocks as run at a time, or fewer when there is less to do.
unsigned grid(int64_t n_chunks, int64_t most_blocks) {
  const int64_t wanted = (n_chunks + kBlockWarps - 1) / kBlockWarps;
  return unsigned(std::max<int64_t>(1, std::min(wanted, most_blocks)));
}

template <auto kKernel, class Arguments>
void launch(const CudaQueue& queue, const Arguments& arguments, int64_t n_chunks,
            uint32_t buffer_bytes) {
  const OnDevice on(queue.device);
  const Fit chosen = once_per({queue.device, buffer_bytes},
                              [](const Key& key) { return fit<kKernel>(key.first, key.second); });
  kKernel<<<grid(n_chunks, chosen.blocks), kBlockThreads, chosen.shared_bytes,
            static_cast<cudaStream_t>(queue.stream)>>>(arguments, chosen.depth);
  check(cudaGetLastError(), "a launch failed");
}

template <auto kKernel, class Arguments>
void launch_direct(const CudaQueue& queue, const Arguments& arguments) {
  const OnDevice on(queue.device);
  const int64_t blocks =
      once_per({queue.device, 0}, [](const Key& key) { return blocks_of<kKernel>(key.first, 0); });
  kKernel<<<grid(arguments.line.n_chunks, blocks), kBlockThreads, 0,
            static_cast<cudaStream_t>(queue.stream)>>>(arguments);
  check(cudaGetLastError(), "a launch failed");
}

// What a stream records, if anything.
struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

Capture capture_of(const CudaQueue& queue) {
  const OnDevice on(queue.device);
  Capture capture;
  const auto stream = static_cast<cudaStream_t>(queue.stream);
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &capture.status, &capture.id, &capture.graph);
#else
  const cudaError_t error =
      cudaStreamGetCaptureInfo_v2(stream, &capture.status, &capture.id, &capture.graph);
#endif
  check(error, "the state of a stream");
  // (What else is told is not valid then.)
  if (capture.status == cudaStreamCaptureStatusInvalidated) {
    check(cudaErrorStreamCaptureInvalidated, "the capture of a graph");
  }
  return capture;
}

// A stream that nobody else knows, so that no graph records it; and one that does not wait for the
// default stream, which could not be used while a graph is recorded. As long as the process.
cudaStream_t stream_outside_graphs(int device) {
  return once_per({device, 0}, [](const Key& key) {
    const OnDevice on(key.first);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    return stream;
  });
}

// Until the end of a block, lets the thread do what it must not while it records a graph, unless it
// says that it means it: allocate memory, wait for another stream.
class AllowedInCapture {
 public:
  AllowedInCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "the capture's mode"); }
  ~AllowedInCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowedInCapture(const AllowedInCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <class T>
struct LaunchUpdate {
  const CudaQueue& queue;
  const UpdateArguments<DeviceLine>& arguments;

  template <class Rule>
  void run() const {
    launch<update_kernel<AnyRule<T, Rule::kStates>, T>>(queue, arguments, arguments.line.n_chunks,
                                                        arguments.line.buffer_bytes);
  }
};

struct LaunchDirectUpdate {
  const CudaQueue& queue;
  int formats;
  const UpdateArguments<DirectLine>& arguments;

  template <class Rule>
  void run() const {
    with_direct_kernel<Rule>(formats, [&](auto format) {
      launch_direct<direct_update_kernel<Rule, decltype(format)::value>>(queue, arguments);
    });
  }
};

template <size_t kBytes>
void upload(cudaStream_t stream, char* to, const char* from, size_t bytes) {
  Parcel<kBytes> parcel;
  for (size_t at = 0; at < bytes; at += kBytes) {
    const size_t size = std::min(kBytes, bytes - at);
    std::memcpy(parcel.bytes, from + at, size);
    const unsigned n = unsigned(size / kUploadUnit);
    const unsigned blocks = (n + kBlockThreads - 1) / kBlockThreads;
    upload_kernel<kBytes>
        <<<blocks, kBlockThreads, 0, stream>>>(parcel, reinterpret_cast<uint4*>(to + at), n);
    check(cudaGetLastError(), "an upload failed");
  }
}

}  // namespace cuda

DeviceKind cuda_kind() { return {2, "cuda"}; }

const char* cuda_architectures() { return FUSEDOPT_CUDA_ARCHS; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

bool cuda_runs_on(int device) {
  return cuda::once_per({device, 0}, [](const cuda::Key& key) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver) return false;
    const cuda::OnDevice on(key.first);
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, cuda::accumulate_kernel<float>);
    switch (error) {
      case cudaErrorNoKernelImageForDevice:
      case cudaErrorInvalidDeviceFunction:
      case cudaErrorUnsupportedPtxVersion: (void)cudaGetLastError(); return false;
      default: cuda::check(error, "loading the kernels"); return true;
    }
  });
}

uint64_t cuda_capture(const CudaQueue& queue) {
  const cuda::Capture capture = cuda::capture_of(queue);
  return capture.status == cudaStreamCaptureStatusNone ? 0 : uint64_t(capture.id) + 1;
}

void cuda_outside_graphs(int device, const std::function<void(const CudaQueue&)>& work) {
  const cuda::OnDevice on(device);
  const cuda::AllowedInCapture allowed;
  const cudaStream_t stream = cuda::stream_outside_graphs(device);
  work({device, stream});
  cuda::check(cudaStreamSynchronize(stream), "work outside of a graph failed");
}

void cuda_retain(const CudaQueue& queue, void (*release)(void*), void* what) {
  cudaUserObject_t object = nullptr;
  try {
    cuda::check(cudaUserObjectCreate(&object, what, release, 1, cudaUserObjectNoDestructorSync),
                "an object for a graph");
  } catch (...) {
    release(what);
    throw;
  }
  // From here on it is called when the last reference goes: ours, or those of the graph and of what
  // is made of it.
  try {
    cuda::check(cudaGraphRetainUserObject(cuda::capture_of(queue).graph, object, 1,
                                          cudaGraphUserObjectMove),
                "a graph does not retain what it uses");
  } catch (...) {
    (void)cudaUserObjectRelease(object, 1);
    throw;
  }
}

int64_t cuda_max_warps(int device) {
  return int64_t(cuda::processors(device)) * cuda::kMaxBlocks * cuda::kBlockWarps;
}

void cuda_upload(const CudaQueue& queue, void* to, const void* from, size_t bytes) {
  const cuda::OnDevice on(queue.device);
  static const bool large = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  const auto upload = large && bytes > cuda::kSmallParcel ? cuda::upload<cuda::kLargeParcel>
                                                          : cuda::upload<cuda::kSmallParcel>;
  upload(static_cast<cudaStream_t>(queue.stream), static_cast<char*>(to),
         static_cast<const char*>(from), bytes);
}

void cuda_update(const CudaQueue& queue, int rule, bool in_double,
                 const UpdateArguments<DeviceLine>& arguments) {
  if (in_double) {
    cuda::select_rule<double>(rule, cuda::LaunchUpdate<double>{queue, arguments});
  } else {
    cuda::select_rule<float>(rule, cuda::LaunchUpdate<float>{queue, arguments});
  }
}

int cuda_direct_formats(int rule) { return cuda::direct_formats(rule); }

void cuda_update_direct(const CudaQueue& queue, int rule, int formats,
                        const UpdateArguments<DirectLine>& arguments) {
  cuda::select_rule<float>(rule, cuda::LaunchDirectUpdate{queue, formats, arguments});
}

void cuda_measure(const CudaQueue& queue, bool in_double,
                  const MeasureArguments<DeviceLine>& arguments) {
  const int64_t n = arguments.line.n_chunks;
  const uint32_t bytes = arguments.line.grad_bytes;
  if (in_double) {
    cuda::launch<cuda::measure_kernel<double>>(queue, arguments, n, bytes);
  } else {
    cuda::launch<cuda::measure_kernel<float>>(queue, arguments, n, bytes);
  }
}

void cuda_measure_direct(const CudaQueue& queue, int formats,
                         const MeasureArguments<DirectLine>& arguments) {
  if (kFormats[formats].grad == DType::kFloat32) {
    cuda::launch_direct<cuda::direct_measure_kernel<float>>(queue, arguments);
  } else {
    cuda::launch_direct<cuda::direct_measure_kernel<cuda::BFloat16>>(queue, arguments);
  }
}

void cuda_accumulate(const CudaQueue& queue, bool in_double, const DeviceLine& line) {
  if (in_double) {
    cuda::launch<cuda::accumulate_kernel<double>>(queue, line, line.n_chunks, line.grad_bytes);
  } else {
    cuda::launch<cuda::accumulate_kernel<float>>(queue, line, line.n_chunks, line.grad_bytes);
  }
}

}  // namespace fusedopt
