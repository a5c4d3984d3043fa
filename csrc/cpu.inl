// The CPU engine's kernels: walks a part of the plan's work line, tile by tile. Included by
// cpu_base.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each compiled for its own instruction set; not a
// header to include elsewhere.

#include "cpu.h"
#include "norm.h"
#include "plan.h"
#include "select.h"
#include "tile.h"

namespace fusedopt::FUSEDOPT_ISA {

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

// A tile, or what of it a thread has: elements [begin, begin + n) of a parameter.
class Span {
 public:
  static constexpr int64_t kElements = kTile;

  Span(int64_t begin, int64_t n) : begin_(begin), n_(n) {}

  int64_t length() const { return n_; }

  template <class Kind>
  static constexpr bool has(Kind) {
    return true;
  }

  template <class T>
  bool in_place(const Operand& operand) const {
    return is_plain<T>(operand);
  }

  template <class T>
  T* open(const Operand& operand, T* buffer) const {
    if (is_plain<T>(operand)) return static_cast<T*>(operand.data) + begin_;
    with_format(operand.dtype, [&](auto format) {
      for_elements<decltype(format)>(
          operand, [&](const auto* from, int64_t stride, int64_t at, int64_t run) {
            T* const out = buffer + at;
            if (stride == 1) {
              FUSEDOPT_VECTORIZE
              for (int64_t i = 0; i < run; ++i) out[i] = load<T>(from[i]);
            } else {
              for (int64_t i = 0; i < run; ++i) out[i] = load<T>(from[i * stride]);
            }
          });
    });
    return buffer;
  }

  // Nothing to do when the tile was worked on in place.
  template <class T>
  void close(const Operand& operand, const T* tile) const {
    if (is_plain<T>(operand)) return;
    with_format(operand.dtype, [&](auto format) {
      for_elements<decltype(format)>(operand,
                                     [&](auto* to, int64_t stride, int64_t at, int64_t run) {
                                       const T* const from = tile + at;
                                       if (stride == 1) {
                                         FUSEDOPT_VECTORIZE
                                         for (int64_t i = 0; i < run; ++i) store(from[i], to[i]);
                                       } else {
                                         for (int64_t i = 0; i < run; ++i)
                                           store(from[i], to[i * stride]);
                                       }
                                     });
    });
  }

  // Calls f(elements) with a floating-point operand as it is stored, or as T.
  template <class T, class F>
  void with_elements(const Operand& operand, T* buffer, F&& f) const {
    if (operand.layout != nullptr) return f(open(operand, buffer));
    with_format(operand.dtype, [&](auto format) {
      f(static_cast<const decltype(format)*>(operand.data) + begin_);
    });
  }

  template <class Stored>
  const Stored* read(const Operand& operand, Stored* buffer) const {
    const Stored* const data = static_cast<const Stored*>(operand.data);
    if (operand.layout == nullptr) return data + begin_;
    for_elements<Stored>(operand, [&](const Stored* from, int64_t stride, int64_t at, int64_t run) {
      for (int64_t i = 0; i < run; ++i) buffer[at + i] = from[i * stride];
    });
    return buffer;
  }

  template <class Stored, class F>
  void write(const Operand& operand, F&& fill) const {
    if (operand.layout == nullptr) return fill(static_cast<Stored*>(operand.data) + begin_);
    alignas(64) Stored buffer[kElements];
    fill(buffer);
    for_elements<Stored>(operand, [&](Stored* to, int64_t stride, int64_t at, int64_t run) {
      for (int64_t i = 0; i < run; ++i) to[i * stride] = buffer[at + i];
    });
  }

  float* scale(float* scales) const { return scales + begin_ / kBlock; }

  Random draw(uint64_t seed, uint64_t step, uint32_t stream, uint16_t (&bits)[kElements]) const {
    const uint64_t pair = uint64_t(begin_) / 2;
    const RandomKey key = random_key(seed, step, stream, uint32_t(pair >> 32));
    draw_bits(key, uint32_t(pair), bits);
    return {true, bits, tail_bits(key)};
  }

 private:
  // Calls f(first, stride, at, length) for the runs of elements that lie at equal distances; `at`
  // is where in the tile they belong.
  template <class Stored, class F>
  void for_elements(const Operand& operand, F&& f) const {
    Stored* const data = static_cast<Stored*>(operand.data);
    if (operand.layout == nullptr) return f(data + begin_, 1, 0, n_);
    const int64_t stride = operand.layout->stride[operand.layout->ndim - 1];
    int64_t at = 0;
    for_each_run(*operand.layout, begin_, n_, [&](int64_t offset, int64_t run) {
      f(data + offset, stride, at, run);
      at += run;
    });
  }

  int64_t begin_, n_;
};

// True when the rule's loop can run over the tensors themselves, and nothing but it is to be done.
template <class Rule, class T>
inline bool is_direct(const Task& task, const TileStages<T>& stages) {
  bool direct =
      !stages.limits() && stages.shrink == 0 && is_plain<T>(task.param) && is_plain<T>(task.grad);
  if (task.extras != nullptr) {
    direct = direct && !task.extras->accumulated &&
             (task.extras->ema.data == nullptr || is_plain<T>(task.extras->ema));
  }
  for (int k = 0; k < Rule::kStates; ++k) direct = direct && is_plain<T>(task.state[k]);
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
  const Average<T> average(static_cast<T*>(task.extras->ema.data) + begin, stages.ema_weight);
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
inline HalfStates<kRandom> half_states(const Span& span, const Task& task, Random random) {
  HalfStates<kRandom> states = {{}, random.bits};
  for (int k = 0; k < Rule::kStates; ++k) {
    span.write<BFloat16>(task.state[k], [&](BFloat16* data) { states.data[k] = data; });
  }
  return states;
}

// States in 8 bits: first all scales, then all codes, so that the one need not wait for the other.
template <class T>
inline void rescale_state(const Span& span, const Task& task, int k, const T* tile) {
  *span.scale(task.extras->scale[k]) = block_scale(largest_magnitude(tile, span.length()));
}

template <class T>
inline void recode_state(const Span& span, const Task& task, int k, const T* tile, Random random) {
  encode_state(span, task, k, *span.scale(task.extras->scale[k]), tile, random);
}

// The rule on a tile whose weights and gradients are open: reads, applies, and writes the states.
template <class Rule, class T>
inline void update_states(const Rule& rule, const Span& span, const Task& task, Access access, T* p,
                          const T* g, T multiplier, T factor, Random random) {
  constexpr int kStates = Rule::kStates;
  const int64_t n = span.length();
  alignas(64) T buffer[kMaxStates][kTile];
  if constexpr (sizeof(T) == sizeof(float) && kStates > 0) {
    if (access == Access::kHalves) {
      return apply_rule(rule, p, g, multiplier, factor,
                        half_states<Rule, false>(span, task, random), NoAverage{}, n);
    }
    if (access == Access::kRoundedHalves) {
      return apply_rule(rule, p, g, multiplier, factor, half_states<Rule, true>(span, task, random),
                        NoAverage{}, n);
    }
    if (access == Access::kCodes) {
      CodedStates<Rule> states;
      for (int k = 0; k < kStates; ++k) {
        states.codes[k] = span.read<uint8_t>(task.state[k], nullptr);
        states.scale[k] = *span.scale(task.extras->scale[k]);
        states.decoded[k] = buffer[k];
      }
      apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, n);
      for (int k = 0; k < kStates; ++k) rescale_state(span, task, k, buffer[k]);
      for (int k = 0; k < kStates; ++k) recode_state(span, task, k, buffer[k], random);
      return;
    }
  }
  States<T> states = {};
  for (int k = 0; k < kStates; ++k) states.data[k] = open_state(span, task, k, buffer[k]);
  apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, n);
  for (int k = 0; k < kStates; ++k) {
    if (task.state[k].dtype == DType::kUInt8) {
      rescale_state(span, task, k, states.data[k]);
      recode_state(span, task, k, states.data[k], random);
    } else {
      close_state(span, task.state[k], k, states.data[k], random);
    }
  }
}

template <class Rule, class T>
inline void update_elements(const Rule& rule, const Task& task, const TileStages<T>& stages,
                            int64_t begin, int64_t end) {
  if (is_direct<Rule>(task, stages)) {
    return update_directly(rule, task, stages, begin, end - begin);
  }
  const Access access = state_access<Rule, T>(task);
  const bool draws = draws_for_states<Rule>(task);
  alignas(64) T weights[kTile], gradients[kTile];
  alignas(64) uint16_t bits[kTile];
  for (int64_t at = begin, next; at < end; at = next) {
    next = tile_end(at, end);
    const Span span(at, next - at);
    update_tile(span, task, gradients_of(task), stages, weights, gradients,
                [&](T* p, const T* g, T multiplier) {
                  const Random random =
                      draws ? span.draw(task.extras->seed, stages.step, kStateStream, bits)
                            : Random{};
                  update_states(rule, span, task, access, p, g, multiplier, stages.factor, random);
                });
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
      select_rule_or_stream<double>(rule, UpdateTasks<double>{plan, i, last, begin, end});
    } else {
      select_rule_or_stream<float>(rule, UpdateTasks<float>{plan, i, last, begin, end});
    }
    i = last;
  }
}

// Sums of squares in lanes of fixed number, so that every instruction set adds in the same order.
constexpr int64_t kLanes = 32;
static_assert(kTile % kLanes == 0 && kNormChunk % kTile == 0, "lanes start anew at each tile");

// Of what `of` makes of each element.
template <class T, class F>
inline void add_squares(const T* g, int64_t n, double* lanes, F&& of) {
  double sum[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) sum[k] = lanes[k];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    // Beyond the page, where the processor's own prefetching ends.
    for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) __builtin_prefetch(g + i + 1024 + k);
    for (int64_t k = 0; k < kLanes; ++k) sum[k] = add_square(sum[k], of(g[i + k]));
  }
  for (; i < n; ++i) sum[i % kLanes] = add_square(sum[i % kLanes], of(g[i]));
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
inline ChunkNorm measure_elements(const Task& task, NormType type, double scale, T multiplier,
                                  int64_t begin, int64_t end) {
  alignas(64) T buffer[kTile];
  const Gradients from = gradients_of(task);
  const bool direct = is_plain<T>(from.grad) && from.sum == nullptr;
  // In float, one sum answers both questions: a square that is nan or inf had such a gradient.
  // Squares of doubles overflow; so there the test is the largest magnitude.
  const bool sums = type == NormType::kTwo;
  // Nor does it tell whether a gradient is still finite when it has been multiplied.
  const bool maximum = !sums || sizeof(T) == 8 || !(multiplier >= -1 && multiplier <= 1);
  double lanes[kLanes] = {};
  auto bits = magnitude_bits(T(0));
  for (int64_t at = begin, next; at < end; at = next) {
    next = direct ? end : tile_end(at, end);
    const T* g = open_gradients(Span(at, next - at), from, buffer);
    if (sums && scale == 1) {
      add_squares(g, next - at, lanes, [](T x) { return x; });
    } else if (sums) {
      add_squares(g, next - at, lanes, [&](T x) { return double(x) * scale; });
    }
    if (maximum) {
      const auto other = largest(g, next - at);
      bits = other > bits ? other : bits;
    }
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  const T magnitude = bit_cast<T>(bits);
  const auto infinity = magnitude_bits(T(INFINITY));
  const bool finite = maximum ? magnitude_bits(magnitude * multiplier) < infinity : sum < INFINITY;
  return {sums ? sum : double(magnitude), finite && (!maximum || bits < infinity)};
}

void measure_range(const Plan& plan, NormType type, double scale, const int64_t* first_chunk,
                   int64_t first_task, int64_t begin, int64_t end, ChunkNorm* out) {
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
          in_double(task) ? measure_elements<double>(task, type, scale, multiplier, from, to)
                          : measure_elements<float>(task, type, scale, float(multiplier), from, to);
    }
  }
}

template <class T>
inline void accumulate_elements(const Task& task, int64_t begin, int64_t end) {
  const Operand& to = task.extras->grad_sum;
  const bool adds = task.extras->accumulated;
  alignas(64) T sums[kTile], gradients[kTile];
  for (int64_t at = begin, next; at < end; at = next) {
    next = is_plain<T>(to) && task.grad.layout == nullptr ? end : tile_end(at, end);
    const Span span(at, next - at);
    T* const sum = span.open(to, sums);
    span.with_elements(task.grad, gradients,
                       [&](const auto* g) { accumulate(g, adds, sum, span.length()); });
    span.close(to, sum);
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

template <class T>
inline void average_elements(const Task& task, double weight, int64_t begin, int64_t end) {
  const Average<T> average(static_cast<T*>(task.extras->ema.data) + begin, T(weight));
  const Span span(begin, end - begin);
  span.with_elements<T>(task.param, nullptr,
                        [&](const auto* p) { update_average(average, p, span.length()); });
}

void average_range(const Plan& plan, double weight, int64_t first_task, int64_t begin,
                   int64_t end) {
  for (int64_t i = first_task; i < plan.n_tasks && plan.begin[i] < end; ++i) {
    const Task& task = *plan.tasks[i];
    const auto [from, to] = part_of(plan, i, begin, end);
    if (task.extras->ema.dtype == DType::kFloat64) {
      average_elements<double>(task, weight, from, to);
    } else {
      average_elements<float>(task, weight, from, to);
    }
  }
}

// Calls f(first element, span) for all tiles of a task.
template <class F>
inline void for_each_tile(const Task& task, F&& f) {
  for (int64_t at = 0; at < task.numel; at += kTile) f(at, Span(at, tile_end(at, task.numel) - at));
}

void join_weights(const Task& task, float* whole) {
  alignas(64) float buffer[kTile];
  for_each_tile(task, [&](int64_t at, const Span& span) {
    __builtin_memcpy(whole + at, open_weights(span, task, buffer), span.length() * sizeof(float));
  });
}

void split_weights(const Task& task, const float* whole) {
  alignas(64) float buffer[kTile];
  for_each_tile(task, [&](int64_t at, const Span& span) {
    // As in a step, master weights are worked on where they lie.
    const Operand& hidden = task.extras->hidden;
    const bool in_hidden =
        task.extras->precision == WeightPrecision::kMaster && is_plain<float>(hidden);
    float* const tile = in_hidden ? static_cast<float*>(hidden.data) + at : buffer;
    __builtin_memcpy(tile, whole + at, span.length() * sizeof(float));
    close_weights(span, task, uint64_t(task.step), tile);
  });
}

void decode_states(const Task& task, float* values) {
  for_each_tile(task,
                [&](int64_t at, const Span& span) { open_state(span, task, 0, values + at); });
}

void encode_states(const Task& task, const float* values) {
  alignas(64) uint16_t nearest[kTile];
  for (uint16_t& bits : nearest) bits = kNearest;
  for_each_tile(task, [&](int64_t at, const Span& span) {
    rescale_state(span, task, 0, values + at);
    recode_state(span, task, 0, values + at, Random{true, nearest, 0});
  });
}

const Kernels kKernels = {update_range, measure_range, accumulate_range, average_range,
                          join_weights, split_weights, decode_states,    encode_states};

}  // namespace fusedopt::FUSEDOPT_ISA
