// A warp without a GPU: its lanes take turns.
#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <utility>
#include <vector>

#include "cuda_warp.h"

namespace fusedopt::emulated {

template <class State>
class EmulatedWarp {
 public:
  template <class F>
  void each(F&& f) {
    for (int lane = 0; lane < kWarpLanes; ++lane) f(lane, states_[lane]);
  }

  template <class F>
  void once(F&& f) {
    f();
  }

  template <class F>
  auto largest(F&& f) {
    auto result = f(states_[0]);
    for (const State& state : states_) result = std::max(result, f(state));
    return result;
  }

  // As shuffles do it: pairs, pairs of pairs, and so on.
  template <class F>
  double sum(F&& f) {
    double sums[kWarpLanes];
    for (int lane = 0; lane < kWarpLanes; ++lane) sums[lane] = f(states_[lane]);
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
    }
    return sums[0];
  }

  void raise(uint64_t* to, uint64_t n) { *to = std::max(*to, n); }

  // As late as possible: who reads before he has waited finds something else.
  template <class T>
  void copy(T* to, const T* from) {
    begun_.push_back({to, from, sizeof(T)});
  }

  void commit() {
    batches_.push_back(std::move(begun_));
    begun_.clear();
  }

  void wait(int n) {
    for (; int(batches_.size()) > n; batches_.pop_front()) {
      for (const Copy& copy : batches_.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };

  State states_[kWarpLanes];
  std::vector<Copy> begun_;
  std::list<std::vector<Copy>> batches_;
};

// A warp's shared memory, full of what is no number.
class EmulatedBuffers {
 public:
  EmulatedBuffers(uint32_t bytes, int depth)
      : memory_(depth * bytes / kLargestPiece), bytes_(bytes), depth_(depth) {
    std::memset(memory_.data(), 0xff, depth * bytes);
  }

  operator Buffers() { return {reinterpret_cast<unsigned char*>(memory_.data()), bytes_, depth_}; }

 private:
  std::vector<Piece<kLargestPiece>> memory_;
  uint32_t bytes_;
  int depth_;
};

}  // namespace fusedopt::emulated
