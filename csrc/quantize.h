// Optimizer state in 8 bits. A block of 256 elements shares a scale, a power of two next to its
// largest magnitude; an element is a small float in units of it:
//
//     averages (signed)        sign, 4 bits of exponent, 3 of mantissa: down to 2^-15 of the scale
//     squares (never negative)       5 bits of exponent, 3 of mantissa: down to 2^-31
//
// Code 0 is zero. Because scales are powers of two, what is read and written back unchanged keeps
// its bits, and every value is exact in bfloat16 (which is what checkpoints hold).
//
// Rounding is stochastic. An average that moves by a thousandth of itself at each step would never
// move if it were rounded to the nearest of eight values per octave; so it moves with probability
// proportional to the change, and is right in the mean. Neighbours are at most 1/8 apart, which
// bounds the error of one rounding, but for values at the bottom of the range. A square that is not
// zero never becomes zero: a later division by its root would throw the weight away.
//
// Block-wise scaling: Dettmers et al. 2022, section 2.1.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

// How far the lowest bit of a code's mantissa is from that of a float.
constexpr int kCodeShift = 20;

constexpr uint32_t kSignedZero = (127 - 15) << 23;  // the float bits that code 0 would have
constexpr uint32_t kSquareZero = (127 - 31) << 23;

// The block's scale from the bits of its largest magnitude: the largest is below 1.875 scales, the
// highest value that both formats can hold. inf and nan make an infinite scale, and so spread to
// the block.
FUSEDOPT_ELEMENT inline float block_scale(uint32_t largest) {
  const float margin = bit_cast<float>(largest) * 1.06666f;
  const uint32_t bits = bit_cast<uint32_t>(margin) & 0x7f800000u;
  const uint32_t lowest = (127 - 90) << 23;  // so that no value is subnormal, not in bfloat16
  const uint32_t highest = 253u << 23;       // beyond, the inverse would be
  const uint32_t scale = bits < lowest ? lowest : bits;
  return bit_cast<float>(scale > highest ? 0x7f800000u : scale);
}

// 1 / scale, exactly. (Of an infinite one, some number.)
FUSEDOPT_ELEMENT inline float inverse_scale(float scale) {
  return bit_cast<float>((254u << 23) - bit_cast<uint32_t>(scale));
}

template <bool kSquare>
FUSEDOPT_ELEMENT inline float decode(uint8_t code, float scale) {
  // All of it in 32 bits: compilers would widen code and sign apart from each other.
  const uint32_t wide = code;
  const uint32_t bits = wide << kCodeShift & (kSquare ? 0xffu : 0x7fu) << kCodeShift;
  const uint32_t magnitude = bits == 0 ? 0 : bits + (kSquare ? kSquareZero : kSignedZero);
  const uint32_t sign = kSquare ? 0 : wide << 24 & 0x80000000u;
  return bit_cast<float>(magnitude | sign) * scale;
}

// `random`: 16 random bits. The middle of their range, kNearest, rounds to nearest.
// `tail`: 4 bits to follow them, which a tensor's elements share. In the mean over many steps, they
// make up for what 16 bits are too coarse for: averages that change by a millionth at each step.
constexpr uint16_t kNearest = 0x8000;

template <bool kSquare>
FUSEDOPT_ELEMENT inline uint8_t encode(float x, float inverse, uint16_t random, uint32_t tail) {
  constexpr int32_t kHighest = kSquare ? 255 : 127;
  const uint32_t offset = tail - (kSquare ? kSquareZero : kSignedZero);
  const uint32_t bits = bit_cast<uint32_t>(x * inverse);
  const uint32_t fraction = uint32_t(random) << (kCodeShift - 16);
  int32_t code = int32_t((bits & 0x7fffffffu) + fraction + offset) >> kCodeShift;
  const int32_t least = kSquare && x != 0 ? 1 : 0;
  code = code < least ? least : code;
  code = code > kHighest ? kHighest : code;
  return uint8_t(uint32_t(code) | (kSquare ? 0 : bits >> 31 << 7));
}

}  // namespace fusedopt::FUSEDOPT_ISA
