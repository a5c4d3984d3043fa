#include "stepper.h"

#include <algorithm>

#include "cpu.h"
#include "norm.h"

namespace fusedopt {
namespace {

const base::FamilyEntry& find_family(const std::string& name) {
  for (const auto& entry : base::kFamilies) {
    if (name == entry.family->name) return entry;
  }
  throw py::value_error("no rule family \"" + name + "\"");
}

}  // namespace

py::dict family_states(const std::string& name) {
  py::dict squares;
  for (const auto& state : find_family(name).family->states) {
    if (state.name != nullptr) squares[state.name] = state.square;
  }
  return squares;
}

void close_windows(PyObject* state) {
  Py_ssize_t position = 0;
  PyObject *param, *entries;
  while (PyDict_Next(state, &position, &param, &entries)) {
    PyObject* count = PyDict_Check(entries) ? PyDict_GetItemString(entries, "grad_count") : nullptr;
    View view;
    if (count != nullptr && read_tensor(count, &view) == Reading::kOk &&
        view.dtype == DType::kInt64 && fusedopt::count(view) == 1) {
      *reinterpret_cast<int64_t*>(view.data) = 0;
    }
  }
}

Stepper::Stepper(const std::string& family_name, py::object unshared)
    : unshared_(std::move(unshared)) {
  const base::FamilyEntry& found = find_family(family_name);
  family_ = found.family;
  first_rule_ = found.first_rule;
  family_options_ = std::make_unique<FamilyOptions>(*family_, first_rule_);
  for (const auto& state : family_->states) {
    if (state.name != nullptr) state_names_.push_back(PyUnicode_InternFromString(state.name));
  }
}

Stepper::~Stepper() {
  release();
  for (PyObject* key : state_names_) Py_DECREF(key);
}

void Stepper::configure(const StepOptions& options) {
  const StepOptions& old = options_of_step_;
  const bool same_state = options.weight_precision == old.weight_precision &&
                          options.random_state == old.random_state &&
                          (options.ema_decay >= 0) == (old.ema_decay >= 0) &&
                          options.ema_warmup == old.ema_warmup;
  options_of_step_ = options;
  if (same_state) return;
  for (Entry& entry : entries_) entry.known = false;
}

void Stepper::forget() {
  if (busy_) return;
  for (Entry& entry : entries_) entry.forget();
}

py::object Stepper::gather(const py::dict& attributes, bool created, bool window, bool accumulate) {
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

py::list Stepper::updated() const {
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

py::object Stepper::measure(int threads, double multiplier) {
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

void Stepper::run(int threads, double multiplier, bool stream) {
  plan(multiplier);
  if (stream) {
    for (Group& group : groups_) group.rule = stream_rule(group.rule);
  }
  if (window_) close_windows(state_);
  if (!tasks_.empty()) {
    py::gil_scoped_release nogil;
    for (const Active& active : active_) {
      const Entry& entry = entries_[active.entry];
      if (entry.step) entry.write_step();
    }
    cpu_update(plan_, threads, measured_);
  }
  release();
}

int64_t Stepper::accumulate(int threads, int64_t count) {
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

void Stepper::plan(double multiplier) {
  begin_.assign(1, 0);
  tasks_.clear();
  for (const Active& active : active_) {
    const Task& task = entries_[active.entry].task;
    tasks_.push_back(&task);
    begin_.push_back(begin_.back() + task.numel + kTaskOverhead);
  }
  plan_ = {groups_.data(), tasks_.data(), int64_t(tasks_.size()), begin_.data(), {}};
  const StepOptions& options = options_of_step_;
  plan_.stages = {multiplier, options.max_grad_value, clip_, options.ema_decay, options.ema_warmup};
}

std::string Stepper::describe_place(const Place& place) {
  std::string text =
      "parameter " + std::to_string(place.index) + " of group " + std::to_string(place.group);
  PyObject* names = PyDict_GetItemString(place.group_dict, "param_names");
  if (names != nullptr && PyList_Check(names) && place.index < PyList_GET_SIZE(names)) {
    text += " (" + py::str(PyList_GET_ITEM(names, place.index)).cast<std::string>() + ")";
  }
  return text;
}

PyObject* Stepper::state_of(PyObject* param) {
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

py::object Stepper::as_sequence(PyObject* object) {
  PyObject* sequence = PySequence_Fast(object, "param_groups and params must be sequences");
  if (sequence == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(sequence);
}

void Stepper::gather_group(int index, PyObject* dict) {
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

void Stepper::gather_param(const Place& place, PyObject* param, const char* group_reason) {
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

bool Stepper::has_window(const Entry& entry, PyObject* param) {
  if (entry.known && entry.param == param && untouched_ && entry.epoch == epoch_ &&
      !(entry.state_dict && is_referenced(entry))) {
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

void Stepper::prefetch(int32_t number) const {
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

bool Stepper::is_as_before(Entry& entry, PyObject* param, PyObject* grad) {
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

int64_t Stepper::bytes(const Operand& operand, int64_t numel) {
  const Layout* layout = operand.layout;
  if (layout == nullptr) return numel * item_size(operand.dtype);
  int64_t last = 0;
  for (int d = 0; d < layout->ndim; ++d) last += (layout->size[d] - 1) * layout->stride[d];
  return (last + 1) * item_size(operand.dtype);
}

void Stepper::find_overlaps() {
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

void Stepper::set_aside_overlaps() {
  const auto overlaps = [&](const Active& active) {
    if (!overlaps_.has(active.entry)) return false;
    fallback_.append(
        py::make_tuple(active.group, active.index, "parameters or state that share memory"));
    return true;
  };
  active_.erase(std::remove_if(active_.begin(), active_.end(), overlaps), active_.end());
}

}  // namespace fusedopt
