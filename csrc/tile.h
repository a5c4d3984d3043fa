// What a step does to one tile of one parameter, whatever the processor.
//
// A tile is kTile consecutive elements. An engine's `Memory` is the part of a tile that one thread
// has, and how it gets at it: on a CPU all of it, a pointer into the tensor where that will do; on
// a GPU the handful of elements that one thread keeps in registers.
//
//     kElements                   room for a part: the length of buffers
//     length()                    the elements in it
//     open(operand, buffer)       the part as T, in `buffer` or where it lies
//     close(operand, tile)        writes it back
//     in_place<T>(operand)        whether open() gives where it lies
//     with_elements(operand, buffer, f)
//                                 calls f(elements), as they are stored if that can be had
//     read<Stored>(operand, buffer), write<Stored>(operand, fill)
//                                 the same without conversion; fill(to) is told where to write
//     scale(scales)               the tile's own among the scales of 8-bit state
//     draw(seed, step, stream, buffer)
//                                 random bits for its elements
//     has(dtype), has(precision)  whether any task may have it: what none has is not compiled
#pragma once

#include "plan.h"
#include "store.h"
#include "update.h"

namespace fusedopt::FUSEDOPT_ISA {

// A tile is a block of 8-bit state. On a CPU, its buffers fit the first-level cache beside the
// streams.
constexpr int64_t kTile = kBlock;

template <class T>
constexpr DType kArithmetic = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// True when the operand's elements are T's, one after another.
template <class T>
FUSEDOPT_HD inline bool is_plain(const Operand& operand) {
  return operand.dtype == kArithmetic<T> && operand.layout == nullptr;
}

// Calls f(Stored{}) with the storage format, one of the four floating-point ones.
template <class F>
FUSEDOPT_HD inline void with_format(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    case DType::kInt16:
    case DType::kInt64:
    case DType::kUInt8: return;
  }
}

// Calls f(P{}) with the 16-bit format.
template <class Memory, class F>
FUSEDOPT_HD inline void with_half(DType dtype, F&& f) {
  if constexpr (Memory::has(DType::kBFloat16)) {
    if (dtype == DType::kBFloat16) return f(BFloat16{});
  }
  if constexpr (Memory::has(DType::kFloat16)) f(Float16{});
}

// Where the gradients come from: what one backward pass left, what was accumulated before, or both.
struct Gradients {
  Operand grad;        // no data: none
  const Operand* sum;  // null: none
};

FUSEDOPT_HD inline Gradients gradients_of(const Task& task) {
  const bool accumulated = task.extras != nullptr && task.extras->accumulated;
  return {task.grad, accumulated ? &task.extras->grad_sum : nullptr};
}

template <class T, class Memory>
FUSEDOPT_HD inline const T* open_gradients(const Memory& memory, const Gradients& from, T* buffer) {
  if (from.sum == nullptr) return memory.open(from.grad, buffer);
  if (from.grad.data == nullptr) return memory.open(*from.sum, buffer);
  alignas(64) T sum_buffer[Memory::kElements];
  const T* const sum = memory.open(*from.sum, sum_buffer);
  memory.with_elements(from.grad, buffer,
                       [&](const auto* g) { add(sum, g, buffer, memory.length()); });
  return buffer;
}

// The weights in full precision.
template <class Memory>
FUSEDOPT_HD inline double* open_weights(const Memory& memory, const Task& task, double* buffer) {
  return memory.open(task.param, buffer);
}

template <class Memory>
FUSEDOPT_HD inline float* open_weights(const Memory& memory, const Task& task, float* buffer) {
  float* const p = memory.open(task.param, buffer);
  if (task.extras == nullptr) return p;
  const Operand& hidden = task.extras->hidden;
  const WeightPrecision precision = task.extras->precision;
  const int64_t n = memory.length();
  if constexpr (Memory::has(WeightPrecision::kMaster)) {
    if (precision == WeightPrecision::kMaster) {
      alignas(64) float master_buffer[Memory::kElements];
      float* const master = memory.open(hidden, master_buffer);
      with_half<Memory>(task.param.dtype,
                        [&](auto format) { join_masters<decltype(format)>(p, master, n); });
      if (memory.template in_place<float>(hidden)) return master;
      FUSEDOPT_VECTORIZE
      for (int64_t i = 0; i < n; ++i) p[i] = master[i];
    }
  }
  if constexpr (Memory::has(WeightPrecision::kRemainder)) {
    if (precision == WeightPrecision::kRemainder) {
      alignas(64) int16_t hidden_buffer[Memory::kElements];
      join_remainders(p, memory.template read<int16_t>(hidden, hidden_buffer), n);
    }
  }
  if constexpr (Memory::has(WeightPrecision::kKahan)) {
    if (precision == WeightPrecision::kKahan) {
      alignas(64) int16_t hidden_buffer[Memory::kElements];
      const int16_t* const lost = memory.template read<int16_t>(hidden, hidden_buffer);
      with_half<Memory>(task.param.dtype,
                        [&](auto format) { join_kahans<decltype(format)>(p, lost, n); });
    }
  }
  return p;
}

template <class Memory>
FUSEDOPT_HD inline void close_weights(const Memory& memory, const Task& task, uint64_t, double* p) {
  memory.close(task.param, p);
}

template <class Memory>
FUSEDOPT_HD inline void close_weights(const Memory& memory, const Task& task, uint64_t step,
                                      float* p) {
  const Extras* const extras = task.extras;
  const int64_t n = memory.length();
  const WeightPrecision precision =
      extras == nullptr ? WeightPrecision::kNearest : extras->precision;
  if constexpr (Memory::has(WeightPrecision::kMaster)) {
    if (precision == WeightPrecision::kMaster) {
      if (task.param.dtype == DType::kBFloat16) move_off_upper_ties(p, n);
      memory.close(extras->hidden, p);
    }
  }
  if constexpr (Memory::has(WeightPrecision::kRemainder)) {
    if (precision == WeightPrecision::kRemainder) {
      move_off_upper_ties(p, n);
      memory.template write<int16_t>(extras->hidden,
                                     [&](int16_t* to) { split_remainders(p, to, n); });
    }
  }
  if constexpr (Memory::has(WeightPrecision::kKahan)) {
    if (precision == WeightPrecision::kKahan) {
      with_half<Memory>(task.param.dtype, [&](auto format) {
        memory.template write<int16_t>(
            extras->hidden, [&](int16_t* to) { split_kahans<decltype(format)>(p, to, n); });
      });
    }
  }
  if constexpr (Memory::has(WeightPrecision::kStochastic)) {
    if (precision == WeightPrecision::kStochastic) {
      alignas(64) uint16_t random[Memory::kElements];
      memory.draw(extras->seed, step, kWeightStream, random);
      return with_half<Memory>(task.param.dtype, [&](auto format) {
        memory.template write<decltype(format)>(
            task.param, [&](auto* to) { round_all_randomly(p, random, 0, to, n); });
      });
    }
  }
  memory.close(task.param, p);
}

template <class T, class Memory>
FUSEDOPT_HD inline T* open_state(const Memory& memory, const Task& task, int k, T* buffer) {
  const Operand& state = task.state[k];
  if constexpr (Memory::has(DType::kUInt8)) {
    if (state.dtype == DType::kUInt8) {
      alignas(64) uint8_t code_buffer[Memory::kElements];
      const uint8_t* const codes = memory.template read<uint8_t>(state, code_buffer);
      const float scale = *memory.scale(task.extras->scale[k]);
      if (task.extras->square[k]) {
        decode_block<true>(codes, scale, buffer, memory.length());
      } else {
        decode_block<false>(codes, scale, buffer, memory.length());
      }
      return buffer;
    }
  }
  return memory.open(state, buffer);
}

// Writes a state in 8 bits, given the scale.
template <class T, class Memory>
FUSEDOPT_HD inline void encode_state(const Memory& memory, const Task& task, int k, float scale,
                                     const T* tile, Random random) {
  const float inverse = inverse_scale(scale);
  memory.template write<uint8_t>(task.state[k], [&](uint8_t* codes) {
    if (task.extras->square[k]) {
      encode_block<true>(tile, inverse, random, k, codes, memory.length());
    } else {
      encode_block<false>(tile, inverse, random, k, codes, memory.length());
    }
  });
}

// Writes any other. Without random bits, states in bfloat16 are rounded to nearest.
template <class T, class Memory>
FUSEDOPT_HD inline void close_state(const Memory& memory, const Operand& state, int k,
                                    const T* tile, Random random) {
  if constexpr (Memory::has(DType::kBFloat16)) {
    if (state.dtype == DType::kBFloat16 && random.drawn) {
      return memory.template write<BFloat16>(state, [&](BFloat16* to) {
        round_all_randomly(tile, random.bits, k, to, memory.length());
      });
    }
  }
  memory.close(state, tile);
}

// Whether any of the rule's states is rounded at random.
template <class Rule>
FUSEDOPT_HD inline bool draws_for_states(const Task& task) {
  bool draws = task.extras != nullptr && task.extras->random_state;
  each_index<Rule::kStates>(
      [&](auto k) { draws |= task.state[decltype(k)::value].dtype == DType::kUInt8; });
  return draws;
}

// The stages of a step in their order. `apply(p, g, multiplier)` applies the rule.
template <class T, class Memory, class Apply>
FUSEDOPT_HD inline void update_tile(const Memory& memory, const Task& task, const Gradients& from,
                                    const TileStages<T>& stages, T* weights, T* gradients,
                                    Apply&& apply) {
  const Extras* const extras = task.extras;
  T* const p = open_weights(memory, task, weights);
  const T* g = open_gradients(memory, from, gradients);
  T multiplier = stages.multiplier;
  if (stages.limits()) {
    limit_gradients(g, stages, gradients, memory.length());
    g = gradients;
    multiplier = 1;
  }
  apply(p, g, multiplier);
  if (stages.shrink != 0) shrink(p, stages.shrink, memory.length());
  if (extras != nullptr && extras->ema.data != nullptr) {
    T* const ema = memory.open(extras->ema, gradients);
    update_average(Average<T>(ema, stages.ema_weight), p, memory.length());
    memory.close(extras->ema, ema);
  }
  close_weights(memory, task, stages.step, p);
}

}  // namespace fusedopt::FUSEDOPT_ISA
