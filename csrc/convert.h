// Between the forms in which a state can be kept. For creating and loading state; the step itself
// converts on the way. All tensors: dense, on the CPU, with the same number of elements.
#pragma once

#include <string>

#include "cpu.h"
#include "layout.h"
#include "pytensor.h"

namespace fusedopt {

inline Operand dense(const py::object& tensor, const char* name, int64_t numel) {
  View view;
  if (read_tensor(tensor.ptr(), &view) != Reading::kOk || view.device != kHost || view.complex ||
      count(view) != numel || !(numel == 0 || is_row_major(view)) || is_negated(tensor.ptr())) {
    throw py::value_error(std::string(name) + " is not a contiguous tensor on the CPU with " +
                          std::to_string(numel) + " elements");
  }
  return {view.data, view.dtype, nullptr};
}

inline float* floats(const py::object& tensor, const char* name, int64_t numel) {
  const Operand operand = dense(tensor, name, numel);
  if (operand.dtype != DType::kFloat32) {
    throw py::value_error(std::string(name) + " is not float32");
  }
  return static_cast<float*>(operand.data);
}

inline Task weight_task(const py::object& param, const py::object& hidden,
                        WeightPrecision precision, int64_t numel, Extras* extras) {
  extras->precision = precision;
  extras->hidden = dense(hidden, "hidden", numel);
  const DType wanted = precision == WeightPrecision::kMaster ? DType::kFloat32 : DType::kInt16;
  if (extras->hidden.dtype != wanted) throw py::value_error("hidden has the wrong dtype");
  Task task;
  task.param = dense(param, "param", numel);
  task.numel = numel;
  task.extras = extras;
  return task;
}

inline void join_weights(const py::object& param, const py::object& hidden,
                         WeightPrecision precision, const py::object& whole, int64_t numel) {
  Extras extras;
  const Task task = weight_task(param, hidden, precision, numel, &extras);
  cpu_kernels().join_weights(task, floats(whole, "whole", numel));
}

inline void split_weights(const py::object& param, const py::object& hidden,
                          WeightPrecision precision, const py::object& whole, int64_t numel) {
  Extras extras;
  const Task task = weight_task(param, hidden, precision, numel, &extras);
  cpu_kernels().split_weights(task, floats(whole, "whole", numel));
}

inline Task state_task(const py::object& codes, const py::object& scale, bool square, int64_t numel,
                       Extras* extras) {
  extras->scale[0] = floats(scale, "scale", (numel + kBlock - 1) / kBlock);
  extras->square[0] = square;
  Task task;
  task.state[0] = dense(codes, "codes", numel);
  if (task.state[0].dtype != DType::kUInt8) throw py::value_error("codes is not uint8");
  task.numel = numel;
  task.extras = extras;
  return task;
}

inline void decode_state(const py::object& codes, const py::object& scale, bool square,
                         const py::object& values, int64_t numel) {
  Extras extras;
  const Task task = state_task(codes, scale, square, numel, &extras);
  cpu_kernels().decode_state(task, floats(values, "values", numel));
}

inline void encode_state(const py::object& codes, const py::object& scale, bool square,
                         const py::object& values, int64_t numel) {
  Extras extras;
  const Task task = state_task(codes, scale, square, numel, &extras);
  cpu_kernels().encode_state(task, floats(values, "values", numel));
}

}  // namespace fusedopt
