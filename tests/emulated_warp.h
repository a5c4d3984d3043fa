// A warp without a GPU: its lanes take turns.
#pragma once

#include <algorithm>

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

 private:
  State states_[kWarpLanes];
};

}  // namespace fusedopt::emulated
