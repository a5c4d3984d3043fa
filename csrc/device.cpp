#include "device.h"

#include <atomic>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace fusedopt {
namespace {

char* memory_of(const py::object& tensor, int device) {
  View view;
  if (read_tensor(tensor.ptr(), &view) != Reading::kOk || view.device != device) {
    throw std::runtime_error("there is no memory on the device");
  }
  return view.data;
}

// What graphs use, perhaps for longer than the optimizer lives. That a graph is gone is heard on a
// thread of the driver's, which may not touch tensors; so they are let go of later.
class RetainedByGraphs {
 public:
  void add(const CudaQueue& queue, const py::object& tensors) {
    auto gone = std::make_unique<std::atomic<bool>>(false);
    std::atomic<bool>* const told = gone.get();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      entries_.push_back({tensors, std::move(gone)});
    }
    cuda_retain(queue, [](void* gone) { *static_cast<std::atomic<bool>*>(gone) = true; }, told);
  }

  void let_go() {
    std::vector<Entry> gone;  // released after the lock, as that may run anything
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < entries_.size();) {
      if (!*entries_[i].gone) {
        ++i;
        continue;
      }
      std::swap(entries_[i], entries_.back());
      gone.push_back(std::move(entries_.back()));
      entries_.pop_back();
    }
  }

 private:
  struct Entry {
    py::object tensors;
    std::unique_ptr<std::atomic<bool>> gone;
  };

  std::mutex mutex_;
  std::vector<Entry> entries_;
};

// (Never destroyed: graphs may outlive the interpreter.)
RetainedByGraphs& retained = *new RetainedByGraphs;

}  // namespace

void check_not_capturing(int device) {
  if (cuda_capture({device, current_stream(device)}) == 0) return;
  throw std::runtime_error(
      "the first step cannot be captured in a CUDA graph, whose replays would create the "
      "optimizer's state anew each time; take one step before the capture");
}

void DeviceBuffer::allocate(const TensorMemory& memory, size_t bytes, const CudaQueue& queue) {
  py::object tensor = memory.allocate(bytes, queue.device);
  data_ = memory_of(tensor, queue.device);
  tensor_ = std::move(tensor);
  bytes_ = bytes;
  streams_ = {queue.stream};
}

void DeviceBuffer::use(const TensorMemory& memory, const CudaQueue& queue) {
  if (streams_.insert(queue.stream).second) memory.record(tensor_, queue.device);
}

void ResidentTable::load(const TensorMemory& memory, const CudaQueue& queue, const Plan& plan,
                         const std::vector<DeviceCounter>& counters,
                         const std::vector<DeviceRate>& rates, bool same_tasks) {
  same_tasks = same_tasks && complete_ && table_.write_grads(plan, image_.data());
  if (!same_tasks) {
    complete_ = false;
    const size_t bytes = table_.lay_out(plan, counters);
    if (bytes > buffer_.bytes()) {
      buffer_.allocate(memory, bytes, queue);
      loaded_.clear();
    }
    image_.resize(bytes);
    table_.write_tasks(plan, counters, image_.data(), buffer_.data());
    table_.write_grads(plan, image_.data());
  }
  buffer_.use(memory, queue);
  table_.write_groups(plan, rates, image_.data());
  upload(queue, 0, table_.tasks().begin);
  if (!same_tasks) upload(queue, table_.tasks().begin, table_.tasks().end);
  complete_ = true;
}

void ResidentTable::upload(const CudaQueue& queue, size_t begin, size_t end) {
  constexpr size_t kUnit = kUploadUnit;
  const auto differs = [&](size_t at) {
    return at + kUnit > loaded_.size() || std::memcmp(&image_[at], &loaded_[at], kUnit) != 0;
  };
  while (begin < end && !differs(begin)) begin += kUnit;
  while (begin < end && !differs(end - kUnit)) end -= kUnit;
  if (begin == end) return;
  if (loaded_.size() < end) loaded_.resize(end);
  std::memcpy(&loaded_[begin], &image_[begin], end - begin);
  try {
    cuda_upload(queue, buffer_.data() + begin, &image_[begin], end - begin);
  } catch (...) {
    loaded_.clear();  // some of it has been copied
    throw;
  }
}

std::vector<Launch> write_captured(const TensorMemory& memory, const CudaQueue& queue,
                                   const Plan& plan, const std::vector<DeviceCounter>& counters,
                                   const std::vector<DeviceRate>& rates, const py::object& other) {
  DeviceTable table({cuda_max_warps(queue.device), cuda_direct_formats});
  std::vector<char> image(table.lay_out(plan, counters));
  table.write_grads(plan, image.data());
  table.write_groups(plan, rates, image.data());
  // Not in the graph's memory: replays write there what lay at this place before the step.
  cuda_outside_graphs(queue.device, [&](const CudaQueue& outside) {
    const auto stream = reinterpret_cast<uintptr_t>(outside.stream);
    const py::object tensor = memory.allocate_for(image.size(), queue.device, stream);
    char* const data = memory_of(tensor, queue.device);
    table.write_tasks(plan, counters, image.data(), data);
    cuda_upload(outside, data, image.data(), image.size());
    retained.add(queue, py::make_tuple(tensor, other));
  });
  return table.launches();
}

Device::~Device() { retained.let_go(); }

void Device::begin() {
  retained.let_go();
  queue_ = {index_, current_stream(index_)};
  capture_ = cuda_capture(queue_);
  if (!report_.tensor()) {
    check_not_capturing(index_);
    const int64_t n_warps = cuda_max_warps(index_);
    report_.allocate(memory_, (kNormWord + 1 + n_warps) * 8, queue_);
    table_ = std::make_unique<ResidentTable>(n_warps);
  }
  if (!capturing()) report_.use(memory_, queue_);
  if (measuring_) forget_measured();
}

void Device::end() {
  if (!measuring_) return;
  try {
    forget_measured();
  } catch (const std::exception&) {
    // What has failed before says more. The next step tries again.
  }
}

// At the end of the step that has failed, and not when the next one begins: that may be a replay.
void Device::forget_measured() {
  constexpr char zeros[kUploadUnit] = {};
  static_assert(offsetof(DeviceControl, nonfinite) + sizeof(uint64_t) == kUploadUnit);
  cuda_upload(queue_, report_.data(), zeros, sizeof(zeros));
  measuring_ = false;
}

void Device::load(const Plan& plan, const std::vector<DeviceCounter>& counters,
                  const std::vector<DeviceRate>& rates, bool same_tasks) {
  if (capturing()) {
    launches_ = write_captured(memory_, queue_, plan, counters, rates, report_.tensor());
    return;
  }
  table_->load(memory_, queue_, plan, counters, rates, same_tasks);
  launches_ = table_->launches();
}

template <class Line>
MeasureArguments<Line> Device::measure_arguments(const DeviceStages& stages) const {
  double* const words = reinterpret_cast<double*>(report_.data());
  MeasureArguments<Line> arguments = {};
  arguments.stages = stages;
  arguments.control = control();
  arguments.grad_norm = words + kNormWord;
  arguments.partial = words + kNormWord + 1;
  return arguments;
}

void Device::measure(const DeviceStages& stages, bool alone) {
  measuring_ = true;
  for (const Launch& launch : launches_) {
    const auto with_line = [&](const auto& line) {
      auto arguments = measure_arguments<std::decay_t<decltype(line)>>(stages);
      arguments.line = line;
      arguments.first_launch = &launch == &launches_.front();
      arguments.last_launch = alone && &launch == &launches_.back();
      return arguments;
    };
    if (launch.formats == kAnyFormats) {
      cuda_measure(queue_, launch.in_double, with_line(launch.line));
    } else {
      cuda_measure_direct(queue_, launch.formats, with_line(launch.direct));
    }
  }
  measuring_ = !alone;
}

void Device::finish_measure(const DeviceStages& stages) {
  auto arguments = measure_arguments<DeviceLine>(stages);  // of no tasks
  arguments.line.chunk_spans = 1;
  arguments.last_launch = true;
  cuda_measure(queue_, false, arguments);
  measuring_ = false;
}

void Device::update(const DeviceStages& stages, bool counts_skips) {
  for (const Launch& launch : launches_) {
    const bool last = counts_skips && &launch == &launches_.back();
    if (launch.formats == kAnyFormats) {
      cuda_update(queue_, launch.rule, launch.in_double, {launch.line, stages, control(), last});
    } else {
      cuda_update_direct(queue_, launch.rule, launch.formats,
                         {launch.direct, stages, control(), last});
    }
  }
}

void Device::accumulate() {
  for (const Launch& launch : launches_) {
    // (Where gradients are accumulated, the general kernel takes them.)
    if (launch.formats != kAnyFormats) continue;
    cuda_accumulate(queue_, launch.in_double, launch.line);
  }
}

}  // namespace fusedopt
