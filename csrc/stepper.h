// Reads an optimizer's groups, parameters, gradients and state into a Plan, and runs it. No math.
// The step is in stepper.cpp; describe.cpp is the long way of looking at a parameter.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "entry.h"
#include "groups.h"
#include "layout.h"
#include "overlap.h"
#include "plan.h"
#include "pytensor.h"
#include "select.h"

namespace fusedopt {

// The options of the step that are the optimizer's and not a group's (fusedopt/options.py).
struct StepOptions {
  NormType norm_type = NormType::kNone;
  double max_grad_norm = -1;  // negative: none
  double max_grad_value = -1;
  WeightPrecision weight_precision = WeightPrecision::kNearest;
  bool random_state = false;  // state is in bfloat16 or 8 bits, and rounded at random
  double ema_decay = -1;      // negative: no average
  bool ema_warmup = false;
  double l1 = 0;
};

// A family's states, and whether they are squares, which in 8 bits have a format of their own.
py::dict family_states(const std::string& name);

// What a parameter's state has all of, or none: the counter and the states of every variant.
py::list family_vitals(const std::string& name);

// The numbers (not the flags) that a family's rules read from a group, by their keys.
py::list family_hypers(const std::string& name);

// Ends the window of micro-batches of an optimizer, of which this is the __dict__: its accumulators
// hold nothing, also those of parameters that have left their group meanwhile. `skips`: how many
// steps were skipped with that. One call, for Python may be interrupted between any two.
void end_window(PyObject* attributes, int skips);

// Reads an optimizer at every step. Of what it saw at the last one it trusts nothing that may have
// changed since: parameters and gradients are looked at again. State is looked at again too,
// unless nobody can have touched it: the `state` attribute has not been asked for since the last
// step (its getter removes the mark `_state_seen` that gather() leaves), and no one else holds a
// reference to its dicts and tensors or shares their memory.
class Stepper {
 public:
  // `unshared(tensor)` says whether a tensor is the only one on its memory, and has neither weak
  // references nor an exported storage.
  Stepper(const std::string& family_name, CarriedOptions carried, py::object unshared,
          const TensorMemory& memory);

  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  ~Stepper();

  void configure(const StepOptions& options);

  // One step at a time: begin(), the step, end().
  void begin() {
    if (busy_) {
      throw std::runtime_error(
          "step() or accumulate() was called while another one runs, or within it");
    }
    busy_ = true;
    wrote_ = false;
  }
  void end() {
    for (Part& part : parts_) part.device.end();
    busy_ = false;
    release();
  }

  // Lets go of the state: someone may be about to replace it, and count on its memory.
  void forget();

  // Looks at everything and checks it. Nothing is written. Returns None when run() may follow, or
  // (missing, fallback): `missing` lists (group, parameter, [state names]) of the state that has
  // to be created, after which gather(created=true) must be called; `fallback` lists (group,
  // parameter, reason) of what these kernels do not take and run() will leave alone.
  // `attributes` is the optimizer's __dict__. `window`: look for accumulated gradients, too.
  // `accumulate`: accumulate() will follow and not run(), so of the state only the accumulated
  // gradients are needed.
  py::object gather(const py::dict& attributes, bool created, bool window, bool accumulate);

  // Whether run() or accumulate() has begun to write since begin(). What Python has to remember of
  // them they write into the optimizer's attributes themselves, so that a Ctrl-C, which Python sees
  // right after the call, finds all of the step or nothing.
  bool wrote() const { return wrote_; }

  // Whether any parameter has a gradient of its own, not only accumulated ones.
  bool has_grads() const { return has_grads_; }

  // The tensors that run() will write to and that others may know of: all parameters, and the
  // state that is not certainly ours alone.
  py::list updated() const;

  // Where the parameters are that gather() has found: any on the CPU, and on which devices.
  bool has_host() const { return has_host_; }
  py::list devices() const;

  // Prepares what follows: gradients are divided by `divisor` and, on a device, by the number at
  // grad_scale[device]; a device skips the step when found_inf[device] is not 0 or, after
  // measure() and with `skip_nonfinite`, when a gradient anywhere is not finite. (Elsewhere Python
  // decides.) The tensors are float32, and need not be there.
  void prepare(double divisor, const py::dict& grad_scale, const py::dict& found_inf,
               bool skip_nonfinite);

  // The norm of the gradients, by which run() will clip. When parameters are in several places,
  // returns a report of each, and finish_measure() must follow when these have been made one.
  py::list measure(int threads);
  void finish_measure();

  // The norm and the number (name_of()) of the first parameter whose gradient is not finite, or
  // -1. Only when has_host(): otherwise they are in the devices' reports.
  py::tuple host_norm() const { return py::make_tuple(norm(), norm_.nonfinite_task); }

  // What the devices that took part in any step have reported: Device::report().
  py::dict reports() const;

  // Names a parameter of this step, for messages.
  std::string name_of(int64_t number) const;

  // Carries out what gather() found. With `stream` the rule is replaced by one that moves the same
  // bytes and computes nothing of use: for benchmarks, on tensors that may be spoilt. (CPU only.)
  void run(int threads, bool stream);

  // Adds the gradients that gather() found to the accumulated ones, which then come from `count`
  // micro-batches, and sets them to None.
  void accumulate(int threads, int64_t count);

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

  // What there is of one device: its parameters are, in its table, those of these numbers.
  struct Part {
    Device device;
    std::vector<int32_t> rows;
    bool changed = true;  // the table may hold other tasks than entries_
    bool active = false;  // in this step,
    DeviceStages stages;  // of which these are
  };

  void release() {
    for (PyObject* grad : grads_) Py_DECREF(grad);
    grads_.clear();
    active_.clear();
    param_lists_.clear();
    group_dicts_.clear();
    for (Part& part : parts_) part.active = false;
    measured_ = false;
    norm_ = {};
  }

  // Finds a device's part, or makes it.
  Part& part_of(int device);

  // Throws when a graph records this step or accumulate(), but not the whole window.
  void check_window() const;

  // Puts the Plan of the parameters on the CPU together.
  void plan(double multiplier);

  // Brings the tables of the devices that take part up to date.
  void load_devices();
  void load(Part* part);

  // Tasks stay in a table when they take no part in a step, so that those of which only some do
  // at a time (a mixture of experts) need not be copied anew at each.
  void choose_rows(Part* part, const std::vector<int32_t>& wanted) const;

  // The CPU's report, for the others to be combined with.
  DeviceControl* host_control();

  double norm() const;
  void clip();

  static std::string describe_place(const Place& place);

  [[noreturn]] static void fail(const Place& place, const std::string& what) {
    throw std::runtime_error(describe_place(place) + ": " + what);
  }

  // optimizer.state is keyed by tensors, and hashing one calls Python. Its iteration order hardly
  // ever changes, so each parameter remembers where its entry was.
  PyObject* state_of(PyObject* param);

  // Usually a list already; stock iterates over whatever it is.
  static py::object as_sequence(PyObject* object);

  void gather_group(int index, PyObject* dict);

  void gather_param(const Place& place, PyObject* param);

  // Whether the parameter has accumulated gradients.
  bool has_window(const Entry& entry, PyObject* param);

  static bool count_is_one(const View& view) { return !view.complex && count(view) == 1; }

  static bool is_on_host(PyObject* tensor) {
    View view;
    return read_tensor(tensor, &view) == Reading::kOk && view.device == kHost;
  }

  static constexpr int32_t kAhead = 8;

  // The objects of a model lie all over memory: have a later parameter's on their way.
  void prefetch(int32_t number) const;

  void fall_back(const Place& place, const char* reason) {
    fallback_.append(py::make_tuple(place.group, place.index, reason));
  }

  // The short way: everything is as it was but, perhaps, where parameter and gradient lie.
  bool is_as_before(Entry& entry, PyObject* param, PyObject* grad);

  // The long way, without assumptions. False when the parameter takes no part in run().
  bool describe_param(Entry& entry, const Place& place, PyObject* param, PyObject* grad);

  // Whether someone holds the state's dict or one of its tensors, beside the dict above and us.
  static bool is_referenced(const Entry& entry) {
    bool alone = has_references(entry.state_dict.ptr(), 2);
    entry.for_each_object(
        [&](const py::object& object) { alone = alone && has_references(object.ptr(), 2); });
    return !alone;
  }

  bool has_own_memory(const Entry& entry) const;

  // The tensors of a parameter's state that have its shape, and where they go in its Task.
  struct Described {
    int n = 0;
    View view[kMaxStates + kShapedExtras];
    PyObject* object[kMaxStates + kShapedExtras];
    Operand* operand[kMaxStates + kShapedExtras];
  };

  // Finds what the parameter's state must hold; false when some has to be created first.
  bool find_state(Entry& entry, const Place& place, PyObject* param, const View& p);

  // Checks what was found.
  void check_state(Entry& entry, const Place& place, const View& p, Described* found);

  // What of weight_precision applies to a parameter.
  WeightPrecision precision_of(const View& p) const {
    const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
    return half && !p.complex ? options_of_step_.weight_precision : WeightPrecision::kNearest;
  }

  static std::string quoted(PyObject* name) { return text_of(py::repr(name).ptr()); }

  // Blocks of 8-bit state are runs of its memory, so it has to lie as its parameter does. False
  // when the parameter lies otherwise than when the state was made.
  bool check_codes(const Entry& entry, const Place& place);

  // The general case of layouts. False when elements of what is written may overlap.
  bool arrange(Entry& entry, const Place& place, PyObject* param, const View& p,
               const Described& found, PyObject* grad, View g);

  static int64_t bytes(const Operand& operand, int64_t numel);

  void find_overlaps();

  // Whether reading zeros would make the first update of state[0] another one.
  bool dampens() const {
    return family_->first_hyper >= 0 && groups_.back().hyper[family_->first_hyper] != 0;
  }

  // torch updates one parameter after the other, so it can take these.
  void set_aside_overlaps();

  // Has counters made anew that would stop. (Not those that several parameters share.)
  void replace_counters();

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
  CarriedOptions carried_;
  StepOptions options_of_step_;

  std::unique_ptr<FamilyOptions> family_options_;
  std::vector<GroupOptions> options_;
  std::vector<Entry> entries_;  // one per parameter, counted over all groups
  std::vector<std::pair<PyObject*, PyObject*>> state_items_;
  std::vector<size_t> state_hints_;
  size_t last_hit_ = 0;
  Overlaps overlaps_;
  std::vector<int32_t> checked_;  // the entries whose overlaps are known

  TensorMemory memory_;
  std::vector<Part> parts_;

  // Of the step being taken.
  Plan plan_{};
  std::vector<int32_t> plan_entries_;  // of its tasks
  Norm norm_;
  py::dict grad_scale_, found_inf_;
  py::object host_report_;
  bool measured_ = false;
  std::vector<Group> groups_;
  std::vector<py::object> group_dicts_;
  std::vector<Active> active_;
  std::vector<py::object> param_lists_;
  std::vector<PyObject*> grads_;  // owned until the step is over
  std::vector<const Task*> tasks_;
  std::vector<int64_t> begin_;
  py::list missing_, fallback_;
  PyObject* attributes_ = nullptr;  // borrowed: the optimizer's __dict__,
  PyObject* state_ = nullptr;       // and its state
  bool untouched_ = false;
  int64_t epoch_ = 0;  // counts the gathers that found the state touched
  bool created_ = false;
  bool window_ = false;
  uint64_t window_capture_ = 0;  // the graph that has recorded the window's first accumulate()
  bool accumulate_ = false;
  bool has_grads_ = false;
  bool counters_stop_ = false;  // that of any parameter
  bool has_host_ = false;
  bool described_ = false;  // something may lie elsewhere than when overlaps were last looked for
  bool busy_ = false;
  bool wrote_ = false;

  // Of the group and parameter being gathered.
  int32_t entry_ = -1;
  PyObject* group_states_[kMaxStates];
  int n_states_ = 0;
};

}  // namespace fusedopt
