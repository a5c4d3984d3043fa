// The CPU engine's kernels: walks a part of the plan's work line, tile by tile. Included by
// cpu_base.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each compiled for its own instruction set; not a
// header to include elsewhere.

#include "cpu.h"
#include "plan.h"
#include "select.h"
#include "store.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {

// Elements of a tile: up to six buffers of it fit the first-level cache beside the streams.
constexpr int64_t kTile = 512;

// Calls f(offset, length) for the runs of equal stride that elements [begin, begin + n) of a
// layout fall into; offset is where the run starts in memory.
template <class F>
inline void for_each_run(const Layout& layout, int64_t begin, int64_t n, F&& f) {
  const int last = layout.ndim - 1;
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = begin % layout.size[d];
    begin /= layout.size[d];
    offset += index[d] * layout.stride[d];
  }
  while (n > 0) {
    int64_t run = layout.size[last] - index[last];
    if (run > n) run = n;
    f(offset, run);
    n -= run;
    if (n == 0) return;
    offset -= index[last] * layout.stride[last];
    index[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      offset += layout.stride[d];
      if (++index[d] < layout.size[d]) break;
      offset -= index[d] * layout.stride[d];
      index[d] = 0;
    }
  }
}

template <class T, class Stored>
inline void load_tile(const Stored* from, const Layout* layout, int64_t begin, int64_t n, T* out) {
  if (layout == nullptr) {
    from += begin;
    FUSEDOPT_VECTORIZE
    for (int64_t i = 0; i < n; ++i) out[i] = load<T>(from[i]);
    return;
  }
  const int64_t stride = layout->stride[layout->ndim - 1];
  for_each_run(*layout, begin, n, [&](int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; ++i) out[i] = load<T>(from[offset + i * stride]);
    out += run;
  });
}

template <class T, class Stored>
inline void store_tile(const T* from, const Layout* layout, int64_t begin, int64_t n, Stored* to) {
  if (layout == nullptr) {
    to += begin;
    FUSEDOPT_VECTORIZE
    for (int64_t i = 0; i < n; ++i) store(from[i], to[i]);
    return;
  }
  const int64_t stride = layout->stride[layout->ndim - 1];
  for_each_run(*layout, begin, n, [&](int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; ++i) store(from[i], to[offset + i * stride]);
    from += run;
  });
}

template <class T>
constexpr DType kArithmetic = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// True when the operand can be worked on where it lies.
template <class T>
inline bool in_place(const Operand& operand) {
  return operand.dtype == kArithmetic<T> && operand.layout == nullptr;
}

// A pointer to elements [begin, begin + n) as T: into the tensor itself, or to a copy in `buffer`.
template <class T>
inline T* open_tile(const Operand& operand, int64_t begin, int64_t n, T* buffer) {
  if (in_place<T>(operand)) return static_cast<T*>(operand.data) + begin;
  const Layout* layout = operand.layout;
  switch (operand.dtype) {
    case DType::kFloat32:
      load_tile(static_cast<const float*>(operand.data), layout, begin, n, buffer);
      break;
    case DType::kFloat64:
      load_tile(static_cast<const double*>(operand.data), layout, begin, n, buffer);
      break;
    case DType::kBFloat16:
      load_tile(static_cast<const BFloat16*>(operand.data), layout, begin, n, buffer);
      break;
    case DType::kFloat16:
      load_tile(static_cast<const Float16*>(operand.data), layout, begin, n, buffer);
      break;
  }
  return buffer;
}

// Writes a tile back, unless it was worked on in place.
template <class T>
inline void close_tile(const Operand& operand, int64_t begin, int64_t n, const T* tile) {
  if (in_place<T>(operand)) return;
  const Layout* layout = operand.layout;
  switch (operand.dtype) {
    case DType::kFloat32:
      return store_tile(tile, layout, begin, n, static_cast<float*>(operand.data));
    case DType::kFloat64:
      return store_tile(tile, layout, begin, n, static_cast<double*>(operand.data));
    case DType::kBFloat16:
      return store_tile(tile, layout, begin, n, static_cast<BFloat16*>(operand.data));
    case DType::kFloat16:
      return store_tile(tile, layout, begin, n, static_cast<Float16*>(operand.data));
  }
}

template <class Rule, class T>
inline void update_elements(const Rule& rule, const Task& task, T multiplier, int64_t begin,
                            int64_t end) {
  alignas(64) T buffer[2 + kMaxStates][kTile];
  const bool prepare = multiplier != T(1);
  bool direct = !prepare && in_place<T>(task.param) && in_place<T>(task.grad);
  for (int k = 0; k < Rule::kStates; ++k) direct = direct && in_place<T>(task.state[k]);

  // Without conversions there is no need for tiles.
  const int64_t tile = direct ? end - begin : kTile;
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t n = end - at < tile ? end - at : tile;
    T* p = open_tile(task.param, at, n, buffer[0]);
    const T* g = open_tile(task.grad, at, n, buffer[1]);
    T* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) s[k] = open_tile(task.state[k], at, n, buffer[2 + k]);
    if (prepare) {
      prepare_gradients(g, multiplier, buffer[1], n);
      g = buffer[1];
    }
    apply_rule(rule, p, g, s, n);
    close_tile(task.param, at, n, p);
    for (int k = 0; k < Rule::kStates; ++k) close_tile(task.state[k], at, n, s[k]);
  }
}

// The element at a position on a task's stretch of the work line, rounded so that two threads
// which share a tensor do not share a cache line of it.
inline int64_t element_at(int64_t position, int64_t numel) {
  const int64_t element = position / 64 * 64;
  return element < numel ? element : numel;
}

// The start of a later task's arrays: the processor cannot guess where the next tensor lies.
inline void prefetch(const Task& task) {
  const char* const arrays[] = {
      static_cast<const char*>(task.param.data), static_cast<const char*>(task.grad.data),
      static_cast<const char*>(task.state[0].data), static_cast<const char*>(task.state[1].data)};
  for (const char* array : arrays) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(array + 64 * line);
  }
}

// Tasks [first, last) share a rule, its hyper-parameters and the step, so the rule is built once;
// of each, the part on [begin, end) of the work line is done.
template <class T>
struct UpdateTasks {
  const Plan& plan;
  int64_t first, last, begin, end;

  template <class Rule>
  void run() const {
    const Task& model = *plan.tasks[first];
    const Group& group = plan.groups[model.group];
    const Rule rule(group.hyper, model.step, model.first);
    for (int64_t i = first; i < last; ++i) {
      const Task& task = *plan.tasks[i];
      if (i + 2 < last) prefetch(*plan.tasks[i + 2]);
      const int64_t start = plan.begin[i];
      const int64_t from = begin > start ? element_at(begin - start, task.numel) : 0;
      const int64_t to = end < plan.begin[i + 1] ? element_at(end - start, task.numel) : task.numel;
      if (from < to) update_elements(rule, task, T(group.grad_multiplier), from, to);
    }
  }
};

inline bool in_double(const Task& task) { return task.param.dtype == DType::kFloat64; }

inline bool same_options(const Group& a, const Group& b) {
  bool same = a.rule == b.rule && a.grad_multiplier == b.grad_multiplier;
  for (int i = 0; i < kMaxHypers; ++i) same = same && a.hyper[i] == b.hyper[i];
  return same;
}

inline bool share_rule(const Plan& plan, const Task& a, const Task& b) {
  return a.step == b.step && a.first == b.first && in_double(a) == in_double(b) &&
         (a.group == b.group || same_options(plan.groups[a.group], plan.groups[b.group]));
}

void update_range(const Plan& plan, int64_t first_task, int64_t begin, int64_t end) {
  int64_t i = first_task;
  while (i < plan.n_tasks && plan.begin[i] < end) {
    int64_t last = i + 1;
    while (last < plan.n_tasks && plan.begin[last] < end &&
           share_rule(plan, *plan.tasks[i], *plan.tasks[last])) {
      ++last;
    }
    const int rule = plan.groups[plan.tasks[i]->group].rule;
    if (in_double(*plan.tasks[i])) {
      select_rule<double>(rule, UpdateTasks<double>{plan, i, last, begin, end});
    } else {
      select_rule<float>(rule, UpdateTasks<float>{plan, i, last, begin, end});
    }
    i = last;
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
