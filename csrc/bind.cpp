// The module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "average.h"
#include "convert.h"
#include "cpu.h"
#include "pytensor.h"
#include "stepper.h"

#ifndef FUSEDOPT_SOURCES  // of a build that setup.py has not made
#define FUSEDOPT_SOURCES ""
#endif

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;
  m.doc() = "fusedopt's kernels; see _C.pyi.";
  m.def("bind_torch", &bind_torch, py::arg("tensor_type"), py::arg("parameter_type"));
  m.def("cpu_isa", [] { return std::string(cpu_isa()); });
  m.def("cpu_isas", [] { return std::string(cpu_isas()); });
  m.def("cpu_has_threads", &cpu_has_threads);
  m.def("cuda_architectures", [] { return std::string(cuda_architectures()); });
  m.def("cuda_device_count", &cuda_device_count);
  m.def("device_type", [] { return std::string(cuda_kind().torch); });
  m.def(
      "is_capturing",
      [](int device) { return cuda_capture({device, current_stream(device)}) != 0; },
      py::arg("device"));
  m.def("check_not_capturing", &check_not_capturing, py::arg("device"));
  m.def("family_states", &family_states, py::arg("family"));
  m.def("family_vitals", &family_vitals, py::arg("family"));
  m.def("family_hypers", &family_hypers, py::arg("family"));
  m.attr("BLOCK") = kBlock;
  m.attr("SOURCES") = FUSEDOPT_SOURCES;
  py::dict words;
  words["total"] = offsetof(DeviceControl, total) / 8;
  words["nonfinite"] = offsetof(DeviceControl, nonfinite) / 8;
  words["found"] = offsetof(DeviceControl, found) / 8;
  words["skipped"] = offsetof(DeviceControl, skipped) / 8;
  words["norm"] = Device::kNormWord;
  m.attr("REPORT_WORDS") = words;

  m.def(
      "end_window",
      [](const py::dict& attributes, int skips) { end_window(attributes.ptr(), skips); },
      py::arg("attributes"), py::arg("skips"));

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
  m.def("average", &average, py::arg("means"), py::arg("values"), py::arg("weight"),
        py::arg("threads"), py::arg("written"));

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
      .def(py::init([](const std::string& family, const std::vector<py::object>& carried,
                       const py::object& check_carried, const py::object& unshared,
                       const py::object& allocate, const py::object& allocate_for,
                       const py::object& record) {
             return std::make_unique<Stepper>(family, CarriedOptions{carried, check_carried},
                                              unshared,
                                              TensorMemory{allocate, allocate_for, record});
           }),
           py::arg("family"), py::arg("carried"), py::arg("check_carried"), py::arg("unshared"),
           py::arg("allocate"), py::arg("allocate_for"), py::arg("record"))
      .def("configure", &Stepper::configure, py::arg("options"))
      .def("__enter__", &Stepper::begin)
      .def("__exit__", [](Stepper& stepper, const py::args&) { stepper.end(); })
      .def("wrote", &Stepper::wrote)
      .def("forget", &Stepper::forget)
      // A copy of an optimizer makes a stepper of its own.
      .def("__reduce__",
           [](const Stepper&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); })
      .def("gather", &Stepper::gather, py::arg("attributes"), py::arg("created"), py::arg("window"),
           py::arg("accumulate"))
      .def("has_grads", &Stepper::has_grads)
      .def("updated", &Stepper::updated)
      .def("has_host", &Stepper::has_host)
      .def("devices", &Stepper::devices)
      .def("prepare", &Stepper::prepare, py::arg("divisor"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("skip_nonfinite"))
      .def("measure", &Stepper::measure, py::arg("threads"))
      .def("finish_measure", &Stepper::finish_measure)
      .def("host_norm", &Stepper::host_norm)
      .def("reports", &Stepper::reports)
      .def("name_of", &Stepper::name_of, py::arg("number"))
      .def("run", &Stepper::run, py::arg("threads"), py::arg("stream"))
      .def("accumulate", &Stepper::accumulate, py::arg("threads"), py::arg("count"));
}
