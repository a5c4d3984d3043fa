// Between memory and arithmetic: how an element is read from its storage format and written back,
// and how a weight that is stored in 16 bits keeps the precision of a float.
//
// A weight's full-precision value lives in two places: rounded to nearest in the parameter, where
// the model sees it, and in a hidden part. When someone has written to the parameter since, it
// wins: over a master copy that no longer rounds to it, and over the other two in that what they
// hide is always less than half the distance to the next number.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

template <class T, class Stored>
FUSEDOPT_ELEMENT inline T load(const Stored& from) {
  return narrow(widen(from), T{});
}

template <class T, class Stored>
FUSEDOPT_ELEMENT inline void store(T value, Stored& to) {
  to = narrow(value, Stored{});
}

// x as it will read once stored in the 16-bit format P.
template <class P>
FUSEDOPT_ELEMENT inline float rounded(float x) {
  return widen(narrow(x, P{}));
}

// "master": the hidden part is the whole weight, in float32.
template <class P>
FUSEDOPT_ELEMENT inline float join_master(float p, float master) {
  return rounded<P>(master) == p ? master : p;
}

// "remainder": the hidden part is the lower half of the weight's float32, the parameter (bfloat16)
// the upper half, rounded to nearest even. Read as a signed number, the lower half says by itself
// whether the upper one was rounded up.
FUSEDOPT_ELEMENT inline float join_remainder(float p, int16_t remainder) {
  const float whole = bit_cast<float>(bit_cast<uint32_t>(p) + uint32_t(int32_t(remainder)));
  return rounded<BFloat16>(whole) == p ? whole : p;
}

FUSEDOPT_ELEMENT inline int16_t lower_half(float whole) {
  return int16_t(bit_cast<uint32_t>(whole) & 0xffffu);
}

// But for one case. A weight half-way between two bfloat16 rounds to the even one of them, which
// so owns 65,537 floats: its own 65,535 and a tie on either side, one more than 16 bits tell
// apart. So no weight rests on the tie above an even number (away from zero); it moves to the next
// float towards it, by 2^-24 of itself. Master weights do the same, and are the same bits.
FUSEDOPT_ELEMENT inline float off_upper_tie(float whole) {
  const uint32_t bits = bit_cast<uint32_t>(whole);
  return bit_cast<float>(bits - ((bits & 0x1ffffu) == 0x8000u ? 1u : 0u));
}

// The distance from a weight in format P to its neighbour away from zero. (Next to zero: some
// small number, so that nothing is subnormal.)
FUSEDOPT_ELEMENT inline float unit(float p, BFloat16) {
  const uint32_t power = bit_cast<uint32_t>(p) & 0x7f800000u;
  const uint32_t least = 64u << 23;
  return bit_cast<float>((power > least ? power : least) - (7u << 23));
}

FUSEDOPT_ELEMENT inline float unit(float p, Float16) {
  const uint32_t power = bit_cast<uint32_t>(p) & 0x7f800000u;
  const uint32_t least = 113u << 23;  // 2^-14: below, halves are equidistant
  return bit_cast<float>((power > least ? power : least) - (10u << 23));
}

// "kahan": the hidden part is what rounding took away (Kahan 1965), at most half a unit, and kept
// in 2^-16 of it. (In the parameter's own format, as others keep it, its last bits would be lost
// with each small update.)
template <class P>
FUSEDOPT_ELEMENT inline float join_kahan(float p, int16_t lost) {
  const float whole = p + float(lost) * (unit(p, P{}) * 0x1p-16f);
  return rounded<P>(whole) == p ? whole : p;
}

template <class P>
FUSEDOPT_ELEMENT inline int16_t split_kahan(float whole) {
  const float p = rounded<P>(whole);
  float lost = (whole - p) * (0x1p16f / unit(p, P{}));
  lost = lost > -32767.0f ? lost : -32767.0f;  // nan, too; and never quite half a unit
  lost = lost < 32767.0f ? lost : 32767.0f;
  return int16_t(int32_t(lost + (lost < 0 ? -0.5f : 0.5f)));
}

// "stochastic": no hidden part, but rounding up with a probability equal to the fraction, which
// makes the mean right (Gupta et al. 2015).
FUSEDOPT_ELEMENT inline BFloat16 round_randomly(float x, uint16_t random, BFloat16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {uint16_t((x == x ? bits + random : bits | 0x400000u) >> 16)};
}

FUSEDOPT_ELEMENT inline Float16 round_randomly(float x, uint16_t random, Float16 to) {
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  // From 2^-14 on, the lower 13 bits are what a half has no room for. (inf and nan keep theirs.)
  const uint32_t normal = (magnitude + (random >> 3)) & ~0x1fffu;
  // Below, halves are the multiples of 2^-24.
  const uint32_t bounded = magnitude < (113u << 23) ? magnitude : (113u << 23);
  const float multiple =
      bit_cast<float>(bounded) * 0x1p24f + float(int32_t(random >> 3)) * 0x1p-13f;
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(multiple)) * 0x1p-24f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return narrow(bit_cast<float>(sign | (magnitude < 0x7f800000u ? finite : magnitude)), to);
}

}  // namespace fusedopt::FUSEDOPT_ISA
