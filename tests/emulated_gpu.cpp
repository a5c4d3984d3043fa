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
  Image(const Plan& plan, const Options& options) : table_(0, options.chunk_spans) {
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

template <class T>
struct Update {
  const UpdateArguments& arguments;
  int64_t n_warps;
  int depth;

  template <class Rule>
  void run() const {
    for (int64_t i = 0; i < n_warps; ++i) {
      EmulatedWarp<LaneTile<T>> warp;
      WarpMemory<Rule, T> memory = {};
      EmulatedBuffers buffers(arguments.line.buffer_bytes, depth);
      update_warp<Rule, T>(arguments, warp, memory, buffers, i, n_warps);
    }
    for (int64_t thread = 0; thread < 7; ++thread) finish_update(arguments, thread, 7);
  }
};

void update_range(const Plan& whole, int64_t, int64_t begin, int64_t end) {
  const Stretch stretch(whole, begin, end);
  Options options;
  options.stages.stages = whole.stages;
  options.stages.divisor = 1 / whole.stages.grad_multiplier;
  for (const Task* task : stretch.tasks) options.steps.push_back(task->step - 1);
  DeviceControl control = {};
  update(stretch.plan, &options, &control);
}

void accumulate_range(const Plan& whole, int64_t, int64_t begin, int64_t end) {
  const Stretch stretch(whole, begin, end);
  const Options options;
  const Image image(stretch.plan, options);
  for (const Launch& launch : image.launches()) {
    for (int64_t i = 0; i < options.n_warps; ++i) {
      EmulatedBuffers buffers(launch.line.grad_bytes, options.depth);
      if (launch.in_double) {
        EmulatedWarp<LaneTile<double>> warp;
        accumulate_warp<double>(launch.line, warp, buffers, i, options.n_warps);
      } else {
        EmulatedWarp<LaneTile<float>> warp;
        accumulate_warp<float>(launch.line, warp, buffers, i, options.n_warps);
      }
    }
  }
}

}  // namespace

void measure(const Plan& plan, const Options& options, DeviceControl* control, double* grad_norm) {
  const Image image(plan, options);
  for (const Launch& launch : image.launches()) {
    std::vector<double> partial(options.n_warps);
    const MeasureArguments arguments = {launch.line,
                                        options.stages,
                                        control,
                                        partial.data(),
                                        grad_norm,
                                        &launch == &image.launches().front(),
                                        &launch == &image.launches().back()};
    EmulatedWarp<LaneNorm> warp;
    for (int64_t i = 0; i < options.n_warps; ++i) {
      EmulatedBuffers buffers(launch.line.grad_bytes, options.depth);
      if (launch.in_double) {
        measure_warp<double>(arguments, warp, buffers, i, options.n_warps);
      } else {
        measure_warp<float>(arguments, warp, buffers, i, options.n_warps);
      }
    }
    finish_measure(arguments, warp, options.n_warps);
  }
}

void update(const Plan& plan, Options* options, DeviceControl* control) {
  const Image image(plan, *options);
  for (const Launch& launch : image.launches()) {
    const bool last = &launch == &image.launches().back();
    const UpdateArguments arguments = {launch.line, options->stages, control, last};
    if (launch.in_double) {
      select_rule_or_stream<double>(launch.rule,
                                    Update<double>{arguments, options->n_warps, options->depth});
    } else {
      select_rule_or_stream<float>(launch.rule,
                                   Update<float>{arguments, options->n_warps, options->depth});
    }
  }
  options->steps = image.steps(*options);
}

const Kernels kKernels = {update_range,
                          avx2::kKernels.measure,
                          accumulate_range,
                          avx2::kKernels.join_weights,
                          avx2::kKernels.split_weights,
                          avx2::kKernels.decode_state,
                          avx2::kKernels.encode_state};

}  // namespace fusedopt::emulated
