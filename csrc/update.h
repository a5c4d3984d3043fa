// One tile: a run of elements of one parameter, already in the arithmetic type.
//
// The stages of a step are small loops over a tile, one after another: on a CPU a tile is a few
// hundred elements that stay in the first-level cache (or the tensors themselves, when they need
// no conversion); on a GPU it is the handful of elements that one thread keeps in registers, and
// the same loops unroll. A stage that is switched off is not run, so stages cost no template
// instances: there is one instance per rule and arithmetic type.
#pragma once

#include "gradient.h"
#include "rules.h"

#if defined(__CUDACC__)
#define FUSEDOPT_VECTORIZE _Pragma("unroll")
#elif defined(__clang__)
#define FUSEDOPT_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fusedopt::FUSEDOPT_ISA {

template <class T>
FUSEDOPT_HD inline void prepare_gradients(const T* g, T multiplier, T* out, int64_t n) {
  FUSEDOPT_VECTORIZE
  for (int64_t i = 0; i < n; ++i) out[i] = prepare_gradient(g[i], multiplier);
}

// Applies the rule to n elements in place. `s` holds the states' arrays.
template <class Rule, class T>
FUSEDOPT_HD inline void apply_rule(const Rule rule, T* p, const T* g, T* const* s, int64_t n) {
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
    rule(weight, g[i], state);
    p[i] = weight;
    if constexpr (Rule::kStates > 0) s0[i] = state[0];
    if constexpr (Rule::kStates > 1) s1[i] = state[1];
    if constexpr (Rule::kStates > 2) s2[i] = state[2];
  }
}

}  // namespace fusedopt::FUSEDOPT_ISA
