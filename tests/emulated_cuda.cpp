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

constexpr Grid kGrid = {7, 2};

// What tests tell and ask (emulation.py).
const FakeDriver* driver = nullptr;
int64_t launches = 0, uploads = 0;

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

int64_t cuda_max_warps(int) { return emulated::kGrid.warps; }

void cuda_upload(const CudaQueue& queue, void* to, const void* from, size_t bytes) {
  ++emulated::uploads;
  const char* const begin = static_cast<const char*>(from);
  std::vector<char> parcel(begin, begin + bytes);
  emulated::driver->launch(queue.stream, [=] { std::memcpy(to, parcel.data(), bytes); });
}

void cuda_update(const CudaQueue& queue, int rule, bool in_double,
                 const UpdateArguments<DeviceLine>& arguments) {
  using namespace emulated;
  ++launches;
  driver->launch(queue.stream, [=] {
    if (in_double) {
      select_rule<double>(rule, EmulateUpdate<double>{arguments, kGrid});
    } else {
      select_rule<float>(rule, EmulateUpdate<float>{arguments, kGrid});
    }
  });
}

int cuda_direct_formats(int rule) { return emulated::direct_formats(rule); }

void cuda_update_direct(const CudaQueue& queue, int rule, int formats,
                        const UpdateArguments<DirectLine>& arguments) {
  using namespace emulated;
  ++launches;
  driver->launch(queue.stream,
                 [=] { select_rule<float>(rule, EmulateDirectUpdate{formats, arguments, kGrid}); });
}

void cuda_measure(const CudaQueue& queue, bool in_double,
                  const MeasureArguments<DeviceLine>& arguments) {
  using namespace emulated;
  ++launches;
  driver->launch(queue.stream, [=] {
    in_double ? emulate_measure<double>(arguments, kGrid)
              : emulate_measure<float>(arguments, kGrid);
  });
}

void cuda_measure_direct(const CudaQueue& queue, int formats,
                         const MeasureArguments<DirectLine>& arguments) {
  using namespace emulated;
  ++launches;
  driver->launch(queue.stream, [=] { emulate_direct_measure(formats, arguments, kGrid); });
}

void cuda_accumulate(const CudaQueue& queue, bool in_double, const DeviceLine& line) {
  using namespace emulated;
  ++launches;
  driver->launch(queue.stream, [=] {
    in_double ? emulate_accumulate<double>(line, kGrid) : emulate_accumulate<float>(line, kGrid);
  });
}

}  // namespace fusedopt

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulated_set_driver(const FakeDriver* driver) { fusedopt::emulated::driver = driver; }

EXPORT int64_t emulated_launches() { return fusedopt::emulated::launches; }

EXPORT int64_t emulated_uploads() { return fusedopt::emulated::uploads; }
