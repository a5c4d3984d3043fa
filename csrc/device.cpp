#include "device.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

namespace fusedopt {

void check_not_capturing(int device) {
  if (cuda_capture({device, current_stream(device)}) == 0) return;
  throw std::runtime_error(
      "the first step cannot be captured in a CUDA graph, whose replays would create the "
      "optimizer's state anew each time; take one step before the capture");
}

void DeviceBuffer::allocate(const TensorMemory& memory, size_t bytes, const CudaQueue& queue) {
  py::object tensor = memory.allocate(bytes, queue.device);
  View view;
  if (read_tensor(tensor.ptr(), &view) != Reading::kOk || view.device != queue.device) {
    throw std::runtime_error("there is no memory on the device");
  }
  tensor_ = std::move(tensor);
  data_ = view.data;
  bytes_ = bytes;
  streams_ = {queue.stream};
}

void DeviceBuffer::use(const TensorMemory& memory, const CudaQueue& queue) {
  if (streams_.insert(queue.stream).second) memory.record(tensor_, queue.device);
}

void ResidentTable::load(const TensorMemory& memory, const CudaQueue& queue, const Plan& plan,
                         const std::vector<DeviceCounter>& counters,
                         const std::vector<DeviceRate>& rates, bool same_tasks) {
  if (!same_tasks) {
    const size_t bytes = table_.lay_out(plan, counters);
    if (bytes > buffer_.bytes()) {
      buffer_.allocate(memory, bytes, queue);
      loaded_.clear();
    }
    image_.resize(bytes);
    table_.write_tasks(plan, counters, image_.data(), buffer_.data());
  }
  buffer_.use(memory, queue);
  table_.write_grads(plan, image_.data());
  table_.write_groups(plan, rates, image_.data());
  upload(queue, 0, table_.tasks().begin);
  if (!same_tasks) upload(queue, table_.tasks().begin, table_.tasks().end);
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

void Device::begin() {
  queue_ = {index_, current_stream(index_)};
  capture_ = cuda_capture(queue_);
  if (!report_.tensor()) {
    check_not_capturing(index_);
    const int64_t n_warps = cuda_max_warps(index_);
    report_.allocate(memory_, (kNormWord + 1 + n_warps) * 8, queue_);
    table_ = std::make_unique<ResidentTable>(n_warps);
  }
  report_.use(memory_, queue_);
  if (measuring_) {  // an earlier step has failed in between
    constexpr char zeros[kUploadUnit] = {};
    static_assert(offsetof(DeviceControl, nonfinite) + sizeof(uint64_t) == kUploadUnit);
    cuda_upload(queue_, report_.data(), zeros, sizeof(zeros));
    measuring_ = capturing();
  }
}

void Device::load(const Plan& plan, const std::vector<DeviceCounter>& counters,
                  const std::vector<DeviceRate>& rates, bool same_tasks) {
  current_ = table_.get();
  if (capturing()) {
    captured_ = std::make_unique<ResidentTable>(cuda_max_warps(index_));
    current_ = captured_.get();
  }
  current_->load(memory_, queue_, plan, counters, rates, same_tasks && !capturing());
}

MeasureArguments Device::measure_arguments(const DeviceStages& stages) const {
  double* const words = reinterpret_cast<double*>(report_.data());
  MeasureArguments arguments = {};
  arguments.stages = stages;
  arguments.control = control();
  arguments.grad_norm = words + kNormWord;
  arguments.partial = words + kNormWord + 1;
  return arguments;
}

void Device::measure(const DeviceStages& stages, bool alone) {
  const std::vector<Launch>& launches = current_->launches();
  MeasureArguments arguments = measure_arguments(stages);
  measuring_ = true;
  for (const Launch& launch : launches) {
    arguments.line = launch.line;
    arguments.first_launch = &launch == &launches.front();
    arguments.last_launch = alone && &launch == &launches.back();
    cuda_measure(queue_, launch.in_double, arguments);
  }
  measuring_ = !alone;
}

void Device::finish_measure(const DeviceStages& stages) {
  MeasureArguments arguments = measure_arguments(stages);  // of no tasks
  arguments.line.chunk_spans = 1;
  arguments.last_launch = true;
  cuda_measure(queue_, false, arguments);
  measuring_ = false;
}

void Device::update(const DeviceStages& stages, bool counts_skips) {
  const std::vector<Launch>& launches = current_->launches();
  for (const Launch& launch : launches) {
    const bool last = &launch == &launches.back();
    cuda_update(queue_, launch.rule, launch.in_double,
                {launch.line, stages, control(), last && counts_skips});
  }
}

void Device::accumulate() {
  for (const Launch& launch : current_->launches()) {
    cuda_accumulate(queue_, launch.in_double, launch.line);
  }
}

}  // namespace fusedopt
