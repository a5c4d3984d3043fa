#include "cuda_table.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "layout.h"

namespace fusedopt {
namespace {

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

void DeviceTable::find_kinds(const Plan& plan) {
  std::map<std::pair<int, bool>, std::vector<int64_t>> places;
  n_groups_ = 0;
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    const Task& task = *plan.tasks[i];
    n_groups_ = std::max<int64_t>(n_groups_, task.group + 1);
    places[{plan.groups[task.group].rule, task.param.dtype == DType::kFloat64}].push_back(i);
  }
  kinds_.clear();
  for (auto& [key, list] : places) {
    Kind kind = {key.first, key.second, std::move(list)};
    int64_t spans = 0;
    for (int64_t i : kind.places) spans += spans_of(*plan.tasks[i], kind.in_double);
    // Enough chunks for the warps to end at about the same time.
    const int64_t share = spans / std::max<int64_t>(1, 16 * n_warps_);
    kind.chunk_spans = std::max<int64_t>(1, std::min(share, most_spans_));
    kind.n_chunks = (spans + kind.chunk_spans - 1) / kind.chunk_spans;
    kinds_.push_back(std::move(kind));
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
    kind.tasks = cursor.take<DeviceTask>(kind.places.size());
    kind.first_span = cursor.take<int64_t>(kind.places.size() + 1);
    kind.chunk_task = cursor.take<int32_t>(kind.n_chunks);
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

void DeviceTable::write_grads(const Plan& plan, char* image) const {
  std::memset(image + grads_.begin, 0, grads_.end - grads_.begin);
  for (const Kind& kind : kinds_) {
    for (size_t k = 0; k < kind.places.size(); ++k) {
      const Task& task = *plan.tasks[kind.places[k]];
      const bool accumulated = task.extras != nullptr && task.extras->accumulated;
      put(image, kind.grads + k * sizeof(DeviceGrad), DeviceGrad{task.grad.data, accumulated});
    }
  }
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
  const auto at = [&](size_t offset) { return static_cast<const void*>(device + offset); };
  launches_.clear();
  size_t n_layouts = 0;
  for (const Kind& kind : kinds_) {
    int64_t span = 0, chunk = 0;
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
        put(image, layouts_[n_layouts], *operand.layout);
        operand.layout = static_cast<const Layout*>(at(layouts_[n_layouts++]));
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
      for (; chunk * kind.chunk_spans < span; ++chunk) {
        put(image, kind.chunk_task + chunk * sizeof(int32_t), int32_t(k));
      }
    }
    put(image, kind.first_span + kind.places.size() * sizeof(int64_t), span);
    launches_.push_back(
        {kind.rule,
         kind.in_double,
         {static_cast<const DeviceTask*>(at(kind.tasks)),
          static_cast<const DeviceGrad*>(at(kind.grads)),
          static_cast<const DeviceGroup*>(at(groups_.begin)),
          static_cast<const int64_t*>(at(kind.first_span)),
          static_cast<const int32_t*>(at(kind.chunk_task)), int32_t(kind.places.size()),
          int32_t(kind.chunk_spans), kind.n_chunks, grad_bytes, buffer_bytes}});
  }
}

}  // namespace fusedopt
