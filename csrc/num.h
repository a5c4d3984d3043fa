// Numbers: the host/device mark, the two 16-bit float formats, and the few functions whose
// result must be the same on every compiler.
//
// This header is compiled once per instruction set (and by nvcc). Everything sits in a namespace
// named after the target, so that the linker can never take an AVX-512 copy of an inline function
// for the baseline build. For the same reason none of these headers uses the C++ library.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__
#else
#define FUSEDOPT_HD
#endif

// For what is done to each element. A loop with a call in it is not vectorized, and by compilers'
// own measure some of these are too long to be inlined everywhere.
#define FUSEDOPT_ELEMENT FUSEDOPT_HD __attribute__((always_inline))

#ifndef FUSEDOPT_ISA
#define FUSEDOPT_ISA base
#endif

namespace fusedopt::FUSEDOPT_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FUSEDOPT_ELEMENT inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Widening is exact, so there is one function for each format and no rounding to speak of.
FUSEDOPT_ELEMENT inline float widen(float x) { return x; }
FUSEDOPT_ELEMENT inline double widen(double x) { return x; }
FUSEDOPT_ELEMENT inline float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Branch-free, so that compilers vectorize it without half-precision instructions.
FUSEDOPT_ELEMENT inline float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  const uint32_t normal = magnitude + (112u << 23);  // re-bias the exponent: 127 - 15
  const uint32_t special = magnitude + (224u << 23);
  // A subnormal half is magnitude * 2^-24: let float subtraction normalize it.
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t finite = exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal;
  return bit_cast<float>(sign | (exponent == 0x0f800000 ? special : finite));
#endif
}

// narrow(x, To{}): round to nearest, ties to even, as torch's casts do. (GPUs have instructions,
// whose nan has other bits.)
FUSEDOPT_ELEMENT inline float narrow(float x, float) { return x; }
FUSEDOPT_ELEMENT inline float narrow(double x, float) { return float(x); }
FUSEDOPT_ELEMENT inline double narrow(float x, double) { return x; }
FUSEDOPT_ELEMENT inline double narrow(double x, double) { return x; }

FUSEDOPT_ELEMENT inline BFloat16 narrow(float x, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {x != x ? uint16_t(0x7fc0) : uint16_t(rounded)};
#endif
}

FUSEDOPT_ELEMENT inline Float16 narrow(float x, Float16) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  // Below 2^-14 the half is subnormal: adding 0.5 makes float addition round at its last bit.
  const uint32_t half = 126u << 23;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(half)) - half;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  // 65520 is the first float that rounds to infinity.
  return {uint16_t(sign | (magnitude >= 0x477ff000 ? special : finite))};
#endif
}

// A double meets a 16-bit format only when stock torch's own dtypes are mixed by hand (a float64
// parameter with a bfloat16 state): through float, as torch casts.
FUSEDOPT_ELEMENT inline BFloat16 narrow(double x, BFloat16 to) { return narrow(float(x), to); }
FUSEDOPT_ELEMENT inline Float16 narrow(double x, Float16 to) { return narrow(float(x), to); }

FUSEDOPT_ELEMENT inline float square_root(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_ELEMENT inline double square_root(double x) { return __builtin_sqrt(x); }

// a * b + c, rounded once where the processor can (x86 from AVX2 on, ARM, every GPU): there all
// give the same bits, and stock torch's kernels round so too. The oldest x86 rounds twice.
#if defined(__FMA__) || defined(__CUDACC__) || defined(__aarch64__)
FUSEDOPT_ELEMENT inline float multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
FUSEDOPT_ELEMENT inline double multiply_add(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
#else
FUSEDOPT_ELEMENT inline float multiply_add(float a, float b, float c) { return a * b + c; }
FUSEDOPT_ELEMENT inline double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

// (1 - weight) * from + weight * to, as torch.lerp: from the nearer end, so that what is rounded
// beside the result is small, constants stay what they are, and both ends are exact.
template <class E, class T>
FUSEDOPT_ELEMENT inline E interpolate(E from, E to, T weight) {
  const bool near = weight < T(0.5);  // (The same for all elements.)
  return multiply_add(near ? weight : weight - T(1), to - from, near ? from : to);
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// x where the gate is open, else 0, whatever x is. A mask, because compilers fail to vectorize a
// loop that chooses by a bool.
template <class T>
class Gate {
 public:
  Gate() = default;
  FUSEDOPT_HD explicit Gate(bool open) : mask_(open ? ~Bits(0) : Bits(0)) {}
  FUSEDOPT_ELEMENT T operator()(T x) const { return bit_cast<T>(bit_cast<Bits>(x) & mask_); }
  template <class E>
  FUSEDOPT_ELEMENT E operator()(E x) const {  // another kind of number, with a T for a value
    x.value = (*this)(x.value);
    return x;
  }

 private:
  using Bits = typename BitsOf<T>::type;
  Bits mask_;
};

// As torch.maximum: a nan on either side wins.
template <class T>
FUSEDOPT_ELEMENT inline T maximum(T a, T b) {
  return ((a > b) | (a != a)) ? a : b;
}

}  // namespace fusedopt::FUSEDOPT_ISA
