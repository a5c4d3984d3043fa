// The CPU engine's kernels: walks a part of the plan's work line, tile by tile. Included by
// cpu_base.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each compiled for its own instruction set; not a
// header to include elsewhere.

#include "cpu.h"
#include "norm.h"
#include "plan.h"
#include "select.h"
#include "store.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {

// Elements of a tile: all its buffers fit the first-level cache beside the streams. A tile begins
// at a multiple of its size, as threads' parts do; so it is a block of 8-bit state, too.
constexpr int64_t kTile = kBlock;

inline int64_t tile_end(int64_t at, int64_t end) {
  const int64_t next = at / kTile * kTile + kTile;
  return next < end ? next : end;
}

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

// Calls f(Stored{}) with the operand's storage format, one of the four floating-point ones.
template <class F>
inline void with_format(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    case DType::kInt16:
    case DType::kInt64:
    case DType::kUInt8: return;
  }
}

// A pointer to elements [begin, begin + n) as T: into the tensor itself, or to a copy in `buffer`.
template <class T>
inline T* open_tile(const Operand& operand, int64_t begin, int64_t n, T* buffer) {
  if (in_place<T>(operand)) return static_cast<T*>(operand.data) + begin;
  with_format(operand.dtype, [&](auto format) {
    load_tile(static_cast<const decltype(format)*>(operand.data), operand.layout, begin, n, buffer);
  });
  return buffer;
}

// Writes a tile back, unless it was worked on in place.
template <class T>
inline void close_tile(const Operand& operand, int64_t begin, int64_t n, const T* tile) {
  if (in_place<T>(operand)) return;
  with_format(operand.dtype, [&](auto format) {
    store_tile(tile, operand.layout, begin, n, static_cast<decltype(format)*>(operand.data));
  });
}

// Gradient and what was accumulated before, added up.
template <class T>
inline const T* open_gradients(const Task& task, int64_t begin, int64_t n, T* buffer) {
  const bool accumulated = task.extras != nullptr && task.extras->accumulated;
  if (!accumulated) return open_tile(task.grad, begin, n, buffer);
  if (task.grad.data == nullptr) return open_tile(task.extras->grad_sum, begin, n, buffer);
  alignas(64) T sum_buffer[kTile];
  const T* const sum = open_tile(task.extras->grad_sum, begin, n, sum_buffer);
  if (task.grad.layout == nullptr) {
    with_format(task.grad.dtype, [&](auto format) {
      add(sum, static_cast<const decltype(format)*>(task.grad.data) + begin, buffer, n);
    });
  } else {
    add(sum, open_tile(task.grad, begin, n, buffer), buffer, n);
  }
  return buffer;
}

// Calls fill(to) with where to write a tile.
template <class Stored, class F>
inline void write_tile(const Operand& operand, int64_t begin, int64_t n, F&& fill) {
  Stored* data = static_cast<Stored*>(operand.data);
  if (operand.layout == nullptr) return fill(data + begin);
  alignas(64) Stored buffer[kTile];
  fill(buffer);
  const Stored* from = buffer;
  const int64_t stride = operand.layout->stride[operand.layout->ndim - 1];
  for_each_run(*operand.layout, begin, n, [&](int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; ++i) data[offset + i * stride] = *from++;
  });
}

// States in 8 bits are dense, and a tile is one of their blocks.
inline uint8_t* codes_of(const Task& task, int k, int64_t begin) {
  return static_cast<uint8_t*>(task.state[k].data) + begin;
}

inline float& scale_of(const Task& task, int k, int64_t begin) {
  return task.extras->scale[k][begin / kBlock];
}

template <class T>
inline void rescale_state(const Task& task, int k, int64_t begin, int64_t n, const T* tile) {
  scale_of(task, k, begin) = block_scale(largest_magnitude(tile, n));
}

template <class T>
inline void encode_state(const Task& task, int k, int64_t begin, int64_t n, const T* tile,
                         const uint16_t* random) {
  const float inverse = inverse_scale(scale_of(task, k, begin));
  uint8_t* const codes = codes_of(task, k, begin);
  if (task.extras->square[k]) {
    encode_block<true>(tile, inverse, random, k, codes, n);
  } else {
    encode_block<false>(tile, inverse, random, k, codes, n);
  }
}

template <class T>
inline T* open_state(const Task& task, int k, int64_t begin, int64_t n, T* buffer) {
  if (task.state[k].dtype != DType::kUInt8) return open_tile(task.state[k], begin, n, buffer);
  const uint8_t* const codes = codes_of(task, k, begin);
  const float scale = scale_of(task, k, begin);
  if (task.extras->square[k]) {
    decode_block<true>(codes, scale, buffer, n);
  } else {
    decode_block<false>(codes, scale, buffer, n);
  }
  return buffer;
}

// `random`: null when states of 16 bits are rounded to nearest.
template <class T>
inline void close_state(const Task& task, int k, int64_t begin, int64_t n, const T* tile,
                        const uint16_t* random) {
  const Operand& state = task.state[k];
  if (state.dtype == DType::kUInt8) {
    rescale_state(task, k, begin, n, tile);
    return encode_state(task, k, begin, n, tile, random);
  }
  if (state.dtype != DType::kBFloat16 || random == nullptr) {
    return close_tile(state, begin, n, tile);
  }
  write_tile<BFloat16>(state, begin, n,
                       [&](BFloat16* to) { round_all_randomly(tile, random, k, to, n); });
}

// Calls f(P{}) with the 16-bit format.
template <class F>
inline void with_half(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

// Hidden parts of 16 bits.
inline const int16_t* open_hidden(const Operand& hidden, int64_t begin, int64_t n,
                                  int16_t* buffer) {
  const int16_t* data = static_cast<const int16_t*>(hidden.data);
  if (hidden.layout == nullptr) return data + begin;
  const int64_t stride = hidden.layout->stride[hidden.layout->ndim - 1];
  int16_t* out = buffer;
  for_each_run(*hidden.layout, begin, n, [&](int64_t offset, int64_t run) {
    for (int64_t i = 0; i < run; ++i) *out++ = data[offset + i * stride];
  });
  return buffer;
}

// The weights of a tile in full precision, in `buffer` or in the tensor they live in.
inline double* open_weights(const Task& task, int64_t begin, int64_t n, double* buffer) {
  return open_tile(task.param, begin, n, buffer);
}

inline float* open_weights(const Task& task, int64_t begin, int64_t n, float* buffer) {
  float* p = open_tile(task.param, begin, n, buffer);
  if (task.extras == nullptr) return p;
  const Operand& hidden = task.extras->hidden;
  switch (task.extras->precision) {
    case WeightPrecision::kNearest:
    case WeightPrecision::kStochastic: break;
    case WeightPrecision::kMaster: {
      alignas(64) float master_buffer[kTile];
      float* master = open_tile(hidden, begin, n, master_buffer);
      with_half(task.param.dtype,
                [&](auto format) { join_masters<decltype(format)>(p, master, n); });
      if (in_place<float>(hidden)) return master;
      __builtin_memcpy(p, master, n * sizeof(float));
      break;
    }
    case WeightPrecision::kRemainder: {
      alignas(64) int16_t hidden_buffer[kTile];
      join_remainders(p, open_hidden(hidden, begin, n, hidden_buffer), n);
      break;
    }
    case WeightPrecision::kKahan: {
      alignas(64) int16_t hidden_buffer[kTile];
      const int16_t* lost = open_hidden(hidden, begin, n, hidden_buffer);
      with_half(task.param.dtype, [&](auto format) { join_kahans<decltype(format)>(p, lost, n); });
      break;
    }
  }
  return p;
}

inline void draw_tile(const Task& task, uint32_t stream, int64_t begin, uint16_t (&random)[kTile]) {
  const uint64_t pair = uint64_t(begin) / 2;
  draw(random_key(task.extras->seed, uint64_t(task.step), stream, uint32_t(pair >> 32)),
       uint32_t(pair), random);
}

inline void close_weights(const Task& task, int64_t begin, int64_t n, double* p) {
  close_tile(task.param, begin, n, p);
}

inline void close_weights(const Task& task, int64_t begin, int64_t n, float* p) {
  const WeightPrecision precision =
      task.extras == nullptr ? WeightPrecision::kNearest : task.extras->precision;
  switch (precision) {
    case WeightPrecision::kNearest: break;
    case WeightPrecision::kMaster:
      if (task.param.dtype == DType::kBFloat16) move_off_upper_ties(p, n);
      close_tile(task.extras->hidden, begin, n, p);
      break;
    case WeightPrecision::kRemainder:
      move_off_upper_ties(p, n);
      write_tile<int16_t>(task.extras->hidden, begin, n,
                          [&](int16_t* to) { split_remainders(p, to, n); });
      break;
    case WeightPrecision::kKahan:
      with_half(task.param.dtype, [&](auto format) {
        write_tile<int16_t>(task.extras->hidden, begin, n,
                            [&](int16_t* to) { split_kahans<decltype(format)>(p, to, n); });
      });
      break;
    case WeightPrecision::kStochastic: {
      alignas(64) uint16_t random[kTile];
      draw_tile(task, kWeightStream, begin, random);
      return with_half(task.param.dtype, [&](auto format) {
        write_tile<decltype(format)>(task.param, begin, n,
                                     [&](auto* to) { round_all_randomly(p, random, 0, to, n); });
      });
    }
  }
  close_tile(task.param, begin, n, p);
}

// True when the rule's loop can run over the tensors themselves, and nothing but it is to be done.
template <class Rule, class T>
inline bool is_direct(const Task& task, const TileStages<T>& stages) {
  bool direct =
      !stages.limits() && stages.shrink == 0 && in_place<T>(task.param) && in_place<T>(task.grad);
  if (task.extras != nullptr) {
    direct = direct && !task.extras->accumulated &&
             (task.extras->ema.data == nullptr || in_place<T>(task.extras->ema));
  }
  for (int k = 0; k < Rule::kStates; ++k) direct = direct && in_place<T>(task.state[k]);
  return direct;
}

template <class Rule, class T>
inline void update_directly(const Rule& rule, const Task& task, const TileStages<T>& stages,
                            int64_t begin, int64_t n) {
  T* const p = static_cast<T*>(task.param.data) + begin;
  const T* const g = static_cast<const T*>(task.grad.data) + begin;
  States<T> states = {};
  for (int k = 0; k < Rule::kStates; ++k) {
    states.data[k] = static_cast<T*>(task.state[k].data) + begin;
  }
  if (task.extras == nullptr || task.extras->ema.data == nullptr) {
    return apply_rule(rule, p, g, stages.multiplier, stages.factor, states, NoAverage{}, n);
  }
  const Average<T> average = {static_cast<T*>(task.extras->ema.data) + begin, stages.ema_weight};
  apply_rule(rule, p, g, stages.multiplier, stages.factor, states, average, n);
}

// How the rule's loop reaches the states.
enum class Access : uint8_t { kTiles, kHalves, kRoundedHalves, kCodes };

// The access that suits all of a task's states.
template <class Rule, class T>
inline Access state_access(const Task& task) {
  if (Rule::kStates == 0 || sizeof(T) != sizeof(float)) return Access::kTiles;
  bool halves = true, codes = true;
  for (int k = 0; k < Rule::kStates; ++k) {
    halves &= task.state[k].dtype == DType::kBFloat16 && task.state[k].layout == nullptr;
    codes &= task.state[k].dtype == DType::kUInt8 && task.extras->square[k] == Rule::is_square(k);
  }
  if (codes) return Access::kCodes;
  if (!halves) return Access::kTiles;
  const bool rounds = task.extras != nullptr && task.extras->random_state;
  return rounds ? Access::kRoundedHalves : Access::kHalves;
}

template <class Rule, bool kRandom>
inline HalfStates<kRandom> half_states(const Task& task, int64_t begin, const uint16_t* random) {
  HalfStates<kRandom> states = {{}, random};
  for (int k = 0; k < Rule::kStates; ++k) {
    states.data[k] = static_cast<BFloat16*>(task.state[k].data) + begin;
  }
  return states;
}

// The rule on a tile whose weights and gradients are open: reads, applies, and writes the states.
template <class Rule, class T>
inline void update_states(const Rule& rule, const Task& task, Access access, T* p, const T* g,
                          T multiplier, T factor, int64_t begin, int64_t n, T (*buffer)[kTile],
                          const uint16_t* random) {
  constexpr int kStates = Rule::kStates;
  if constexpr (sizeof(T) == sizeof(float) && kStates > 0) {
    if (access == Access::kHalves) {
      return apply_rule(rule, p, g, multiplier, factor,
                        half_states<Rule, false>(task, begin, random), NoAverage{}, n);
    }
    if (access == Access::kRoundedHalves) {
      return apply_rule(rule, p, g, multiplier, factor,
                        half_states<Rule, true>(task, begin, random), NoAverage{}, n);
    }
    if (access == Access::kCodes) {
      CodedStates<Rule> states;
      for (int k = 0; k < kStates; ++k) {
        states.codes[k] = codes_of(task, k, begin);
        states.scale[k] = scale_of(task, k, begin);
        states.decoded[k] = buffer[k];
      }
      apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, n);
      for (int k = 0; k < kStates; ++k) rescale_state(task, k, begin, n, buffer[k]);
      for (int k = 0; k < kStates; ++k) encode_state(task, k, begin, n, buffer[k], random);
      return;
    }
  }
  States<T> states = {};
  for (int k = 0; k < kStates; ++k) states.data[k] = open_state(task, k, begin, n, buffer[k]);
  apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, n);
  for (int k = 0; k < kStates; ++k) close_state(task, k, begin, n, states.data[k], random);
}

template <class Rule, class T>
inline void update_elements(const Rule& rule, const Task& task, const TileStages<T>& stages,
                            int64_t begin, int64_t end) {
  if (is_direct<Rule>(task, stages)) {
    return update_directly(rule, task, stages, begin, end - begin);
  }
  const Extras* extras = task.extras;
  const Access access = state_access<Rule, T>(task);
  bool draws = extras != nullptr && extras->random_state;
  for (int k = 0; k < Rule::kStates; ++k) draws |= task.state[k].dtype == DType::kUInt8;
  alignas(64) T buffer[2 + kMaxStates][kTile];
  alignas(64) uint16_t random[kTile];
  for (int64_t at = begin, next; at < end; at = next) {
    next = tile_end(at, end);
    const int64_t n = next - at;
    T* p = open_weights(task, at, n, buffer[0]);
    const T* g = open_gradients(task, at, n, buffer[1]);
    T multiplier = stages.multiplier;
    if (stages.limits()) {
      limit_gradients(g, stages, buffer[1], n);
      g = buffer[1];
      multiplier = 1;
    }
    if (draws) draw_tile(task, kStateStream, at, random);
    update_states(rule, task, access, p, g, multiplier, stages.factor, at, n, buffer + 2,
                  draws ? random : nullptr);
    if (stages.shrink != 0) shrink(p, stages.shrink, n);
    if (extras != nullptr && extras->ema.data != nullptr) {
      T* ema = open_tile(extras->ema, at, n, buffer[1]);
      update_average(Average<T>{ema, stages.ema_weight}, p, n);
      close_tile(extras->ema, at, n, ema);
    }
    close_weights(task, at, n, p);
  }
}

// The element at a position on a task's stretch of the work line, rounded so that two threads
// which share a tensor share no cache line and no block of it.
inline int64_t element_at(int64_t position, int64_t numel) {
  const int64_t element = position / kBlock * kBlock;
  return element < numel ? element : numel;
}

// The elements of task i that lie on [begin, end) of the work line.
struct Part {
  int64_t from, to;
};

inline Part part_of(const Plan& plan, int64_t i, int64_t begin, int64_t end) {
  const int64_t start = plan.begin[i], numel = plan.tasks[i]->numel;
  return {begin > start ? element_at(begin - start, numel) : 0,
          end < plan.begin[i + 1] ? element_at(end - start, numel) : numel};
}

// The start of a later task's arrays: the processor cannot guess where the next tensor lies.
inline void prefetch(const Task& task) {
  const char* const arrays[] = {
      static_cast<const char*>(task.param.data), static_cast<const char*>(task.grad.data),
      static_cast<const char*>(task.state[0].data), static_cast<const char*>(task.state[1].data)};
  for (const char* array : arrays) {
    if (array == nullptr) continue;
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
    const TileStages<T> stages(plan.stages, group, model.step);
    for (int64_t i = first; i < last; ++i) {
      const Task& task = *plan.tasks[i];
      if (i + 2 < last) prefetch(*plan.tasks[i + 2]);
      const auto [from, to] = part_of(plan, i, begin, end);
      if (from < to) update_elements(rule, task, stages, from, to);
    }
  }
};

inline bool in_double(const Task& task) { return task.param.dtype == DType::kFloat64; }

inline bool same_options(const Group& a, const Group& b) {
  bool same = a.rule == b.rule && a.sign == b.sign && a.l1 == b.l1;
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

// Sums of squares in lanes of fixed number, so that every instruction set adds in the same order.
constexpr int64_t kLanes = 32;
static_assert(kTile % kLanes == 0 && kNormChunk % kTile == 0, "lanes start anew at each tile");

template <class T>
inline void add_squares(const T* g, int64_t n, double* lanes) {
  double sum[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) sum[k] = lanes[k];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    // Beyond the page, where the processor's own prefetching ends.
    for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(g + i + 1024 + k);
    for (int64_t k = 0; k < kLanes; ++k) sum[k] = add_square(sum[k], g[i + k]);
  }
  for (; i < n; ++i) sum[i % kLanes] = add_square(sum[i % kLanes], g[i]);
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] = sum[k];
}

template <class T>
inline auto largest(const T* g, int64_t n) {
  auto bits = magnitude_bits(T(0));
  for (int64_t i = 0; i < n; ++i) {
    const auto other = magnitude_bits(g[i]);
    bits = other > bits ? other : bits;
  }
  return bits;
}

// The norm of elements [begin, end) of one parameter, at most a chunk; the 2-norm squared.
template <class T>
inline ChunkNorm measure_elements(const Task& task, NormType type, T multiplier, int64_t begin,
                                  int64_t end) {
  alignas(64) T buffer[kTile];
  const bool accumulated = task.extras != nullptr && task.extras->accumulated;
  const bool direct = in_place<T>(task.grad) && !accumulated;
  // In float, one sum answers both questions: a square that is nan or inf had such a gradient.
  // Squares of doubles overflow; so there the test is the largest magnitude.
  const bool sums = type == NormType::kTwo;
  // Nor does it tell whether a gradient is still finite when it has been multiplied.
  const bool maximum = !sums || sizeof(T) == 8 || multiplier > 1;
  double lanes[kLanes] = {};
  auto bits = magnitude_bits(T(0));
  for (int64_t at = begin, next; at < end; at = next) {
    next = direct ? end : tile_end(at, end);
    const T* g = open_gradients(task, at, next - at, buffer);
    if (sums) add_squares(g, next - at, lanes);
    if (maximum) {
      const auto other = largest(g, next - at);
      bits = other > bits ? other : bits;
    }
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  const T magnitude = bit_cast<T>(bits);
  const bool finite = maximum ? magnitude * multiplier < T(INFINITY) : sum < INFINITY;
  return {sums ? sum : double(magnitude), finite && (!maximum || magnitude < T(INFINITY))};
}

void measure_range(const Plan& plan, NormType type, const int64_t* first_chunk, int64_t first_task,
                   int64_t begin, int64_t end, ChunkNorm* out) {
  for (int64_t i = first_task; i < plan.n_tasks && plan.begin[i] < end; ++i) {
    const Task& task = *plan.tasks[i];
    if (i + 2 < plan.n_tasks) __builtin_prefetch(plan.tasks[i + 2]->grad.data);
    const int64_t chunks = first_chunk[i + 1] - first_chunk[i];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t from = chunk * kNormChunk;
      const int64_t position = plan.begin[i] + from;
      if (position < begin || position >= end) continue;
      const int64_t to = task.numel < from + kNormChunk ? task.numel : from + kNormChunk;
      const double multiplier = plan.stages.grad_multiplier;
      out[first_chunk[i] + chunk] =
          in_double(task) ? measure_elements<double>(task, type, multiplier, from, to)
                          : measure_elements<float>(task, type, float(multiplier), from, to);
    }
  }
}

template <class T>
inline void accumulate_elements(const Task& task, int64_t begin, int64_t end) {
  const Operand& to = task.extras->grad_sum;
  const bool adds = task.extras->accumulated;
  if (in_place<T>(to) && task.grad.layout == nullptr) {
    return with_format(task.grad.dtype, [&](auto format) {
      const auto* const g = static_cast<const decltype(format)*>(task.grad.data) + begin;
      accumulate(g, adds, static_cast<T*>(to.data) + begin, end - begin);
    });
  }
  alignas(64) T buffer[2][kTile];
  for (int64_t at = begin, next; at < end; at = next) {
    next = tile_end(at, end);
    const int64_t n = next - at;
    T* sum = open_tile(to, at, n, buffer[0]);
    accumulate(open_tile(task.grad, at, n, buffer[1]), adds, sum, n);
    close_tile(to, at, n, sum);
  }
}

void accumulate_range(const Plan& plan, int64_t first_task, int64_t begin, int64_t end) {
  for (int64_t i = first_task; i < plan.n_tasks && plan.begin[i] < end; ++i) {
    const Task& task = *plan.tasks[i];
    const auto [from, to] = part_of(plan, i, begin, end);
    if (in_double(task)) {
      accumulate_elements<double>(task, from, to);
    } else {
      accumulate_elements<float>(task, from, to);
    }
  }
}

void join_weights(const Task& task, float* whole) {
  alignas(64) float buffer[kTile];
  for (int64_t at = 0; at < task.numel; at += kTile) {
    const int64_t n = tile_end(at, task.numel) - at;
    __builtin_memcpy(whole + at, open_weights(task, at, n, buffer), n * sizeof(float));
  }
}

void split_weights(const Task& task, const float* whole) {
  alignas(64) float buffer[kTile];
  for (int64_t at = 0; at < task.numel; at += kTile) {
    const int64_t n = tile_end(at, task.numel) - at;
    // As in a step, master weights are worked on where they lie.
    const Operand& hidden = task.extras->hidden;
    const bool in_hidden =
        task.extras->precision == WeightPrecision::kMaster && in_place<float>(hidden);
    float* tile = in_hidden ? static_cast<float*>(hidden.data) + at : buffer;
    __builtin_memcpy(tile, whole + at, n * sizeof(float));
    close_weights(task, at, n, tile);
  }
}

void decode_states(const Task& task, float* values) {
  for (int64_t at = 0; at < task.numel; at += kTile) {
    open_state(task, 0, at, tile_end(at, task.numel) - at, values + at);
  }
}

void encode_states(const Task& task, const float* values) {
  alignas(64) uint16_t nearest[kTile];
  for (uint16_t& bits : nearest) bits = kNearest;
  for (int64_t at = 0; at < task.numel; at += kTile) {
    const int64_t n = tile_end(at, task.numel) - at;
    rescale_state(task, 0, at, n, values + at);
    encode_state(task, 0, at, n, values + at, nearest);
  }
}

const Kernels kKernels = {update_range,  measure_range, accumulate_range, join_weights,
                          split_weights, decode_states, encode_states};

}  // namespace fusedopt::FUSEDOPT_ISA
