// The options of a parameter group, read from its dict.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cuda_table.h"
#include "plan.h"
#include "pytensor.h"
#include "select.h"

namespace fusedopt {

// "betas.0" is element 0 of the option "betas"; "nesterov?" is 1 if the option is true, else 0.
struct Option {
  py::object key;
  int element = -1;  // -1: the option itself
  bool truth = false;

  explicit Option(std::string name) {
    if (name.back() == '?') {
      truth = true;
      name.pop_back();
    }
    const size_t dot = name.find('.');
    if (dot != std::string::npos) element = std::stoi(name.substr(dot + 1));
    key =
        py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.substr(0, dot).c_str()));
  }
};

// The options of the step (fusedopt/options.py), as a group may carry them: not to be read, for
// they are the optimizer's, but to be found equal to those.
struct CarriedOptions {
  std::vector<py::object> names;
  py::object check;  // check(attributes of the optimizer, group, its index): raises

  bool any(PyObject* dict) const {
    for (const py::object& name : names) {
      if (PyDict_GetItemWithError(dict, name.ptr()) != nullptr) return true;
    }
    return false;
  }
};

// The options that a family's rules read.
struct FamilyOptions {
  std::vector<Option> hyper, flags;
  int first_rule;

  FamilyOptions(const base::Family& family, int first_rule) : first_rule(first_rule) {
    for (const char* name : family.hyper) {
      if (name != nullptr) hyper.emplace_back(name);
    }
    for (const char* name : family.flags) {
      if (name != nullptr) flags.emplace_back(name);
    }
  }
};

// Reads one group at every step. Numbers, flags and strings cannot change but by being replaced by
// another object, so when a group's dict holds the very same objects as at the last step, what was
// read then holds. (Schedulers replace one or two of them; models with a group to each parameter
// have thousands.)
class GroupOptions {
 public:
  // Reads the group and returns its parameters' sequence (borrowed). `index` is for messages, and
  // `attributes` the optimizer's.
  PyObject* read(const FamilyOptions& options, const CarriedOptions& carried, PyObject* attributes,
                 PyObject* dict, int index) {
    PyObject* params = nullptr;
    if (!is_as_before(dict, &params)) {
      const bool may_carry = carries_ || !has_same_keys(dict);
      seen_.clear();  // reading may end half-way
      carries_ = may_carry && carried.any(dict);
      if (carries_) carried.check(py::handle(attributes), py::handle(dict), index);
      read_all(options, dict, index);
      params = remember(dict);
    }
    if (params == nullptr) {
      throw py::key_error("param group " + std::to_string(index) + " has no \"params\"");
    }
    return params;
  }

  // Has options that the group carries compared anew: the optimizer's may have changed.
  void forget_carried() {
    if (carries_) seen_.clear();
  }

  // The hyper-parameters, the rule and the sign. l1 is negative when the group says nothing of it.
  const Group& group() const { return group_; }

  // Why torch's implementation has to take this group, or null.
  const char* fallback() const { return fallback_; }

  // Which parameters on the CPU cannot be.
  bool capturable() const { return capturable_; }

  // Where the learning rate is when it is a tensor on a device: then hyper[0] is nan.
  int rate_device() const { return rate_device_; }
  const DeviceRate& rate() const { return rate_; }

  // Its number, for which the device is waited for.
  double read_rate() const {
    const double rate = PyFloat_AsDouble(rate_tensor_.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return rate;
  }

 private:
  static bool is_key(PyObject* key, const char* name) {
    return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
  }

  static bool is_immutable(PyObject* value) {
    if (PyTuple_CheckExact(value)) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
        if (!is_immutable(PyTuple_GET_ITEM(value, i))) return false;
      }
      return true;
    }
    return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
           PyUnicode_CheckExact(value) || value == Py_None;
  }

  bool is_as_before(PyObject* dict, PyObject** params) const {
    if (seen_.empty() || PyDict_GET_SIZE(dict) != Py_ssize_t(seen_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& [seen_key, seen_value] : seen_) {
      if (!PyDict_Next(dict, &position, &key, &value) || key != seen_key.ptr()) return false;
      if (!seen_value) {
        if (is_key(key, "params")) *params = value;
      } else if (value != seen_value.ptr()) {
        return false;
      }
    }
    return true;
  }

  bool has_same_keys(PyObject* dict) const {
    if (seen_.empty() || PyDict_GET_SIZE(dict) != Py_ssize_t(seen_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& seen : seen_) {
      if (!PyDict_Next(dict, &position, &key, &value) || key != seen.first.ptr()) return false;
    }
    return true;
  }

  // Keeps the objects alive, so that none can be replaced by another one at the same address; but
  // not the list of parameters, which the garbage collector must be able to free.
  PyObject* remember(PyObject* dict) {
    seen_.clear();
    PyObject* params = nullptr;
    bool immutable = true;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &position, &key, &value)) {
      const bool is_list = is_key(key, "params") || is_key(key, "param_names");
      if (is_key(key, "params")) params = value;
      immutable = immutable && (is_list || is_immutable(value));
      seen_.emplace_back(py::reinterpret_borrow<py::object>(key),
                         is_list ? py::object() : py::reinterpret_borrow<py::object>(value));
    }
    if (!immutable) seen_.clear();
    return params;
  }

  void read_all(const FamilyOptions& options, PyObject* dict, int index) {
    read_rate_tensor(PyDict_GetItemWithError(dict, options.hyper[0].key.ptr()));
    group_.hyper[0] = NAN;
    for (size_t i = rate_device_ == kHost ? 0 : 1; i < options.hyper.size(); ++i) {
      group_.hyper[i] = number(dict, options.hyper[i], index);
      check(dict, options.hyper, i, index);
    }
    int variant = 0;
    for (size_t i = 0; i < options.flags.size(); ++i) {
      if (number(dict, options.flags[i], index) != 0) variant |= 1 << i;
    }
    group_.rule = options.first_rule + variant;
    group_.sign = is_set(dict, "maximize") ? -1 : 1;
    group_.l1 = -1;
    if (PyDict_GetItemString(dict, "l1") != nullptr) {
      group_.l1 = number(dict, Option("l1"), index);
      if (!(group_.l1 >= 0 && group_.l1 < HUGE_VAL)) {
        throw py::value_error("param group " + std::to_string(index) +
                              ": l1 is negative or not finite");
      }
    }
    fallback_ = is_set(dict, "differentiable") ? "differentiable=True" : nullptr;
    capturable_ = is_set(dict, "capturable");
  }

  void read_rate_tensor(PyObject* lr) {
    rate_device_ = kHost;
    View view;
    if (lr == nullptr || PyFloat_CheckExact(lr) || read_tensor(lr, &view) != Reading::kOk) return;
    const bool known = view.dtype == DType::kFloat32 || view.dtype == DType::kFloat64;
    if (view.device == kHost || !known || view.complex || count(view) != 1) return;
    if (is_negated(lr)) return;
    rate_device_ = view.device;
    rate_ = {view.data, view.dtype};
    rate_tensor_ = py::reinterpret_borrow<py::object>(lr);
  }

  static bool is_set(PyObject* dict, const char* key) {
    PyObject* value = PyDict_GetItemString(dict, key);
    return value != nullptr && PyObject_IsTrue(value) == 1;
  }

  // What no constructor takes and no step can use: a number that is nan, or of several numbers, all
  // of which are decays, another count or one outside of [0, 1).
  void check(PyObject* dict, const std::vector<Option>& options, size_t i, int group) const {
    const Option& option = options[i];
    const double value = group_.hyper[i];
    const auto fail = [&](const std::string& wanted) {
      PyObject* const found = PyDict_GetItemWithError(dict, option.key.ptr());
      throw py::value_error("param group " + std::to_string(group) + ": " +
                            py::str(option.key).cast<std::string>() + " must be " + wanted + ": " +
                            text_of(py::repr(found).ptr()));
    };
    if (option.element < 0) {
      if (value != value) fail("a number");
      return;
    }
    if (!(value >= 0 && value < 1)) fail("at least 0 and below 1");
    Py_ssize_t wanted = 0;
    for (const Option& other : options) wanted += other.key.is(option.key);
    const Py_ssize_t n = PySequence_Size(PyDict_GetItemWithError(dict, option.key.ptr()));
    if (n != wanted) fail(std::to_string(wanted) + " numbers");
  }

  static double number(PyObject* dict, const Option& option, int group) {
    const auto text = [&] {
      return "param group " + std::to_string(group) + ": " + text_of(option.key.ptr());
    };
    PyObject* found = PyDict_GetItemWithError(dict, option.key.ptr());
    if (found == nullptr) throw py::key_error(text() + " is missing");
    if (option.truth) return PyObject_IsTrue(found) == 1;
    auto value = py::reinterpret_borrow<py::object>(found);
    if (option.element >= 0) {
      value = py::reinterpret_steal<py::object>(PySequence_GetItem(found, option.element));
    }
    // A float, an int, a bool, or a tensor of one element.
    const double number = value ? PyFloat_AsDouble(value.ptr()) : -1.0;
    if (PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(text() + " is not " + (option.element < 0 ? "a number" : "of numbers") +
                           ": " + text_of(py::repr(found).ptr()));
    }
    return number;
  }

  Group group_;
  bool carries_ = false;  // any CarriedOptions
  const char* fallback_ = nullptr;
  bool capturable_ = false;
  int rate_device_ = kHost;
  DeviceRate rate_;
  py::object rate_tensor_;
  // The dict's items when it was last read, in order; a null value for the parameters and
  // their names. Empty when
  // one of them could change unseen.
  std::vector<std::pair<py::object, py::object>> seen_;
};

}  // namespace fusedopt
