// The module.
#include <pybind11/pybind11.h>

#include <string>

#include "convert.h"
#include "cpu.h"
#include "pytensor.h"
#include "stepper.h"

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;
  m.doc() = "fusedopt's kernels; see _C.pyi.";
  m.def("bind_torch", &bind_torch, py::arg("tensor_type"), py::arg("parameter_type"));
  m.def("cpu_isa", [] { return std::string(cpu_isa()); });
  m.def("cpu_isas", [] { return std::string(cpu_isas()); });
  m.def("cpu_has_threads", &cpu_has_threads);
  m.def("family_states", &family_states, py::arg("family"));
  m.attr("BLOCK") = kBlock;

  m.def(
      "close_windows", [](const py::dict& state) { close_windows(state.ptr()); }, py::arg("state"));

  py::enum_<NormType>(m, "NormType")
      .value("none", NormType::kNone)
      .value("two", NormType::kTwo)
      .value("infinity", NormType::kInfinity);
  py::enum_<WeightPrecision>(m, "WeightPrecision")
      .value("nearest", WeightPrecision::kNearest)
      .value("master", WeightPrecision::kMaster)
      .value("remainder", WeightPrecision::kRemainder)
      .value("stochastic", WeightPrecision::kStochastic)
      .value("kahan", WeightPrecision::kKahan);
  m.def("join_weights", &join_weights, py::arg("param"), py::arg("hidden"), py::arg("precision"),
        py::arg("whole"), py::arg("numel"));
  m.def("split_weights", &split_weights, py::arg("param"), py::arg("hidden"), py::arg("precision"),
        py::arg("whole"), py::arg("numel"));
  m.def("decode_state", &decode_state, py::arg("codes"), py::arg("scale"), py::arg("square"),
        py::arg("values"), py::arg("numel"));
  m.def("encode_state", &encode_state, py::arg("codes"), py::arg("scale"), py::arg("square"),
        py::arg("values"), py::arg("numel"));

  py::class_<StepOptions>(m, "StepOptions")
      .def(py::init<>())
      .def_readwrite("norm_type", &StepOptions::norm_type)
      .def_readwrite("max_grad_norm", &StepOptions::max_grad_norm)
      .def_readwrite("max_grad_value", &StepOptions::max_grad_value)
      .def_readwrite("weight_precision", &StepOptions::weight_precision)
      .def_readwrite("random_state", &StepOptions::random_state)
      .def_readwrite("ema_decay", &StepOptions::ema_decay)
      .def_readwrite("ema_warmup", &StepOptions::ema_warmup)
      .def_readwrite("l1", &StepOptions::l1);

  py::class_<Stepper>(m, "Stepper")
      .def(py::init<const std::string&, py::object>(), py::arg("family"), py::arg("unshared"))
      .def("configure", &Stepper::configure, py::arg("options"))
      .def("begin", &Stepper::begin)
      .def("end", &Stepper::end)
      .def("forget", &Stepper::forget)
      // A copy of an optimizer makes a stepper of its own.
      .def("__reduce__",
           [](const Stepper&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); })
      .def("gather", &Stepper::gather, py::arg("attributes"), py::arg("created"), py::arg("window"),
           py::arg("accumulate"))
      .def("has_grads", &Stepper::has_grads)
      .def("updated", &Stepper::updated)
      .def("measure", &Stepper::measure, py::arg("threads"), py::arg("multiplier"))
      .def("run", &Stepper::run, py::arg("threads"), py::arg("multiplier"), py::arg("stream"))
      .def("accumulate", &Stepper::accumulate, py::arg("threads"), py::arg("count"));
}
