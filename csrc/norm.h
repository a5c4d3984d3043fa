// The norm of all gradients: how it is summed up, and what follows from it.
//
// Sums are kept in double, per chunk of elements, and the chunks are added in their order, so the
// norm does not depend on the number of threads. On a GPU, where doubles may be slow, the squares
// of a few floats are added in float first.
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

// The sum of n squares, n a power of two, of numbers of which `largest` is the largest magnitude's
// bits. Of floats it is off by at most (1 + log2(n)) 2^-24 of itself, for eight 2^-22: n squares of
// one sign are added in pairs, pairs of pairs and so on, each sum rounded once, and the first
// squares, too. (The norm, its root, is off by half of that.) Where squares might leave the range
// of floats, they are doubles; of numbers between 2^-50 and 2^60 none does that counts.
template <int n, class T>
FUSEDOPT_HD inline double sum_of_squares(const T* g, typename BitsOf<T>::type largest) {
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr uint32_t kLowest = (127u - 50) << 23, kHighest = (127u + 60) << 23;
    if (largest == 0 || (largest >= kLowest && largest < kHighest)) {
      float sums[n / 2];
      for (int i = 0; i < n / 2; ++i) {
        sums[i] = multiply_add(g[2 * i], g[2 * i], g[2 * i + 1] * g[2 * i + 1]);
      }
      for (int left = n / 4; left > 0; left /= 2) {
        for (int i = 0; i < left; ++i) sums[i] += sums[i + left];
      }
      return double(sums[0]);
    }
  }
  double sum = 0;
  for (int i = 0; i < n; ++i) sum = add_square(sum, g[i]);
  return sum;
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
