// The CUDA engine (cuda.h) without a GPU: launches run at once, lane by lane, on the CPU. Linked
// instead of cuda.cu into an extension for tests, whose devices are those of fake_device.cpp.
#include <cstring>
#include <utility>
#include <vector>

#include "cuda.h"
#include "emulated_warp.h"
#include "fake_device.h"

namespace fusedopt {
namespace emulated {
namespace {

constexpr int64_t kWarps = 7;
constexpr int kDepth = 2;

// What tests tell and ask (emulation.py).
const FakeDriver* driver = nullptr;
int64_t launches = 0, uploads = 0;

template <class T>
struct Update {
  const UpdateArguments& arguments;

  template <class Rule>
  void run() const {
    for (int64_t i = 0; i < kWarps; ++i) {
      EmulatedWarp<LaneTile<T>> warp;
      WarpMemory<Rule, T> memory = {};
      EmulatedBuffers buffers(arguments.line.buffer_bytes, kDepth);
      update_warp<Rule, T>(arguments, warp, memory, buffers, i, kWarps);
    }
    for (int64_t thread = 0; thread < 7; ++thread) finish_update(arguments, thread, 7);
  }
};

template <class T>
void measure(const MeasureArguments& arguments) {
  EmulatedWarp<LaneNorm> warp;
  EmulatedBuffers buffers(arguments.line.grad_bytes, kDepth);
  for (int64_t i = 0; i < kWarps; ++i) measure_warp<T>(arguments, warp, buffers, i, kWarps);
  finish_measure(arguments, warp, kWarps);
}

template <class T>
void accumulate_all(const DeviceLine& line) {
  EmulatedWarp<LaneTile<T>> warp;
  EmulatedBuffers buffers(line.grad_bytes, kDepth);
  for (int64_t i = 0; i < kWarps; ++i) accumulate_warp<T>(line, warp, buffers, i, kWarps);
}

}  // namespace
}  // namespace emulated

DeviceKind cuda_kind() { return {12, "fake"}; }

const char* cuda_architectures() { return "emulated"; }

int cuda_device_count() { return 2; }

bool cuda_runs_on(int) { return true; }

uint64_t cuda_capture(const CudaQueue& queue) { return emulated::driver->capture(queue.stream); }

void cuda_outside_graphs(int device, const std::function<void(const CudaQueue&)>& work) {
  struct Allowed {
    const bool before = emulated::driver->allow_in_capture(true);
    ~Allowed() { emulated::driver->allow_in_capture(before); }
  };
  const Allowed allowed;
  work({device, emulated::driver->stream_outside_graphs(device)});
}

void cuda_retain(const CudaQueue& queue, void (*release)(void*), void* what) {
  emulated::driver->retain(queue.stream, release, what);
}

int64_t cuda_max_warps(int) { return emulated::kWarps; }

void cuda_upload(const CudaQueue& queue, void* to, const void* from, size_t bytes) {
  ++emulated::uploads;
  const char* const begin = static_cast<const char*>(from);
  std::vector<char> parcel(begin, begin + bytes);
  emulated::driver->launch(queue.stream, [=] { std::memcpy(to, parcel.data(), bytes); });
}

void cuda_update(const CudaQueue& queue, int rule, bool in_double,
                 const UpdateArguments& arguments) {
  ++emulated::launches;
  emulated::driver->launch(queue.stream, [=] {
    if (in_double) {
      emulated::select_rule<double>(rule, emulated::Update<double>{arguments});
    } else {
      emulated::select_rule<float>(rule, emulated::Update<float>{arguments});
    }
  });
}

void cuda_measure(const CudaQueue& queue, bool in_double, const MeasureArguments& arguments) {
  ++emulated::launches;
  emulated::driver->launch(queue.stream, [=] {
    in_double ? emulated::measure<double>(arguments) : emulated::measure<float>(arguments);
  });
}

void cuda_accumulate(const CudaQueue& queue, bool in_double, const DeviceLine& line) {
  ++emulated::launches;
  emulated::driver->launch(queue.stream, [=] {
    in_double ? emulated::accumulate_all<double>(line) : emulated::accumulate_all<float>(line);
  });
}

}  // namespace fusedopt

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulated_set_driver(const FakeDriver* driver) { fusedopt::emulated::driver = driver; }

EXPORT int64_t emulated_launches() { return fusedopt::emulated::launches; }

EXPORT int64_t emulated_uploads() { return fusedopt::emulated::uploads; }
