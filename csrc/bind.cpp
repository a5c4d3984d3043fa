// The module.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu.h"
#include "pytensor.h"
#include "select.h"
#include "stepper.h"

namespace fusedopt {
namespace {

py::dict families() {
  py::dict all;
  for (const auto& entry : base::kFamilies) {
    py::list states;
    for (const auto& state : entry.family->states) {
      if (state.name == nullptr) continue;
      states.append(py::make_tuple(
          state.name, state.flag < 0 ? py::object(py::none())
                                     : py::object(py::str(entry.family->flags[state.flag]))));
    }
    py::dict info;
    info["states"] = states;
    info["counts_steps"] = entry.family->counts_steps;
    all[entry.family->name] = info;
  }
  return all;
}

}  // namespace
}  // namespace fusedopt

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;
  m.doc() = "fusedopt's kernels; see _C.pyi.";
  m.def("bind_torch", &bind_torch, py::arg("tensor_type"), py::arg("parameter_type"));
  m.def("cpu_isa", [] { return std::string(cpu_isa()); });
  m.def("cpu_isas", [] { return std::string(cpu_isas()); });
  m.def("cpu_has_threads", &cpu_has_threads);
  m.def("families", &families);
  py::class_<Stepper>(m, "Stepper")
      .def(py::init<const std::string&, py::object>(), py::arg("family"), py::arg("unshared"))
      .def("gather", &Stepper::gather, py::arg("attributes"), py::arg("created"),
           py::arg("grad_scale"))
      .def("run", &Stepper::run, py::arg("threads"), py::arg("stream") = false);
}
