// The long way of looking at a parameter: without assumptions.
#include "stepper.h"

namespace fusedopt {
namespace {

// The state's entries that are not a rule's own.
struct Names {
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* master = PyUnicode_InternFromString("master");
  PyObject* remainder = PyUnicode_InternFromString("remainder");
  PyObject* kahan = PyUnicode_InternFromString("kahan");
  PyObject* ema = PyUnicode_InternFromString("ema");
  PyObject* grad_sum = PyUnicode_InternFromString("grad_sum");
  PyObject* grad_count = PyUnicode_InternFromString("grad_count");
  PyObject* seed = PyUnicode_InternFromString("seed");
};

const Names& names() {
  static const Names all;
  return all;
}

const char* const kNoDevice = cuda_kind().dlpack < 0
                                  ? "a parameter on another device than the CPU, and this build "
                                    "of fusedopt has no CUDA kernels"
                                  : "a parameter on a device that is neither the CPU nor CUDA";

PyObject* hidden_name(WeightPrecision precision) {
  switch (precision) {
    case WeightPrecision::kMaster: return names().master;
    case WeightPrecision::kRemainder: return names().remainder;
    case WeightPrecision::kKahan: return names().kahan;
    default: return nullptr;
  }
}

// A gradient of no elements may have no memory, but is there.
Operand gradient(const View& g) {
  static char nothing;
  return {g.data != nullptr ? g.data : &nothing, g.dtype, nullptr};
}

}  // namespace

bool Stepper::describe_param(Entry& entry, const Place& place, PyObject* param, PyObject* grad) {
  entry.forget();
  View p, g;
  switch (read_tensor(param, &p)) {
    case Reading::kOk: break;
    case Reading::kOther:
      return fall_back(place, "a parameter that is not a plain dense tensor"), false;
    case Reading::kDevice: return fall_back(place, kNoDevice), false;
    case Reading::kDType: return fall_back(place, "a parameter of an unusual dtype"), false;
  }
  if (!is_float(p.dtype)) return fall_back(place, "a parameter of an unusual dtype"), false;
  if (p.device != kHost && !cuda_runs_on(p.device)) {
    return fall_back(place,
                     "a parameter on a CUDA device for which this build of fusedopt has no "
                     "kernels (see FUSEDOPT_CUDA_ARCHS), or whose driver is older than the CUDA "
                     "that it was built with"),
           false;
  }
  if (grad != nullptr) {
    switch (read_tensor(grad, &g)) {
      case Reading::kOk: break;
      case Reading::kOther:
        return fall_back(place, "a gradient that is not a plain dense tensor"), false;
      case Reading::kDevice: fail(place, "its gradient is on another device");
      case Reading::kDType: fail(place, "its gradient has an unusual dtype");
    }
    if (g.device != p.device) fail(place, "its gradient is on another device");
    if (!is_float(g.dtype)) fail(place, "its gradient has an unusual dtype");
    if (!same_shape(p, g)) {
      fail(place, "its shape is " + shape_text(p) + ", its gradient's " + shape_text(g));
    }
    if (p.complex != g.complex) fail(place, "it and its gradient are not both complex");
  }

  entry.device = p.device;
  Task& task = entry.task;
  Described found;
  if (!find_state(entry, place, param, p)) return false;
  check_state(entry, place, p, &found);

  task.numel = count(p) * (p.complex ? 2 : 1);
  task.param = {p.data, p.dtype, nullptr};
  task.grad = {};
  if (grad != nullptr) task.grad = gradient(g);
  const bool negated = grad != nullptr && is_negated(grad);
  entry.negates |= negated;
  bool plain = task.numel > 1 && !p.complex && is_row_major(p) && !is_negated(param);
  plain = plain && (grad == nullptr || (is_row_major(g) && !negated));
  for (int i = 0; i < found.n; ++i) {
    const View& view = found.view[i];
    *found.operand[i] = {view.data, view.dtype, nullptr};
    plain = plain && is_row_major(view) && !is_negated(found.object[i]);
  }
  if (!plain && !arrange(entry, place, param, p, found, grad, grad == nullptr ? p : g)) {
    return fall_back(place,
                     "a parameter whose elements may overlap in memory, or are lazily negated or "
                     "conjugated"),
           false;
  }
  if (entry.extra != nullptr && !check_codes(entry, place)) return false;

  entry.param = param;
  entry.rule = groups_.back().rule;
  // A gradient with the parameter's own strides will then need no thought. (Single elements and
  // complex ones always do: autograd may leave them lazily negated or conjugated. So do those
  // whose gradient has ever been negated and without gaps, which only torch._neg_view() makes:
  // asking each gradient for that would take a tenth of a small step.)
  entry.known = !accumulate_ && task.numel > 1 && !p.complex && !entry.negates &&
                entry.shape.remember(p) && task.param.layout == nullptr;
  for (int i = 0; i < found.n; ++i) {
    entry.known = entry.known && found.operand[i]->layout == nullptr;
  }
  const bool own = entry.known && untouched_ && entry.state_dict;
  entry.epoch = own && !is_referenced(entry) && has_own_memory(entry) ? epoch_ : -1;
  return true;
}

bool Stepper::has_own_memory(const Entry& entry) const {
  bool own = true;
  entry.for_each_object(
      [&](const py::object& object) { own = own && unshared_(object).cast<bool>(); });
  return own;
}

bool Stepper::find_state(Entry& entry, const Place& place, PyObject* param, const View& p) {
  const StepOptions& options = options_of_step_;
  if (!created_) entry.lacks_first = false;
  entry.task.first = entry.lacks_first;
  entry.first_by_step = false;
  entry.dampens = dampens();
  const WeightPrecision precision = precision_of(p);
  if (precision == WeightPrecision::kRemainder && p.dtype == DType::kFloat16) {
    fail(place, "weight_precision='remainder' does not work with float16");
  }
  const bool random = options.random_state || precision == WeightPrecision::kStochastic;
  const bool counts = family_->counts_steps || random || options.ema_warmup;
  const bool averages = options.ema_decay >= 0;
  if (n_states_ == 0 && !counts && !averages && precision == WeightPrecision::kNearest &&
      !window_ && !accumulate_) {
    return true;
  }

  PyObject* dict = state_of(param);
  if (dict != nullptr && !PyDict_Check(dict)) fail(place, "its state is not a dict");
  py::list missing;
  const auto look_up = [&](PyObject* name) {
    PyObject* value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
    return py::reinterpret_borrow<py::object>(value == Py_None ? nullptr : value);
  };
  const auto find = [&](PyObject* name) {
    py::object value = look_up(name);
    if (!value) missing.append(py::handle(name));
    return value;
  };
  const auto extra = [&](ExtraSlot slot) -> py::object& {
    if (entry.extra == nullptr) entry.extra = std::make_unique<ExtraState>();
    return entry.extra->objects[slot];
  };

  bool coded = false;
  // Stock optimizers take state that is not empty for their own. So accumulators do not come
  // without a rule's state, unless the rule can do without.
  if (!accumulate_ || !family_->first_writes_state) {
    // Of what a rule cannot do without, there is either all or nothing.
    bool any = false;
    PyObject* lost = nullptr;
    const auto find_vital = [&](PyObject* name) {
      py::object value = find(name);
      if (value) any = true;
      if (!value) lost = name;
      return value;
    };
    if (family_->counts_steps) entry.step = find_vital(names().step);
    for (size_t i = 0, k = 0; i < state_names_.size(); ++i) {
      if (!has_state(groups_.back().rule, i)) continue;
      py::object& state = entry.states[k];
      state = family_->states[i].flag < 0 ? find_vital(state_names_[i]) : find(state_names_[i]);
      View view;
      if (state && read_tensor(state.ptr(), &view) == Reading::kOk && view.dtype == DType::kUInt8) {
        const py::str scale(text_of(state_names_[i]) + "_scale");
        extra(ExtraSlot(kScale + k)) = look_up(scale.ptr());
        if (!entry.extra->objects[kScale + k])
          fail(place, "its state lacks " + quoted(scale.ptr()));
        entry.extra->extras.square[k] = family_->states[i].square;
        coded = true;
      }
      ++k;
    }
    if (any && lost != nullptr) fail(place, "its state lacks " + quoted(lost));
    if (n_states_ > 0 && !entry.states[0]) entry.lacks_first = family_->first_writes_state;
  }
  if (!accumulate_) {
    if (p.device != kHost && n_states_ > 0 && entry.dampens) {
      // A device may skip the first update, and tells nobody but the counter.
      entry.first_by_step = !entry.states[0] || look_up(names().step);
    }
    if (p.device != kHost) entry.task.first = entry.first_by_step;
    if (!family_->counts_steps && (counts || coded || entry.first_by_step)) {
      entry.step = find(names().step);
    }
    if (PyObject* name = hidden_name(precision)) extra(kHidden) = find(name);
    if (averages) extra(kEma) = find(names().ema);
  }
  // Drawn as soon as there is state, so that a checkpoint of it repeats what follows.
  if (random || coded) extra(kSeed) = find(names().seed);
  if (accumulate_ || (window_ && look_up(names().grad_count))) {
    const py::object count = extra(kGradCount) = find(names().grad_count);
    const py::object sum = extra(kGradSum) = find(names().grad_sum);
    if (count && !sum) fail(place, "its state lacks 'grad_sum', but has 'grad_count'");
  }
  // Stock keeps counters on the CPU, too, and takes them in any dtype.
  if (entry.step) {
    View step;
    const Reading reading = read_tensor(entry.step.ptr(), &step);
    const bool counts = step.dtype == DType::kFloat32 || step.dtype == DType::kFloat64;
    if (reading == Reading::kDType ||
        (reading == Reading::kOk && (step.device != p.device || !counts))) {
      missing.append(py::handle(names().step));
    }
  }
  if (!missing.empty()) {
    missing_.append(py::make_tuple(place.group, place.index, missing));
    return false;
  }
  entry.state_dict = py::reinterpret_borrow<py::object>(dict);
  return true;
}

void Stepper::check_state(Entry& entry, const Place& place, const View& p, Described* found) {
  const auto add = [&](const py::object& object, PyObject* name, Operand* operand) {
    View& view = found->view[found->n];
    if (read_tensor(object.ptr(), &view) != Reading::kOk) {
      fail(place,
           "state[" + quoted(name) + "] is not a dense floating-point tensor, as it is itself");
    }
    if (view.device != p.device) {
      fail(place, "state[" + quoted(name) + "] is on another device");
    }
    if (!same_shape(view, p)) {
      fail(place, "state[" + quoted(name) + "] has the shape " + shape_text(view) + ", not " +
                      shape_text(p));
    }
    if (view.complex != p.complex) {
      fail(place, "it and state[" + quoted(name) + "] are not both complex");
    }
    found->object[found->n] = object.ptr();
    found->operand[found->n++] = operand;
    return view.dtype;
  };
  const auto check_dtype = [&](bool ok, PyObject* name, const char* wanted) {
    if (!ok) fail(place, "state[" + quoted(name) + "] is not " + wanted);
  };
  for (int k = 0; entry.states[0] && k < n_states_; ++k) {
    const DType dtype = add(entry.states[k], group_states_[k], &entry.task.state[k]);
    check_dtype(is_float(dtype) || (dtype == DType::kUInt8 && !p.complex), group_states_[k],
                "a floating-point tensor");
  }
  if (entry.step) {
    View view;
    if (read_tensor(entry.step.ptr(), &view) != Reading::kOk || !count_is_one(view) ||
        (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64) ||
        view.device != p.device || is_negated(entry.step.ptr())) {
      fail(place, "state['step'] is not a float32 or float64 tensor of one element on its device");
    }
    entry.step_data = view.data;
    entry.step_dtype = view.dtype;
  }
  if (entry.extra == nullptr) return;

  const WeightPrecision precision = precision_of(p);
  Extras& extras = entry.extra->extras;
  extras.precision = accumulate_ ? WeightPrecision::kNearest : precision;
  const auto& objects = entry.extra->objects;
  if (objects[kHidden]) {
    PyObject* const name = hidden_name(precision);
    const DType dtype = add(objects[kHidden], name, &extras.hidden);
    const bool master = precision == WeightPrecision::kMaster;
    check_dtype(master ? is_float(dtype) : dtype == DType::kInt16, name,
                master ? "a floating-point tensor" : "an int16 tensor");
  }
  if (objects[kEma]) {
    check_dtype(is_float(add(objects[kEma], names().ema, &extras.ema)), names().ema,
                "a floating-point tensor");
  }
  if (objects[kGradSum]) {
    check_dtype(is_float(add(objects[kGradSum], names().grad_sum, &extras.grad_sum)),
                names().grad_sum, "a floating-point tensor");
  }
  const auto integer = [&](ExtraSlot slot, PyObject* name) -> int64_t* {
    if (!objects[slot]) return nullptr;
    PyObject* const object = objects[slot].ptr();
    int64_t* const data = read_integer(object);
    check_dtype(data != nullptr && !is_negated(object), name,
                "an int64 tensor of one element on the CPU");
    return data;
  };
  extras.random_state = options_of_step_.random_state && objects[kSeed];
  entry.extra->grad_count = integer(kGradCount, names().grad_count);
  if (const int64_t* seed = integer(kSeed, names().seed)) extras.seed = uint64_t(*seed);
  for (int k = 0; k < n_states_; ++k) {
    if (!objects[kScale + k]) continue;
    View view;
    const bool ok = read_tensor(objects[kScale + k].ptr(), &view) == Reading::kOk &&
                    view.device == p.device && view.dtype == DType::kFloat32 && !view.complex &&
                    is_row_major(view) && count(view) == (count(p) + kBlock - 1) / kBlock &&
                    !is_negated(objects[kScale + k].ptr());
    if (!ok) {
      fail(place, "the scale of state[" + quoted(group_states_[k]) + "] is not a float32 tensor " +
                      "with an element for each " + std::to_string(kBlock) + " of the state's");
    }
    extras.scale[k] = reinterpret_cast<float*>(view.data);
  }
  entry.task.extras = &extras;
}

bool Stepper::check_codes(const Entry& entry, const Place& place) {
  py::list stale;
  for (int k = 0; entry.states[0] && k < n_states_; ++k) {
    const Operand& state = entry.task.state[k];
    if (state.dtype == DType::kUInt8 && state.layout != nullptr) {
      stale.append(py::handle(group_states_[k]));
    }
  }
  if (stale.empty()) return true;
  missing_.append(py::make_tuple(place.group, place.index, stale));
  return false;
}

void Stepper::replace_counters() {
  const py::list step(1);
  step[0] = py::handle(names().step);
  for (const Active& active : active_) {
    if (!entries_[active.entry].counter_stops()) continue;
    missing_.append(py::make_tuple(active.group, active.index, step));
  }
}

bool Stepper::arrange(Entry& entry, const Place& place, PyObject* param, const View& p,
                      const Described& found, PyObject* grad, View g) {
  for (int d = 0; d < p.ndim; ++d) {
    if (p.size[d] > 1 && p.stride != nullptr && p.stride[d] == 0) {
      fail(place, "some of its elements refer to a single memory location; clone() it first");
    }
  }
  if (!never_overlaps(p) || is_lazy(param)) return false;
  Task& task = entry.task;
  if (grad != nullptr && is_lazy(grad)) {
    py::object resolved = py::handle(grad).attr("resolve_conj")().attr("resolve_neg")();
    if (read_tensor(resolved.ptr(), &g) != Reading::kOk) return false;
    grads_.push_back(resolved.release().ptr());
    task.grad = gradient(g);
  }
  for (int i = 0; i < found.n; ++i) {
    if (!never_overlaps(found.view[i]) || is_lazy(found.object[i])) return false;
  }
  if (task.numel == 0) return true;
  if (entry.layouts == nullptr) {
    entry.layouts = std::make_unique<Layout[]>(2 + kMaxStates + kShapedExtras);
  }
  Layout* layout = entry.layouts.get();
  const Order order = memory_order(p);
  if (describe(p, order, layout)) task.param.layout = layout;
  if (grad != nullptr && describe(g, order, ++layout)) task.grad.layout = layout;
  for (int i = 0; i < found.n; ++i) {
    if (describe(found.view[i], order, ++layout)) found.operand[i]->layout = layout;
  }
  return true;
}

}  // namespace fusedopt
