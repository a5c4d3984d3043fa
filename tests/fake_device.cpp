// A fake accelerator for tests: torch's PrivateUse1 backend with two devices. The operators run on
// the CPU; what is real is the rest, such as memory that the host cannot touch while tests say so
// (fake_device_shut), a count of the waits for the device, and graphs with memory of their own.
// fake_device.py builds and registers it.
#define AT_PER_OPERATOR_HEADERS
#include "fake_device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceGuard.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t(1) << 30;  // of address space; each device has its own part
constexpr size_t kSmallestBlock = 512;
constexpr int kGarbage = 0xFF;  // NaN in every floating-point type

std::atomic<int64_t> synchronizations = 0;
std::atomic<int64_t> fallbacks = 0;
thread_local bool in_fallback = false;
thread_local c10::DeviceIndex current_device = 0;

constexpr c10::StreamId kOutsideGraphs = 1;  // a stream of each device; 0 is the default one
thread_local c10::StreamId current_stream[kDevices] = {};
thread_local bool allowed_in_capture = false;

char* arena() {
  static char* const memory = [] {
    void* mapped = mmap(nullptr, kDevices * kDeviceBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "no address space for the fake device");
    madvise(mapped, kDevices * kDeviceBytes, MADV_HUGEPAGE);  // mprotect() visits every used page
    return static_cast<char*>(mapped);
  }();
  return memory;
}

std::mutex counting;
int inside = 0;  // kernels and copies that run
int shut = 0;    // calls that keep the host out, of all threads

// The host's access follows from both counts. To keep it out always would make each of torch's
// operators pay for that.
void count(int& calls, int by) {
  const std::lock_guard<std::mutex> lock(counting);
  const auto open = [] { return inside > 0 || shut == 0; };
  const bool was_open = open();
  calls += by;
  if (open() == was_open) return;
  const int protection = open() ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (mprotect(arena(), kDevices * kDeviceBytes, protection) != 0) std::abort();
}

}  // namespace

// In between, the host cannot touch the memory of the devices. May be nested, also by threads.
extern "C" void fake_device_shut() { count(shut, 1); }
extern "C" void fake_device_open() { count(shut, -1); }

namespace {

// Around all that a kernel or a copy would do on the device. May be nested.
struct OnDevice {
  OnDevice() { count(inside, 1); }
  ~OnDevice() { count(inside, -1); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

c10::Device fake(c10::DeviceIndex index) { return {c10::DeviceType::PrivateUse1, index}; }

// Unused blocks of one device, by size: the ordinary ones or, with `home`, those of graphs. When
// these graphs and all that is in use of it are gone, its blocks are ordinary ones again.
struct Pool {
  explicit Pool(Pool* home = nullptr) : home(home) {}
  Pool(const Pool&) = delete;
  ~Pool();

  Pool* home;
  std::map<size_t, std::vector<char*>> free;
};

using Pools = std::array<std::shared_ptr<Pool>, kDevices>;

// What is recorded from two streams, one of each device.
struct Graph {
  c10::StreamId stream = 0;
  Pools pools;
  std::vector<std::function<void()>> nodes;
  std::vector<std::pair<void (*)(void*), void*>> retained;
};

Graph* recorded = nullptr;

// The graph that a stream records.
Graph* recorded_by(c10::StreamId stream) {
  return recorded != nullptr && recorded->stream == stream ? recorded : nullptr;
}

Graph* recorded_now() { return recorded_by(current_stream[current_device]); }

// For what a graph cannot hold.
void check_not_recorded() {
  TORCH_CHECK(recorded_now() == nullptr, "operation not permitted when stream is capturing");
}

// Blocks of powers of two, which are used again and never merged. Unused ones hold garbage. What is
// allocated for a stream that records a graph comes from the graph's own pool, as its replays
// write there.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device = fake(current_device);
    if (bytes == 0) return {nullptr, device};
    size_t size = kSmallestBlock;
    while (size < bytes) size *= 2;
    const Graph* const graph = recorded_now();
    TORCH_CHECK(graph != nullptr || recorded == nullptr || allowed_in_capture,
                "operation not permitted when stream is capturing");
    auto* block =
        new Block{{}, size, graph ? graph->pools[device.index()] : ordinary(device.index())};
    block->data = take(device.index(), block->pool.get(), size);
    return {block->data, block, [](void* b) { give_back(static_cast<Block*>(b)); }, device};
  }

  static std::shared_ptr<Pool>& ordinary(c10::DeviceIndex device) {
    // Never destroyed, as the last tensors die very late.
    static auto* const pools = new Pools{std::make_shared<Pool>(), std::make_shared<Pool>()};
    return (*pools)[device];
  }

  static inline std::mutex mutex;  // of the pools

  void copy_data(void* dst, const void* src, size_t bytes) const override {
    const OnDevice on_device;
    default_copy_data(dst, src, bytes);
  }

 private:
  struct Block {
    char* data;
    size_t size;
    std::shared_ptr<Pool> pool;
  };

  static char* take(c10::DeviceIndex device, Pool* pool, size_t size) {
    static size_t used[kDevices] = {};
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<char*>& free = pool->free[size];
    if (free.empty()) {
      TORCH_CHECK_WITH(OutOfMemoryError, size <= kDeviceBytes - used[device], "out of memory");
      free.push_back(arena() + device * kDeviceBytes + used[device]);
      used[device] += size;
      fill(free.back(), size);
    }
    char* data = free.back();
    free.pop_back();
    return data;
  }

  static void give_back(Block* block) {
    fill(block->data, block->size);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      block->pool->free[block->size].push_back(block->data);
    }
    delete block;
  }

  static void fill(char* data, size_t size) {
    const OnDevice on_device;
    std::memset(data, kGarbage, size);
  }
};

Pool::~Pool() {
  const std::lock_guard<std::mutex> lock(Allocator::mutex);
  for (auto& [size, blocks] : free) {
    std::vector<char*>& to = home->free[size];
    to.insert(to.end(), blocks.begin(), blocks.end());
  }
}

Allocator& allocator = *new Allocator;

void* handle_of(c10::DeviceIndex device, c10::StreamId stream) {
  return reinterpret_cast<void*>(uintptr_t(1 + device + kDevices * stream));
}

c10::StreamId stream_of(uintptr_t handle) { return c10::StreamId(handle - 1) / kDevices; }

Graph* recorded_by(void* handle) {
  return recorded_by(stream_of(reinterpret_cast<uintptr_t>(handle)));
}

const FakeDriver driver = {
    [](void* stream, std::function<void()> work) {
      if (Graph* const graph = recorded_by(stream)) {
        graph->nodes.push_back(std::move(work));
        return;
      }
      const OnDevice on_device;
      work();
    },
    [](void* stream) { return recorded_by(stream) == nullptr ? 0 : uint64_t(recorded->stream); },
    [](void* stream, void (*release)(void*), void* what) {
      recorded_by(stream)->retained.push_back({release, what});
    },
    [](int device) { return handle_of(c10::DeviceIndex(device), kOutsideGraphs); },
    [](bool allow) { return std::exchange(allowed_in_capture, allow); },
};

// Streams are told from each other; but they, and events, have nothing to wait for: what is started
// has happened.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return fake(current_device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device previous = getDevice();
    setDevice(device);
    return previous;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "there is no device ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream[index_of(device)]);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream previous = getStream(stream.device());
    current_stream[index_of(stream.device())] = stream.id();
    return previous;
  }
  // Not marked as an override, which it is from torch 2.11 on.
  virtual void* getStreamNativeHandle(c10::Stream stream) const {
    return handle_of(stream.device_index(), stream.id());
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override { ++synchronizations; }

 private:
  static int index_of(c10::Device device) {
    return device.has_index() ? device.index() : current_device;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// One of the CPU, as which it goes to the operators that run there.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) { be(fake(index < 0 ? current_device : index)); }
  void be(c10::Device device) { device_ = device; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const OnDevice on_device;
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(*device);
  return at::detail::empty_generic(size, &allocator, keys(), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(*device);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys(),
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat> format) {
  const OnDevice on_device;
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  const OnDevice on_device;
  const c10::DeviceGuard guard(source.device());
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

// The same memory as a tensor of the CPU, without holding it.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  at::Tensor host = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                                  tensor.options().device(at::kCPU));
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return host;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  const bool waits = dst.is_cpu() || (self.is_cpu() && !non_blocking);
  const auto copy = [to = on_host(dst), from = on_host(self)] { to.copy_(from); };
  if (!in_fallback) {
    if (waits) ++synchronizations, check_not_recorded();
    if (Graph* const graph = recorded_now()) graph->nodes.push_back(copy);
  }
  const OnDevice on_device;
  copy();
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  resize_(dst, self.sizes(), std::nullopt);
  return copy_from(self, dst, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  if (!in_fallback) ++synchronizations, check_not_recorded();
  const OnDevice on_device;
  return on_host(self).item();
}

// An operator's arguments or results, of which those on a device are its memory only.
torch::jit::Stack on_host(at::ArrayRef<c10::IValue> values) {
  torch::jit::Stack result;
  for (const c10::IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) {
      result.emplace_back(on_host(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(on_host(tensor));
      result.emplace_back(std::move(list));
    } else {
      TORCH_CHECK(!value.isDevice() && !value.isOptionalTensorList(), "cannot be recorded");
      result.push_back(value);
    }
  }
  return result;
}

// Does an operator again, on the same memory.
void repeat(const c10::OperatorHandle& op, torch::jit::Stack stack,
            const torch::jit::Stack& results) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  op.callBoxed(&stack);
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].isTensor()) continue;
    const at::Tensor& to = results[i].toTensor();
    if (to.defined() && to.data_ptr() != stack[i].toTensor().data_ptr())
      to.copy_(stack[i].toTensor());
  }
}

// All other operators. Their own copies to the CPU stand for a kernel that reads in place. But one
// whose result the host must know in order to go on waits for the device.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  struct Scope {
    const bool outer = std::exchange(in_fallback, true);
    at::Generator generator;
    c10::Device device = at::kCPU;
    ~Scope() {
      in_fallback = outer;
      if (generator.defined()) generator.get<Generator>()->be(device);
    }
  };
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape)) {
    ++synchronizations;
    check_not_recorded();
  }
  ++fallbacks;
  Graph* const graph = in_fallback ? nullptr : recorded_now();
  const c10::FunctionSchema& schema = op.schema();
  torch::jit::Stack arguments;
  if (graph != nullptr) arguments = on_host(torch::jit::last(*stack, schema.arguments().size()));
  {
    Scope scope;
    for (const c10::IValue& argument : torch::jit::last(*stack, schema.arguments().size())) {
      if (!argument.isGenerator()) continue;
      const at::Generator generator = argument.toGenerator();
      TORCH_CHECK(generator.device().is_privateuseone(), "a generator of the device ",
                  generator.device(), " for a fake one, which CUDA would refuse");
      scope.generator = generator;
      scope.device = generator.device();
      generator.get<Generator>()->be(at::kCPU);
    }
    at::native::cpu_fallback(op, stack, true);
  }
  if (graph == nullptr) return;
  torch::jit::Stack results = on_host(torch::jit::last(*stack, schema.returns().size()));
  graph->nodes.push_back([op, arguments = std::move(arguments), results = std::move(results)] {
    repeat(op, arguments, results);
  });
}

// As torch.cuda.CUDAGraph; but what is recorded is also done, except for launches.
class RecordedGraph {
 public:
  void begin(const RecordedGraph* share) {
    static c10::StreamId last = kOutsideGraphs;
    TORCH_CHECK(recorded == nullptr, "another graph is being recorded");
    for (c10::DeviceIndex i = 0; i < kDevices; ++i) {
      graph_.pools[i] = share != nullptr ? share->graph_.pools[i]
                                         : std::make_shared<Pool>(Allocator::ordinary(i).get());
    }
    graph_.stream = ++last;
    recorded = &graph_;
    for (int i = 0; i < kDevices; ++i) before_[i] = std::exchange(current_stream[i], last);
  }

  void end() {
    recorded = nullptr;
    for (int i = 0; i < kDevices; ++i) current_stream[i] = before_[i];
  }

  void replay() const {
    const OnDevice on_device;
    for (const auto& node : graph_.nodes) node();
  }

  size_t nodes() const { return graph_.nodes.size(); }

  ~RecordedGraph() {
    std::thread([this] {
      for (const auto& [release, what] : graph_.retained) release(what);
    }).join();
  }

 private:
  Graph graph_;
  c10::StreamId before_[kDevices] = {};
};

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  // These touch no memory.
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("set_.source_Storage", &at::native::set_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("unfold", &at::native::unfold);
  m.impl("view", &at::native::view);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("view_as_real", &at::native::view_as_real);
}

// on_host() keeps these lazy bits. (The fallback for them would resolve them by _copy_from again.)
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::DeviceType::PrivateUse1, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("driver_address", [] { return reinterpret_cast<uintptr_t>(&driver); });
  m.def("stream_id", &stream_of);
  m.def("shut_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_shut); });
  m.def("open_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_open); });
  pybind11::class_<RecordedGraph>(m, "Graph")
      .def(pybind11::init<>())
      .def("begin", &RecordedGraph::begin)
      .def("end", &RecordedGraph::end)
      .def("replay", &RecordedGraph::replay)
      .def("nodes", &RecordedGraph::nodes);
  m.def("synchronizations", [] { return synchronizations.load(); });
  m.def("fallbacks", [] { return fallbacks.load(); });
}
