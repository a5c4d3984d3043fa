#include "cuda_table.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "layout.h"

namespace fusedopt {
namespace {

bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kDirectAlignment == 0;
}

// Whether an operand is in a format, dense and aligned.
bool is_in(const Operand& operand, DType dtype) {
  return operand.dtype == dtype && operand.layout == nullptr && is_aligned(operand.data);
}

bool has_formats(const Task& task, const Formats& formats) {
  const Extras none, &extras = task.extras == nullptr ? none : *task.extras;
  const bool hides = formats.precision != WeightPrecision::kNearest;
  const bool coded = formats.state == DType::kUInt8;
  bool same = is_in(task.param, formats.param) && extras.precision == formats.precision &&
              (!hides || is_in(extras.hidden, hidden_format(formats.precision))) &&
              (extras.ema.data != nullptr) == formats.ema &&
              (!formats.ema || is_in(extras.ema, DType::kFloat32)) &&
              extras.grad_sum.data == nullptr && (coded || !extras.random_state) &&
              (task.grad.data == nullptr || is_in(task.grad, formats.grad));
  for (const Operand& state : task.state) {
    same = same && (state.data == nullptr || is_in(state, formats.state));
  }
  return same;
}

int64_t tiles_of(const Task& task) { return (task.numel + kBlock - 1) / kBlock; }

int64_t spans_of(const Task& task, bool in_double) {
  const int64_t length = span_tiles(in_double) * kBlock;
  return (task.numel + length - 1) / length;
}

// Calls f(operand) for all operands of a task that the kernels may read or write.
template <class F>
void for_each_operand(DeviceTask& task, F&& f) {
  f(task.task.param);
  f(task.task.grad);
  for (Operand& state : task.task.state) f(state);
  f(task.extras.hidden);
  f(task.extras.ema);
  f(task.extras.grad_sum);
}

DeviceTask device_task(const Task& task, const DeviceCounter& counter) {
  DeviceTask device;
  device.task = task;
  device.task.step = counter.first_step;
  if (task.extras != nullptr) device.extras = *task.extras;
  device.step = counter.step;
  device.step_dtype = counter.dtype;
  device.place = counter.place;
  return device;
}

// Gives a task's operands their places in a buffer, and lists where they are in device memory.
class Placer {
 public:
  Placer(DeviceTask* task, bool in_double) : task_(*task), in_double_(in_double) {
    Task& parts = task_.task;
    Extras& extras = task_.extras;
    task_.operands[kGradOperand] = place(&parts.grad);
    if (extras.grad_sum.data != nullptr) {
      task_.operands[kGradSumOperand] = place(&extras.grad_sum);
    }
    grad_bytes_ = end_;
    for (Operand* operand : {&parts.param, &extras.hidden, &extras.ema}) add(operand);
    for (int k = 0; k < kMaxStates; ++k) {
      add(&parts.state[k]);
      if (parts.state[k].dtype != DType::kUInt8) continue;
      task_.scale[k] = extras.scale[k];
      extras.scale[k] =
          reinterpret_cast<float*>(uintptr_t(take(span_tiles(in_double_) * kScaleBytes)));
    }
  }

  uint32_t grad_bytes() const { return grad_bytes_; }
  uint32_t buffer_bytes() const { return end_; }

 private:
  DeviceOperand place(Operand* operand) {
    DeviceOperand device;
    device.data = operand->data;
    device.layout = operand->layout;
    device.size = uint8_t(item_size(operand->dtype));
    if (operand->dtype == DType::kFloat64 && !in_double_) operand->dtype = DType::kFloat32;
    device.buffered_size = uint8_t(item_size(operand->dtype));
    device.place = take(span_tiles(in_double_) * kBlock * device.buffered_size);
    device.dense = device.layout == nullptr && device.size == device.buffered_size;
    device.misaligned = uint8_t(std::min(4 * device.size, 16) - 1);
    operand->data = reinterpret_cast<void*>(uintptr_t(device.place));
    operand->layout = nullptr;
    return device;
  }

  void add(Operand* operand) {
    if (operand->data != nullptr) task_.operands[task_.n_operands++] = place(operand);
  }

  uint32_t take(uint32_t bytes) {
    const uint32_t begin = end_;
    end_ += bytes;
    return begin;
  }

  DeviceTask& task_;
  bool in_double_;
  uint32_t end_ = kBufferBegin, grad_bytes_ = 0;
};

// (Padding may differ between equal values. Then a part that has not changed is copied again.)
template <class T>
void put(char* image, size_t offset, const T& value) {
  std::memcpy(image + offset, &value, sizeof(value));
}

class Cursor {
 public:
  template <class T>
  size_t take(size_t count) {
    const size_t begin = (at_ + alignof(T) - 1) / alignof(T) * alignof(T);
    at_ = begin + count * sizeof(T);
    return begin;
  }

  // The end of a part, and the beginning of the next.
  size_t align() {
    constexpr size_t k = DeviceTable::kAlignment;
    return at_ = (at_ + k - 1) / k * k;
  }

 private:
  size_t at_ = 0;
};

}  // namespace

int formats_of(const Task& task, int n) {
  for (int i = 0; i < n; ++i) {
    if (has_formats(task, kFormats[i])) return i;
  }
  return kAnyFormats;
}

void DeviceTable::find_kinds(const Plan& plan) {
  std::map<std::tuple<int, bool, int>, std::vector<int64_t>> places;
  std::vector<int64_t> empty;
  n_groups_ = 0;
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    const Task& task = *plan.tasks[i];
    n_groups_ = std::max<int64_t>(n_groups_, task.group + 1);
    const int rule = plan.groups[task.group].rule;
    const int n_formats = cut_.direct_formats == nullptr ? 0 : cut_.direct_formats(rule);
    const bool in_double = task.param.dtype == DType::kFloat64;
    if (task.numel == 0) {
      empty.push_back(i);
    } else {
      places[{rule, in_double, formats_of(task, n_formats)}].push_back(i);
    }
  }
  // Tensors without elements have only counters, which any launch of their rule advances.
  for (int64_t i : empty) {
    const int rule = plan.groups[plan.tasks[i]->group].rule;
    const auto of_rule = places.lower_bound({rule, false, kAnyFormats});
    if (of_rule != places.end() && std::get<0>(of_rule->first) == rule) {
      of_rule->second.push_back(i);
    } else {
      places[{rule, false, kAnyFormats}].push_back(i);
    }
  }
  kinds_.clear();
  for (auto& [key, list] : places) {
    Kind kind = {};
    std::tie(kind.rule, kind.in_double, kind.formats) = key;
    kind.places = std::move(list);
    cut(plan, &kind);
    kinds_.push_back(std::move(kind));
  }
}

void DeviceTable::cut(const Plan& plan, Kind* kind) const {
  const auto length_of = [&](int64_t place) {
    const Task& task = *plan.tasks[place];
    return kind->direct() ? tiles_of(task) : spans_of(task, kind->in_double);
  };
  int64_t length = 0;
  for (int64_t place : kind->places) length += length_of(place);
  // Enough chunks for the warps to end at about the same time.
  const int64_t share = length / std::max<int64_t>(1, (kind->direct() ? 32 : 16) * cut_.warps);
  if (!kind->direct()) {
    kind->chunk_length = std::max<int64_t>(1, std::min(share, cut_.most_spans));
    int64_t end = 0;
    for (size_t k = 0; k < kind->places.size(); ++k) {
      end += length_of(kind->places[k]);
      // The task that a chunk's first span belongs to.
      const int64_t n_chunks = (end + kind->chunk_length - 1) / kind->chunk_length;
      kind->chunk_task.resize(n_chunks, int64_t(k));
    }
    return;
  }
  // A power of two, so that no chunk's elements differ in more than the lower 33 bits (random.h).
  while (2 * kind->chunk_length <= std::min(share, cut_.most_tiles)) kind->chunk_length *= 2;
  for (size_t k = 0; k < kind->places.size(); ++k) {
    const int64_t n_chunks =
        (length_of(kind->places[k]) + kind->chunk_length - 1) / kind->chunk_length;
    kind->chunk_task.insert(kind->chunk_task.end(), n_chunks, int64_t(k));
    if (n_chunks != 1) kind->others.push_back(int64_t(k));
  }
}

size_t DeviceTable::lay_out(const Plan& plan, const std::vector<DeviceCounter>& counters) {
  find_kinds(plan);
  Cursor cursor;
  for (Kind& kind : kinds_) kind.grads = cursor.take<DeviceGrad>(kind.places.size());
  grads_ = {0, cursor.align()};
  cursor.take<DeviceGroup>(n_groups_);
  groups_ = {grads_.end, cursor.align()};
  layouts_.clear();
  for (Kind& kind : kinds_) {
    kind.chunks = cursor.take<int32_t>(kind.chunk_task.size());
    kind.other = cursor.take<int32_t>(kind.others.size());
    if (kind.direct()) {
      kind.tasks = cursor.take<DirectTask>(kind.places.size());
      continue;
    }
    kind.tasks = cursor.take<DeviceTask>(kind.places.size());
    kind.first_span = cursor.take<int64_t>(kind.places.size() + 1);
    for (int64_t i : kind.places) {
      DeviceTask task = device_task(*plan.tasks[i], counters[i]);
      for_each_operand(task, [&](const Operand& operand) {
        if (operand.layout != nullptr) layouts_.push_back(cursor.take<Layout>(1));
      });
    }
  }
  tasks_ = {groups_.end, cursor.align()};
  return tasks_.end;
}

bool DeviceTable::write_grads(const Plan& plan, char* image) const {
  bool fits = true;
  std::memset(image + grads_.begin, 0, grads_.end - grads_.begin);
  for (const Kind& kind : kinds_) {
    for (size_t k = 0; k < kind.places.size(); ++k) {
      const Task& task = *plan.tasks[kind.places[k]];
      const bool accumulated = task.extras != nullptr && task.extras->accumulated;
      put(image, kind.grads + k * sizeof(DeviceGrad), DeviceGrad{task.grad.data, accumulated});
      fits &= !kind.direct() || task.numel == 0 || is_aligned(task.grad.data);
    }
  }
  return fits;
}

void DeviceTable::write_groups(const Plan& plan, const std::vector<DeviceRate>& rates,
                               char* image) const {
  std::memset(image + groups_.begin, 0, groups_.end - groups_.begin);
  for (int64_t g = 0; g < n_groups_; ++g) {
    DeviceGroup group;
    group.group = plan.groups[g];
    if (!rates.empty()) group.lr = rates[g].lr, group.lr_dtype = rates[g].dtype;
    put(image, groups_.begin + g * sizeof(DeviceGroup), group);
  }
}

void DeviceTable::write_tasks(const Plan& plan, const std::vector<DeviceCounter>& counters,
                              char* image, const char* device) {
  std::memset(image + tasks_.begin, 0, tasks_.end - tasks_.begin);
  launches_.clear();
  size_t n_layouts = 0;
  for (const Kind& kind : kinds_) {
    for (size_t k = 0; k < kind.chunk_task.size(); ++k) {
      put(image, kind.chunks + k * sizeof(int32_t), int32_t(kind.chunk_task[k]));
    }
    launches_.push_back(kind.direct()
                            ? write_direct_line(kind, plan, counters, image, device)
                            : write_line(kind, plan, counters, image, device, &n_layouts));
  }
}

Launch DeviceTable::write_line(const Kind& kind, const Plan& plan,
                               const std::vector<DeviceCounter>& counters, char* image,
                               const char* device, size_t* n_layouts) const {
  const auto at = [&](size_t offset) { return static_cast<const void*>(device + offset); };
  int64_t span = 0;
  uint32_t grad_bytes = 0, buffer_bytes = 0;
  for (size_t k = 0; k < kind.places.size(); ++k) {
    const int64_t i = kind.places[k];
    DeviceTask task = device_task(*plan.tasks[i], counters[i]);
    const size_t offset = kind.tasks + k * sizeof(DeviceTask);
    if (task.task.extras != nullptr) {
      task.task.extras = static_cast<const Extras*>(at(offset + offsetof(DeviceTask, extras)));
    }
    for_each_operand(task, [&](Operand& operand) {
      if (operand.layout == nullptr) return;
      put(image, layouts_[*n_layouts], *operand.layout);
      operand.layout = static_cast<const Layout*>(at(layouts_[(*n_layouts)++]));
    });
    // These are the gradients' part.
    task.task.grad.data = nullptr;
    task.extras.accumulated = false;
    const Placer placer(&task, kind.in_double);
    grad_bytes = std::max(grad_bytes, placer.grad_bytes());
    buffer_bytes = std::max(buffer_bytes, placer.buffer_bytes());
    put(image, offset, task);
    put(image, kind.first_span + k * sizeof(int64_t), span);
    span += spans_of(*plan.tasks[i], kind.in_double);
  }
  put(image, kind.first_span + kind.places.size() * sizeof(int64_t), span);
  Launch launch = {kind.rule, kind.in_double, kind.formats, {}, {}};
  launch.line = {static_cast<const DeviceTask*>(at(kind.tasks)),
                 static_cast<const DeviceGrad*>(at(kind.grads)),
                 static_cast<const DeviceGroup*>(at(groups_.begin)),
                 static_cast<const int64_t*>(at(kind.first_span)),
                 static_cast<const int32_t*>(at(kind.chunks)),
                 int32_t(kind.places.size()),
                 int32_t(kind.chunk_length),
                 int64_t(kind.chunk_task.size()),
                 grad_bytes,
                 buffer_bytes};
  return launch;
}

Launch DeviceTable::write_direct_line(const Kind& kind, const Plan& plan,
                                      const std::vector<DeviceCounter>& counters, char* image,
                                      const char* device) const {
  const auto at = [&](size_t offset) { return static_cast<const void*>(device + offset); };
  size_t chunk = 0;
  for (size_t k = 0; k < kind.places.size(); ++k) {
    const int64_t i = kind.places[k];
    const Task& task = *plan.tasks[i];
    const DeviceCounter& counter = counters[i];
    DirectTask direct;
    direct.param = task.param.data;
    for (int s = 0; s < kMaxStates; ++s) direct.state[s] = task.state[s].data;
    if (task.extras != nullptr) {
      direct.hidden = task.extras->hidden.data;
      direct.ema = task.extras->ema.data;
      direct.seed = task.extras->seed;
      for (int s = 0; s < kMaxStates; ++s) direct.scale[s] = task.extras->scale[s];
    }
    direct.step = counter.step;
    direct.step_dtype = counter.dtype;
    if (task.first) direct.first_step = counter.first_step;
    direct.numel = task.numel;
    direct.place = int32_t(counter.place);
    direct.group = task.group;
    direct.first_chunk = int32_t(chunk);
    while (chunk < kind.chunk_task.size() && kind.chunk_task[chunk] == int64_t(k)) ++chunk;
    direct.one_chunk = int64_t(chunk) - direct.first_chunk == 1;
    put(image, kind.tasks + k * sizeof(DirectTask), direct);
  }
  for (size_t k = 0; k < kind.others.size(); ++k) {
    put(image, kind.other + k * sizeof(int32_t), int32_t(kind.others[k]));
  }
  Launch launch = {kind.rule, kind.in_double, kind.formats, {}, {}};
  launch.direct = {static_cast<const DirectTask*>(at(kind.tasks)),
                   static_cast<const DeviceGrad*>(at(kind.grads)),
                   static_cast<const DeviceGroup*>(at(groups_.begin)),
                   static_cast<const int32_t*>(at(kind.chunks)),
                   static_cast<const int32_t*>(at(kind.other)),
                   int32_t(kind.others.size()),
                   int32_t(kind.chunk_task.size()),
                   int32_t(kind.chunk_length)};
  return launch;
}

}  // namespace fusedopt
