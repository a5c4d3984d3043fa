// The gradient pipeline: what happens to a gradient between memory and the rule. It is computed
// on the way through the registers; the gradient in memory is never written.
//
//     g = (accumulated + gradient) * multiplier     undoes the loss scale, makes the mean
//     test for nan and inf, norm                    (norm.h: a pass of its own, when asked for)
//     g = clamp(g, limit)                           max_grad_value, or
//     g = g * coefficient                           max_grad_norm; -1 in it maximizes
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

// As torch.clamp(g, -limit, limit): nan stays nan.
template <class T>
FUSEDOPT_ELEMENT inline T clamp(T g, T limit) {
  g = g > limit ? limit : g;
  return g < -limit ? -limit : g;
}

}  // namespace fusedopt::FUSEDOPT_ISA
