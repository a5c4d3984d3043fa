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
FUSEDOPT_HD inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// `stream` tells apart the random numbers that one step needs for different purposes; `block` is
// the upper half of the element's number.
FUSEDOPT_HD inline RandomKey random_key(uint64_t seed, uint64_t step, uint32_t stream,
                                        uint32_t block) {
  const uint64_t purpose = (uint64_t(stream) << 32) | block;
  const uint64_t key = mix(mix(mix(seed) + step) + purpose);
  return {uint32_t(key >> 32), uint32_t(key)};
}

// 32 bits for the element whose number ends in `index`. Multiplications and shifts of 32 bits
// only, which every vector unit has.
FUSEDOPT_HD inline uint32_t random_bits(RandomKey key, uint32_t index) {
  uint32_t x = index ^ key.first;
  x *= 0x9e3779b1u;
  x = (x ^ (x >> 15)) + key.second;
  x *= 0x85ebca77u;
  x = (x ^ (x >> 13)) * 0xc2b2ae3du;
  return x ^ (x >> 16);
}

}  // namespace fusedopt::FUSEDOPT_ISA
