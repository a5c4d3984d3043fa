// One tile: a run of elements of one parameter, already in the arithmetic type.
//
// The stages of a step are small loops over a tile, one after another: on a CPU a tile is a few
// hundred elements that stay in the first-level cache (or the tensors themselves, when they need
// no conversion); on a GPU it is the handful of elements that one thread keeps in registers, and
// the same loops unroll. A stage that is switched off is not run, so stages cost no template
// instances: there is one instance per rule and arithmetic type.
#pragma once

#include "gradient.h"
#include "plan.h"
#include "quantize.h"
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

  FUSEDOPT_HD TileStages(const Stages& stages, const Group& group, double step)
      : multiplier(T(stages.grad_multiplier)),
        limit(T(stages.max_grad_value)),
        factor(T(stages.clip_coefficient * group.sign)),
        shrink(T(group.l1 * group.hyper[0])) {
    // The warm-up of TensorFlow's ExponentialMovingAverage.
    const double warm = (1 + step) / (10 + step);
    const double decay = stages.ema_warmup && warm < stages.ema_decay ? warm : stages.ema_decay;
    ema_weight = T(1 - decay);
  }

  // Only a limit needs a loop of its own; the rule's loop multiplies.
  FUSEDOPT_HD bool limits() const { return limit >= 0; }
};

template <class T>
FUSEDOPT_HD inline void add(const T* a, const T* b, T* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

// Unscales and clips by value; what is left to do is the factor.
template <class T>
FUSEDOPT_HD inline void limit_gradients(const T* g, const TileStages<T>& stages, T* out,
                                        int64_t n) {
  const T multiplier = stages.multiplier, limit = stages.limit;
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = clamp(g[i] * multiplier, limit);
}

// Applies the rule to n elements in place, on gradients times multiplier times factor. (One may
// be finite where their product is not.) `s` holds the states' arrays.
template <class Rule, class T>
FUSEDOPT_HD inline void apply_rule(const Rule rule, T* p, const T* g, T multiplier, T factor,
                                   T* const* s, int64_t n) {
  // One name per array, so that the loop below is free of double indirections.
  T* const s0 = Rule::kStates > 0 ? s[0] : nullptr;
  T* const s1 = Rule::kStates > 1 ? s[1] : nullptr;
  T* const s2 = Rule::kStates > 2 ? s[2] : nullptr;
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    T state[3] = {};
    if constexpr (Rule::kStates > 0) state[0] = s0[i];
    if constexpr (Rule::kStates > 1) state[1] = s1[i];
    if constexpr (Rule::kStates > 2) state[2] = s2[i];
    T weight = p[i];
    rule(weight, g[i] * multiplier * factor, state);
    p[i] = weight;
    if constexpr (Rule::kStates > 0) s0[i] = state[0];
    if constexpr (Rule::kStates > 1) s1[i] = state[1];
    if constexpr (Rule::kStates > 2) s2[i] = state[2];
  }
}

// The proximal operator of L1 (Parikh & Boyd 2014, section 6.5.2): soft thresholding.
template <class T>
FUSEDOPT_HD inline void shrink(T* p, T threshold, int64_t n) {
  // p less its part within the threshold; so nan stays nan, and zeros are exact.
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] -= clamp(p[i], threshold);
}

template <class T>
FUSEDOPT_HD inline void average(T* ema, const T* p, T weight, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) ema[i] = interpolate(ema[i], p[i], weight);
}

// What the random bits of a step are for.
constexpr uint32_t kWeightStream = 0;
constexpr uint32_t kStateStream = 1;

FUSEDOPT_HD inline void draw(RandomKey key, uint32_t index, uint32_t* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = random_bits(key, index + uint32_t(i));
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

template <class P>
FUSEDOPT_HD inline void round_all_randomly(float* p, const uint32_t* random, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) p[i] = round_randomly(p[i], random[i], P{});
}

// State in bfloat16.
template <class T>
FUSEDOPT_HD inline void round_state_randomly(T* x, const uint32_t* random, int shift, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random[i] >> shift << (32 - kCodeShift);
    x[i] = round_randomly(float(x[i]), bits, BFloat16{});
  }
}

// 8-bit state: n elements of one block.
template <class T>
FUSEDOPT_HD inline uint32_t largest_magnitude(const T* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(float(x[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

template <bool kSquare, class T>
FUSEDOPT_HD inline void decode(const uint8_t* codes, float scale, T* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    out[i] = kSquare ? decode_square(codes[i], scale) : decode_signed(codes[i], scale);
  }
}

// `shift` picks the bits of `random` that this state uses.
template <bool kSquare, class T>
FUSEDOPT_HD inline void encode(const T* x, float inverse, const uint32_t* random, int shift,
                               uint8_t* codes, int64_t n) {
  constexpr uint32_t kMask = (1u << kCodeShift) - 1;
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random[i] >> shift & kMask;
    codes[i] = kSquare ? encode_square(float(x[i]), inverse, bits)
                       : encode_signed(float(x[i]), inverse, bits);
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
