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
constexpr uint32_t kCodeNearest = 1u << (kCodeShift - 1);  // as random bits: round to nearest

constexpr uint32_t kSignedZero = (127 - 15) << 23;  // the float bits that code 0 would have
constexpr uint32_t kSquareZero = (127 - 31) << 23;

// The block's scale from the bits of its largest magnitude: the largest is below 1.875 scales, the
// highest value that both formats can hold. inf and nan make an infinite scale, and so spread to
// the block.
FUSEDOPT_HD inline float block_scale(uint32_t largest) {
  const float margin = bit_cast<float>(largest) * 1.06666f;
  const uint32_t bits = bit_cast<uint32_t>(margin) & 0x7f800000u;
  const uint32_t lowest = (127 - 90) << 23;  // so that no value is subnormal, not in bfloat16
  const uint32_t highest = 253u << 23;       // beyond, the inverse would be
  const uint32_t scale = bits < lowest ? lowest : bits;
  return bit_cast<float>(scale > highest ? 0x7f800000u : scale);
}

// 1 / scale, exactly. (Of an infinite one, some number.)
FUSEDOPT_HD inline float inverse_scale(float scale) {
  return bit_cast<float>((254u << 23) - bit_cast<uint32_t>(scale));
}

FUSEDOPT_HD inline float decode_signed(uint8_t code, float scale) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t bits = magnitude == 0 ? 0 : (magnitude << kCodeShift) + kSignedZero;
  return bit_cast<float>(bits | uint32_t(code & 0x80) << 24) * scale;
}

FUSEDOPT_HD inline float decode_square(uint8_t code, float scale) {
  const uint32_t bits = code == 0 ? 0 : (uint32_t(code) << kCodeShift) + kSquareZero;
  return bit_cast<float>(bits) * scale;
}

// `random`: kCodeShift random bits.
FUSEDOPT_HD inline uint8_t encode_signed(float x, float inverse, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x * inverse);
  int32_t code = int32_t((bits & 0x7fffffffu) + random - kSignedZero) >> kCodeShift;
  code = code < 0 ? 0 : code;
  code = code > 127 ? 127 : code;
  return uint8_t(uint32_t(code) | bits >> 31 << 7);
}

FUSEDOPT_HD inline uint8_t encode_square(float x, float inverse, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x * inverse) & 0x7fffffffu;
  int32_t code = int32_t(bits + random - kSquareZero) >> kCodeShift;
  const int32_t least = x == 0 ? 0 : 1;
  code = code < least ? least : code;
  return uint8_t(code > 255 ? 255 : code);
}

}  // namespace fusedopt::FUSEDOPT_ISA
