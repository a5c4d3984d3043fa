// Averages of tensors that no step updates here.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"
#include "layout.h"
#include "overlap.h"
#include "pytensor.h"

namespace fusedopt {

// Reads what the kernels can work on as plain arrays: real numbers on the CPU.
inline bool read_reals(const py::object& tensor, View* view) {
  return read_tensor(tensor.ptr(), view) == Reading::kOk && view->device == kHost &&
         !view->complex && is_float(view->dtype) && !is_negated(tensor.ptr()) &&
         reinterpret_cast<uintptr_t>(view->data) % item_size(view->dtype) == 0;
}

// Does mean += weight (value - mean) in place, on infinities as update.h says, and calls written(),
// again when an interrupt has broken that off. False, with nothing written, when a pair is not of
// the kernels: a mean in float32 or float64 and a value that is at most as wide, with one shape and
// one order in memory, without gaps, and apart from all else that is written.
inline bool average(const std::vector<py::object>& means, const std::vector<py::object>& values,
                    double weight, int threads, const py::function& written) {
  if (means.size() != values.size()) throw py::value_error("means and values differ in number");
  const size_t n = means.size();
  std::vector<Extras> extras(n);
  std::vector<Task> tasks(n);
  std::vector<const Task*> listed;
  std::vector<int64_t> begin = {0};
  Overlaps memory;
  for (size_t i = 0; i < n; ++i) {
    View mean, value;
    Layout layout;
    if (!read_reals(means[i], &mean) || !read_reals(values[i], &value)) return false;
    if (!same_shape(mean, value) || item_size(mean.dtype) < 4 ||
        item_size(value.dtype) > item_size(mean.dtype)) {
      return false;
    }
    const int64_t numel = count(mean);
    if (numel == 0) continue;
    const Order order = memory_order(mean);
    if (describe(mean, order, &layout) || describe(value, order, &layout)) return false;
    extras[i].ema = {mean.data, mean.dtype, nullptr};
    tasks[i].param = {value.data, value.dtype, nullptr};
    tasks[i].numel = numel;
    tasks[i].extras = &extras[i];
    listed.push_back(&tasks[i]);
    begin.push_back(begin.back() + numel + kTaskOverhead);
    memory.add(mean.data, span(mean), int32_t(i));
  }
  memory.find(int32_t(n));
  for (size_t i = 0; i < n; ++i) {
    const Operand& value = tasks[i].param;
    memory.add_reader(value.data, tasks[i].numel * item_size(value.dtype), int32_t(i));
  }
  if (memory.any()) return false;
  if (!listed.empty()) {
    const Plan plan = {nullptr, listed.data(), int64_t(listed.size()), begin.data(), {}};
    py::gil_scoped_release nogil;
    cpu_average(plan, weight, threads);
  }
  try {
    written();
  } catch (const py::error_already_set&) {
    written();
    throw;
  }
  return true;
}

}  // namespace fusedopt
