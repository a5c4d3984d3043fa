// What a Stepper remembers of one parameter.
#pragma once

#include <memory>

#include "layout.h"
#include "plan.h"
#include "pytensor.h"

namespace fusedopt {

// The entries of a parameter's state beside the rule's own and "step". Those with the parameter's
// shape come first.
enum ExtraSlot { kHidden, kEma, kGradSum, kGradCount, kSeed, kScale };
constexpr int kShapedExtras = 3;
constexpr int kExtraSlots = kScale + kMaxStates;

// The state's objects are owned: they outlive the step, whatever another thread does to the
// optimizer, and none can be replaced by another one at the same address.
struct ExtraState {
  py::object objects[kExtraSlots];
  Extras extras;
  int64_t* grad_count = nullptr;  // micro-batches in grad_sum; none: it holds nothing
};

// (The parameter is not owned, so that the garbage collector can free a model.)
struct Entry {
  PyObject* param = nullptr;  // borrowed, and only ever compared
  py::object state_dict;
  py::object states[kMaxStates];
  py::object step;
  int rule = -1;
  int device = kHost;
  bool known = false;  // described before, all in one shape: `shape` and `task` hold
  int64_t epoch = -1;  // when its state was found to be its own, and no one else's
  bool lacks_first = false;
  bool negates = false;               // a gradient has been negated lazily
  bool dampens = false;               // Stepper::dampens()
  bool first_by_step = false;         // state[0] has never been written as long as its "step" is 0
  const void* param_sizes = nullptr;  // where the tensors' own C++ objects were,
  const void* grad_sizes = nullptr;   // for prefetch()
  Shape shape;
  DType step_dtype = DType::kFloat32;
  char* step_data = nullptr;  // on the parameter's device
  Task task;
  std::unique_ptr<ExtraState> extra;
  std::unique_ptr<Layout[]> layouts;

  void forget() {
    state_dict = step = py::object();
    for (py::object& state : states) state = py::object();
    extra = nullptr;
    for (Operand& state : task.state) state = {};
    task.extras = nullptr;
    known = false;
    epoch = -1;
  }

  // (On the CPU.)
  double read_step() const {
    return step_dtype == DType::kFloat64 ? *reinterpret_cast<const double*>(step_data)
                                         : double(*reinterpret_cast<const float*>(step_data));
  }
  void write_step() const {
    if (step_dtype == DType::kFloat64) {
      *reinterpret_cast<double*>(step_data) = task.step;
    } else {
      *reinterpret_cast<float*>(step_data) = float(task.step);
    }
  }

  // Whether the counter cannot hold this step's number: a float32 stops at 2^24, and would have all
  // later steps round with the same random bits. On a device nobody reads the counter, so there it
  // must be float64 from the first step on.
  bool counter_stops() const {
    return step && step_dtype == DType::kFloat32 &&
           (device != kHost || double(float(task.step)) != task.step);
  }

  // Calls f(object) for everything in the state that is in use.
  template <class F>
  void for_each_object(F&& f) const {
    if (step) f(step);
    for (const py::object& state : states) {
      if (state) f(state);
    }
    if (extra == nullptr) return;
    for (const py::object& object : extra->objects) {
      if (object) f(object);
    }
  }
};

}  // namespace fusedopt
