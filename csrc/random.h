// Random bits for stochastic rounding. Counter-based: they are a function of (seed, step, element)
// and nothing else, so that a run gives the same bits on any number of threads, on any processor,
// and after it was resumed from a checkpoint.
#pragma once

#include "num.h"

namespace fusedopt::FUSEDOPT_ISA {

struct RandomKey {
  uint32_t first, second;
};

// The finalizer of SplitMix64 (Steele, Lea & Flood 2014).
FUSEDOPT_ELEMENT inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A step's number for the key. (A counter may have been set to anything: what cannot be told apart
// as an integer is 0.)
FUSEDOPT_HD inline uint64_t step_number(double step) {
  return step > -0x1p63 && step < 0x1p63 ? uint64_t(int64_t(step)) : 0;
}

// `stream` tells apart the random numbers that one step needs for different purposes; `block` is
// the upper half of the pair's index.
FUSEDOPT_ELEMENT inline RandomKey random_key(uint64_t seed, uint64_t step, uint32_t stream,
                                             uint32_t block) {
  const uint64_t purpose = (uint64_t(stream) << 32) | block;
  const uint64_t key = mix(mix(mix(seed) + step) + purpose);
  return {uint32_t(key >> 32), uint32_t(key)};
}

// The block of an element's pair.
FUSEDOPT_ELEMENT inline uint32_t pair_block(int64_t element) {
  return uint32_t(uint64_t(element) >> 33);
}

// The 32 bits for a pair of elements, of which the even one takes the lower half; `index` is half
// the number of either. Multiplications and shifts of 32 bits only, which every vector unit has.
FUSEDOPT_ELEMENT inline uint32_t random_bits(RandomKey key, uint32_t index) {
  uint32_t x = index ^ key.first;
  x *= 0x9e3779b1u;
  x = (x ^ (x >> 15)) + key.second;
  x *= 0x85ebca77u;
  x = (x ^ (x >> 13)) * 0xc2b2ae3du;
  return x ^ (x >> 16);
}

// Four bits that all elements share.
FUSEDOPT_ELEMENT inline uint32_t tail_bits(RandomKey key) { return key.second >> 28; }

// The k-th use of an element's bits, when it rounds several things in one step: times an odd
// number, which permutes all 65,536 values. With these numbers the pairs of any two uses fill the
// square evenly (0x9e37 / 2^16 is next to the golden ratio).
FUSEDOPT_ELEMENT inline uint16_t again(uint16_t random, int k) {
  const uint32_t factor = k == 0 ? 1 : k == 1 ? 0x9e37 : 0xd2b5;
  return uint16_t(random * factor);
}

}  // namespace fusedopt::FUSEDOPT_ISA
