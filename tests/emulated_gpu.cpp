// The bodies of the CUDA kernels on the CPU, lane by lane and warp by warp, with the interface of
// the CPU's kernels: whatever is tested of those is tested of these.
#include "emulated_gpu.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "cuda_warp.h"

namespace fusedopt::emulated {
namespace {

constexpr int64_t kWarps = 5;
constexpr int32_t kChunkTiles = 3;

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
  std::vector<double> steps;

  void add(const Task& task, int64_t place) {
    DeviceTask device;
    device.task = task;
    device.task.step = task.step - 1;
    if (task.extras != nullptr) device.extras = *task.extras;
    device.place = place;
    grads.push_back({task.grad.data, task.extras != nullptr && task.extras->accumulated});
    tasks.push_back(device);
    steps.push_back(task.step - 1);
    first_tile.push_back(first_tile.back() + (task.numel + kTile - 1) / kTile);
  }

  DeviceLine line(const Plan& plan) {
    int32_t n_groups = 0;
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (tasks[i].task.extras != nullptr) tasks[i].task.extras = &tasks[i].extras;
      // Counters are kept in either type.
      tasks[i].step = &steps[i];
      tasks[i].step_dtype = DType::kFloat64;
      n_groups = std::max(n_groups, tasks[i].task.group + 1);
    }
    for (int32_t g = 0; g < n_groups; ++g) groups.push_back({plan.groups[g]});
    int32_t task = 0;
    for (int64_t tile = 0; tile < first_tile.back(); tile += kChunkTiles) {
      while (tile >= first_tile[task + 1]) ++task;
      chunk_task.push_back(task);
    }
    return {tasks.data(),      grads.data(),          groups.data(), first_tile.data(),
            chunk_task.data(), int32_t(tasks.size()), kChunkTiles,   int64_t(chunk_task.size())};
  }
};

template <class T>
struct Update {
  const UpdateArguments& arguments;

  template <class Rule>
  void run() const {
    for (int64_t i = 0; i < kWarps; ++i) {
      EmulatedWarp<LaneTile<T>> warp;
      WarpMemory<Rule, T> memory;
      update_warp<Rule, T>(arguments, warp, memory, i, kWarps);
    }
    for (int64_t thread = 0; thread < 7; ++thread) finish_update(arguments, thread, 7);
  }
};

bool in_double(const Task& task) { return task.param.dtype == DType::kFloat64; }

// The tasks that begin on a stretch of the plan's line, by rule and type.
std::map<std::pair<int, bool>, Table> tables(const Plan& plan, int64_t begin, int64_t end) {
  std::map<std::pair<int, bool>, Table> result;
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    if (plan.begin[i] < begin || plan.begin[i] >= end) continue;
    const Task& task = *plan.tasks[i];
    result[{plan.groups[task.group].rule, in_double(task)}].add(task, i);
  }
  return result;
}

void update(const Plan& plan, int64_t, int64_t begin, int64_t end) {
  for (auto& [kind, table] : tables(plan, begin, end)) {
    DeviceControl control = {};
    UpdateArguments arguments = {table.line(plan), {plan.stages}, &control, true};
    arguments.stages.divisor = 1 / plan.stages.grad_multiplier;
    if (kind.second) {
      select_rule_or_stream<double>(kind.first, Update<double>{arguments});
    } else {
      select_rule_or_stream<float>(kind.first, Update<float>{arguments});
    }
    for (size_t i = 0; i < table.tasks.size(); ++i) {
      if (table.steps[i] != table.tasks[i].task.step + 1) std::abort();
    }
  }
}

void accumulate(const Plan& plan, int64_t, int64_t begin, int64_t end) {
  for (auto& [kind, table] : tables(plan, begin, end)) {
    const DeviceLine line = table.line(plan);
    for (int64_t i = 0; i < kWarps; ++i) {
      if (kind.second) {
        EmulatedWarp<LaneTile<double>> warp;
        accumulate_warp<double>(line, warp, i, kWarps);
      } else {
        EmulatedWarp<LaneTile<float>> warp;
        accumulate_warp<float>(line, warp, i, kWarps);
      }
    }
  }
}

}  // namespace

const Kernels kKernels = {update,
                          avx2::kKernels.measure,
                          accumulate,
                          avx2::kKernels.join_weights,
                          avx2::kKernels.split_weights,
                          avx2::kKernels.decode_state,
                          avx2::kKernels.encode_state};

}  // namespace fusedopt::emulated
