// One tile: a run of elements of one parameter, already in the arithmetic type.
//
// The stages of a step are small loops over a tile, one after another: on a CPU a tile is a few
// hundred elements that stay in the first-level cache (or the tensors themselves, when they need
// no conversion); on a GPU it is the handful of elements that one thread keeps in registers, and
// the same loops unroll. A stage that is switched off is not run, so stages cost no template
// instances; there are a few for each rule: two arithmetic types, and the ways to reach states.
#pragma once

#include "gradient.h"
#include "plan.h"
#include "quantize.h"
#include "quick.h"
#include "random.h"
#include "rules.h"
#include "store.h"

#if defined(__CUDACC__)
#define FUSEDOPT_VECTORIZE _Pragma("unroll")
#elif defined(__clang__)
#define FUSEDOPT_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fusedopt::FUSEDOPT_ISA {

// The stages in the arithmetic type, for parameters that share a step and a group.
template <class T>
struct TileStages {
  T multiplier, limit, factor;  // of the gradient
  T shrink;                     // proximal L1
  T ema_weight;                 // of the new weight in the average
  uint64_t step;

  TileStages() = default;
  FUSEDOPT_HD TileStages(const Stages& stages, const Group& group, double step)
      : multiplier(T(stages.grad_multiplier)),
        limit(T(stages.max_grad_value)),
        factor(T(stages.clip_coefficient * group.sign)),
        shrink(T(group.l1 * group.hyper[0])),
        step(step_number(step)) {
    // The warm-up of TensorFlow's ExponentialMovingAverage.
    const double warm = (1 + step) / (10 + step);
    const double decay = stages.ema_warmup && warm < stages.ema_decay ? warm : stages.ema_decay;
    ema_weight = T(1 - decay);
  }

  // Only a limit needs a loop of its own; the rule's loop multiplies.
  FUSEDOPT_HD bool limits() const { return limit >= 0; }
};

template <class T, class Stored>
FUSEDOPT_HD inline void add(const T* sum, const Stored* g, T* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = sum[i] + load<T>(g[i]);
}

// Adds micro-batches up. The first is written over whatever the memory held.
template <class T, class Stored>
FUSEDOPT_HD inline void accumulate(const Stored* g, bool adds, T* sum, int64_t n) {
  if (adds) return add(sum, g, sum, n);
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) sum[i] = load<T>(g[i]);
}

// Unscales and clips by value; what is left to do is the factor.
template <class T>
FUSEDOPT_HD inline void limit_gradients(const T* g, const TileStages<T>& stages, T* out,
                                        int64_t n) {
  const T multiplier = stages.multiplier, limit = stages.limit;
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = clamp(g[i] * multiplier, limit);
}

// Where the rule's loop finds the states and leaves them: as they are, ...
template <class T>
struct States {
  T* data[kMaxStates];

  template <int k>
  FUSEDOPT_ELEMENT T load(int64_t i) const {
    return data[k][i];
  }
  template <int k>
  FUSEDOPT_ELEMENT void store(int64_t i, T x) const {
    data[k][i] = x;
  }
};

// ... in bfloat16, rounded to nearest or at random, ...
template <bool kRandom>
struct HalfStates {
  BFloat16* data[kMaxStates];
  const uint16_t* random;

  template <int k>
  FUSEDOPT_ELEMENT float load(int64_t i) const {
    return widen(data[k][i]);
  }
  template <int k>
  FUSEDOPT_ELEMENT void store(int64_t i, float x) const {
    if constexpr (kRandom) {
      data[k][i] = round_randomly(x, again(random[i], k), BFloat16{});
    } else {
      data[k][i] = narrow(x, BFloat16{});
    }
  }
};

// ... or in 8 bits, of one block. What is left to do with the new values is to encode them.
template <class Rule>
struct CodedStates {
  const uint8_t* codes[kMaxStates];
  float scale[kMaxStates];
  float* decoded[kMaxStates];

  template <int k>
  FUSEDOPT_ELEMENT float load(int64_t i) const {
    return decode<Rule::is_square(k)>(codes[k][i], scale[k]);
  }
  template <int k>
  FUSEDOPT_ELEMENT void store(int64_t i, float x) const {
    decoded[k][i] = x;
  }
};

// The exponential moving average of the weights. A weight of -inf, as a mask has, is its own
// average: where infinities leave interpolate() without a difference, the mean is their sum.
template <class T>
struct Average {
  T* ema;
  T weight;      // of the new one
  Gate<T> past;  // whether the old average counts

  FUSEDOPT_HD Average(T* ema, T weight) : ema(ema), weight(weight), past(weight != 1) {}

  FUSEDOPT_ELEMENT void operator()(int64_t i, T p) const {
    const T mean = interpolate(ema[i], p, weight);
    ema[i] = mean == mean ? mean : p + past(ema[i]);
  }
};

struct NoAverage {
  template <class T>
  FUSEDOPT_ELEMENT void operator()(int64_t, T) const {}
};

// Applies the rule to an element, as numbers of the kind E. Returns whether what came out is known
// to be what floats would have given.
template <class E, class Rule, class T, class RuleStates, class RuleAverage>
FUSEDOPT_ELEMENT inline bool apply_to_element(const Rule& rule, T* p, const T* g, T multiplier,
                                              T factor, const RuleStates& s,
                                              const RuleAverage& average, int64_t i) {
  E state[kMaxStates] = {0, 0, 0};
  if constexpr (Rule::kStates > 0) state[0] = s.template load<0>(i);
  if constexpr (Rule::kStates > 1) state[1] = s.template load<1>(i);
  if constexpr (Rule::kStates > 2) state[2] = s.template load<2>(i);
  E weight = p[i];
  rule(weight, E(g[i] * multiplier * factor), state);
  p[i] = value_of(weight);
  if constexpr (Rule::kStates > 0) s.template store<0>(i, value_of(state[0]));
  if constexpr (Rule::kStates > 1) s.template store<1>(i, value_of(state[1]));
  if constexpr (Rule::kStates > 2) s.template store<2>(i, value_of(state[2]));
  average(i, value_of(weight));
  bool exact = is_exact(weight);
  for (int k = 0; k < Rule::kStates; ++k) exact &= is_exact(state[k]);
  return exact;
}

// Applies the rule to n elements in place, on gradients times multiplier times factor. (One may
// be finite where their product is not.)
template <class Rule, class T, class RuleStates, class RuleAverage>
FUSEDOPT_HD inline void apply_rule(const Rule rule, T* p, const T* g, T multiplier, T factor,
                                   const RuleStates s, const RuleAverage average, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    apply_to_element<T>(rule, p, g, multiplier, factor, s, average, i);
  }
}

// The proximal operator of L1 (Parikh & Boyd 2014, section 6.5.2): soft thresholding.
template <class T>
FUSEDOPT_HD inline void shrink(T* p, T threshold, int64_t n) {
  // p less its part within the threshold; so nan stays nan, and zeros are exact.
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] -= clamp(p[i], threshold);
}

template <class T, class Stored>
FUSEDOPT_HD inline void update_average(const Average<T> average, const Stored* p, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) average(i, load<T>(p[i]));
}

// Calls f(Index<0>{}), f(Index<1>{}) and so on, n times: a loop for those who need its number when
// they are compiled.
template <int k>
struct Index {
  static constexpr int value = k;
};

template <int n, class F>
FUSEDOPT_ELEMENT inline void each_index(F&& f) {
  if constexpr (n > 0) {
    each_index<n - 1>(f);
    f(Index<n - 1>{});
  }
}

// What the random bits of a step are for.
constexpr uint32_t kWeightStream = 0;
constexpr uint32_t kStateStream = 1;

// Random bits for the elements of a tile: 16 for each, and 4 for all. (Whether there are any is not
// told by a null pointer: a choice of pointers would keep a GPU's registers in memory.)
struct Random {
  bool drawn = false;
  const uint16_t* bits = nullptr;
  uint32_t tail = 0;
};

// For kN elements, of which the first two are the pair `index`. (The halves of a word lie in memory
// lower one first.)
template <int64_t kN>
FUSEDOPT_HD inline void draw_bits(RandomKey key, uint32_t index, uint16_t (&out)[kN]) {
  uint32_t words[kN / 2];
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < kN / 2; ++i) words[i] = random_bits(key, index + uint32_t(i));
  __builtin_memcpy(out, words, sizeof(out));
}

// From parameter and hidden part to the full weight, and back.
template <class P>
FUSEDOPT_HD inline void join_masters(const float* p, float* master, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) master[i] = join_master<P>(p[i], master[i]);
}

FUSEDOPT_HD inline void join_remainders(float* p, const int16_t* remainder, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] = join_remainder(p[i], remainder[i]);
}

template <class P>
FUSEDOPT_HD inline void join_kahans(float* p, const int16_t* lost, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] = join_kahan<P>(p[i], lost[i]);
}

FUSEDOPT_HD inline void move_off_upper_ties(float* p, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] = off_upper_tie(p[i]);
}

FUSEDOPT_HD inline void split_remainders(const float* p, int16_t* remainder, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) remainder[i] = lower_half(p[i]);
}

template <class P>
FUSEDOPT_HD inline void split_kahans(const float* p, int16_t* lost, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) lost[i] = split_kahan<P>(p[i]);
}

// The k-th that is rounded with these random bits.
template <class P, class T>
FUSEDOPT_HD inline void round_all_randomly(const T* x, const uint16_t* random, int k, P* out,
                                           int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = round_randomly(float(x[i]), again(random[i], k), P{});
}

// 8-bit state: n elements of one block.
template <class T>
FUSEDOPT_HD inline uint32_t largest_magnitude(const T* x, int64_t n) {
  uint32_t largest = 0;
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(float(x[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

template <bool kSquare, class T>
FUSEDOPT_HD inline void decode_block(const uint8_t* codes, float scale, T* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = decode<kSquare>(codes[i], scale);
}

// The k-th that is rounded with these random bits.
template <bool kSquare, class T>
FUSEDOPT_HD inline void encode_block(const T* x, float inverse, Random random, int k,
                                     uint8_t* codes, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i)
    codes[i] = encode<kSquare>(float(x[i]), inverse, again(random.bits[i], k), random.tail);
}

}  // namespace fusedopt::FUSEDOPT_ISA
