// Tests of the C++ core without Python: every rule, stage and storage format on every instruction
// set, data type, tail, layout and number of threads, on heap blocks of exactly the right size, so
// that a sanitizer sees any step outside. Prints what failed, or a count of the checks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu.h"
#include "cuda_formats.h"
#include "emulated_gpu.h"
#include "layout.h"
#include "norm.h"
#include "overlap.h"
#include "plan.h"
#include "quantize.h"
#include "random.h"
#include "store.h"

using namespace fusedopt;

namespace {

int checks = 0;
int failures = 0;

void check(bool ok, const char* what, int a = 0, int b = 0, int64_t c = 0) {
  ++checks;
  if (ok) return;
  if (++failures < 20) std::printf("failed: %s (%d, %d, %lld)\n", what, a, b, (long long)c);
}

struct Isa {
  const char* name;
  const Kernels* kernels;
};

std::vector<Isa> isas() {
  std::vector<Isa> list = {{"base", &base::kKernels}};
#ifdef FUSEDOPT_X86
  if (std::strstr(cpu_isas(), "avx2")) {
    list.push_back({"avx2", &avx2::kKernels});
    list.push_back({"emulated GPU", &emulated::kKernels});
    list.push_back({"emulated GPU, general", &emulated::kGeneralKernels});
  }
  if (std::strstr(cpu_isas(), "avx512")) list.push_back({"avx512", &avx512::kKernels});
#endif
  return list;
}

constexpr int kRules = 9;
constexpr int64_t kRowGap = 5;
constexpr int kStream = 9;  // + the number of states: the rule that only adds the gradient

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What a parameter owns. Models of plain steps end before kHidden.
enum Slot {
  kParam,
  kGrad,
  kState,
  kHidden = kState + kMaxStates,
  kEma,
  kGradSum,
  kScale,
  kSlots = kScale + kMaxStates
};

// A tensor in its own heap block; with a stride, garbage lies between the elements. With `row`,
// it has two dimensions, and some more between rows of that many.
struct Tensor {
  DType dtype;
  int64_t numel, stride, row, item;
  std::unique_ptr<char[]> block;
  Layout layout;

  Tensor(DType dtype, int64_t numel, int64_t stride, int64_t row = 0)
      : dtype(dtype), numel(numel), stride(stride), row(row), item(item_size(dtype)) {
    block = std::make_unique<char[]>(bytes());
    std::memset(block.get(), 0x5a, bytes());
    layout.ndim = row > 0 ? 2 : 1;
    layout.size[0] = row > 0 ? (numel + row - 1) / row : numel;
    layout.stride[0] = row > 0 ? row * stride + kRowGap : stride;
    layout.size[1] = row;
    layout.stride[1] = stride;
  }
  Tensor(const Tensor& other) : Tensor(other.dtype, other.numel, other.stride, other.row) {
    std::memcpy(block.get(), other.block.get(), bytes());
  }
  Tensor(Tensor&&) = default;
  Tensor& operator=(const Tensor& other) { return *this = Tensor(other); }
  Tensor& operator=(Tensor&&) = default;

  size_t bytes() const { return numel == 0 ? 0 : (offset(numel - 1) + 1) * item; }
  char* at(int64_t i) const { return block.get() + offset(i) * item; }
  template <class T>
  T& as(int64_t i) const {
    return *reinterpret_cast<T*>(at(i));
  }

  void set(int64_t i, double value) {
    switch (dtype) {
      case DType::kFloat32: return base::store(value, *reinterpret_cast<float*>(at(i)));
      case DType::kFloat64: return base::store(value, *reinterpret_cast<double*>(at(i)));
      case DType::kBFloat16: return base::store(value, *reinterpret_cast<base::BFloat16*>(at(i)));
      case DType::kFloat16: return base::store(value, *reinterpret_cast<base::Float16*>(at(i)));
      default: std::abort();
    }
  }
  double get(int64_t i) const {
    switch (dtype) {
      case DType::kFloat32: return base::load<double>(*reinterpret_cast<float*>(at(i)));
      case DType::kFloat64: return base::load<double>(*reinterpret_cast<double*>(at(i)));
      case DType::kBFloat16: return base::load<double>(*reinterpret_cast<base::BFloat16*>(at(i)));
      case DType::kFloat16: return base::load<double>(*reinterpret_cast<base::Float16*>(at(i)));
      default: std::abort();
    }
  }
  int64_t offset(int64_t i) const { return i * stride + (row > 0 ? i / row * kRowGap : 0); }
  Operand operand() const { return {block.get(), dtype, stride == 1 ? nullptr : &layout}; }
};

// A few parameters with what belongs to them.
using Model = std::vector<std::vector<Tensor>>;

Model make_model(const std::vector<int64_t>& sizes, DType param, DType state, int64_t stride) {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  Model model;
  for (int64_t n : sizes) {
    std::vector<Tensor> tensors;
    for (int k = 0; k < kHidden; ++k) {
      tensors.emplace_back(k < 2 ? param : state, n, k == 1 ? 1 : stride);
      for (int64_t i = 0; i < n; ++i) {
        const double x = normal(random);
        // Second moments are positive, and larger than a squared mean.
        tensors.back().set(i, k < 2 ? x : k == 2 ? 2 + x * x : 0.3 + 0.05 * x * x);
      }
    }
    model.push_back(std::move(tensors));
  }
  return model;
}

// What a step does: the rule, and the stages and extras.
struct Setup {
  DType param = DType::kFloat32, grad = DType::kFloat32, state = DType::kFloat32;
  DType ema = DType::kFloat32, grad_sum = DType::kFloat32;
  WeightPrecision precision = WeightPrecision::kNearest;
  bool random_state = false;
  bool averages = false;
  bool accumulated = false;
  bool grad_sums = false;     // there is room for them
  bool no_gradients = false;  // only accumulated ones
  Group group;
  Stages stages;
  double step = 3;
  uint64_t seed = 5;

  explicit Setup(int rule = 0, DType all = DType::kFloat32) : param(all), grad(all), state(all) {
    group.rule = rule;
    const double hyper[kMaxHypers] = {0.01, 0.9, 0.1, 1e-6, 0.5, 0};
    std::copy(hyper, hyper + kMaxHypers, group.hyper);
  }
  bool has_extras() const {
    return precision != WeightPrecision::kNearest || averages || accumulated || grad_sums ||
           coded() || random_state;
  }
  bool coded() const { return state == DType::kUInt8; }
  DType hidden() const {
    return precision == WeightPrecision::kMaster ? DType::kFloat32 : DType::kInt16;
  }
  bool square(int k) const { return group.rule < 2 ? k > 0 : group.rule >= 4 && k == 0; }
  // Units in the last place of a weight, with room for what FMA changes.
  double tolerance() const {
    return param == DType::kFloat64 && state == param ? 1e-14
           : param == DType::kBFloat16                ? 1e-2
           : param == DType::kFloat16                 ? 1e-3
                                                      : 1e-5;
  }
};

// The plan of a step on a model.
class Step {
 public:
  Step(const Model& model, const Setup& setup)
      : group_(setup.group), extras_(model.size()), tasks_(model.size()) {
    for (size_t i = 0; i < model.size(); ++i) {
      Task& task = tasks_[i];
      task.param = model[i][kParam].operand();
      if (!setup.no_gradients) task.grad = model[i][kGrad].operand();
      for (int k = 0; k < kMaxStates; ++k) task.state[k] = model[i][kState + k].operand();
      task.numel = model[i][kParam].numel;
      // Most share a rule with their neighbours.
      task.step = setup.step + double(i / 3 % 2);
      task.first = i % 5 == 4;
      if (setup.has_extras()) {
        Extras& extras = extras_[i];
        extras.precision = setup.precision;
        extras.hidden = model[i][kHidden].operand();
        if (setup.averages) extras.ema = model[i][kEma].operand();
        if (setup.accumulated || setup.grad_sums) extras.grad_sum = model[i][kGradSum].operand();
        extras.accumulated = setup.accumulated;
        for (int k = 0; k < kMaxStates; ++k) {
          extras.scale[k] = reinterpret_cast<float*>(model[i][kScale + k].block.get());
          extras.square[k] = setup.square(k);
        }
        extras.random_state = setup.random_state;
        extras.seed = setup.seed + i;
        task.extras = &extras;
      }
      pointers_.push_back(&task);
      begin_.push_back(begin_.back() + task.numel + kTaskOverhead);
    }
    plan_ = {&group_, pointers_.data(), int64_t(tasks_.size()), begin_.data(), setup.stages};
  }
  Step(const Step&) = delete;

  const Plan& plan() const { return plan_; }
  const Task& task(size_t i) const { return tasks_[i]; }

  // Calls f(first task, begin, end) for the stretches of the work line between the cuts.
  template <class F>
  void for_cuts(const std::vector<int64_t>& cuts, F&& f) const {
    for (size_t k = 0; k + 1 < cuts.size(); ++k) {
      int64_t first = 0;
      while (begin_[first + 1] <= cuts[k]) ++first;
      f(first, cuts[k], cuts[k + 1]);
    }
  }
  template <class F>
  void for_parts(int parts, F&& f) const {
    std::vector<int64_t> cuts;
    for (int part = 0; part <= parts; ++part) cuts.push_back(begin_.back() * part / parts);
    for_cuts(cuts, f);
  }
  void update(const Kernels* kernels, int parts = 1) const {
    for_parts(parts, [&](int64_t first, int64_t from, int64_t to) {
      kernels->update(plan_, first, from, to);
    });
  }

 private:
  Group group_;
  std::vector<Extras> extras_;
  std::vector<Task> tasks_;
  std::vector<const Task*> pointers_;
  std::vector<int64_t> begin_ = {0};
  Plan plan_;
};

void update(const Model& model, int rule, double multiplier, int parts, const Kernels* kernels) {
  Setup setup(rule);
  setup.group.sign = multiplier < 0 ? -1 : 1;
  setup.stages.grad_multiplier = std::fabs(multiplier);
  const Step step(model, setup);
  if (kernels == nullptr) return cpu_update(step.plan(), parts, false);
  step.update(kernels, parts);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.block.get(), b.block.get(), a.bytes()) == 0;
}

bool same_bits(const Model& a, const Model& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t k = 0; k < a[i].size(); ++k) {
      if (!same_bits(a[i][k], b[i][k])) return false;
    }
  }
  return true;
}

// The values agree to `tolerance`, relative to one. (Hidden parts change their sign with the way
// that a weight is rounded.)
bool close(const Model& a, const Model& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t k = 0; k < a[i].size() && k < kScale; ++k) {
      if (k == kHidden && a[i][k].dtype != DType::kFloat32) continue;
      for (int64_t j = 0; is_float(a[i][k].dtype) && j < a[i][k].numel; ++j) {
        const double x = a[i][k].get(j), y = b[i][k].get(j);
        if (!(std::fabs(x - y) <= tolerance * (1 + std::fabs(y)))) return false;
      }
    }
  }
  return true;
}

void check_gaps(const Model& model, int a = 0, int b = 0) {
  for (const auto& tensors : model) {
    for (const Tensor& tensor : tensors) {
      int64_t touched = 0;
      for (int64_t i = 0; tensor.stride > 1 && i + 1 < tensor.numel; ++i) {
        const char* const next = tensor.at(i + 1);
        for (char* gap = tensor.at(i) + tensor.item; gap < next; ++gap) {
          touched += *gap != 0x5a;
        }
      }
      check(touched == 0, "the gaps are untouched", a, b, touched);
    }
  }
}

void test_kernels() {
  const std::vector<int64_t> sizes = {0, 1, 3, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1100};
  for (int rule = 0; rule < kRules; ++rule) {
    for (DType param : kFloats) {
      for (DType state : {param, DType::kFloat32}) {
        for (double multiplier : {1.0, -0.5}) {
          const Model start = make_model(sizes, param, state, 1);
          Model reference = start;
          update(reference, rule, multiplier, 1, &base::kKernels);
          check(!same_bits(start, reference), "the kernel does something", rule, int(param));
          const Model* fused = nullptr;
          std::vector<Model> results;
          results.reserve(4);
          for (const Isa& isa : isas()) {
            for (int parts : {1, 2, 7}) {
              Model model = start;
              update(model, rule, multiplier, parts, isa.kernels);
              if (isa.kernels == &base::kKernels) {
                check(same_bits(model, reference), "any number of parts", rule, int(param), parts);
                continue;
              }
              // One rounding where base has two: half a unit of the coarser format, at most.
              const double unit = param == DType::kFloat64 && state == param ? 1e-14
                                  : param == DType::kBFloat16                ? 1e-2
                                  : param == DType::kFloat16                 ? 1e-3
                                                                             : 1e-5;
              check(close(model, reference, unit), isa.name, rule, int(param), parts);
              if (fused == nullptr) {
                results.push_back(model);
                fused = &results.back();
              }
              check(same_bits(model, *fused), "avx2 and avx512 agree", rule, int(param), parts);
            }
          }
          // With gaps between the elements: the same values, and the gaps untouched.
          Model strided = make_model(sizes, param, state, 3);
          update(strided, rule, multiplier, 2, &base::kKernels);
          check(close(strided, reference, 0), "strided", rule, int(param));
          check_gaps(strided, rule, int(param));
        }
      }
    }
  }
}

void test_threads() {
  const std::vector<int64_t> sizes = {100000, 3, 0, 70001, 1};
  const Model start = make_model(sizes, DType::kFloat32, DType::kFloat32, 1);
  Model reference = start;
  update(reference, 0, 1, 1, nullptr);
  for (int threads : {2, 3, 8}) {
    Model model = start;
    update(model, 0, 1, threads, nullptr);
    check(same_bits(model, reference), "any number of threads", threads);
  }
}

void test_half() {
#ifdef __FLT16_MAX__
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const base::Float16 half{uint16_t(bits)};
    _Float16 native;
    std::memcpy(&native, &half, 2);
    const float wide = base::widen(half);
    check(wide == float(native) || (wide != wide && native != native), "widen", int(bits));
    // The value itself, its neighbours in float, and the ties between halves.
    uint32_t word;
    std::memcpy(&word, &wide, 4);
    for (int delta : {-4097, -4096, -4095, -1, 0, 1, 4095, 4096, 4097}) {
      const uint32_t near = word + delta;
      float x;
      std::memcpy(&x, &near, 4);
      const base::Float16 mine = base::narrow(x, base::Float16{});
      const _Float16 theirs = _Float16(x);
      check(x != x ? base::widen(mine) != base::widen(mine) : !std::memcmp(&mine, &theirs, 2),
            "narrow to float16", int(bits), delta);
    }
  }
#endif
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = base::widen(base::BFloat16{uint16_t(bits)});
    if (x != x) continue;
    check(base::narrow(x, base::BFloat16{}).bits == bits, "bfloat16 round trip", int(bits));
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if ((bits & 0x7f80) == 0x7f80) continue;
    const auto rounded = [&](uint32_t low) {
      const uint32_t near = word | low;
      float y;
      std::memcpy(&y, &near, 4);
      return base::narrow(y, base::BFloat16{}).bits;
    };
    check(rounded(0x7fff) == bits, "bfloat16 rounds down", int(bits));
    check(rounded(0x8001) == bits + 1, "bfloat16 rounds up", int(bits));
    check(rounded(0x8000) == bits + (bits & 1), "bfloat16 ties go to even", int(bits));
  }
  const float nan = std::nanf("");
  check(base::narrow(nan, base::BFloat16{}).bits == 0x7fc0, "bfloat16 nan");
  check((base::narrow(nan, base::Float16{}).bits & 0x7fff) == 0x7e00, "float16 nan");
}

void test_layout() {
  const int64_t size[] = {2, 3, 4};
  const int64_t rows[] = {12, 4, 1}, turned[] = {1, 2, 6}, gaps[] = {24, 8, 2}, flat[] = {0, 4, 1};
  const auto view = [&](const int64_t* stride) {
    return View{nullptr, kHost, DType::kFloat32, false, 3, size, stride};
  };
  check(is_row_major(view(rows)) && is_row_major(view(nullptr)), "row-major");
  check(!is_row_major(view(turned)), "not row-major");
  check(never_overlaps(view(rows)) && never_overlaps(view(turned)) && never_overlaps(view(gaps)),
        "no overlap");
  check(!never_overlaps(view(flat)), "a stride of zero overlaps");
  Layout layout;
  check(!describe(view(rows), memory_order(view(rows)), &layout), "rows are plain");
  check(!describe(view(turned), memory_order(view(turned)), &layout), "turned ones, too");
  check(describe(view(gaps), memory_order(view(gaps)), &layout) && layout.ndim == 1 &&
            layout.size[0] == 24 && layout.stride[0] == 2,
        "gaps fold into one dimension");
  check(describe(view(rows), memory_order(view(turned)), &layout) && layout.ndim == 3,
        "rows in another's order");
  check(describe(view(flat), memory_order(view(rows)), &layout) && layout.stride[0] == 0,
        "an expanded gradient");
  View complex = view(turned);
  complex.complex = true;
  check(!describe(complex, memory_order(complex), &layout), "complex is plain");
  check(describe(complex, memory_order(view(rows)), &layout) && layout.size[layout.ndim - 1] == 2,
        "complex in another order keeps its pairs");
}

void test_overlap() {
  const char memory[100] = {};
  Overlaps overlaps;
  overlaps.add(memory, 10, 0);
  overlaps.add(memory + 10, 10, 1);
  overlaps.find(3);
  check(!overlaps.any(), "neighbours do not overlap");
  overlaps.add(memory + 15, 50, 2);
  overlaps.find(3);
  check(overlaps.any() && !overlaps.has(0) && overlaps.has(1) && overlaps.has(2), "overlap");
  overlaps.clear();
  overlaps.add(memory, 100, 0);
  overlaps.add(memory + 10, 1, 1);
  overlaps.add(memory + 50, 1, 2);
  overlaps.find(3);
  check(overlaps.has(0) && overlaps.has(1) && overlaps.has(2), "one within another");
  overlaps.clear();
  overlaps.add(memory, 0, 0);
  overlaps.find(3);
  check(!overlaps.any(), "empty tensors do not overlap");
}

}  // namespace

#include "core_stages_test.cpp"

// After the stages, whose models it uses.
#include "core_gpu_test.cpp"

int main() {
  test_kernels();
  test_threads();
  test_half();
  test_layout();
  test_overlap();
  test_stages<float>(DType::kFloat32);
  test_stages<double>(DType::kFloat64);
  test_formulas<float>(DType::kFloat32);
  test_formulas<double>(DType::kFloat64);
  test_special_gradients();
  test_extras();
  test_threads_with_stages();
  test_split_and_join();
  test_hidden_weights_train_like_floats();
  test_remainder_is_master();
  test_overwritten_weights();
  test_random_bits();
  test_bits_again();
  test_random_rounding();
  test_stochastic_weights();
  test_codes();
  test_coded_states();
  test_random_states(DType::kUInt8);
  test_random_states(DType::kBFloat16);
  test_norm();
  test_nonfinite();
  test_accumulate();
  test_gpu();
  std::printf("%d passed, %d failed (%s)\n", checks - failures, failures, cpu_isas());
  return failures != 0;
}
