// Between memory and arithmetic: how an element is read from its storage format and written back,
// and how a weight that is stored in 16 bits keeps the precision of a float.
//
// A weight's full-precision value lives in two places: rounded to nearest in the parameter, where
// the model sees it, and in a hidden part. When the parameter is not what the hidden part says,
// someone has written to it since, and the parameter wins.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

template <class T, class Stored>
FUSEDOPT_HD inline T load(const Stored& from) {
  return narrow(widen(from), T{});
}

template <class T, class Stored>
FUSEDOPT_HD inline void store(T value, Stored& to) {
  to = narrow(value, Stored{});
}

// x as it will read once stored in the 16-bit format P.
template <class P>
FUSEDOPT_HD inline float rounded(float x) {
  return widen(narrow(x, P{}));
}

// "master": the hidden part is the whole weight, in float32.
template <class P>
FUSEDOPT_HD inline float join_master(float p, float master) {
  return rounded<P>(master) == p ? master : p;
}

// "remainder": the hidden part is the lower half of the weight's float32, the parameter (bfloat16)
// the upper half, rounded to nearest even. Read as a signed number, the lower half says by itself
// whether the upper one was rounded up.
FUSEDOPT_HD inline float join_remainder(float p, int16_t remainder) {
  const float whole = bit_cast<float>(bit_cast<uint32_t>(p) + uint32_t(int32_t(remainder)));
  return rounded<BFloat16>(whole) == p ? whole : p;
}

FUSEDOPT_HD inline int16_t lower_half(float whole) {
  return int16_t(bit_cast<uint32_t>(whole) & 0xffffu);
}

// But for one case. A weight half-way between two bfloat16 rounds to the even one of them, which
// so owns 65,537 floats: its own 65,535 and a tie on either side, one more than 16 bits tell
// apart. So no weight rests on the tie above an even number (away from zero); it moves to the next
// float towards it, by 2^-24 of itself. Master weights do the same, and are the same bits.
FUSEDOPT_HD inline float off_upper_tie(float whole) {
  const uint32_t bits = bit_cast<uint32_t>(whole);
  return bit_cast<float>(bits - ((bits & 0x1ffffu) == 0x8000u ? 1u : 0u));
}

// "kahan": the hidden part is what rounding took away, itself rounded to bfloat16 (Kahan 1965).
// It is at most half the distance between neighbours; halved, it cannot change the rounding.
template <class P>
FUSEDOPT_HD inline float join_kahan(float p, float lost) {
  return rounded<P>(p + 0.5f * lost) == p ? p + lost : p;
}

// "stochastic": no hidden part, but rounding up with a probability equal to the fraction, which
// makes the mean right (Gupta et al. 2015). Returns a float that P holds exactly, unless it is
// beyond P's range.
FUSEDOPT_HD inline float round_randomly(float x, uint32_t random, BFloat16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const float up = bit_cast<float>((bits + (random >> 16)) & 0xffff0000u);
  return x == x ? up : x;
}

FUSEDOPT_HD inline float round_randomly(float x, uint32_t random, Float16) {
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  // From 2^-14 on, the lower 13 bits are what a half has no room for. (inf and nan keep theirs.)
  const uint32_t normal = (magnitude + (random >> 19)) & ~0x1fffu;
  // Below, halves are the multiples of 2^-24.
  const uint32_t bounded = magnitude < (113u << 23) ? magnitude : (113u << 23);
  const float multiple =
      bit_cast<float>(bounded) * 0x1p24f + float(int32_t(random >> 19)) * 0x1p-13f;
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(multiple)) * 0x1p-24f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return bit_cast<float>(sign | (magnitude < 0x7f800000u ? finite : magnitude));
}

}  // namespace fusedopt::FUSEDOPT_ISA
