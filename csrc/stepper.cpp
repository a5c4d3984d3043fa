#include "stepper.h"

#include <algorithm>
#include <iterator>

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

// Calls f(count) for the accumulators of an optimizer's state.
template <class F>
void each_window(PyObject* state, F&& f) {
  Py_ssize_t position = 0;
  PyObject *param, *entries;
  while (PyDict_Next(state, &position, &param, &entries)) {
    PyObject* count = PyDict_Check(entries) ? PyDict_GetItemString(entries, "grad_count") : nullptr;
    if (int64_t* const data = count == nullptr ? nullptr : read_integer(count)) f(data);
  }
}

void set_attribute(PyObject* attributes, const char* name, int64_t value) {
  if (PyDict_SetItemString(attributes, name, py::int_(value).ptr()) != 0) {
    throw py::error_already_set();
  }
}

}  // namespace

py::dict family_states(const std::string& name) {
  py::dict squares;
  for (const auto& state : find_family(name).family->states) {
    if (state.name != nullptr) squares[state.name] = state.square;
  }
  return squares;
}

py::list family_vitals(const std::string& name) {
  const base::Family& family = *find_family(name).family;
  py::list names;
  if (family.counts_steps) names.append("step");
  for (const auto& state : family.states) {
    if (state.name != nullptr && state.flag < 0) names.append(state.name);
  }
  return names;
}

py::list family_hypers(const std::string& name) {
  const base::FamilyEntry& found = find_family(name);
  py::list names;
  for (const Option& option : FamilyOptions(*found.family, found.first_rule).hyper) {
    if (!option.truth && !names.contains(option.key)) names.append(option.key);
  }
  return names;
}

void end_window(PyObject* attributes, int skips) {
  PyObject* const state = PyDict_GetItemString(attributes, "state");
  if (state != nullptr && PyDict_Check(state)) {
    each_window(state, [](int64_t* count) { *count = 0; });
  }
  set_attribute(attributes, "_micro_batches", 0);
  if (skips == 0) return;
  PyObject* const before = PyDict_GetItemString(attributes, "_skipped_steps");
  set_attribute(attributes, "_skipped_steps",
                skips + (before == nullptr ? 0 : py::cast<int64_t>(py::handle(before))));
}

Stepper::Stepper(const std::string& family_name, CarriedOptions carried, py::object unshared,
                 const TensorMemory& memory)
    : unshared_(std::move(unshared)), carried_(std::move(carried)), memory_(memory) {
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
  for (GroupOptions& group : options_) group.forget_carried();
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
    attributes_ = attributes.ptr();
    PyObject* state = PyDict_GetItemString(attributes_, "state");
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
    has_grads_ = counters_stop_ = false;
    groups_.clear();
    state_items_.clear();
    state_ = state;
    if (!missing_.empty()) missing_ = py::list();
    if (!fallback_.empty()) fallback_ = py::list();
    entry_ = -1;
    for (Py_ssize_t g = 0; g < PySequence_Fast_GET_SIZE(group_list.ptr()); ++g) {
      gather_group(int(g), PySequence_Fast_GET_ITEM(group_list.ptr(), g));
    }
    if (described_) {
      for (Part& part : parts_) part.changed = true;
    }
    find_overlaps();
    if (overlaps_.any()) set_aside_overlaps();
    if (counters_stop_ && !accumulate_) replace_counters();
    has_host_ = false;
    for (const Active& active : active_) {
      const int device = entries_[active.entry].device;
      if (device == kHost)
        has_host_ = true;
      else
        part_of(device).active = true;
    }
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

py::list Stepper::devices() const {
  py::list devices;
  for (const Part& part : parts_) {
    if (part.active) devices.append(part.device.index());
  }
  return devices;
}

Stepper::Part& Stepper::part_of(int device) {
  for (Part& part : parts_) {
    if (part.device.index() == device) return part;
  }
  parts_.push_back({Device(device, memory_), {}, true, false, {}});
  return parts_.back();
}

void Stepper::prepare(double divisor, const py::dict& grad_scale, const py::dict& found_inf,
                      bool skip_nonfinite) {
  const auto number_at = [](const py::dict& tensors, int device) -> const float* {
    if (!tensors.contains(device)) return nullptr;
    View view;
    const py::object tensor = tensors[py::int_(device)];
    if (read_tensor(tensor.ptr(), &view) != Reading::kOk || view.device != device ||
        view.dtype != DType::kFloat32 || view.complex || count(view) != 1 ||
        is_negated(tensor.ptr())) {
      throw py::type_error("grad_scale or found_inf is not a number in float32 on its device");
    }
    return reinterpret_cast<const float*>(view.data);
  };
  grad_scale_ = grad_scale, found_inf_ = found_inf;
  plan(1 / divisor);
  for (Part& part : parts_) {
    if (!part.active) continue;
    const StepOptions& options = options_of_step_;
    part.stages.stages = plan_.stages;
    part.stages.divisor = divisor;
    part.stages.grad_scale = number_at(grad_scale, part.device.index());
    part.stages.found_inf = number_at(found_inf, part.device.index());
    part.stages.norm = options.norm_type;
    part.stages.max_grad_norm = options.max_grad_norm;
    part.stages.skip_nonfinite = skip_nonfinite;
  }
  load_devices();
  if (window_) check_window();
}

py::list Stepper::measure(int threads) {
  const auto n_parts =
      std::count_if(parts_.begin(), parts_.end(), [](auto& p) { return p.active; });
  const bool alone = n_parts + has_host_ == 1;
  py::list reports;
  for (Part& part : parts_) {
    if (!part.active) continue;
    part.device.measure(part.stages, alone);
    if (!alone) reports.append(part.device.report());
  }
  if (!tasks_.empty()) {
    py::gil_scoped_release nogil;
    norm_ = cpu_measure(plan_, options_of_step_.norm_type, threads);
  }
  if (norm_.nonfinite_task >= 0) norm_.nonfinite_task = plan_entries_[norm_.nonfinite_task];
  measured_ = true;
  if (alone || n_parts == 0) {
    clip();
  } else if (has_host_) {
    DeviceControl* const control = host_control();
    control->total = norm_.total / norm_.scale / norm_.scale;  // as devices have it
    control->nonfinite = norm_.nonfinite_task < 0 ? 0 : kFirstPlace - norm_.nonfinite_task;
    reports.append(host_report_);
  }
  return reports;
}

DeviceControl* Stepper::host_control() {
  if (!host_report_) host_report_ = memory_.allocate(sizeof(DeviceControl), kHost);
  View view;
  if (read_tensor(host_report_.ptr(), &view) != Reading::kOk || view.device != kHost) {
    throw std::runtime_error("there is no memory");
  }
  return reinterpret_cast<DeviceControl*>(view.data);
}

void Stepper::finish_measure() {
  for (Part& part : parts_) {
    if (part.active) part.device.finish_measure(part.stages);
  }
  if (!has_host_) return;
  const DeviceControl* const control = host_control();
  norm_.total = control->total, norm_.scale = 1;
  norm_.nonfinite_task = control->nonfinite == 0 ? -1 : int64_t(kFirstPlace - control->nonfinite);
  clip();
}

void Stepper::clip() {
  const double limit = options_of_step_.max_grad_norm;
  if (limit >= 0) plan_.stages.clip_coefficient = base::clip_coefficient(norm(), limit);
}

double Stepper::norm() const {
  return base::norm_of(options_of_step_.norm_type, norm_.total, plan_.stages.grad_multiplier) /
         norm_.scale;
}

py::dict Stepper::reports() const {
  py::dict reports;
  for (const Part& part : parts_) {
    if (part.device.report()) reports[py::int_(part.device.index())] = part.device.report();
  }
  return reports;
}

std::string Stepper::name_of(int64_t number) const {
  for (const Active& active : active_) {
    if (active.entry != number) continue;
    return describe_place({active.group, active.index, group_dicts_[active.group].ptr()});
  }
  throw py::index_error("no parameter of this step has that number");
}

void Stepper::run(int threads, bool stream) {
  if (stream) {
    if (!devices().empty()) throw std::runtime_error("stream=True is for the CPU only");
    for (Group& group : groups_) group.rule = stream_rule(group.rule);
  }
  wrote_ = true;
  if (window_) end_window(attributes_, 0);
  bool counts_skips = true;
  for (Part& part : parts_) {
    if (!part.active) continue;
    part.device.update(part.stages, counts_skips);
    counts_skips = false;
  }
  if (!tasks_.empty()) {
    py::gil_scoped_release nogil;
    for (int32_t number : plan_entries_) {
      const Entry& entry = entries_[number];
      if (entry.step) entry.write_step();
    }
    cpu_update(plan_, threads, measured_);
  }
  release();
}

void Stepper::accumulate(int threads, int64_t count) {
  plan(1);
  load_devices();
  if (count == 1) {
    window_capture_ = 0;
    for (const Part& part : parts_) {
      if (part.active) window_capture_ = part.device.capture();
    }
  }
  check_window();
  wrote_ = true;
  for (Part& part : parts_) {
    if (part.active) part.device.accumulate();
  }
  if (!tasks_.empty()) {
    py::gil_scoped_release nogil;
    cpu_accumulate(plan_, threads);
  }
  for (const Active& active : active_) {
    *entries_[active.entry].extra->grad_count = count;
    drop_grad(active.param);
  }
  // A micro-batch without gradients counts. Checkpoints know it by the accumulators of others.
  if (active_.empty()) {
    each_window(state_, [count](int64_t* c) {
      if (*c > 0) *c = count;
    });
  }
  set_attribute(attributes_, "_micro_batches", count);
  release();
}

void Stepper::check_window() const {
  for (const Part& part : parts_) {
    if (!part.active || part.device.capture() == window_capture_) continue;
    throw std::runtime_error(
        "accumulate() and the step() that follows must be captured in one CUDA graph, or none of "
        "them: what has been accumulated would not be there, or would be there again at each "
        "replay; zero_grad() drops it");
  }
}

void Stepper::plan(double multiplier) {
  begin_.assign(1, 0);
  tasks_.clear();
  plan_entries_.clear();
  for (const Active& active : active_) {
    const Entry& entry = entries_[active.entry];
    if (entry.device != kHost) continue;
    plan_entries_.push_back(active.entry);
    tasks_.push_back(&entry.task);
    begin_.push_back(begin_.back() + entry.task.numel + kTaskOverhead);
  }
  plan_ = {groups_.data(), tasks_.data(), int64_t(tasks_.size()), begin_.data(), {}};
  const StepOptions& options = options_of_step_;
  plan_.stages = {multiplier, options.max_grad_value, 1, options.ema_decay, options.ema_warmup};
}

void Stepper::load_devices() {
  for (Part& part : parts_) {
    if (!part.active) continue;
    part.device.begin();
    if (has_host_ && part.device.capturing()) {
      throw std::runtime_error(
          "a step with parameters on the CPU cannot be captured in a CUDA graph");
    }
  }
  for (Part& part : parts_) {
    if (part.active) load(&part);
  }
}

void Stepper::choose_rows(Part* part, const std::vector<int32_t>& wanted) const {
  std::vector<int32_t> rows;
  std::set_union(part->rows.begin(), part->rows.end(), wanted.begin(), wanted.end(),
                 std::back_inserter(rows));
  const auto is_gone = [&](int32_t number) {
    return number > entry_ || entries_[number].device != part->device.index() ||
           size_t(entries_[number].task.group) >= groups_.size();
  };
  rows.erase(std::remove_if(rows.begin(), rows.end(), is_gone), rows.end());
  if (rows == part->rows) return;
  part->rows = std::move(rows);
  part->changed = true;
}

void Stepper::load(Part* part) {
  const int device = part->device.index();
  std::vector<int32_t> wanted;
  for (const Active& active : active_) {
    if (entries_[active.entry].device == device) wanted.push_back(active.entry);
  }
  choose_rows(part, wanted);

  std::vector<const Task*> tasks;
  std::vector<DeviceCounter> counters;
  auto next = wanted.begin();
  for (int32_t number : part->rows) {
    Entry& entry = entries_[number];
    if (next != wanted.end() && *next == number) {
      ++next;
    } else {
      entry.task.grad.data = nullptr;
      if (entry.extra != nullptr) entry.extra->extras.accumulated = false;
    }
    tasks.push_back(&entry.task);
    counters.push_back({entry.step ? entry.step_data : nullptr, entry.step_dtype, 0, number});
  }
  std::vector<DeviceRate> rates(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (options_[g].rate_device() == device) rates[g] = options_[g].rate();
  }
  const Plan plan = {groups_.data(), tasks.data(), int64_t(tasks.size()), nullptr, {}};
  part->device.load(plan, counters, rates, !part->changed);
  if (!part->device.capturing()) part->changed = false;  // else that was another table
}

std::string Stepper::describe_place(const Place& place) {
  std::string text =
      "parameter " + std::to_string(place.index) + " of group " + std::to_string(place.group);
  PyObject* names = PyDict_GetItemString(place.group_dict, "param_names");
  if (names != nullptr && PyList_Check(names) && place.index < PyList_GET_SIZE(names)) {
    text += " (" + text_of(PyList_GET_ITEM(names, place.index)) + ")";
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
  const py::object params =
      as_sequence(options.read(*family_options_, carried_, attributes_, dict, index));
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
    gather_param({index, i, dict}, PySequence_Fast_GET_ITEM(params.ptr(), i));
  }
}

void Stepper::gather_param(const Place& place, PyObject* param) {
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

  const GroupOptions& options = options_[place.group];
  if (options.fallback() != nullptr) return fall_back(place, options.fallback());
  if (options.capturable() && is_on_host(param)) return fall_back(place, "capturable=True");
  const bool known = is_as_before(entry, param, grad);
  if (!known) {
    described_ = true;
    if (!describe_param(entry, place, param, grad)) return;
  }
  if (entry.task.group != place.group) described_ = true;
  entry.task.group = place.group;
  if (entry.step && entry.device == kHost) entry.task.step = entry.read_step() + 1;
  counters_stop_ |= entry.counter_stops();
  double& rate = groups_.back().hyper[0];
  if (options.rate_device() != kHost && options.rate_device() != entry.device && rate != rate) {
    rate = options.read_rate();
  }
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
  const int64_t* const data = count == nullptr ? nullptr : read_integer(count);
  return data != nullptr && *data > 0;
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
  if (p.device != entry.device || dampens() != entry.dampens) return false;
  if (grad != nullptr) {
    if (read_tensor(grad, &g) != Reading::kOk) return false;
    if (!entry.shape.matches(g) || g.complex || !is_float(g.dtype)) return false;
    if (g.device != p.device) return false;
    const uintptr_t ahead = uintptr_t(g.data) - uintptr_t(p.data);
    const auto reaches = [&](DType dtype) { return uint64_t(entry.task.numel * item_size(dtype)); };
    if (ahead < reaches(p.dtype) || -ahead < reaches(g.dtype)) return false;  // it is overwritten
    if (g.dtype != entry.task.grad.dtype || entry.task.grad.layout != nullptr) described_ = true;
    entry.grad_sizes = g.size;
    entry.task.grad = {g.data, g.dtype, nullptr};
  } else {
    entry.task.grad.data = nullptr;
  }
  if (p.data != entry.task.param.data) {
    if (is_negated(param)) return false;
    described_ = true;  // it may overlap others now
  }
  entry.param_sizes = p.size;
  entry.task.param.data = p.data;
  entry.task.first = entry.first_by_step;
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
      const int64_t n_blocks = (task.numel + kBlock - 1) / kBlock;
      for (const float* scale : extras->scale) {
        if (scale != nullptr) overlaps_.add(scale, n_blocks * sizeof(float), active.entry);
      }
    }
    if (entry.step) overlaps_.add(entry.step_data, item_size(entry.step_dtype), active.entry);
  }
  const bool moved = overlaps_.find(entry_ + 1);
  // Gradients seldom lie where they did; so those are looked at that are new in other respects,
  // too.
  for (const Active& active : active_) {
    const Task& task = entries_[active.entry].task;
    if (accumulate_ || !(moved || active.described) || task.grad.data == nullptr) continue;
    overlaps_.add_reader(task.grad.data, bytes(task.grad, task.numel), active.entry);
  }
  described_ = overlaps_.any_reader();
}

void Stepper::set_aside_overlaps() {
  const auto overlaps = [&](const Active& active) {
    if (!overlaps_.has(active.entry)) return false;
    fallback_.append(py::make_tuple(active.group, active.index,
                                    "parameters, state or gradients that share memory"));
    return true;
  };
  active_.erase(std::remove_if(active_.begin(), active_.end(), overlaps), active_.end());
}

}  // namespace fusedopt
