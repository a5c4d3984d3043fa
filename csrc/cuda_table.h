// A Plan's tasks as the CUDA kernels read them: an image of device memory, made on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_plan.h"

namespace fusedopt {

// What a Plan does not say of a task.
struct DeviceCounter {
  void* step = nullptr;  // on the device; null: nothing counts the parameter's steps
  DType dtype = DType::kFloat32;
  double first_step = 0;  // where the counter stands before the first update
  int64_t place = 0;      // among all parameters of the step, for messages
};

// Instead of a group's hyper[0], its learning rate on the device.
struct DeviceRate {
  const void* lr = nullptr;
  DType dtype = DType::kFloat32;
};

// The tasks that share a rule and an arithmetic type.
struct Launch {
  int rule;
  bool in_double;
  DeviceLine line;
};

// The image has three parts, which change at different times: gradients (at each step, perhaps),
// groups (with the learning rate), and tasks (when parameters or state are others).
class DeviceTable {
 public:
  struct Part {
    size_t begin = 0, end = 0;
  };

  // `n_warps`, as many as run at a time, are to get several chunks each; but a chunk has at most
  // `most_spans`, and at least one.
  explicit DeviceTable(int64_t n_warps, int64_t most_spans = 32)
      : n_warps_(n_warps), most_spans_(most_spans) {}

  // Lays the image out, and returns its size. Counters go with tasks, rates (or none) with groups.
  // Tasks without gradients may be among the plan's: they take no part.
  size_t lay_out(const Plan& plan, const std::vector<DeviceCounter>& counters);

  // Write its parts, for a place in device memory (aligned to kAlignment), from the plan that
  // lay_out() saw or, all but the tasks, from another one with the same tasks.
  void write_grads(const Plan& plan, char* image) const;
  void write_groups(const Plan& plan, const std::vector<DeviceRate>& rates, char* image) const;
  void write_tasks(const Plan& plan, const std::vector<DeviceCounter>& counters, char* image,
                   const char* device);

  // What has to be launched, when the image is at the place that write_tasks() was told.
  const std::vector<Launch>& launches() const { return launches_; }

  Part grads() const { return grads_; }
  Part groups() const { return groups_; }
  Part tasks() const { return tasks_; }

  static constexpr size_t kAlignment = 256;

 private:
  // The tasks of one launch, and where its arrays are in the image.
  struct Kind {
    int rule;
    bool in_double;
    std::vector<int64_t> places;  // in the plan
    int64_t chunk_spans = 1;
    int64_t n_chunks = 0;
    size_t tasks = 0, grads = 0, first_span = 0, chunk_task = 0;
  };

  void find_kinds(const Plan& plan);

  int64_t n_warps_, most_spans_;
  int64_t n_groups_ = 0;
  std::vector<Kind> kinds_;
  std::vector<Launch> launches_;
  std::vector<size_t> layouts_;  // offsets, in the order in which write_tasks() meets them
  Part grads_, groups_, tasks_;
};

}  // namespace fusedopt
