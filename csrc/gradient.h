// The gradient pipeline: what happens to a gradient between memory and the rule. It is computed
// on the way through the registers; the gradient in memory is never written.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

template <class T>
FUSEDOPT_HD inline T prepare_gradient(T g, T multiplier) {
  return g * multiplier;
}

}  // namespace fusedopt::FUSEDOPT_ISA
