// Reads an optimizer's groups, parameters, gradients and state into a Plan, and runs it. No math.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"
#include "entry.h"
#include "groups.h"
#include "layout.h"
#include "norm.h"
#include "overlap.h"
#include "plan.h"
#include "pytensor.h"
#include "select.h"

namespace fusedopt {

// The options of the step that are the optimizer's and not a group's (fusedopt/pipeline.py).
struct StepOptions {
  NormType norm_type = NormType::kNone;
  double max_grad_norm = -1;  // negative: none
  double max_grad_value = -1;
  WeightPrecision weight_precision = WeightPrecision::kNearest;
  bool coded_state = false;  // new state is in 8 bits
  double ema_decay = -1;     // negative: no average
  bool ema_warmup = false;
  double l1 = 0;
};

inline const base::FamilyEntry& find_family(const std::string& name) {
  for (const auto& entry : base::kFamilies) {
    if (name == entry.family->name) return entry;
  }
  throw py::value_error("no rule family \"" + name + "\"");
}

// A family's states, and whether they are squares, which in 8 bits have a format of their own.
inline py::dict family_states(const std::string& name) {
  py::dict squares;
  for (const auto& state : find_family(name).family->states) {
    if (state.name != nullptr) squares[state.name] = state.square;
  }
  return squares;
}

// Reads an optimizer at every step. Of what it saw at the last one it trusts nothing that may have
// changed since: parameters and gradients are looked at again. State is looked at again too,
// unless nobody can have touched it: the `state` attribute has not been asked for since the last
// step (its getter removes the mark `_state_seen` that gather() leaves), and no one else holds a
// reference to its dicts and tensors or shares their memory.
class Stepper {
 public:
  // `unshared(tensor)` says whether a tensor is the only one on its memory, and has neither weak
  // references nor an exported storage.
  Stepper(const std::string& family_name, py::object unshared) : unshared_(std::move(unshared)) {
    const base::FamilyEntry& found = find_family(family_name);
    family_ = found.family;
    first_rule_ = found.first_rule;
    family_options_ = std::make_unique<FamilyOptions>(*family_, first_rule_);
    for (const auto& state : family_->states) {
      if (state.name != nullptr) state_names_.push_back(PyUnicode_InternFromString(state.name));
    }
  }

  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  ~Stepper() {
    release();
    for (PyObject* key : state_names_) Py_DECREF(key);
  }

  void configure(const StepOptions& options) {
    options_of_step_ = options;
    ++epoch_;
    for (Entry& entry : entries_) entry.known = false;
  }

  // One step at a time: begin(), the step, end().
  void begin() {
    if (busy_) {
      throw std::runtime_error(
          "step() or accumulate() was called while another one runs, or within it");
    }
    busy_ = true;
  }
  void end() {
    busy_ = false;
    release();
  }

  // Lets go of the state: someone may be about to replace it, and count on its memory.
  void forget() {
    if (busy_) return;
    for (Entry& entry : entries_) entry.forget();
  }

  // Looks at everything and checks it. Nothing is written. Returns None when run() may follow, or
  // (missing, fallback): `missing` lists (group, parameter, [state names]) of the state that has
  // to be created, after which gather(created=true) must be called; `fallback` lists (group,
  // parameter, reason) of what these kernels do not take and run() will leave alone.
  // `attributes` is the optimizer's __dict__. `window`: look for accumulated gradients, too.
  // `accumulate`: accumulate() will follow and not run(), so of the state only the accumulated
  // gradients are needed.
  py::object gather(const py::dict& attributes, bool created, bool window, bool accumulate) {
    release();
    try {
      PyObject* state = PyDict_GetItemString(attributes.ptr(), "state");
      PyObject* groups = PyDict_GetItemString(attributes.ptr(), "param_groups");
      if (state == nullptr || !PyDict_Check(state)) throw py::type_error("state is not a dict");
      if (groups == nullptr) throw py::type_error("there are no param_groups");
      const py::object group_list = as_sequence(groups);
      PyObject* seen = PyDict_GetItemString(attributes.ptr(), "_state_seen");
      untouched_ = seen == state && has_references(state, 2);
      if (!untouched_) ++epoch_;
      created_ = created;
      window_ = window;
      accumulate_ = accumulate;
      has_grads_ = false;
      groups_.clear();
      state_items_.clear();
      state_ = state;
      if (!missing_.empty()) missing_ = py::list();
      if (!fallback_.empty()) fallback_ = py::list();
      entry_ = -1;
      for (Py_ssize_t g = 0; g < PySequence_Fast_GET_SIZE(group_list.ptr()); ++g) {
        gather_group(int(g), PySequence_Fast_GET_ITEM(group_list.ptr(), g));
      }
      find_overlaps();
      if (overlaps_.any()) set_aside_overlaps();
      if (seen != state && PyDict_SetItemString(attributes.ptr(), "_state_seen", state) != 0) {
        throw py::error_already_set();
      }
    } catch (...) {
      release();
      throw;
    }
    if (missing_.empty() && fallback_.empty()) return py::none();
    return py::make_tuple(missing_, fallback_);
  }

  // Whether any parameter has a gradient of its own, not only accumulated ones.
  bool has_grads() const { return has_grads_; }

  // The tensors that run() will write to and that others may know of: all parameters, and the
  // state that is not certainly ours alone.
  py::list updated() const {
    py::list tensors(active_.size());
    for (size_t i = 0; i < active_.size(); ++i) {
      Py_INCREF(active_[i].param);
      PyList_SET_ITEM(tensors.ptr(), Py_ssize_t(i), active_[i].param);
    }
    for (const Active& active : active_) {
      if (!active.described) continue;
      entries_[active.entry].for_each_object([&](const py::object& o) { tensors.append(o); });
    }
    return tensors;
  }

  // The norm of the gradients times `multiplier`, and the place of the first that is not finite, or
  // None. run() will clip by it.
  py::object measure(int threads, double multiplier) {
    plan(multiplier);
    Norm norm;
    if (!tasks_.empty()) {
      py::gil_scoped_release nogil;
      norm = cpu_measure(plan_, options_of_step_.norm_type, threads);
    }
    measured_ = true;
    if (options_of_step_.max_grad_norm >= 0) {
      clip_ = base::clip_coefficient(norm.value, options_of_step_.max_grad_norm);
    }
    if (norm.nonfinite_task < 0) return py::make_tuple(norm.value, py::none());
    const Active& active = active_[norm.nonfinite_task];
    PyObject* const dict = group_dicts_[active.group].ptr();
    return py::make_tuple(norm.value, describe_place({active.group, active.index, dict}));
  }

  // Carries out what gather() found, on gradients times `multiplier`. With `stream` the rule is
  // replaced by one that moves the same bytes and computes nothing of use: for benchmarks, on
  // tensors that may be spoilt.
  void run(int threads, double multiplier, bool stream) {
    plan(multiplier);
    if (stream) {
      for (Group& group : groups_) group.rule = stream_rule(group.rule);
    }
    if (!tasks_.empty()) {
      py::gil_scoped_release nogil;
      for (const Active& active : active_) {
        Entry& entry = entries_[active.entry];
        if (entry.step) entry.write_step();
        if (entry.extra != nullptr && entry.extra->grad_count != nullptr) {
          *entry.extra->grad_count = 0;
        }
      }
      cpu_update(plan_, threads, measured_);
    }
    release();
  }

  // Adds the gradients that gather() found to the accumulated ones, which then come from `count`
  // micro-batches, and sets them to None. Returns how many there were.
  int64_t accumulate(int threads, int64_t count) {
    plan(1);
    const int64_t n = int64_t(tasks_.size());
    if (n > 0) {
      py::gil_scoped_release nogil;
      for (const Active& active : active_) *entries_[active.entry].extra->grad_count = count;
      cpu_accumulate(plan_, threads);
    }
    for (const Active& active : active_) drop_grad(active.param);
    release();
    return n;
  }

 private:
  // A parameter that takes part in this step.
  struct Active {
    int32_t entry;
    int32_t group;
    Py_ssize_t index;
    PyObject* param;  // borrowed: its group owns it
    bool described;   // the long way
  };

  // Where a parameter stands, for messages.
  struct Place {
    int group;
    Py_ssize_t index;
    PyObject* group_dict;
  };

  static bool has_references(PyObject* object, Py_ssize_t n) {
#ifdef Py_GIL_DISABLED
    (void)object, (void)n;
    return false;  // counts are split between threads
#else
    return Py_REFCNT(object) == n;
#endif
  }

  void release() {
    for (PyObject* grad : grads_) Py_DECREF(grad);
    grads_.clear();
    active_.clear();
    param_lists_.clear();
    group_dicts_.clear();
    measured_ = false;
    clip_ = 1;
  }

  // Puts the Plan together.
  void plan(double multiplier) {
    begin_.assign(1, 0);
    tasks_.clear();
    for (const Active& active : active_) {
      const Task& task = entries_[active.entry].task;
      tasks_.push_back(&task);
      begin_.push_back(begin_.back() + task.numel + kTaskOverhead);
    }
    plan_ = {groups_.data(), tasks_.data(), int64_t(tasks_.size()), begin_.data(), {}};
    const StepOptions& options = options_of_step_;
    plan_.stages = {multiplier, options.max_grad_value, clip_, options.ema_decay,
                    options.ema_warmup};
  }

  static std::string describe_place(const Place& place) {
    std::string text =
        "parameter " + std::to_string(place.index) + " of group " + std::to_string(place.group);
    PyObject* names = PyDict_GetItemString(place.group_dict, "param_names");
    if (names != nullptr && PyList_Check(names) && place.index < PyList_GET_SIZE(names)) {
      text += " (" + py::str(PyList_GET_ITEM(names, place.index)).cast<std::string>() + ")";
    }
    return text;
  }

  [[noreturn]] static void fail(const Place& place, const std::string& what) {
    throw std::runtime_error(describe_place(place) + ": " + what);
  }

  // optimizer.state is keyed by tensors, and hashing one calls Python. Its iteration order hardly
  // ever changes, so each parameter remembers where its entry was.
  PyObject* state_of(PyObject* param) {
    if (state_items_.empty()) {
      Py_ssize_t position = 0;
      PyObject *key, *value;
      while (PyDict_Next(state_, &position, &key, &value)) state_items_.push_back({key, value});
    }
    if (size_t(entry_) >= state_hints_.size()) state_hints_.resize(entry_ + 1, 0);
    size_t& hint = state_hints_[entry_];
    if (hint < state_items_.size() && state_items_[hint].first == param) {
      return state_items_[hint].second;
    }
    for (size_t i = 0; i < state_items_.size(); ++i) {
      // Usually the neighbour of the last one found.
      const size_t at = (last_hit_ + 1 + i) % state_items_.size();
      if (state_items_[at].first == param) {
        hint = last_hit_ = at;
        return state_items_[at].second;
      }
    }
    return nullptr;
  }

  // Usually a list already; stock iterates over whatever it is.
  static py::object as_sequence(PyObject* object) {
    PyObject* sequence = PySequence_Fast(object, "param_groups and params must be sequences");
    if (sequence == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(sequence);
  }

  void gather_group(int index, PyObject* dict) {
    if (!PyDict_Check(dict)) {
      throw py::type_error("param group " + std::to_string(index) + " is not a dict");
    }
    if (size_t(index) == options_.size()) options_.emplace_back();
    GroupOptions& options = options_[index];
    const py::object params = as_sequence(options.read(*family_options_, dict, index));
    param_lists_.push_back(params);  // keeps the parameters alive until the step is over
    groups_.push_back(options.group());
    if (groups_.back().l1 < 0) groups_.back().l1 = options_of_step_.l1;
    group_dicts_.push_back(py::reinterpret_borrow<py::object>(dict));

    // The states of this variant, in the order in which the rule knows them.
    n_states_ = 0;
    for (size_t i = 0; i < state_names_.size(); ++i) {
      if (has_state(groups_.back().rule, i)) group_states_[n_states_++] = state_names_[i];
    }
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
      prefetch(entry_ + 1 + kAhead);
      if (size_t(++entry_) == entries_.size()) entries_.emplace_back();
      gather_param({index, i, dict}, PySequence_Fast_GET_ITEM(params.ptr(), i), options.fallback());
    }
  }

  void gather_param(const Place& place, PyObject* param, const char* group_reason) {
    PyObject* grad = read_grad(param);
    Entry& entry = entries_[entry_];
    if (grad == Py_None) {
      Py_DECREF(grad);
      grad = nullptr;
      if (accumulate_ || !window_ || !has_window(entry, param)) return;
    } else {
      grads_.push_back(grad);  // keeps it alive until the step is over
      has_grads_ = true;
    }

    if (group_reason != nullptr) return fall_back(place, group_reason);
    const bool known = is_as_before(entry, param, grad);
    if (!known) {
      described_ = true;
      if (!describe_param(entry, place, param, grad)) return;
    }
    entry.task.group = place.group;
    if (entry.step) entry.task.step = entry.read_step() + 1;
    if (entry.extra != nullptr) {
      const int64_t* count = entry.extra->grad_count;
      entry.extra->extras.accumulated = count != nullptr && *count > 0;
    }
    active_.push_back({entry_, place.group, place.index, param, !known});
  }

  // Whether the parameter has accumulated gradients.
  bool has_window(const Entry& entry, PyObject* param) {
    if (entry.known && entry.param == param && untouched_ && entry.epoch == epoch_) {
      return entry.extra != nullptr && entry.extra->grad_count != nullptr &&
             *entry.extra->grad_count > 0;
    }
    PyObject* dict = state_of(param);
    PyObject* count =
        dict == nullptr || !PyDict_Check(dict) ? nullptr : PyDict_GetItemString(dict, "grad_count");
    View view;
    return count != nullptr && read_tensor(count, &view) == Reading::kOk &&
           view.dtype == DType::kInt64 && count_is_one(view) &&
           *reinterpret_cast<const int64_t*>(view.data) > 0;
  }

  static bool count_is_one(const View& view) { return !view.complex && count(view) == 1; }

  static constexpr int32_t kAhead = 8;

  // The objects of a model lie all over memory: have a later parameter's on their way.
  void prefetch(int32_t number) const {
    if (size_t(number) >= entries_.size()) return;
    const Entry& entry = entries_[number];
    __builtin_prefetch(entry.param);
    __builtin_prefetch(entry.state_dict.ptr());
    __builtin_prefetch(entry.step.ptr());
    for (int k = 0; k < n_states_; ++k) __builtin_prefetch(entry.states[k].ptr());
    for (const void* sizes : {entry.param_sizes, entry.grad_sizes}) {
      const char* middle = static_cast<const char*>(sizes);
      for (int line = -1; line <= 1; ++line) __builtin_prefetch(middle + line * 64);
    }
  }

  void fall_back(const Place& place, const char* reason) {
    fallback_.append(py::make_tuple(place.group, place.index, reason));
  }

  // The short way: everything is as it was but, perhaps, where parameter and gradient lie.
  bool is_as_before(Entry& entry, PyObject* param, PyObject* grad) {
    if (!entry.known || entry.param != param || entry.rule != groups_.back().rule) return false;
    if (entry.state_dict) {
      if (!untouched_ || entry.epoch != epoch_ || is_referenced(entry)) return false;
    }
    if (accumulate_ && (entry.extra == nullptr || entry.extra->grad_count == nullptr)) return false;
    View p, g;
    if (read_tensor(param, &p) != Reading::kOk) return false;
    if (!entry.shape.matches(p) || p.complex || p.dtype != entry.task.param.dtype) return false;
    if (grad != nullptr) {
      if (read_tensor(grad, &g) != Reading::kOk) return false;
      if (!entry.shape.matches(g) || g.complex || !is_float(g.dtype)) return false;
      entry.grad_sizes = g.size;
      entry.task.grad = {g.data, g.dtype, nullptr};
    } else {
      entry.task.grad = {};
    }
    if (p.data != entry.task.param.data) described_ = true;  // it may overlap another one now
    entry.param_sizes = p.size;
    entry.task.param.data = p.data;
    entry.task.first = false;
    return true;
  }

  // The long way, without assumptions. False when the parameter takes no part in run().
  bool describe_param(Entry& entry, const Place& place, PyObject* param, PyObject* grad) {
    entry.forget();
    View p, g;
    switch (read_tensor(param, &p)) {
      case Reading::kOk: break;
      case Reading::kOther:
        return fall_back(place, "a parameter that is not a plain dense tensor"), false;
      case Reading::kDevice:
        return fall_back(place, "a parameter on another device than the CPU"), false;
      case Reading::kDType: return fall_back(place, "a parameter of an unusual dtype"), false;
    }
    if (!is_float(p.dtype)) return fall_back(place, "a parameter of an unusual dtype"), false;
    if (grad != nullptr) {
      switch (read_tensor(grad, &g)) {
        case Reading::kOk: break;
        case Reading::kOther:
          return fall_back(place, "a gradient that is not a plain dense tensor"), false;
        case Reading::kDevice: fail(place, "its gradient is on another device");
        case Reading::kDType: fail(place, "its gradient has an unusual dtype");
      }
      if (!is_float(g.dtype)) fail(place, "its gradient has an unusual dtype");
      if (!same_shape(p, g)) {
        fail(place, "its shape is " + shape_text(p) + ", its gradient's " + shape_text(g));
      }
      if (p.complex != g.complex) fail(place, "it and its gradient are not both complex");
    }

    Task& task = entry.task;
    Described found;
    if (!describe_state(entry, place, param, p, &found)) return false;

    task.numel = count(p) * (p.complex ? 2 : 1);
    task.param = {p.data, p.dtype, nullptr};
    task.grad = {};
    if (grad != nullptr) task.grad = {g.data, g.dtype, nullptr};
    // A lazily negated tensor of several elements has gaps: it is half of a complex one.
    bool plain = task.numel > 1 && !p.complex && is_row_major(p);
    plain = plain && (grad == nullptr || is_row_major(g));
    for (int i = 0; i < found.n; ++i) {
      const View& view = found.view[i];
      *found.operand[i] = {view.data, view.dtype, nullptr};
      plain = plain && is_row_major(view);
    }
    if (!plain && !arrange(entry, place, param, p, found, grad, grad == nullptr ? p : g)) {
      return fall_back(place, "a parameter whose elements may overlap in memory"), false;
    }
    if (entry.extra != nullptr && !check_codes(entry, place)) return false;

    entry.param = param;
    entry.rule = groups_.back().rule;
    // A gradient with the parameter's own strides will then need no thought. (Single elements and
    // complex ones always do: they may be lazily negated or conjugated.)
    entry.known = !accumulate_ && task.numel > 1 && !p.complex && entry.shape.remember(p) &&
                  task.param.layout == nullptr;
    for (int i = 0; i < found.n; ++i) {
      entry.known = entry.known && found.operand[i]->layout == nullptr;
    }
    const bool own = entry.known && untouched_ && entry.state_dict;
    entry.epoch = own && !is_referenced(entry) && has_own_memory(entry) ? epoch_ : -1;
    return true;
  }

  // Whether someone holds the state's dict or one of its tensors, beside the dict above and us.
  static bool is_referenced(const Entry& entry) {
    bool alone = has_references(entry.state_dict.ptr(), 2);
    entry.for_each_object(
        [&](const py::object& object) { alone = alone && has_references(object.ptr(), 2); });
    return !alone;
  }

  bool has_own_memory(const Entry& entry) const {
    bool own = true;
    entry.for_each_object(
        [&](const py::object& object) { own = own && unshared_(object).cast<bool>(); });
    return own;
  }

  // The tensors of a parameter's state that have its shape, and where they go in its Task.
  struct Described {
    int n = 0;
    View view[kMaxStates + kShapedExtras];
    PyObject* object[kMaxStates + kShapedExtras];
    Operand* operand[kMaxStates + kShapedExtras];
  };

  static PyObject* hidden_name(WeightPrecision precision) {
    static PyObject* const k_names[] = {PyUnicode_InternFromString("master"),
                                        PyUnicode_InternFromString("remainder"),
                                        PyUnicode_InternFromString("kahan")};
    switch (precision) {
      case WeightPrecision::kMaster: return k_names[0];
      case WeightPrecision::kRemainder: return k_names[1];
      case WeightPrecision::kKahan: return k_names[2];
      default: return nullptr;
    }
  }

  // Finds and checks the parameter's state; false when some has to be created first.
  bool describe_state(Entry& entry, const Place& place, PyObject* param, const View& p,
                      Described* found) {
    static PyObject* const k_step = PyUnicode_InternFromString("step");
    static PyObject* const k_ema = PyUnicode_InternFromString("ema");
    static PyObject* const k_grad_sum = PyUnicode_InternFromString("grad_sum");
    static PyObject* const k_grad_count = PyUnicode_InternFromString("grad_count");
    static PyObject* const k_seed = PyUnicode_InternFromString("seed");
    const StepOptions& options = options_of_step_;
    if (!created_) entry.lacks_first = false;
    entry.task.first = entry.lacks_first;
    const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
    const WeightPrecision precision =
        half && !p.complex ? options.weight_precision : WeightPrecision::kNearest;
    const bool random = options.coded_state || precision == WeightPrecision::kStochastic;
    const bool counts = family_->counts_steps || random || options.ema_warmup;
    const bool averages = options.ema_decay >= 0;
    if (n_states_ == 0 && !counts && !averages && precision == WeightPrecision::kNearest &&
        !window_ && !accumulate_) {
      return true;
    }

    PyObject* dict = state_of(param);
    if (dict != nullptr && !PyDict_Check(dict)) fail(place, "its state is not a dict");
    py::list missing;
    std::string lost;  // without it, what is there means nothing
    bool any = false;
    const auto look_up = [&](PyObject* name) {
      PyObject* value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
      return py::reinterpret_borrow<py::object>(value == Py_None ? nullptr : value);
    };
    const auto find = [&](PyObject* name, bool optional) {
      py::object value = look_up(name);
      if (!value) {
        missing.append(py::handle(name));
        if (!optional) lost = quoted(name);
      } else {
        any = any || !optional;
      }
      return value;
    };
    const auto extra = [&](ExtraSlot slot) -> py::object& {
      if (entry.extra == nullptr) entry.extra = std::make_unique<ExtraState>();
      return entry.extra->objects[slot];
    };

    bool coded = false;
    if (!accumulate_) {
      if (counts) entry.step = find(k_step, !family_->counts_steps);
      for (size_t i = 0, k = 0; i < state_names_.size(); ++i) {
        if (!has_state(groups_.back().rule, i)) continue;
        entry.states[k] = find(state_names_[i], family_->states[i].flag >= 0);
        View view;
        if (entry.states[k] && read_tensor(entry.states[k].ptr(), &view) == Reading::kOk &&
            view.dtype == DType::kUInt8) {
          const py::str scale(py::str(py::handle(state_names_[i])).cast<std::string>() + "_scale");
          extra(ExtraSlot(kScale + k)) = look_up(scale.ptr());
          if (!entry.extra->objects[kScale + k]) {
            fail(place, "its state lacks " + quoted(scale.ptr()) + ", but has it in 8 bits");
          }
          entry.extra->extras.square[k] = family_->states[i].square;
          coded = true;
        }
        ++k;
      }
      if (any && !lost.empty()) fail(place, "its state lacks " + lost);
      if (PyObject* name = hidden_name(precision)) extra(kHidden) = find(name, true);
      if (averages) extra(kEma) = find(k_ema, true);
      if (random || coded) extra(kSeed) = find(k_seed, true);
      if (coded && !counts) entry.step = find(k_step, true);
    }
    if (accumulate_ || (window_ && look_up(k_grad_count))) {
      extra(kGradSum) = find(k_grad_sum, true);
      extra(kGradCount) = find(k_grad_count, true);
    }
    if (!missing.empty()) {
      if (!accumulate_ && n_states_ > 0 && !entry.states[0]) {
        entry.lacks_first = family_->first_writes_state;
      }
      missing_.append(py::make_tuple(place.group, place.index, missing));
      return false;
    }
    entry.state_dict = py::reinterpret_borrow<py::object>(dict);

    const auto add = [&](const py::object& object, PyObject* name, Operand* operand) {
      View& view = found->view[found->n];
      if (read_tensor(object.ptr(), &view) != Reading::kOk) {
        fail(place, "state[" + quoted(name) +
                        "] is not a dense floating-point tensor on the CPU, as it is itself");
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
          (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64)) {
        fail(place, "state['step'] is not a float32 or float64 tensor of one element on the CPU");
      }
      entry.step_data = view.data;
      entry.step_dtype = view.dtype;
    }
    if (entry.extra == nullptr) return true;

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
      check_dtype(is_float(add(objects[kEma], k_ema, &extras.ema)), k_ema,
                  "a floating-point tensor");
    }
    if (objects[kGradSum]) {
      check_dtype(is_float(add(objects[kGradSum], k_grad_sum, &extras.grad_sum)), k_grad_sum,
                  "a floating-point tensor");
    }
    const auto integer = [&](ExtraSlot slot, PyObject* name) -> int64_t* {
      if (!objects[slot]) return nullptr;
      View view;
      check_dtype(read_tensor(objects[slot].ptr(), &view) == Reading::kOk && count_is_one(view) &&
                      view.dtype == DType::kInt64,
                  name, "an int64 tensor of one element on the CPU");
      return reinterpret_cast<int64_t*>(view.data);
    };
    entry.extra->grad_count = integer(kGradCount, k_grad_count);
    if (const int64_t* seed = integer(kSeed, k_seed)) extras.seed = uint64_t(*seed);
    for (int k = 0; k < n_states_; ++k) {
      if (!objects[kScale + k]) continue;
      View view;
      const bool ok = read_tensor(objects[kScale + k].ptr(), &view) == Reading::kOk &&
                      view.dtype == DType::kFloat32 && !view.complex && is_row_major(view) &&
                      count(view) == (count(p) + kBlock - 1) / kBlock;
      if (!ok) {
        fail(place, "the scale of state[" + quoted(group_states_[k]) +
                        "] is not a float32 tensor " + "with an element for each " +
                        std::to_string(kBlock) + " of the state's");
      }
      extras.scale[k] = reinterpret_cast<float*>(view.data);
    }
    entry.task.extras = &extras;
    return true;
  }

  static std::string quoted(PyObject* name) { return py::repr(name).cast<std::string>(); }

  // Blocks of 8-bit state are runs of its memory, so it has to lie as its parameter does. False
  // when the parameter lies otherwise than when the state was made.
  bool check_codes(const Entry& entry, const Place& place) {
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

  // The general case of layouts. False when elements of what is written may overlap.
  bool arrange(Entry& entry, const Place& place, PyObject* param, const View& p,
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
      task.grad.data = g.data;
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

  static int64_t bytes(const Operand& operand, int64_t numel) {
    const Layout* layout = operand.layout;
    if (layout == nullptr) return numel * item_size(operand.dtype);
    int64_t last = 0;
    for (int d = 0; d < layout->ndim; ++d) last += (layout->size[d] - 1) * layout->stride[d];
    return (last + 1) * item_size(operand.dtype);
  }

  void find_overlaps() {
    const bool same = checked_.size() == active_.size() &&
                      std::equal(checked_.begin(), checked_.end(), active_.begin(),
                                 [](int32_t entry, const Active& a) { return entry == a.entry; });
    if (same && !described_) return;
    checked_.clear();
    for (const Active& active : active_) checked_.push_back(active.entry);
    overlaps_.clear();
    for (const Active& active : active_) {
      const Task& task = entries_[active.entry].task;
      overlaps_.add(task.param.data, bytes(task.param, task.numel), active.entry);
      const Entry& entry = entries_[active.entry];
      for (int k = 0; k < kMaxStates; ++k) {
        if (!entry.states[k]) continue;
        overlaps_.add(task.state[k].data, bytes(task.state[k], task.numel), active.entry);
      }
      if (const Extras* extras = task.extras) {
        for (const Operand* operand : {&extras->hidden, &extras->ema, &extras->grad_sum}) {
          if (operand->data == nullptr) continue;
          overlaps_.add(operand->data, bytes(*operand, task.numel), active.entry);
        }
      }
      if (entry.step) overlaps_.add(entry.step_data, item_size(entry.step_dtype), active.entry);
    }
    overlaps_.find(entry_ + 1);
    described_ = false;
  }

  // torch updates one parameter after the other, so it can take these.
  void set_aside_overlaps() {
    const auto overlaps = [&](const Active& active) {
      if (!overlaps_.has(active.entry)) return false;
      fallback_.append(
          py::make_tuple(active.group, active.index, "parameters or state that share memory"));
      return true;
    };
    active_.erase(std::remove_if(active_.begin(), active_.end(), overlaps), active_.end());
  }

  bool has_state(int rule, size_t state) const {
    const int flag = family_->states[state].flag;
    return flag < 0 || ((rule - first_rule_) >> flag & 1);
  }

  int states_of(int rule) const {
    int n = 0;
    for (size_t i = 0; i < state_names_.size(); ++i) n += has_state(rule, i);
    return n;
  }

  int stream_rule(int rule) const { return base::kStreamRule + states_of(rule); }

  const base::Family* family_ = nullptr;
  int first_rule_ = 0;
  std::vector<PyObject*> state_names_;
  py::object unshared_;
  StepOptions options_of_step_;

  std::unique_ptr<FamilyOptions> family_options_;
  std::vector<GroupOptions> options_;
  std::vector<Entry> entries_;  // one per parameter, counted over all groups
  std::vector<std::pair<PyObject*, PyObject*>> state_items_;
  std::vector<size_t> state_hints_;
  size_t last_hit_ = 0;
  Overlaps overlaps_;
  std::vector<int32_t> checked_;  // the entries whose overlaps are known

  // Of the step being taken.
  Plan plan_{};
  double clip_ = 1;
  bool measured_ = false;
  std::vector<Group> groups_;
  std::vector<py::object> group_dicts_;
  std::vector<Active> active_;
  std::vector<py::object> param_lists_;
  std::vector<PyObject*> grads_;  // owned until the step is over
  std::vector<const Task*> tasks_;
  std::vector<int64_t> begin_;
  py::list missing_, fallback_;
  PyObject* state_ = nullptr;
  bool untouched_ = false;
  int64_t epoch_ = 0;  // counts the gathers that found the state touched
  bool created_ = false;
  bool window_ = false;
  bool accumulate_ = false;
  bool has_grads_ = false;
  bool described_ = false;  // something may lie elsewhere than when overlaps were last looked for
  bool busy_ = false;

  // Of the group and parameter being gathered.
  int32_t entry_ = -1;
  PyObject* group_states_[kMaxStates];
  int n_states_ = 0;
};

}  // namespace fusedopt
