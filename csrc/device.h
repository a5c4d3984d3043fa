// The part of a step that happens on one CUDA device: what is kept in its memory, and launches.
#pragma once

#include <memory>
#include <set>
#include <vector>

#include "cuda.h"
#include "cuda_table.h"
#include "pytensor.h"

namespace fusedopt {

// How Python provides device memory: as tensors of torch's, so that they show in its statistics.
struct TensorMemory {
  py::object allocate;      // (bytes, device) -> a tensor of zeros
  py::object allocate_for;  // (bytes, device, stream) -> a tensor for use on that stream
  py::object record;        // (tensor, device): it is in use on the device's current stream
};

// Throws when a device's current stream records a graph: for what must not be repeated by replays.
void check_not_capturing(int device);

class DeviceBuffer {
 public:
  // Replaces the memory by another one, for use on this queue.
  void allocate(const TensorMemory& memory, size_t bytes, const CudaQueue& queue);

  // To be called before it is used: torch must not give memory to someone else, once it is freed,
  // before all streams are done with it. (Nobody
  // knows those of replays; so a graph retains what it uses.)
  void use(const TensorMemory& memory, const CudaQueue& queue);

  const py::object& tensor() const { return tensor_; }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  py::object tensor_;
  char* data_ = nullptr;
  size_t bytes_ = 0;
  std::set<void*> streams_;
};

// A DeviceTable in device memory.
class ResidentTable {
 public:
  explicit ResidentTable(int64_t n_warps) : table_({n_warps, cuda_direct_formats}) {}

  // Copies what has changed. `same_tasks`: only gradients and groups may have, since last time.
  void load(const TensorMemory& memory, const CudaQueue& queue, const Plan& plan,
            const std::vector<DeviceCounter>& counters, const std::vector<DeviceRate>& rates,
            bool same_tasks);

  const std::vector<Launch>& launches() const { return table_.launches(); }

 private:
  void upload(const CudaQueue& queue, size_t begin, size_t end);

  DeviceTable table_;
  DeviceBuffer buffer_;
  std::vector<char> image_;   // as it shall be,
  std::vector<char> loaded_;  // and as it is
  bool complete_ = false;     // nothing has failed on the way from the one to the other
};

// A table that the graph which this queue records will read: in memory of its own, that holds it
// from now on, and for as long as the graph may be replayed. So does `other`, a tensor. Returns
// what has to be launched. Waits.
std::vector<Launch> write_captured(const TensorMemory& memory, const CudaQueue& queue,
                                   const Plan& plan, const std::vector<DeviceCounter>& counters,
                                   const std::vector<DeviceRate>& rates, const py::object& other);

class Device {
 public:
  Device(int index, const TensorMemory& memory) : index_(index), memory_(memory) {}
  Device(Device&&) = default;
  Device& operator=(Device&&) = default;
  ~Device();

  int index() const { return index_; }

  // Begins a step or accumulate(), on the stream that is the current one. Throws when that stream
  // records a graph, and the memory that the graph would work on is not there yet.
  void begin();

  // After the step, whether or not it has failed in between: then nothing is left of its norm.
  void end();

  void load(const Plan& plan, const std::vector<DeviceCounter>& counters,
            const std::vector<DeviceRate>& rates, bool same_tasks);

  // The norm. When others take part, each measures, not `alone`; their reports are made one, and
  // each finishes.
  void measure(const DeviceStages& stages, bool alone);
  void finish_measure(const DeviceStages& stages);

  // `counts_skips`: one device does.
  void update(const DeviceStages& stages, bool counts_skips);

  void accumulate();

  // The graph that records the step, or 0 (cuda_capture()).
  uint64_t capture() const { return capture_; }
  bool capturing() const { return capture_ != 0; }

  // A tensor of 8-byte words: those of DeviceControl, then the norm.
  const py::object& report() const { return report_.tensor(); }

  static constexpr int64_t kNormWord = sizeof(DeviceControl) / 8;
  static_assert(sizeof(DeviceControl) % 8 == 0);

 private:
  template <class Line>
  MeasureArguments<Line> measure_arguments(const DeviceStages& stages) const;
  void forget_measured();

  DeviceControl* control() const { return reinterpret_cast<DeviceControl*>(report_.data()); }

  int index_;
  TensorMemory memory_;
  CudaQueue queue_ = {};
  uint64_t capture_ = 0;
  bool measuring_ = false;  // measure() has not been followed by finish_measure() yet
  DeviceBuffer report_;     // and the norm's partial sums behind it
  std::unique_ptr<ResidentTable> table_;
  std::vector<Launch> launches_;  // of the step: of that table, or of a captured one
};

}  // namespace fusedopt
