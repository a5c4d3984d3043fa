// A tensor's Python object, seen from C++.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "layout.h"

namespace fusedopt {

namespace py = pybind11;

// Connects to torch's DLPack exchange API. Once, before all else.
void bind_torch(py::object tensor_type, py::object parameter_type);

enum class Reading {
  kOk,
  kOther,   // not a plain dense tensor: sparse, quantized, a wrapper subclass, ...
  kDevice,  // neither on the CPU nor on a device that this build has kernels for
  kDType,   // not a type that the kernels know
};

// Describes a tensor; valid while it is not changed.
Reading read_tensor(PyObject* object, View* view);

// Where an int64 tensor of one element on the CPU has it; null for any other object.
int64_t* read_integer(PyObject* object);

// torch's current stream of a device.
void* current_stream(int device);

// A new reference to the parameter's gradient, or to None.
PyObject* read_grad(PyObject* param);

// Sets the parameter's gradient to None.
void drop_grad(PyObject* param);

// True for a negated view, whose memory holds other numbers than it stands for; or a conjugated
// one.
bool is_negated(PyObject* tensor);
bool is_lazy(PyObject* tensor);

// str() of an object, for messages; what UTF-8 has no form for is escaped.
std::string text_of(PyObject* object);

std::string shape_text(const View& view);

}  // namespace fusedopt
