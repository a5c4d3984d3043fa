// A Plan's tasks as the CUDA kernels read them: an image of device memory, made on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_formats.h"
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

// The tasks that share a rule, an arithmetic type and, where there is a kernel for them, formats.
struct Launch {
  int rule;
  bool in_double;
  int formats;        // of kFormats, or kAnyFormats:
  DeviceLine line;    // then this is their line,
  DirectLine direct;  // else this
};

// The image has three parts, which change at different times: gradients (at each step, perhaps),
// groups (with the learning rate), and tasks (when parameters or state are others).
class DeviceTable {
 public:
  struct Part {
    size_t begin = 0, end = 0;
  };

  // How a line is cut into chunks: `warps`, as many as run at a time, are to get several each, but
  // a chunk has no more spans, or tiles, than it says. `direct_formats`: how many of kFormats have
  // kernels for a rule (none: all tasks go to the general kernel).
  struct Cut {
    int64_t warps;
    int (*direct_formats)(int rule) = nullptr;
    int64_t most_spans = 32;
    int64_t most_tiles = int64_t(1) << 20;  // (Elements are counted in 32 bits.)
  };

  explicit DeviceTable(const Cut& cut) : cut_(cut) {}

  // Lays the image out, and returns its size. Counters go with tasks, rates (or none) with groups.
  // Tasks without gradients may be among the plan's: they take no part.
  size_t lay_out(const Plan& plan, const std::vector<DeviceCounter>& counters);

  // Write its parts, for a place in device memory (aligned to kAlignment), from the plan that
  // lay_out() saw or, all but the tasks, from another one with the same tasks. False when a
  // gradient is no longer as its kernel needs it: then everything has to be laid out anew.
  bool write_grads(const Plan& plan, char* image) const;
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
    int formats;
    std::vector<int64_t> places;      // in the plan
    std::vector<int64_t> chunk_task;  // of each chunk, by its place in this
    std::vector<int64_t> others;      // the same of tasks of no chunk, or several
    int64_t chunk_length = 1;         // in spans, or tiles
    size_t tasks = 0, grads = 0, first_span = 0, chunks = 0, other = 0;

    bool direct() const { return formats != kAnyFormats; }
  };

  void find_kinds(const Plan& plan);
  void cut(const Plan& plan, Kind* kind) const;
  Launch write_line(const Kind& kind, const Plan& plan, const std::vector<DeviceCounter>& counters,
                    char* image, const char* device, size_t* n_layouts) const;
  Launch write_direct_line(const Kind& kind, const Plan& plan,
                           const std::vector<DeviceCounter>& counters, char* image,
                           const char* device) const;

  Cut cut_;
  int64_t n_groups_ = 0;
  std::vector<Kind> kinds_;
  std::vector<Launch> launches_;
  std::vector<size_t> layouts_;  // offsets, in the order in which write_tasks() meets them
  Part grads_, groups_, tasks_;
};

}  // namespace fusedopt
