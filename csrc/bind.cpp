// The module.
#include <pybind11/pybind11.h>

#include <string>

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
  py::class_<Stepper>(m, "Stepper")
      .def(py::init<const std::string&, py::object>(), py::arg("family"), py::arg("unshared"))
      .def("begin", &Stepper::begin)
      .def("end", &Stepper::end)
      .def("forget", &Stepper::forget)
      // A copy of an optimizer makes a stepper of its own.
      .def("__reduce__",
           [](const Stepper&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); })
      .def("gather", &Stepper::gather, py::arg("attributes"), py::arg("created"),
           py::arg("grad_scale"))
      .def("updated", &Stepper::updated)
      .def("run", &Stepper::run, py::arg("threads"), py::arg("stream") = false);
}
