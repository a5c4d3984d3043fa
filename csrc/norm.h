// The norm of all gradients: how it is summed up, and what follows from it.
//
// Sums are kept in double, per chunk of elements, and the chunks are added in their order, so the
// norm does not depend on the number of threads.
#pragma once

#include <math.h>

#include "num.h"
#include "plan.h"

namespace fusedopt::FUSEDOPT_ISA {

// Adds g^2. The square of a float is exact in double.
template <class T>
FUSEDOPT_HD inline double add_square(double sum, T g) {
  return multiply_add(double(g), double(g), sum);
}

// The bits of |g|, whose order as integers is that of the magnitudes, with inf above all numbers
// and nan above inf.
FUSEDOPT_HD inline uint32_t magnitude_bits(float g) { return bit_cast<uint32_t>(g) & 0x7fffffffu; }
FUSEDOPT_HD inline uint64_t magnitude_bits(double g) {
  return bit_cast<uint64_t>(g) & 0x7fffffffffffffffu;
}

// The norm, from the squares' sum or the largest magnitude of gradients that have yet to be
// multiplied.
FUSEDOPT_HD inline double norm_of(NormType type, double total, double multiplier) {
  return (type == NormType::kTwo ? sqrt(total) : total) * multiplier;
}

// The factor that torch.nn.utils.clip_grad_norm_ multiplies the gradients by: at most 1, and nan
// when the norm is. An infinite limit never clips, whatever the norm.
FUSEDOPT_HD inline double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return max_norm == double(INFINITY) || coefficient > 1 ? 1 : coefficient;
}

}  // namespace fusedopt::FUSEDOPT_ISA
