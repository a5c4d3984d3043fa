// What the bodies of all CUDA kernels have in common: what one warp does with a part of a tile,
// with the rule and its counters, and with the norm.
//
// They are written for any `Warp`, which says what its 32 lanes are: threads of a GPU, each with
// its own registers (cuda.cu), or a loop over 32 structs, which is how tests run the very same
// bodies without a GPU.
//
//     each(f)          calls f(lane, state) for all lanes
//     once(f)          calls f() on one of them, while the others wait
//     largest(f)       the largest of f(state), an unsigned integer, over the lanes
//     sum(f)           the sum of f(state), a double, in a fixed order
//     all(f)           whether f(state) holds for all lanes
//     raise(to, n)     *to = max(*to, n), among all warps
//     take(counter)    the counter's value, which then is one more, among all warps; for one lane
//     wait_for_lanes() until all lanes have come here
//     copy(to, from)   begins to copy a piece from device memory to a buffer
//     commit()         what has begun since the last commit() is a batch
//     wait(n)          until all batches but the last n are there; n < kMaxDepth
//
// A lane waits for its own copies only.
#pragma once

#include "cuda_buffer.h"
#include "norm.h"
#include "select.h"
#include "tile.h"

namespace fusedopt::FUSEDOPT_ISA {

// What of a tile one lane has: kN of its elements, in the forms that tile.h asks for. `Lane` says
// how it reads and writes elements as they are stored, and which of the tensor's the i-th is: one
// of the pair(i) of the block(). Of several, two each are a pair.
template <class Lane, int kN = kLaneElements>
class LaneMemory {
 public:
  static constexpr int64_t kElements = kN;

  FUSEDOPT_HD static constexpr int64_t length() { return kElements; }

  template <class T>
  FUSEDOPT_HD static constexpr bool in_place(const Operand&) {
    return false;
  }

  template <class T>
  FUSEDOPT_HD T* open(const Operand& operand, T* buffer) const {
    with_lane_format<T>(operand.dtype, [&](auto format) {
      using Stored = decltype(format);
      Stored elements[kElements] = {};
      self().read(operand, elements);
      FUSEDOPT_VECTORIZE
      for (int i = 0; i < kElements; ++i) buffer[i] = load<T>(elements[i]);
    });
    return buffer;
  }

  template <class T>
  FUSEDOPT_HD void close(const Operand& operand, const T* tile) const {
    with_lane_format<T>(operand.dtype, [&](auto format) {
      self().template write<decltype(format)>(operand, [&](auto* to) {
        FUSEDOPT_VECTORIZE
        for (int i = 0; i < kElements; ++i) store(tile[i], to[i]);
      });
    });
  }

  template <class T, class F>
  FUSEDOPT_HD void with_elements(const Operand& operand, T* buffer, F&& f) const {
    f(open(operand, buffer));
  }

  FUSEDOPT_HD Random draw(RandomKey key, uint16_t (&bits)[kElements]) const {
    FUSEDOPT_VECTORIZE
    for (int i = 0; i < kElements; i += 2) {
      uint16_t pair[2];
      draw_bits(key, self().pair(i), pair);
      if constexpr (kElements == 1) {
        bits[0] = self().is_second() ? pair[1] : pair[0];
      } else {
        bits[i] = pair[0], bits[i + 1] = pair[1];
      }
    }
    return {true, bits, tail_bits(key)};
  }

  FUSEDOPT_HD Random draw(uint64_t seed, uint64_t step, uint32_t stream,
                          uint16_t (&bits)[kElements]) const {
    return draw(random_key(seed, step, stream, self().block()), bits);
  }

 private:
  FUSEDOPT_HD const Lane& self() const { return static_cast<const Lane&>(*this); }

  // As with_format(), but that among floats no lane meets doubles.
  template <class T, class F>
  FUSEDOPT_HD static void with_lane_format(DType dtype, F&& f) {
    if constexpr (sizeof(T) == 4) {
      if constexpr (Lane::has(DType::kBFloat16)) {
        if (dtype == DType::kBFloat16) return f(BFloat16{});
      }
      if constexpr (Lane::has(DType::kFloat16)) {
        if (dtype == DType::kFloat16) return f(Float16{});
      }
      if constexpr (Lane::has(DType::kFloat32)) f(float{});
    } else {
      with_format(dtype, f);
    }
  }
};

// What a lane keeps of a tile while it is worked on.
template <class T, int kElements = kLaneElements>
struct LaneTile {
  T weights[kElements], gradients[kElements], states[kMaxStates][kElements];
  uint16_t bits[kElements];  // random ones
  uint32_t tail;
  uint32_t largest[kMaxStates];
};

// What a lane adds up.
template <class T>
struct LaneNorm {
  double sum;
  typename BitsOf<T>::type largest;
  uint64_t nonfinite;  // as in DeviceControl

  FUSEDOPT_HD T magnitude() const { return bit_cast<T>(largest); }
};

FUSEDOPT_HD inline bool takes_part(const DeviceGrad& grad) {
  return grad.data != nullptr || grad.accumulated != 0;
}

FUSEDOPT_HD inline double load_scalar(const void* from, DType dtype) {
  return dtype == DType::kFloat64 ? *static_cast<const double*>(from)
                                  : double(*static_cast<const float*>(from));
}

// What is known on the device only, once per launch.
struct Verdict {
  bool skip;
  Stages stages;

  Verdict() = default;
  FUSEDOPT_HD explicit Verdict(const DeviceStages& device) : skip(false), stages(device.stages) {
    const double scale = device.grad_scale == nullptr ? 1 : double(*device.grad_scale);
    stages.grad_multiplier = 1 / (scale * device.divisor);
    if (device.found_inf != nullptr) skip = *device.found_inf != 0;
  }

  FUSEDOPT_HD double norm(const DeviceStages& device, double total) const {
    return norm_of(device.norm, total, stages.grad_multiplier);
  }

  // After the measurement.
  FUSEDOPT_HD Verdict(const DeviceStages& device, const DeviceControl& control) : Verdict(device) {
    if (device.skip_nonfinite && control.found != 0) skip = true;
    if (device.max_grad_norm < 0) return;
    stages.clip_coefficient = clip_coefficient(norm(device, control.total), device.max_grad_norm);
  }
};

// What the lanes of a warp have in common, where they all can read it: the rule and its stages,
// made anew when the warp meets another group or step.
template <class Rule, class T>
struct WarpMemory {
  Verdict verdict;
  int32_t group;
  Group options;  // of that group
  bool first;
  double before;
  alignas(16) Rule rule;  // (Read by few instructions.)
  alignas(16) TileStages<T> stages;
};

template <class Arguments, class Rule, class T, class Warp>
FUSEDOPT_HD inline void begin_update(const Arguments& arguments, Warp& warp,
                                     WarpMemory<Rule, T>& memory) {
  warp.once([&] {
    memory.verdict = Verdict(arguments.stages, *arguments.control);
    memory.group = -1;
  });
}

// A task's counter; 0 when nothing counts.
FUSEDOPT_HD inline double count_of(const void* step, DType dtype) {
  return step == nullptr ? 0 : load_scalar(step, dtype);
}

// Copies what is in memory that all lanes can access, each lane some words.
template <class T, class Warp>
FUSEDOPT_HD inline void copy_words(Warp& warp, T* to, const T* from) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "whole words");
  warp.each([&](int lane, auto&) {
    FUSEDOPT_KEEP_LOOP
    for (int i = lane; i < int(sizeof(T) / sizeof(uint32_t)); i += kWarpLanes) {
      uint32_t word;  // (Of an unknown type: bytes may be of any.)
      __builtin_memcpy(&word, reinterpret_cast<const char*>(from) + i * sizeof(word), sizeof(word));
      __builtin_memcpy(reinterpret_cast<char*>(to) + i * sizeof(word), &word, sizeof(word));
    }
  });
}

template <class Rule>
FUSEDOPT_HD inline void make(Rule& rule, const Group& group, double step, bool first) {
  rule = Rule(group.hyper, step, first);
}

// (A function of its own: it needs many registers, for the powers of doubles in it, and seldom
// runs.)
template <class Rule, class T>
FUSEDOPT_OUTLINE void make_rule(WarpMemory<Rule, T>& memory, const DeviceGroup& device,
                                double before, bool first) {
  if (device.lr != nullptr) memory.options.hyper[0] = load_scalar(device.lr, device.lr_dtype);
  make(memory.rule, memory.options, before + 1, first);
  memory.stages = TileStages<T>(memory.verdict.stages, memory.options, before + 1);
}

// The rule of a group for the step after `before` ones. `first`: state[0] has not been written.
template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void prepare_rule(Warp& warp, WarpMemory<Rule, T>& memory,
                                     const DeviceGroup* groups, int32_t number, double before,
                                     bool first) {
  if (number == memory.group && before == memory.before && first == memory.first) return;
  copy_words(warp, &memory.options, &groups[number].group);
  warp.once([&] {
    make_rule(memory, groups[number], before, first);
    memory.group = number, memory.before = before, memory.first = first;
  });
}

// Works on a lane's part of a tile. States in 8 bits are left to be encoded.
template <class Rule, class T, class Lane, int kElements>
FUSEDOPT_HD inline void update_lane_tile(const Lane& lane, const Rule& rule,
                                         const TileStages<T>& stages, const Task& task,
                                         const Gradients& from, LaneTile<T, kElements>& tile,
                                         Random random) {
  update_tile(lane, task, from, stages, tile.weights, tile.gradients,
              [&](T* p, const T* g, T multiplier) {
                States<T> states = {};
                each_index<Rule::kStates>([&](auto index) {
                  constexpr int k = decltype(index)::value;
                  states.data[k] = open_state(lane, task, k, tile.states[k]);
                });
                lane.apply(rule, p, g, multiplier, stages.factor, states);
              });
  each_index<Rule::kStates>([&](auto index) {
    constexpr int k = decltype(index)::value;
    if (task.state[k].dtype == DType::kUInt8) return;
    close_state(lane, task.state[k], k, tile.states[k], random);
  });
}

// Works on a tile. `lane_of(number, state)` is the Memory of a lane, whose state is a LaneTile, and
// `draw(lane, bits)` draws random bits for it.
template <class Rule, class T, class Warp, class LaneOf, class Draw>
FUSEDOPT_HD inline void update_warp_tile(Warp& warp, const Rule& rule, const TileStages<T>& stages,
                                         const Task& task, const Gradients& from, LaneOf&& lane_of,
                                         Draw&& draw) {
  const bool draws = draws_for_states<Rule>(task);
  warp.each([&](int number, auto& tile) {
    const auto lane = lane_of(number, tile);
    // (A pointer to the lane's registers must not be kept in them: they would go to memory.)
    if (draws) tile.tail = draw(lane, tile.bits).tail;
    update_lane_tile(lane, rule, stages, task, from, tile, Random{draws, tile.bits, tile.tail});
    each_index<Rule::kStates>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if (task.state[k].dtype == DType::kUInt8) tile.largest[k] = lane.largest(tile.states[k]);
    });
  });
  each_index<Rule::kStates>([&](auto index) {
    constexpr int k = decltype(index)::value;
    if (task.state[k].dtype != DType::kUInt8) return;
    const float scale =
        block_scale(warp.largest([&](const auto& tile) { return tile.largest[k]; }));
    warp.each([&](int number, auto& tile) {
      const auto lane = lane_of(number, tile);
      *lane.scale(task.extras->scale[k]) = scale;
      encode_state(lane, task, k, scale, tile.states[k], Random{draws, tile.bits, tile.tail});
    });
  });
}

FUSEDOPT_HD inline void store_count(void* step, DType dtype, double count) {
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(step) = count;
  } else {
    *static_cast<float*>(step) = float(count);
  }
}

// What one of `n` threads does of: adds one to the counters of `n_tasks` tasks, where task_of(i) is
// the i-th's number on the line, or -1.
template <class Line, class TaskOf>
FUSEDOPT_HD inline void advance_counters(const Line& line, int32_t n_tasks, int64_t thread,
                                         int64_t n, TaskOf&& task_of) {
  // Some at a time, so that a thread does not wait for each of the thousands that there may be.
  // (Not many: there is a copy of this in each kernel.)
  constexpr int kBatch = 4;
  for (int64_t first = thread; first < n_tasks; first += kBatch * n) {
    void* steps[kBatch];
    DType dtypes[kBatch];
    double counts[kBatch];
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) {
      const int32_t i = first + k * n < n_tasks ? task_of(first + k * n) : -1;
      steps[k] = i >= 0 && takes_part(line.grads[i]) ? line.tasks[i].step : nullptr;
      dtypes[k] = steps[k] == nullptr ? DType::kFloat32 : line.tasks[i].step_dtype;
    }
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) counts[k] = count_of(steps[k], dtypes[k]);
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) {
      if (steps[k] != nullptr) store_count(steps[k], dtypes[k], counts[k] + 1);
    }
  }
}

// Whether the step was skipped, which then is counted by one thread.
template <class Arguments>
FUSEDOPT_HD inline bool was_skipped(const Arguments& arguments, int64_t thread) {
  const Verdict verdict(arguments.stages, *arguments.control);
  if (verdict.skip && thread == 0 && arguments.last_launch) ++arguments.control->skipped;
  return verdict.skip;
}

// A lane's part of a tile's gradients, of the task at `place`.
template <class T>
FUSEDOPT_HD inline void add_to_norm(LaneNorm<T>& norm, const T* g, bool sums, T multiplier,
                                    int64_t place) {
  auto largest = magnitude_bits(g[0]);
  FUSEDOPT_VECTORIZE
  for (int j = 1; j < kLaneElements; ++j) {
    const auto bits = magnitude_bits(g[j]);
    largest = bits > largest ? bits : largest;
  }
  if (sums) norm.sum += sum_of_squares<kLaneElements>(g, largest);
  norm.largest = largest > norm.largest ? largest : norm.largest;
  // The largest tells of all, also when it is multiplied; inf and nan are largest.
  const auto infinity = magnitude_bits(T(INFINITY));
  if (largest >= infinity || magnitude_bits(bit_cast<T>(largest) * multiplier) >= infinity) {
    const uint64_t number = kFirstPlace - place;
    norm.nonfinite = number > norm.nonfinite ? number : norm.nonfinite;
  }
}

// Where a warp leaves what its lanes have added up.
template <class Line, class Warp>
FUSEDOPT_HD inline void report_norm(const MeasureArguments<Line>& arguments, Warp& warp, bool sums,
                                    int64_t number) {
  const double total = sums ? warp.sum([](const auto& norm) { return norm.sum; })
                            : bit_cast<double>(warp.largest([](const auto& norm) {
                                return magnitude_bits(double(norm.magnitude()));
                              }));
  const uint64_t nonfinite = warp.largest([](const auto& norm) { return norm.nonfinite; });
  warp.each([&](int lane, auto&) {
    if (lane != 0) return;
    arguments.partial[number] = total;
    if (nonfinite != 0) warp.raise(&arguments.control->nonfinite, nonfinite);
  });
}

// When all of them are there: what one warp does.
template <class Line, class Warp>
FUSEDOPT_HD inline void finish_measure(const MeasureArguments<Line>& arguments, Warp& warp,
                                       int64_t n_warps) {
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int lane, LaneNorm<double>& norm) {
    norm = {0, 0, 0};
#if defined(__CUDACC__)
#pragma unroll 16  // there may be thousands: have many on the way at a time
#endif
    for (int64_t i = lane; i < n_warps; i += kWarpLanes) {
      const double part = arguments.partial[i];
      norm.sum += part;
      const uint64_t bits = magnitude_bits(part);
      norm.largest = bits > norm.largest ? bits : norm.largest;
    }
  });
  const double sum = warp.sum([](const LaneNorm<double>& norm) { return norm.sum; });
  const double largest =
      bit_cast<double>(warp.largest([](const LaneNorm<double>& norm) { return norm.largest; }));
  warp.each([&](int lane, LaneNorm<double>&) {
    if (lane != 0) return;
    DeviceControl& control = *arguments.control;
    const double before = arguments.first_launch ? 0 : control.total;
    if (sums) {
      control.total = before + sum;
    } else {
      control.total = magnitude_bits(before) > magnitude_bits(largest) ? before : largest;
    }
    if (!arguments.last_launch) return;
    control.found = control.nonfinite == 0 ? 0 : 1 + kFirstPlace - control.nonfinite;
    control.nonfinite = 0;
    if (arguments.grad_norm == nullptr) return;
    const Verdict verdict(arguments.stages);
    *arguments.grad_norm =
        verdict.skip ? double(NAN) : verdict.norm(arguments.stages, control.total);
  });
}

}  // namespace fusedopt::FUSEDOPT_ISA
