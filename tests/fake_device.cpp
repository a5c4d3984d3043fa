// A fake accelerator for tests: torch's PrivateUse1 backend with two devices. The operators run on
// the CPU; what is real is the rest, such as memory that the host cannot touch while tests say so
// (fake_device_shut), and a count of the waits for the device. fake_device.py builds and
// registers it.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceGuard.h>
#include <ATen/EmptyTensor.h>
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

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
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
bool keeps = false;  // what is allocated is never used again, as a graph may

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

// Around all that a kernel or a copy would do on the device. May be nested.
extern "C" void fake_device_enter() { count(inside, 1); }
extern "C" void fake_device_leave() { count(inside, -1); }

// In between, the host cannot touch the memory of the devices. May be nested, also by threads.
extern "C" void fake_device_shut() { count(shut, 1); }
extern "C" void fake_device_open() { count(shut, -1); }

namespace {

struct OnDevice {
  OnDevice() { fake_device_enter(); }
  ~OnDevice() { fake_device_leave(); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

c10::Device fake(c10::DeviceIndex index) { return {c10::DeviceType::PrivateUse1, index}; }

// Blocks of powers of two, which are used again and never merged. Unused ones hold garbage.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device = fake(current_device);
    if (bytes == 0) return {nullptr, device};
    size_t size = kSmallestBlock;
    while (size < bytes) size *= 2;
    auto* block = new Block{take(device.index(), size), size, device.index(), keeps};
    return {block->data, block, [](void* b) { give_back(static_cast<Block*>(b)); }, device};
  }

  void copy_data(void* dst, const void* src, size_t bytes) const override {
    const OnDevice on_device;
    default_copy_data(dst, src, bytes);
  }

 private:
  struct Block {
    char* data;
    size_t size;
    c10::DeviceIndex device;
    bool kept;
  };

  struct Memory {
    size_t used = 0;
    std::map<size_t, std::vector<char*>> free;  // by size
  };

  static char* take(c10::DeviceIndex device, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Memory& memory = memory_[device];
    std::vector<char*>& free = memory.free[size];
    if (free.empty()) {
      TORCH_CHECK_WITH(OutOfMemoryError, size <= kDeviceBytes - memory.used, "out of memory");
      free.push_back(arena() + device * kDeviceBytes + memory.used);
      memory.used += size;
      fill(free.back(), size);
    }
    char* data = free.back();
    free.pop_back();
    return data;
  }

  static void give_back(Block* block) {
    fill(block->data, block->size);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!block->kept) memory_[block->device].free[block->size].push_back(block->data);
    delete block;
  }

  static void fill(char* data, size_t size) {
    const OnDevice on_device;
    std::memset(data, kGarbage, size);
  }

  static std::mutex mutex_;
  static Memory* const memory_;  // of each device; never freed, as the last tensors die very late
};

std::mutex Allocator::mutex_;
Allocator::Memory* const Allocator::memory_ = new Memory[kDevices];
Allocator& allocator = *new Allocator;

// Each device has one stream, whose handle is told from the other's. Events have nothing to wait
// for: what is started has happened.
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
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  // Not marked as an override, which it is from torch 2.11 on.
  virtual void* getStreamNativeHandle(c10::Stream stream) const {
    return reinterpret_cast<void*>(uintptr_t(1 + stream.device_index()));
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override { ++synchronizations; }
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

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  at::Tensor host = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                                  tensor.options().device(at::kCPU));
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return host;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  const bool waits = dst.is_cpu() || (self.is_cpu() && !non_blocking);
  if (waits && !in_fallback) ++synchronizations;
  const OnDevice on_device;
  on_host(dst).copy_(on_host(self));
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  resize_(dst, self.sizes(), std::nullopt);
  return copy_from(self, dst, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  if (!in_fallback) ++synchronizations;
  const OnDevice on_device;
  return on_host(self).item();
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
  }
  ++fallbacks;
  Scope scope;
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
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
  m.def("enter_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_enter); });
  m.def("leave_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_leave); });
  m.def("shut_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_shut); });
  m.def("open_address", [] { return reinterpret_cast<uintptr_t>(&fake_device_open); });
  m.def("keep", [](bool keep) { keeps = keep; });
  m.def("synchronizations", [] { return synchronizations.load(); });
  m.def("fallbacks", [] { return fallbacks.load(); });
}
