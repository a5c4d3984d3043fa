// The bodies of the CUDA kernels on the CPU, lane by lane and warp by warp.
#include "emulated_gpu.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "cuda_warp.h"

namespace fusedopt::emulated {
namespace {

template <class State>
class EmulatedWarp {
 public:
  template <class F>
  void each(F&& f) {
    for (int lane = 0; lane < kWarpLanes; ++lane) f(lane, states_[lane]);
  }

  template <class F>
  void once(F&& f) {
    f();
  }

  template <class F>
  auto largest(F&& f) {
    auto result = f(states_[0]);
    for (const State& state : states_) result = std::max(result, f(state));
    return result;
  }

  // As shuffles do it: pairs, pairs of pairs, and so on.
  template <class F>
  double sum(F&& f) {
    double sums[kWarpLanes];
    for (int lane = 0; lane < kWarpLanes; ++lane) sums[lane] = f(states_[lane]);
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
    }
    return sums[0];
  }

  void raise(uint64_t* to, uint64_t n) { *to = std::max(*to, n); }

 private:
  State states_[kWarpLanes];
};

// A launch's tasks, as they would lie in device memory.
struct Table {
  std::vector<DeviceTask> tasks;
  std::vector<DeviceGrad> grads;
  std::vector<DeviceGroup> groups;
  std::vector<int64_t> first_tile = {0};
  std::vector<int32_t> chunk_task;
  std::vector<float> narrow_steps;

  void add(const Task& task, int64_t place) {
    DeviceTask device;
    device.task = task;
    device.task.step = task.step - 1;
    if (task.extras != nullptr) device.extras = *task.extras;
    device.place = place;
    grads.push_back({task.grad.data, task.extras != nullptr && task.extras->accumulated});
    tasks.push_back(device);
    first_tile.push_back(first_tile.back() + (task.numel + kTile - 1) / kTile);
  }

  DeviceLine line(const Plan& plan, const Options& options) {
    int32_t n_groups = 0;
    for (DeviceTask& task : tasks) {
      if (task.task.extras != nullptr) task.task.extras = &task.extras;
      n_groups = std::max(n_groups, task.task.group + 1);
    }
    for (int32_t g = 0; g < n_groups; ++g) {
      groups.push_back({plan.groups[g], options.lr, options.lr_dtype});
    }
    int32_t task = 0;
    for (int64_t tile = 0; tile < first_tile.back(); tile += options.chunk_tiles) {
      while (tile >= first_tile[task + 1]) ++task;
      chunk_task.push_back(task);
    }
    return {
        tasks.data(),      grads.data(),          groups.data(),       first_tile.data(),
        chunk_task.data(), int32_t(tasks.size()), options.chunk_tiles, int64_t(chunk_task.size())};
  }

  void point_to_steps(Options* options) {
    if (options->steps.empty()) return;
    narrow_steps.assign(options->steps.begin(), options->steps.end());
    for (DeviceTask& task : tasks) {
      if (options->narrow_steps) {
        task.step = &narrow_steps[task.place];
      } else {
        task.step = &options->steps[task.place];
        task.step_dtype = DType::kFloat64;
      }
    }
  }

  void read_steps(Options* options) const {
    if (!options->narrow_steps) return;
    for (const DeviceTask& task : tasks) options->steps[task.place] = narrow_steps[task.place];
  }
};

bool in_double(const Task& task) { return task.param.dtype == DType::kFloat64; }

// The tasks that begin on a stretch of the plan's line, by rule and type.
using Tables = std::map<std::pair<int, bool>, Table>;

Tables tables(const Plan& plan, int64_t begin, int64_t end) {
  Tables result;
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    if (plan.begin[i] < begin || plan.begin[i] >= end) continue;
    const Task& task = *plan.tasks[i];
    result[{plan.groups[task.group].rule, in_double(task)}].add(task, i);
  }
  return result;
}

template <class T>
struct Update {
  const UpdateArguments& arguments;
  int64_t n_warps;

  template <class Rule>
  void run() const {
    for (int64_t i = 0; i < n_warps; ++i) {
      EmulatedWarp<LaneTile<T>> warp;
      WarpMemory<Rule, T> memory = {};
      update_warp<Rule, T>(arguments, warp, memory, i, n_warps);
    }
    for (int64_t thread = 0; thread < 7; ++thread) finish_update(arguments, thread, 7);
  }
};

void update(const Plan& plan, int64_t begin, int64_t end, Options* options,
            DeviceControl* control) {
  Tables launches = tables(plan, begin, end);
  for (auto& [kind, table] : launches) {
    table.point_to_steps(options);
    const bool last = kind == launches.rbegin()->first;
    const UpdateArguments arguments = {table.line(plan, *options), options->stages, control, last};
    if (kind.second) {
      select_rule_or_stream<double>(kind.first, Update<double>{arguments, options->n_warps});
    } else {
      select_rule_or_stream<float>(kind.first, Update<float>{arguments, options->n_warps});
    }
    table.read_steps(options);
  }
}

void update_range(const Plan& plan, int64_t, int64_t begin, int64_t end) {
  Options options;
  options.stages.stages = plan.stages;
  options.stages.divisor = 1 / plan.stages.grad_multiplier;
  for (int64_t i = 0; i < plan.n_tasks; ++i) options.steps.push_back(plan.tasks[i]->step - 1);
  DeviceControl control = {};
  update(plan, begin, end, &options, &control);
}

void accumulate_range(const Plan& plan, int64_t, int64_t begin, int64_t end) {
  const Options options;
  for (auto& [kind, table] : tables(plan, begin, end)) {
    const DeviceLine line = table.line(plan, options);
    for (int64_t i = 0; i < options.n_warps; ++i) {
      if (kind.second) {
        EmulatedWarp<LaneTile<double>> warp;
        accumulate_warp<double>(line, warp, i, options.n_warps);
      } else {
        EmulatedWarp<LaneTile<float>> warp;
        accumulate_warp<float>(line, warp, i, options.n_warps);
      }
    }
  }
}

}  // namespace

void measure(const Plan& plan, const Options& options, DeviceControl* control, double* grad_norm) {
  Tables launches = tables(plan, 0, plan.begin[plan.n_tasks]);
  for (auto& [kind, table] : launches) {
    std::vector<double> partial(options.n_warps);
    const bool first = kind == launches.begin()->first, last = kind == launches.rbegin()->first;
    const MeasureArguments arguments = {
        table.line(plan, options), options.stages, control, partial.data(), grad_norm, first, last};
    EmulatedWarp<LaneNorm> warp;
    for (int64_t i = 0; i < options.n_warps; ++i) {
      if (kind.second) {
        measure_warp<double>(arguments, warp, i, options.n_warps);
      } else {
        measure_warp<float>(arguments, warp, i, options.n_warps);
      }
    }
    finish_measure(arguments, warp, options.n_warps);
  }
}

void update(const Plan& plan, Options* options, DeviceControl* control) {
  update(plan, 0, plan.begin[plan.n_tasks], options, control);
}

const Kernels kKernels = {update_range,
                          avx2::kKernels.measure,
                          accumulate_range,
                          avx2::kKernels.join_weights,
                          avx2::kKernels.split_weights,
                          avx2::kKernels.decode_state,
                          avx2::kKernels.encode_state};

}  // namespace fusedopt::emulated
