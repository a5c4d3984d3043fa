// The bodies of the CUDA kernels on the CPU, lane by lane and warp by warp.
#include "emulated_gpu.h"

#include <algorithm>
#include <vector>

#include "cuda_table.h"
#include "emulated_warp.h"

namespace fusedopt::emulated {
namespace {

// A plan as it would lie in device memory.
class Image {
 public:
  Image(const Plan& plan, const Options& options)
      : table_({0, options.general ? nullptr : direct_formats, options.chunk_spans,
                options.chunk_spans}) {
    narrow_.assign(options.steps.begin(), options.steps.end());
    wide_.assign(options.steps.begin(), options.steps.end());
    counters_.resize(plan.n_tasks);
    for (size_t i = 0; i < options.steps.size(); ++i) {
      void* const wide = &wide_[i];
      counters_[i] = {options.narrow_steps ? &narrow_[i] : wide,
                      options.narrow_steps ? DType::kFloat32 : DType::kFloat64,
                      plan.tasks[i]->step - 1, int64_t(i)};
    }
    int32_t n_groups = 0;
    for (int64_t i = 0; i < plan.n_tasks; ++i) {
      n_groups = std::max(n_groups, plan.tasks[i]->group + 1);
    }
    if (options.lr != nullptr) rates_.assign(n_groups, {options.lr, options.lr_dtype});
    const size_t size = table_.lay_out(plan, counters_);
    memory_.resize(size + DeviceTable::kAlignment);
    char* image = memory_.data();
    image += DeviceTable::kAlignment - reinterpret_cast<uintptr_t>(image) % DeviceTable::kAlignment;
    table_.write_grads(plan, image);
    table_.write_groups(plan, rates_, image);
    table_.write_tasks(plan, counters_, image, image);
  }

  const std::vector<Launch>& launches() const { return table_.launches(); }

  std::vector<double> steps(const Options& options) const {
    return options.narrow_steps ? std::vector<double>(narrow_.begin(), narrow_.end()) : wide_;
  }

 private:
  DeviceTable table_;
  std::vector<char> memory_;
  std::vector<double> wide_;
  std::vector<float> narrow_;
  std::vector<DeviceCounter> counters_;
  std::vector<DeviceRate> rates_;
};

// The tasks that begin on a stretch of a plan's line.
struct Stretch {
  std::vector<const Task*> tasks;
  std::vector<int64_t> begin = {0};
  Plan plan;

  Stretch(const Plan& whole, int64_t from, int64_t to) {
    for (int64_t i = 0; i < whole.n_tasks; ++i) {
      if (whole.begin[i] < from || whole.begin[i] >= to) continue;
      tasks.push_back(whole.tasks[i]);
      begin.push_back(begin.back() + 1);
    }
    plan = {whole.groups, tasks.data(), int64_t(tasks.size()), begin.data(), whole.stages};
  }
};

template <bool kGeneral>
void update_range(const Plan& whole, int64_t, int64_t begin, int64_t end) {
  const Stretch stretch(whole, begin, end);
  Options options;
  options.general = kGeneral;
  options.stages.stages = whole.stages;
  options.stages.divisor = 1 / whole.stages.grad_multiplier;
  for (const Task* task : stretch.tasks) options.steps.push_back(task->step - 1);
  DeviceControl control = {};
  update(stretch.plan, &options, &control);
}

void accumulate_range(const Plan& whole, int64_t, int64_t begin, int64_t end) {
  const Stretch stretch(whole, begin, end);
  Options options;
  options.general = true;
  const Image image(stretch.plan, options);
  for (const Launch& launch : image.launches()) {
    const Grid grid = {options.n_warps, options.depth};
    launch.in_double ? emulate_accumulate<double>(launch.line, grid)
                     : emulate_accumulate<float>(launch.line, grid);
  }
}

}  // namespace

void measure(const Plan& plan, const Options& options, DeviceControl* control, double* grad_norm) {
  const Image image(plan, options);
  const Grid grid = {options.n_warps, options.depth};
  for (const Launch& launch : image.launches()) {
    std::vector<double> partial(options.n_warps);
    const bool first = &launch == &image.launches().front();
    const bool last = &launch == &image.launches().back();
    if (launch.formats != kAnyFormats) {
      emulate_direct_measure(
          launch.formats,
          {launch.direct, options.stages, control, partial.data(), grad_norm, first, last}, grid);
      continue;
    }
    const MeasureArguments<DeviceLine> arguments = {
        launch.line, options.stages, control, partial.data(), grad_norm, first, last};
    launch.in_double ? emulate_measure<double>(arguments, grid)
                     : emulate_measure<float>(arguments, grid);
  }
}

void update(const Plan& plan, Options* options, DeviceControl* control) {
  const Image image(plan, *options);
  const Grid grid = {options->n_warps, options->depth};
  for (const Launch& launch : image.launches()) {
    const bool last = &launch == &image.launches().back();
    if (launch.formats != kAnyFormats) {
      const UpdateArguments<DirectLine> arguments = {launch.direct, options->stages, control, last};
      select_rule<float>(launch.rule, EmulateDirectUpdate{launch.formats, arguments, grid});
      continue;
    }
    const UpdateArguments<DeviceLine> arguments = {launch.line, options->stages, control, last};
    if (launch.in_double) {
      select_rule_or_stream<double>(launch.rule, EmulateUpdate<double>{arguments, grid});
    } else {
      select_rule_or_stream<float>(launch.rule, EmulateUpdate<float>{arguments, grid});
    }
  }
  options->steps = image.steps(*options);
}

std::vector<int> formats_of_launches(const Plan& plan, const Options& options) {
  std::vector<int> formats;
  const Image image(plan, options);
  for (const Launch& launch : image.launches()) formats.push_back(launch.formats);
  return formats;
}

int count_direct_formats(int rule) { return direct_formats(rule); }

std::pair<float, bool> quick_root(float x) {
  const Quick root = square_root(Quick(x));
  return {root.value, root.exact};
}

std::pair<float, bool> quick_quotient(float a, float b) {
  const Quick quotient = Quick(a) / Quick(b);
  return {quotient.value, quotient.exact};
}

double sum_of_eight_squares(const float* g) {
  uint32_t largest = 0;
  for (int i = 0; i < 8; ++i) largest = std::max(largest, magnitude_bits(g[i]));
  return sum_of_squares<8>(g, largest);
}

template <bool kGeneral>
constexpr Kernels kernels() {
  return {update_range<kGeneral>,      avx2::kKernels.measure,      accumulate_range,
          avx2::kKernels.average,      avx2::kKernels.join_weights, avx2::kKernels.split_weights,
          avx2::kKernels.decode_state, avx2::kKernels.encode_state};
}

const Kernels kKernels = kernels<false>(), kGeneralKernels = kernels<true>();

}  // namespace fusedopt::emulated
