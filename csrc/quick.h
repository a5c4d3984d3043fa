// Floats whose divisions and square roots ask nothing while they are computed.
//
// A GPU has neither as an instruction; what it has are estimates of reciprocals, to about a bit.
// The compiler's functions refine them, where the operands' exponents are such that nothing is lost
// on the way, and call a slow function where they are not: each is a branch, at which the elements
// of a loop wait for each other, and the call needs registers.
//
// A Quick only refines, and remembers whether that is known to have given the exact result, rounded
// once. A kernel computes many elements so, asks once whether it holds for all, and if not,
// computes them as floats, which takes longer. So all results have the bits that floats have.
// (Zeros are exact: rows of an embedding that have never had a gradient take no longer. Numbers
// next to zero are not known to be: rows that had their last gradient hundreds of steps ago do.)
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

// 1 / x and 1 / sqrt(x), to a few units in the last place; numbers without a normal exponent are
// zeros, as operands and as results.
FUSEDOPT_ELEMENT inline float estimate_reciprocal(float x);
FUSEDOPT_ELEMENT inline float estimate_reciprocal_root(float x);

#if defined(__CUDA_ARCH__)
FUSEDOPT_ELEMENT inline float estimate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSEDOPT_ELEMENT inline float estimate_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
// (On a CPU, where only tests come here, reciprocals are off by up to two units, this way or that.)
FUSEDOPT_ELEMENT inline float flush(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (bits & 0x7f800000u) == 0 ? bit_cast<float>(bits & 0x80000000u) : x;
}
FUSEDOPT_ELEMENT inline float spoil(float exact, float x) {
  const uint32_t bits = bit_cast<uint32_t>(exact), exponent = bits & 0x7f800000u;
  const bool all_ones = (bit_cast<uint32_t>(x) & 0x7fffffu) == 0x7fffffu;  // as quotients need it
  if (exponent == 0 || exponent == 0x7f800000u || all_ones) return flush(exact);
  return flush(bit_cast<float>(bits + bit_cast<uint32_t>(x) % 5 - 2));
}
FUSEDOPT_ELEMENT inline float estimate_reciprocal(float x) { return spoil(1 / flush(x), x); }
FUSEDOPT_ELEMENT inline float estimate_reciprocal_root(float x) {
  return flush(float(1 / square_root(double(flush(x)))));
}
#endif

// (False when either is nan.)
FUSEDOPT_ELEMENT inline bool both_zero(float a, float b) {
  return __builtin_fabsf(a) <= -__builtin_fabsf(b);
}

struct Quick {
  float value;
  bool exact;

  Quick() = default;
  FUSEDOPT_ELEMENT Quick(float x, bool is_exact = true) : value(x), exact(is_exact) {}

  FUSEDOPT_ELEMENT Quick& operator+=(Quick b) { return *this = *this + b; }
  FUSEDOPT_ELEMENT Quick& operator-=(Quick b) { return *this = *this - b; }
  FUSEDOPT_ELEMENT Quick& operator*=(Quick b) { return *this = *this * b; }

  FUSEDOPT_ELEMENT friend Quick operator+(Quick a, Quick b) {
    return {a.value + b.value, bool(a.exact & b.exact)};
  }
  FUSEDOPT_ELEMENT friend Quick operator-(Quick a, Quick b) {
    return {a.value - b.value, bool(a.exact & b.exact)};
  }
  FUSEDOPT_ELEMENT friend Quick operator*(Quick a, Quick b) {
    return {a.value * b.value, bool(a.exact & b.exact)};
  }
  FUSEDOPT_ELEMENT friend Quick operator-(Quick a) { return {-a.value, a.exact}; }
  FUSEDOPT_ELEMENT friend Quick multiply_add(Quick a, Quick b, Quick c) {
    return {multiply_add(a.value, b.value, c.value), bool(a.exact & b.exact & c.exact)};
  }
  FUSEDOPT_ELEMENT friend Quick maximum(Quick a, Quick b) {
    return {maximum(a.value, b.value), bool(a.exact & b.exact)};
  }

  // Markstein 1990: the reciprocal is refined once, and the quotient twice by the excess of b q
  // over a, which multiply_add gives without rounding as long as it is not among the subnormal
  // numbers. With b and q of at least 2^-50, it is not. (What is too large or infinite on the way
  // makes q nan.) A divisor whose mantissa is all ones needs an estimate that is rounded correctly;
  // so does the compiler's own function, which begins with the same instructions, and is exact.
  // Zeros keep their signs, as the excess is taken away, not added.
  FUSEDOPT_ELEMENT friend Quick operator/(Quick a, Quick b) {
    const float estimate = estimate_reciprocal(b.value);
    const float inverse = multiply_add(estimate, multiply_add(-b.value, estimate, 1.0f), estimate);
    float q = a.value * inverse;
    q = multiply_add(-inverse, multiply_add(b.value, q, -a.value), q);
    q = multiply_add(-inverse, multiply_add(b.value, q, -a.value), q);
    const bool sure =
        bool(b.value >= 0x1p-50f) & (bool(__builtin_fabsf(q) >= 0x1p-50f) | both_zero(a.value, q));
    return {q, bool(a.exact & b.exact & sure)};
  }

  // The same for a root, refined once by what its square leaves of x. These are the instructions
  // that the compiler itself has for roots between 2^-101 and the largest number, which are exact
  // for the GPU's estimates. (For any that are off by a unit, two or three in 2^24 would not be.)
  // It is nan for infinity, and less than 2^-50 for subnormal numbers and negative ones.
  FUSEDOPT_ELEMENT friend Quick square_root(Quick x) {
    constexpr float kSmallest = 0x1p-126f;  // of zero, the estimate would be infinite
    const float estimate = estimate_reciprocal_root(__builtin_fmaxf(x.value, kSmallest));
    const float half = estimate * 0.5f;
    float root = x.value * estimate;
    root = multiply_add(half, multiply_add(-root, root, x.value), root);
    const bool sure = bool(root >= 0x1p-50f) | both_zero(x.value, root);
    return {root, bool(x.exact & sure)};
  }
};

// Of either kind of number: what it is, and whether that is known.
FUSEDOPT_ELEMENT inline float value_of(Quick x) { return x.value; }
FUSEDOPT_ELEMENT inline bool is_exact(Quick x) { return x.exact; }
template <class T>
FUSEDOPT_ELEMENT inline T value_of(T x) {
  return x;
}
template <class T>
FUSEDOPT_ELEMENT inline bool is_exact(T) {
  return true;
}

}  // namespace fusedopt::FUSEDOPT_ISA
