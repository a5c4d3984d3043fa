// Reads an optimizer's groups, parameters, gradients and state into a Plan, and runs it. No math.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"
#include "groups.h"
#include "layout.h"
#include "overlap.h"
#include "plan.h"
#include "pytensor.h"
#include "select.h"

namespace fusedopt {

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
    for (const auto& entry : base::kFamilies) {
      if (family_name == entry.family->name) {
        family_ = entry.family;
        first_rule_ = entry.first_rule;
      }
    }
    if (family_ == nullptr) throw py::value_error("no rule family \"" + family_name + "\"");
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

  // One step at a time: begin(), the step, end().
  void begin() {
    if (busy_) throw std::runtime_error("step() was called while another one runs, or within it");
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
  // `attributes` is the optimizer's __dict__.
  py::object gather(const py::dict& attributes, bool created, double grad_scale) {
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
      groups_.clear();
      state_items_.clear();
      state_ = state;
      if (!missing_.empty()) missing_ = py::list();
      if (!fallback_.empty()) fallback_ = py::list();
      entry_ = -1;
      for (Py_ssize_t g = 0; g < PySequence_Fast_GET_SIZE(group_list.ptr()); ++g) {
        gather_group(int(g), PySequence_Fast_GET_ITEM(group_list.ptr(), g), grad_scale);
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
      const Entry& entry = entries_[active.entry];
      if (entry.step) tensors.append(entry.step);
      for (const py::object& state : entry.states) {
        if (state) tensors.append(state);
      }
    }
    return tensors;
  }

  // Carries out what gather() found. With `stream` the rule is replaced by one that moves the same
  // bytes and computes nothing of use: for benchmarks, on tensors that may be spoilt.
  void run(int threads, bool stream) {
    begin_.assign(1, 0);
    tasks_.clear();
    for (const Active& active : active_) {
      Entry& entry = entries_[active.entry];
      tasks_.push_back(&entry.task);
      begin_.push_back(begin_.back() + entry.task.numel + kTaskOverhead);
    }
    if (stream) {
      for (Group& group : groups_) group.rule = stream_rule(group.rule);
    }
    if (!tasks_.empty()) {
      const Plan plan{groups_.data(), tasks_.data(), int64_t(tasks_.size()), begin_.data()};
      py::gil_scoped_release nogil;
      if (family_->counts_steps) {
        for (const Active& active : active_) entries_[active.entry].write_step();
      }
      cpu_run(plan, threads);
    }
    release();
  }

 private:
  // What is known of one parameter. The state's objects are owned: they outlive the step, whatever
  // another thread does to the optimizer, and none can be replaced by another one at the same
  // address. (The parameter is not, so that the garbage collector can free a model.)
  struct Entry {
    PyObject* param = nullptr;  // borrowed, and only ever compared
    py::object state_dict;
    py::object states[kMaxStates];
    py::object step;
    int rule = -1;
    bool known = false;  // described before, all in one shape: `shape` and `task` hold
    int64_t epoch = -1;  // when its state was found to be its own, and no one else's
    bool lacks_first = false;
    const void* param_sizes = nullptr;  // where the tensors' own C++ objects were,
    const void* grad_sizes = nullptr;   // for prefetch()
    Shape shape;
    DType step_dtype = DType::kFloat32;
    char* step_data = nullptr;
    Task task;
    std::unique_ptr<Layout[]> layouts;

    void forget() {
      state_dict = step = py::object();
      for (py::object& state : states) state = py::object();
      epoch = -1;
    }

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
  };

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

  void gather_group(int index, PyObject* dict, double grad_scale) {
    if (!PyDict_Check(dict)) {
      throw py::type_error("param group " + std::to_string(index) + " is not a dict");
    }
    if (size_t(index) == options_.size()) options_.emplace_back();
    GroupOptions& options = options_[index];
    const py::object params = as_sequence(options.read(*family_options_, dict, index));
    param_lists_.push_back(params);  // keeps the parameters alive until the step is over
    groups_.push_back(options.group());
    groups_.back().grad_multiplier /= grad_scale;

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
    if (grad == Py_None) return Py_DECREF(grad);
    grads_.push_back(grad);  // keeps it alive until the step is over

    Entry& entry = entries_[entry_];
    if (group_reason != nullptr) return fall_back(place, group_reason);
    const bool known = is_as_before(entry, param, grad);
    if (!known) {
      described_ = true;
      if (!describe_param(entry, place, param, grad)) return;
    }
    entry.task.group = place.group;
    if (family_->counts_steps) entry.task.step = entry.read_step() + 1;
    active_.push_back({entry_, place.group, place.index, param, !known});
  }

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
    if (n_states_ > 0 || family_->counts_steps) {
      if (!untouched_ || entry.epoch != epoch_ || is_referenced(entry)) return false;
    }
    View p, g;
    if (read_tensor(param, &p) != Reading::kOk || read_tensor(grad, &g) != Reading::kOk) {
      return false;
    }
    if (!entry.shape.matches(p) || !entry.shape.matches(g) || p.complex || g.complex ||
        p.dtype != entry.task.param.dtype) {
      return false;
    }
    if (p.data != entry.task.param.data) described_ = true;  // it may overlap another one now
    entry.param_sizes = p.size;
    entry.grad_sizes = g.size;
    entry.task.param.data = p.data;
    entry.task.grad = {g.data, g.dtype, nullptr};
    entry.task.first = false;
    return true;
  }

  // The long way, without assumptions. False when the parameter takes no part in run().
  bool describe_param(Entry& entry, const Place& place, PyObject* param, PyObject* grad) {
    entry.known = false;
    View p, g;
    switch (read_tensor(param, &p)) {
      case Reading::kOk: break;
      case Reading::kOther:
        return fall_back(place, "a parameter that is not a plain dense tensor"), false;
      case Reading::kDevice:
        return fall_back(place, "a parameter on another device than the CPU"), false;
      case Reading::kDType: return fall_back(place, "a parameter of an unusual dtype"), false;
    }
    switch (read_tensor(grad, &g)) {
      case Reading::kOk: break;
      case Reading::kOther:
        return fall_back(place, "a gradient that is not a plain dense tensor"), false;
      case Reading::kDevice: fail(place, "its gradient is on another device");
      case Reading::kDType: fail(place, "its gradient has an unusual dtype");
    }
    if (!same_shape(p, g)) {
      fail(place, "its shape is " + shape_text(p) + ", its gradient's " + shape_text(g));
    }
    if (p.complex != g.complex) fail(place, "it and its gradient are not both complex");

    View states[kMaxStates];
    if (!describe_state(entry, place, param, p, states)) return false;

    Task& task = entry.task;
    task.numel = count(p) * (p.complex ? 2 : 1);
    task.param = {p.data, p.dtype, nullptr};
    task.grad = {g.data, g.dtype, nullptr};
    // A lazily negated tensor of several elements has gaps: it is half of a complex one.
    bool plain = task.numel > 1 && !p.complex && is_row_major(p) && is_row_major(g);
    for (int k = 0; k < n_states_; ++k) {
      task.state[k] = {states[k].data, states[k].dtype, nullptr};
      plain = plain && is_row_major(states[k]);
    }
    if (!plain && !arrange(entry, place, param, p, states, grad, g)) {
      return fall_back(place, "a parameter whose elements may overlap in memory"), false;
    }

    entry.param = param;
    entry.rule = groups_.back().rule;
    // A gradient with the parameter's own strides will then need no thought. (Single elements and
    // complex ones always do: they may be lazily negated or conjugated.)
    entry.known =
        task.numel > 1 && !p.complex && entry.shape.remember(p) && task.param.layout == nullptr;
    for (int k = 0; k < n_states_; ++k) {
      entry.known = entry.known && task.state[k].layout == nullptr;
    }
    const bool own = entry.known && untouched_ && entry.state_dict;
    entry.epoch = own && !is_referenced(entry) && has_own_memory(entry) ? epoch_ : -1;
    return true;
  }

  // Whether someone holds the state's dict or one of its tensors, beside the dict above and us.
  bool is_referenced(const Entry& entry) const {
    bool alone = has_references(entry.state_dict.ptr(), 2) &&
                 (!entry.step || has_references(entry.step.ptr(), 2));
    for (int k = 0; k < n_states_; ++k) alone = alone && has_references(entry.states[k].ptr(), 2);
    return !alone;
  }

  bool has_own_memory(const Entry& entry) const {
    bool own = !entry.step || unshared_(entry.step).cast<bool>();
    for (int k = 0; k < n_states_; ++k) own = own && unshared_(entry.states[k]).cast<bool>();
    return own;
  }

  // Reads the parameter's state; false when some has to be created first.
  bool describe_state(Entry& entry, const Place& place, PyObject* param, const View& p,
                      View* states) {
    static PyObject* const k_step = PyUnicode_InternFromString("step");
    entry.forget();
    entry.task.first = created_ && entry.lacks_first;
    entry.lacks_first = false;
    if (n_states_ == 0 && !family_->counts_steps) return true;

    PyObject* dict = state_of(param);
    if (dict != nullptr && !PyDict_Check(dict)) fail(place, "its state is not a dict");
    py::list missing;
    std::string lost;  // without it, what is there means nothing
    bool any = false;
    const auto find = [&](PyObject* name, bool optional) {
      PyObject* value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
      if (value == nullptr || value == Py_None) {
        missing.append(py::handle(name));
        if (!optional) lost = py::repr(name).cast<std::string>();
      } else {
        any = any || !optional;
      }
      return py::reinterpret_borrow<py::object>(value);
    };
    if (family_->counts_steps) entry.step = find(k_step, false);
    for (size_t i = 0, k = 0; i < state_names_.size(); ++i) {
      if (!has_state(groups_.back().rule, i)) continue;
      entry.states[k++] = find(state_names_[i], family_->states[i].flag >= 0);
    }
    if (any && !lost.empty()) fail(place, "its state lacks " + lost);
    if (!missing.empty()) {
      entry.lacks_first = family_->first_writes_state;
      missing_.append(py::make_tuple(place.group, place.index, missing));
      return false;
    }
    entry.state_dict = py::reinterpret_borrow<py::object>(dict);

    for (int k = 0; k < n_states_; ++k) {
      const auto name = [&] {
        return "state[" + py::repr(group_states_[k]).cast<std::string>() + "]";
      };
      if (read_tensor(entry.states[k].ptr(), &states[k]) != Reading::kOk) {
        fail(place, name() + " is not a dense floating-point tensor on the CPU, as it is itself");
      }
      if (!same_shape(states[k], p)) {
        fail(place, name() + " has the shape " + shape_text(states[k]) + ", not " + shape_text(p));
      }
      if (states[k].complex != p.complex) fail(place, "it and " + name() + " are not both complex");
    }
    if (entry.step) {
      View view;
      if (read_tensor(entry.step.ptr(), &view) != Reading::kOk || view.complex ||
          count(view) != 1 || item_size(view.dtype) < 4) {
        fail(place, "state['step'] is not a float32 or float64 tensor of one element on the CPU");
      }
      entry.step_data = view.data;
      entry.step_dtype = view.dtype;
    }
    return true;
  }

  // The general case of layouts. False when elements of what is written may overlap.
  bool arrange(Entry& entry, const Place& place, PyObject* param, const View& p, const View* states,
               PyObject* grad, View g) {
    for (int d = 0; d < p.ndim; ++d) {
      if (p.size[d] > 1 && p.stride != nullptr && p.stride[d] == 0) {
        fail(place, "some of its elements refer to a single memory location; clone() it first");
      }
    }
    if (!never_overlaps(p) || is_lazy(param)) return false;
    Task& task = entry.task;
    if (is_lazy(grad)) {
      py::object resolved = py::handle(grad).attr("resolve_conj")().attr("resolve_neg")();
      if (read_tensor(resolved.ptr(), &g) != Reading::kOk) return false;
      grads_.push_back(resolved.release().ptr());
      task.grad.data = g.data;
    }
    for (int k = 0; k < n_states_; ++k) {
      if (!never_overlaps(states[k]) || is_lazy(entry.states[k].ptr())) return false;
    }
    if (task.numel == 0) return true;
    if (entry.layouts == nullptr) entry.layouts = std::make_unique<Layout[]>(2 + kMaxStates);
    Layout* layout = entry.layouts.get();
    const Order order = memory_order(p);
    if (describe(p, order, layout)) task.param.layout = layout;
    if (describe(g, order, ++layout)) task.grad.layout = layout;
    for (int k = 0; k < n_states_; ++k) {
      if (describe(states[k], order, ++layout)) task.state[k].layout = layout;
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
      const int n_states = states_of(groups_[active.group].rule);
      for (int k = 0; k < n_states; ++k) {
        overlaps_.add(task.state[k].data, bytes(task.state[k], task.numel), active.entry);
      }
      const Entry& entry = entries_[active.entry];
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

  std::unique_ptr<FamilyOptions> family_options_;
  std::vector<GroupOptions> options_;
  std::vector<Entry> entries_;  // one per parameter, counted over all groups
  std::vector<std::pair<PyObject*, PyObject*>> state_items_;
  std::vector<size_t> state_hints_;
  size_t last_hit_ = 0;
  Overlaps overlaps_;
  std::vector<int32_t> checked_;  // the entries whose overlaps are known

  // Of the step being taken.
  std::vector<Group> groups_;
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
  bool described_ = false;  // something may lie elsewhere than when overlaps were last looked for
  bool busy_ = false;

  // Of the group and parameter being gathered.
  int32_t entry_ = -1;
  PyObject* group_states_[kMaxStates];
  int n_states_ = 0;
};

}  // namespace fusedopt
