// A warp without a GPU: its lanes take turns.
#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_direct.h"
#include "cuda_general.h"

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

  template <class F>
  bool all(F&& f) {
    return std::all_of(std::begin(states_), std::end(states_), f);
  }

  void wait_for_lanes() {}

  uint32_t take(uint32_t* counter) { return (*counter)++; }

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

  State states_[kWarpLanes] = {};
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

// Launches, of so many warps one after another.
struct Grid {
  int64_t warps;
  int depth;
  int64_t threads = 7;  // that finish an update
};

template <class T>
struct EmulateUpdate {
  const UpdateArguments<DeviceLine>& arguments;
  Grid grid;

  template <class Rule>
  void run() const {
    // As cuda.cu has it; but that tests have rules that compute nothing, too.
    constexpr bool kStreams = std::is_same_v<Rule, Stream<T, Rule::kStates>>;
    using Any = std::conditional_t<kStreams, Rule, AnyRule<T, Rule::kStates>>;
    for (int64_t i = 0; i < grid.warps; ++i) {
      EmulatedWarp<LaneTile<T>> warp;
      WarpMemory<Any, T> memory = {};
      EmulatedBuffers buffers(arguments.line.buffer_bytes, grid.depth);
      update_warp<Any, T>(arguments, warp, memory, buffers, i, grid.warps);
    }
    for (int64_t i = 0; i < grid.threads; ++i) finish_update(arguments, i, grid.threads);
  }
};

struct EmulateDirectUpdate {
  int formats;
  const UpdateArguments<DirectLine>& arguments;
  Grid grid;

  template <class Rule>
  void run() const {
    with_direct_kernel<Rule>(formats, [&](auto format) {
      constexpr int kFormat = decltype(format)::value;
      for (int64_t i = 0; i < grid.warps; ++i) {
        EmulatedWarp<DirectTile> warp;
        DirectMemory<Rule> memory = {};
        begin_direct(arguments, warp, memory, int32_t(i));
        update_direct<Rule, kFormat>(arguments, warp, memory, int32_t(i), int32_t(grid.warps));
      }
    });
    for (int64_t i = 0; i < grid.threads; ++i) finish_update(arguments, i, grid.threads);
  }
};

template <class T>
void emulate_measure(const MeasureArguments<DeviceLine>& arguments, Grid grid) {
  EmulatedBuffers buffers(arguments.line.grad_bytes, grid.depth);
  EmulatedWarp<LaneNorm<T>> warp;
  for (int64_t i = 0; i < grid.warps; ++i) {
    measure_warp<T>(arguments, warp, buffers, i, grid.warps);
  }
  EmulatedWarp<LaneNorm<double>> last;
  finish_measure(arguments, last, grid.warps);
}

inline void emulate_direct_measure(int formats, const MeasureArguments<DirectLine>& arguments,
                                   Grid grid) {
  EmulatedWarp<LaneNorm<float>> warp;
  for (int32_t i = 0; i < grid.warps; ++i) {
    if (kFormats[formats].grad == DType::kFloat32) {
      measure_direct<float>(arguments, warp, i, int32_t(grid.warps));
    } else {
      measure_direct<BFloat16>(arguments, warp, i, int32_t(grid.warps));
    }
  }
  EmulatedWarp<LaneNorm<double>> last;
  finish_measure(arguments, last, grid.warps);
}

template <class T>
void emulate_accumulate(const DeviceLine& line, Grid grid) {
  EmulatedBuffers buffers(line.grad_bytes, grid.depth);
  EmulatedWarp<LaneTile<T>> warp;
  for (int64_t i = 0; i < grid.warps; ++i) accumulate_warp<T>(line, warp, buffers, i, grid.warps);
}

}  // namespace fusedopt::emulated
