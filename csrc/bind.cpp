// The only file that knows Python: reads an optimizer's groups, parameters, gradients and state
// into a Plan, and runs it. No math.
//
// Nothing is remembered between steps but memory to work in. Each step looks at every object
// again, so that whatever was changed in between (a parameter's data, a state tensor, an option,
// a gradient that came or went) is simply what the step works on.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "cpu.h"
#include "exchange.h"
#include "layout.h"
#include "plan.h"
#include "select.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr int kMaxFlags = 2;

// --- What torch tells us, once ------------------------------------------------------------------

struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dispatch = nullptr;  // torch.Tensor.__torch_dispatch__
};

Torch torch;

void bind_torch(py::object tensor_type, py::object parameter_type) {
  py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr) {
    throw py::import_error("this torch offers no DLPack exchange API of major version 1");
  }
  torch.api = api;
  torch.dispatch = py::object(tensor_type.attr("__torch_dispatch__")).release().ptr();
  torch.tensor_type = tensor_type.release().ptr();
  torch.parameter_type = parameter_type.release().ptr();
}

// Tensors, parameters and their plain subclasses lie where DLPack says. A subclass with a
// __torch_dispatch__ of its own may be a wrapper around something else.
bool is_plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type == torch.tensor_type || type == torch.parameter_type) return true;
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch.tensor_type))) return false;
  py::handle dispatch = py::handle(type).attr("__torch_dispatch__");
  return dispatch.ptr() == torch.dispatch;
}

// --- Reading one tensor -------------------------------------------------------------------------

enum class Reading { kOk, kOther, kDevice, kDType };

Reading read_tensor(PyObject* object, View* view) {
  if (!is_plain(object)) return Reading::kOther;
  dlpack::Tensor t;
  if (torch.api->view(object, &t) != 0) {  // sparse, meta, quantized, ...
    PyErr_Clear();
    return Reading::kOther;
  }
  if (t.device.type != dlpack::kCPU) return Reading::kDevice;
  view->complex = t.dtype.code == dlpack::kComplex;
  const int bits = view->complex ? t.dtype.bits / 2 : t.dtype.bits;
  if (t.dtype.code == dlpack::kBFloat && bits == 16) {
    view->dtype = DType::kBFloat16;
  } else if (t.dtype.code == dlpack::kFloat || view->complex) {
    if (bits == 32) {
      view->dtype = DType::kFloat32;
    } else if (bits == 64) {
      view->dtype = DType::kFloat64;
    } else if (bits == 16) {
      view->dtype = DType::kFloat16;
    } else {
      return Reading::kDType;
    }
  } else {
    return Reading::kDType;
  }
  view->data = static_cast<char*>(t.data) + t.byte_offset;
  view->ndim = t.ndim;
  view->size = t.shape;
  view->stride = t.strides;
  return Reading::kOk;
}

// A conjugated or negated view holds other numbers than it stands for.
bool is_lazy(PyObject* tensor) {
  const py::handle t(tensor);
  return t.attr("is_conj")().cast<bool>() || t.attr("is_neg")().cast<bool>();
}

std::string shape_text(const View& view) {
  std::string text = "(";
  for (int d = 0; d < view.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.size[d]);
  return text + ")";
}

// --- The stepper --------------------------------------------------------------------------------

// A group option that is a hyper-parameter: "betas.0" is element 0 of the option "betas".
struct Option {
  PyObject* key;
  int element;
};

Option make_option(const char* name) {
  const char* dot = std::strchr(name, '.');
  const std::string key = dot == nullptr ? name : std::string(name, dot);
  return {PyUnicode_InternFromString(key.c_str()), dot == nullptr ? -1 : std::atoi(dot + 1)};
}

// The bytes that one parameter or state tensor occupies.
struct Extent {
  const char* begin;
  const char* end;
  int32_t entry;
  bool operator==(const Extent& other) const {
    return begin == other.begin && end == other.end && entry == other.entry;
  }
};

class Stepper {
 public:
  explicit Stepper(const std::string& family_name) {
    for (const auto& entry : base::kFamilies) {
      if (family_name == entry.family->name) {
        family_ = entry.family;
        first_rule_ = entry.first_rule;
      }
    }
    if (family_ == nullptr) throw py::value_error("no rule family \"" + family_name + "\"");
    for (const char* name : family_->hyper) {
      if (name != nullptr) hyper_.push_back(make_option(name));
    }
    for (const char* name : family_->flags) {
      if (name != nullptr) flags_.push_back(PyUnicode_InternFromString(name));
    }
    for (const auto& state : family_->states) {
      if (state.name != nullptr) state_names_.push_back(PyUnicode_InternFromString(state.name));
    }
  }

  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  ~Stepper() {
    release();
    for (const Option& option : hyper_) Py_DECREF(option.key);
    for (PyObject* key : flags_) Py_DECREF(key);
    for (PyObject* key : state_names_) Py_DECREF(key);
  }

  // Looks at everything and checks it. Nothing is written. Returns None when run() may follow, or
  // (missing, fallback): `missing` lists (group, parameter, [state names]) of the state that has
  // to be created, after which gather(created=True) must be called; `fallback` lists (group,
  // parameter, reason) of what these kernels do not take and run() will leave alone.
  py::object gather(py::list groups, py::dict state, bool created, double grad_scale) {
    if (running_) throw std::runtime_error("step() of one optimizer runs in two threads at once");
    release();
    groups_.clear();
    layouts_.clear();
    extents_.clear();
    missing_ = py::list();
    fallback_ = py::list();
    if (!created) first_entries_.clear();
    index_state(state.ptr());
    entry_ = -1;
    try {
      for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
        gather_group(int(g), PyList_GET_ITEM(groups.ptr(), g), grad_scale);
      }
      set_aside_overlaps(groups);
    } catch (...) {
      release();
      throw;
    }
    if (missing_.empty() && fallback_.empty()) return py::none();
    return py::make_tuple(missing_, fallback_);
  }

  // Carries out what gather() found, and returns the parameters that were updated. With `stream`
  // the rule is replaced by one that moves the same bytes and computes nothing of use: for
  // benchmarks, on tensors that may be spoilt.
  py::list run(int threads, bool stream) {
    begin_.clear();
    begin_.push_back(0);
    for (const Task& task : tasks_) begin_.push_back(begin_.back() + task.numel + kTaskOverhead);
    if (stream) {
      for (Group& group : groups_) group.rule = stream_rule(group.rule);
    }
    if (!tasks_.empty()) {
      const Plan plan{groups_.data(), tasks_.data(), int64_t(tasks_.size()), begin_.data()};
      running_ = true;
      {
        py::gil_scoped_release nogil;
        for (const Step& step : steps_) step.write();
        cpu_run(plan, threads);
      }
      running_ = false;
    }
    py::list updated(params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      Py_INCREF(params_[i]);
      PyList_SET_ITEM(updated.ptr(), Py_ssize_t(i), params_[i]);
    }
    release();
    return updated;
  }

 private:
  // A step counter: read when gathered, written when run.
  struct Step {
    char* data;
    DType dtype;
    double value;
    void write() const {
      if (dtype == DType::kFloat64) {
        *reinterpret_cast<double*>(data) = value;
      } else {
        *reinterpret_cast<float*>(data) = float(value);
      }
    }
  };

  // Where a parameter stands, for messages.
  struct Place {
    int group;
    Py_ssize_t index;
    PyObject* group_dict;
  };

  void release() {
    for (PyObject* grad : grads_) Py_DECREF(grad);
    grads_.clear();
    params_.clear();
    tasks_.clear();
    steps_.clear();
    task_entries_.clear();
  }

  static std::string describe_place(const Place& place) {
    std::string text = "parameter " + std::to_string(place.index) + " of group " +
                       std::to_string(place.group);
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
  void index_state(PyObject* state) {
    state_items_.clear();
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state, &position, &key, &value)) state_items_.push_back({key, value});
  }

  PyObject* state_of(PyObject* param) {
    if (size_t(entry_) >= state_hints_.size()) state_hints_.resize(entry_ + 1, 0);
    size_t& hint = state_hints_[entry_];
    if (hint < state_items_.size() && state_items_[hint].first == param) {
      return state_items_[hint].second;
    }
    for (size_t i = 0; i < state_items_.size(); ++i) {
      // Usually a neighbour of the last one found.
      const size_t at = (last_hit_ + 1 + i) % state_items_.size();
      if (state_items_[at].first == param) {
        hint = last_hit_ = at;
        return state_items_[at].second;
      }
    }
    return nullptr;
  }

  static double number(PyObject* value, int group, PyObject* key) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    const double number = PyFloat_AsDouble(value);  // an int, a bool, a one-element tensor
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error("param group " + std::to_string(group) + ": " +
                           py::str(key).cast<std::string>() + " is not a number: " +
                           py::repr(value).cast<std::string>());
    }
    return number;
  }

  static bool truth(PyObject* dict, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(dict, key);
    return value != nullptr && value != Py_False && PyObject_IsTrue(value) == 1;
  }

  double option(PyObject* dict, const Option& option, int group) const {
    PyObject* value = PyDict_GetItemWithError(dict, option.key);
    if (value != nullptr && option.element >= 0) {
      py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, option.element));
      if (!item) PyErr_Clear();
      if (item) return number(item.ptr(), group, option.key);
      value = nullptr;
    }
    if (value == nullptr) {
      throw py::key_error("param group " + std::to_string(group) + " has no usable option " +
                          py::repr(option.key).cast<std::string>());
    }
    return number(value, group, option.key);
  }

  void gather_group(int index, PyObject* dict, double grad_scale) {
    static PyObject* const k_params = PyUnicode_InternFromString("params");
    static PyObject* const k_maximize = PyUnicode_InternFromString("maximize");
    static PyObject* const k_differentiable = PyUnicode_InternFromString("differentiable");
    static PyObject* const k_capturable = PyUnicode_InternFromString("capturable");

    Group group;
    for (size_t i = 0; i < hyper_.size(); ++i) group.hyper[i] = option(dict, hyper_[i], index);
    int variant = 0;
    for (size_t i = 0; i < flags_.size(); ++i) {
      if (option(dict, {flags_[i], -1}, index) != 0) variant |= 1 << i;
    }
    group.rule = first_rule_ + variant;
    group.grad_multiplier = (truth(dict, k_maximize) ? -1 : 1) / grad_scale;
    groups_.push_back(group);

    // The states of this variant, in the order in which the rule knows them.
    n_states_ = 0;
    for (size_t i = 0; i < state_names_.size(); ++i) {
      const int flag = family_->states[i].flag;
      if (flag < 0 || (variant >> flag & 1)) group_states_[n_states_++] = state_names_[i];
    }

    PyObject* params = PyDict_GetItemWithError(dict, k_params);
    if (params == nullptr || !PyList_Check(params)) {
      throw py::key_error("param group " + std::to_string(index) + " has no list \"params\"");
    }
    const char* reason = truth(dict, k_differentiable) ? "differentiable=True"
                         : truth(dict, k_capturable)   ? "capturable=True"
                                                       : nullptr;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      ++entry_;
      gather_param({index, i, dict}, PyList_GET_ITEM(params, i), reason);
    }
  }

  void fall_back(const Place& place, const char* reason) {
    fallback_.append(py::make_tuple(place.group, place.index, reason));
  }

  void gather_param(const Place& place, PyObject* param, const char* group_reason) {
    static PyObject* const k_grad = PyUnicode_InternFromString("grad");
    PyObject* grad = PyObject_GetAttr(param, k_grad);
    if (grad == nullptr) throw py::error_already_set();
    grads_.push_back(grad);  // keeps it alive until the step is over
    if (grad == Py_None) return;
    if (group_reason != nullptr) return fall_back(place, group_reason);

    View p, g;
    switch (read_tensor(param, &p)) {
      case Reading::kOk: break;
      case Reading::kOther: return fall_back(place, "a parameter that is not a plain dense tensor");
      case Reading::kDevice: return fall_back(place, "a parameter on another device than the CPU");
      case Reading::kDType: return fall_back(place, "a parameter of an unusual dtype");
    }
    switch (read_tensor(grad, &g)) {
      case Reading::kOk: break;
      case Reading::kOther: return fall_back(place, "a gradient that is not a plain dense tensor");
      case Reading::kDevice: fail(place, "its gradient is on another device");
      case Reading::kDType: fail(place, "its gradient has an unusual dtype");
    }
    if (!same_shape(p, g)) {
      fail(place, "its shape is " + shape_text(p) + ", its gradient's " + shape_text(g));
    }
    if (p.complex != g.complex) fail(place, "it and its gradient are not both complex");

    Task task;
    task.group = place.group;
    View states[kMaxStates];
    if (!gather_states(place, param, p, &task, states)) return;

    task.numel = count(p) * (p.complex ? 2 : 1);
    task.param = {p.data, p.dtype, nullptr};
    task.grad = {g.data, g.dtype, nullptr};
    bool plain = p.ndim > 0 && !p.complex && is_row_major(p) && is_row_major(g);
    for (int k = 0; k < n_states_; ++k) {
      task.state[k] = {states[k].data, states[k].dtype, nullptr};
      plain = plain && is_row_major(states[k]);
    }
    if (!plain && !arrange(param, p, states, &grad, &g, &task)) {
      return fall_back(place, "a parameter whose elements may overlap in memory");
    }

    add_extent(p);
    for (int k = 0; k < n_states_; ++k) add_extent(states[k]);
    tasks_.push_back(task);
    params_.push_back(param);
    task_entries_.push_back(entry_);
    if (family_->counts_steps) steps_.push_back(pending_step_);
  }

  // Reads the parameter's state and step; false when some has to be created first.
  bool gather_states(const Place& place, PyObject* param, const View& p, Task* task, View* states) {
    static PyObject* const k_step = PyUnicode_InternFromString("step");
    task->first = first_entries_.size() > size_t(entry_) && first_entries_[entry_];
    if (n_states_ == 0 && !family_->counts_steps) return true;

    PyObject* state = state_of(param);
    if (state != nullptr && !PyDict_Check(state)) fail(place, "its state is not a dict");
    const auto find = [&](PyObject* name) -> PyObject* {
      PyObject* value = state == nullptr ? nullptr : PyDict_GetItemWithError(state, name);
      return value == Py_None ? nullptr : value;
    };
    PyObject* found[kMaxStates];
    bool complete = true;
    for (int k = 0; k < n_states_; ++k) complete &= (found[k] = find(group_states_[k])) != nullptr;
    PyObject* step = family_->counts_steps ? find(k_step) : nullptr;
    if (family_->counts_steps && step == nullptr) complete = false;
    if (!complete) {
      py::list names;
      if (family_->counts_steps && step == nullptr) names.append(py::handle(k_step));
      for (int k = 0; k < n_states_; ++k) {
        if (found[k] == nullptr) names.append(py::handle(group_states_[k]));
      }
      if (family_->first_writes_state) {
        if (first_entries_.size() <= size_t(entry_)) first_entries_.resize(entry_ + 1, false);
        first_entries_[entry_] = true;
      }
      missing_.append(py::make_tuple(place.group, place.index, names));
      return false;
    }

    for (int k = 0; k < n_states_; ++k) {
      const auto name = [&] {
        return "state[" + py::repr(group_states_[k]).cast<std::string>() + "]";
      };
      if (read_tensor(found[k], &states[k]) != Reading::kOk) {
        fail(place, name() + " is not a dense floating-point tensor on the CPU, as it is itself");
      }
      if (!same_shape(states[k], p)) {
        fail(place, name() + " has the shape " + shape_text(states[k]) + ", not " + shape_text(p));
      }
      if (states[k].complex != p.complex) fail(place, "it and " + name() + " are not both complex");
    }
    if (step != nullptr) {
      View view;
      if (read_tensor(step, &view) != Reading::kOk || view.complex || count(view) != 1 ||
          item_size(view.dtype) < 4) {
        fail(place, "state['step'] is not a float32 or float64 tensor of one element on the CPU");
      }
      const double now = view.dtype == DType::kFloat64
                             ? *reinterpret_cast<const double*>(view.data)
                             : double(*reinterpret_cast<const float*>(view.data));
      task->step = now + 1;
      pending_step_ = {view.data, view.dtype, task->step};
    }
    return true;
  }

  // The general case of layouts. False when elements of what is written may overlap.
  bool arrange(PyObject* param, const View& p, const View* states, PyObject** grad, View* g,
               Task* task) {
    if (!never_overlaps(p) || is_lazy(param)) return false;
    if (is_lazy(*grad)) {
      py::object resolved = py::handle(*grad).attr("resolve_conj")().attr("resolve_neg")();
      if (read_tensor(resolved.ptr(), g) != Reading::kOk) return false;
      *grad = resolved.ptr();
      grads_.push_back(resolved.release().ptr());
      task->grad.data = g->data;
    }
    const Order order = memory_order(p);
    const auto layout = [&](const View& view) -> const Layout* {
      layouts_.emplace_back();
      if (task->numel > 0 && describe(view, order, &layouts_.back())) return &layouts_.back();
      layouts_.pop_back();
      return nullptr;
    };
    task->param.layout = layout(p);
    task->grad.layout = layout(*g);
    for (int k = 0; k < n_states_; ++k) {
      if (!never_overlaps(states[k])) return false;
      task->state[k].layout = layout(states[k]);
    }
    return true;
  }

  void add_extent(const View& view) {
    const int64_t bytes = span(view);
    if (bytes > 0) extents_.push_back({view.data, view.data + bytes, entry_});
  }

  // Two parameters that share memory must be updated one after the other, which threads would not
  // do: torch's loop takes them. The search costs a sort, so it waits for a change.
  void set_aside_overlaps(const py::list& groups) {
    if (extents_ != checked_extents_) {
      checked_extents_ = extents_;
      overlapping_.assign(entry_ + 1, false);
      any_overlap_ = false;
      std::vector<Extent> sorted = extents_;
      std::sort(sorted.begin(), sorted.end(),
                [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
      const Extent* farthest = nullptr;
      for (const Extent& extent : sorted) {
        if (farthest != nullptr && extent.begin < farthest->end) {
          overlapping_[extent.entry] = overlapping_[farthest->entry] = any_overlap_ = true;
        }
        if (farthest == nullptr || extent.end > farthest->end) farthest = &extent;
      }
    }
    if (!any_overlap_) return;
    size_t kept = 0;
    for (size_t i = 0; i < tasks_.size(); ++i) {
      if (overlapping_[task_entries_[i]]) {
        const auto [group, index] = place_of(groups, task_entries_[i]);
        fallback_.append(py::make_tuple(group, index, "parameters or state that share memory"));
        continue;
      }
      tasks_[kept] = tasks_[i];
      params_[kept] = params_[i];
      if (family_->counts_steps) steps_[kept] = steps_[i];
      ++kept;
    }
    tasks_.resize(kept);
    params_.resize(kept);
    if (family_->counts_steps) steps_.resize(kept);
  }

  static std::pair<int, Py_ssize_t> place_of(const py::list& groups, int32_t entry) {
    int group = 0;
    for (py::handle dict : groups) {
      const Py_ssize_t n = py::len(dict["params"]);
      if (entry < n) break;
      entry -= int32_t(n);
      ++group;
    }
    return {group, entry};
  }

  int stream_rule(int rule) const {
    int states = 0;
    for (const auto& state : family_->states) {
      states += state.name != nullptr &&
                (state.flag < 0 || ((rule - first_rule_) >> state.flag & 1));
    }
    return base::kStreamRule + states;
  }

  const base::Family* family_ = nullptr;
  int first_rule_ = 0;
  std::vector<Option> hyper_;
  std::vector<PyObject*> flags_;
  std::vector<PyObject*> state_names_;

  std::vector<Group> groups_;
  std::vector<Task> tasks_;
  std::vector<int64_t> begin_;
  std::vector<Step> steps_;
  std::vector<PyObject*> params_;         // borrowed, one per task: the groups own them
  std::vector<PyObject*> grads_;          // owned until the step is over
  std::vector<int32_t> task_entries_;
  std::deque<Layout> layouts_;
  py::list missing_, fallback_;
  std::vector<bool> first_entries_;
  std::vector<std::pair<PyObject*, PyObject*>> state_items_;
  std::vector<size_t> state_hints_;
  size_t last_hit_ = 0;
  std::vector<Extent> extents_, checked_extents_;
  std::vector<bool> overlapping_;
  bool any_overlap_ = false;
  bool running_ = false;

  // Of the group and parameter being gathered.
  int32_t entry_ = -1;  // the parameter's number, counted over all groups
  PyObject* group_states_[kMaxStates];
  int n_states_ = 0;
  Step pending_step_;
};

}  // namespace

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
      .def(py::init<const std::string&>(), py::arg("family"))
      .def("gather", &Stepper::gather, py::arg("groups"), py::arg("state"), py::arg("created"),
           py::arg("grad_scale"))
      .def("run", &Stepper::run, py::arg("threads"), py::arg("stream") = false);
}
