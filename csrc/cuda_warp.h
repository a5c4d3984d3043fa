// The bodies of the CUDA kernels: what one warp does with its share of the work line.
//
// They are written for any `Warp`, which says what its 32 lanes are: threads of a GPU, each with
// its own registers (cuda.cu), or a loop over 32 structs, which is how tests run the very same
// bodies without a GPU.
//
//     each(f)        calls f(lane, state) for all lanes
//     once(f)        calls f() on one of them, while the others wait
//     largest(f)     the largest of f(state), an unsigned integer, over the lanes
//     sum(f)         the sum of f(state), a double, in a fixed order
//     raise(to, n)   *to = max(*to, n), among all warps
//
// A tile is two rows of 128 elements, of which each lane has four neighbours: accesses of 16 bytes
// for floats, 8 for halves, next to those of the neighbouring lanes.
#pragma once

#include "cuda_plan.h"
#include "norm.h"
#include "select.h"
#include "tile.h"

namespace fusedopt::FUSEDOPT_ISA {

#if defined(__CUDACC__)
#define FUSEDOPT_OUTLINE __host__ __device__ __noinline__ inline
#else
#define FUSEDOPT_OUTLINE inline
#endif

constexpr int kWarpLanes = 32;
constexpr int kQuad = 4;
constexpr int kRow = kWarpLanes * kQuad;
constexpr int kRows = int(kTile) / kRow;

template <class Stored>
struct alignas(sizeof(Stored) * kQuad < 16 ? sizeof(Stored) * kQuad : 16) Quad {
  Stored value[kQuad];
};

// Where an element lies. Not inlined: divisions of 64 bits are long, and few tensors need them.
FUSEDOPT_OUTLINE int64_t offset_in(const Layout& layout, int64_t index) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    offset += index % layout.size[d] * layout.stride[d];
    index /= layout.size[d];
  }
  return offset;
}

// What of a tile one lane has: elements `begin` + row * kRow + lane * kQuad + 0 to 3, as far as the
// tensor reaches. Beyond its end it reads zeros and writes nothing.
class Lane {
 public:
  static constexpr int64_t kElements = kRows * kQuad;

  FUSEDOPT_HD Lane(int lane, int64_t begin, int64_t numel)
      : lane_(lane), begin_(begin), numel_(numel) {}

  FUSEDOPT_HD static constexpr int64_t length() { return kElements; }

  // Whether the tensor has a lane's i-th element.
  FUSEDOPT_HD bool has(int i) const { return index(i / kQuad) + i % kQuad < numel_; }

  template <class T>
  FUSEDOPT_HD static constexpr bool in_place(const Operand&) {
    return false;
  }

  template <class T>
  FUSEDOPT_HD T* open(const Operand& operand, T* buffer) const {
    with_format(operand.dtype, [&](auto format) {
      using Stored = decltype(format);
      Stored elements[kElements];
      read(operand, elements);
      FUSEDOPT_VECTORIZE
      for (int i = 0; i < kElements; ++i) buffer[i] = load<T>(elements[i]);
    });
    return buffer;
  }

  template <class T>
  FUSEDOPT_HD void close(const Operand& operand, const T* tile) const {
    with_format(operand.dtype, [&](auto format) {
      write<decltype(format)>(operand, [&](auto* to) {
        FUSEDOPT_VECTORIZE
        for (int i = 0; i < kElements; ++i) store(tile[i], to[i]);
      });
    });
  }

  template <class T, class F>
  FUSEDOPT_HD void with_elements(const Operand& operand, T* buffer, F&& f) const {
    f(open(operand, buffer));
  }

  template <class Stored>
  FUSEDOPT_HD const Stored* read(const Operand& operand, Stored* buffer) const {
    const Stored* const data = static_cast<const Stored*>(operand.data);
    const bool whole_quads = has_quads<Stored>(operand);
    FUSEDOPT_VECTORIZE
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = index(row);
      if (whole_quads && at + kQuad <= numel_) {
        const Quad<Stored> quad = *reinterpret_cast<const Quad<Stored>*>(data + at);
        FUSEDOPT_VECTORIZE
        for (int j = 0; j < kQuad; ++j) buffer[row * kQuad + j] = quad.value[j];
      } else {
        FUSEDOPT_VECTORIZE
        for (int j = 0; j < kQuad; ++j) {
          buffer[row * kQuad + j] = at + j < numel_ ? data[offset(operand, at + j)] : Stored{};
        }
      }
    }
    return buffer;
  }

  template <class Stored, class F>
  FUSEDOPT_HD void write(const Operand& operand, F&& fill) const {
    Stored elements[kElements];
    fill(elements);
    Stored* const data = static_cast<Stored*>(operand.data);
    const bool whole_quads = has_quads<Stored>(operand);
    FUSEDOPT_VECTORIZE
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = index(row);
      if (whole_quads && at + kQuad <= numel_) {
        Quad<Stored> quad;
        FUSEDOPT_VECTORIZE
        for (int j = 0; j < kQuad; ++j) quad.value[j] = elements[row * kQuad + j];
        *reinterpret_cast<Quad<Stored>*>(data + at) = quad;
      } else {
        FUSEDOPT_VECTORIZE
        for (int j = 0; j < kQuad; ++j) {
          if (at + j < numel_) data[offset(operand, at + j)] = elements[row * kQuad + j];
        }
      }
    }
  }

  FUSEDOPT_HD float* scale(float* scales) const { return scales + begin_ / kBlock; }

  FUSEDOPT_HD Random draw(uint64_t seed, uint64_t step, uint32_t stream,
                          uint16_t (&bits)[kElements]) const {
    const RandomKey key = random_key(seed, step, stream, uint32_t(uint64_t(begin_) / 2 >> 32));
    FUSEDOPT_VECTORIZE
    for (int row = 0; row < kRows; ++row) {
      uint16_t quad[kQuad];
      draw_bits(key, uint32_t(index(row) / 2), quad);
      FUSEDOPT_VECTORIZE
      for (int j = 0; j < kQuad; ++j) bits[row * kQuad + j] = quad[j];
    }
    return {true, bits, tail_bits(key)};
  }

 private:
  FUSEDOPT_HD int64_t index(int row) const { return begin_ + row * kRow + lane_ * kQuad; }

  // Whether four elements can be had at once. (Views need not be aligned.)
  template <class Stored>
  FUSEDOPT_HD static bool has_quads(const Operand& operand) {
    return operand.layout == nullptr &&
           reinterpret_cast<uintptr_t>(operand.data) % alignof(Quad<Stored>) == 0;
  }

  FUSEDOPT_HD static int64_t offset(const Operand& operand, int64_t index) {
    return operand.layout == nullptr ? index : offset_in(*operand.layout, index);
  }

  int lane_;
  int64_t begin_, numel_;
};

// What a lane keeps of a tile.
template <class T>
struct LaneTile {
  T weights[Lane::kElements], gradients[Lane::kElements], states[kMaxStates][Lane::kElements];
  uint16_t bits[Lane::kElements];  // random ones
  uint32_t tail;
  uint32_t largest[kMaxStates];
};

// What a lane adds up.
struct LaneNorm {
  double sum;
  uint64_t largest;
};

// Calls open(task number) and then tile(task number, first element) for the tiles of this warp's
// share of the line; open() again only when the task is another one.
template <class Open, class Tile>
FUSEDOPT_HD inline void walk(const DeviceLine& line, int64_t warp, int64_t n_warps, Open&& open,
                             Tile&& tile) {
  int32_t opened = -1;
  for (int64_t chunk = warp; chunk < line.n_chunks; chunk += n_warps) {
    int64_t at = chunk * line.chunk_tiles;
    const int64_t length = line.first_tile[line.n_tasks];
    const int64_t end = at + line.chunk_tiles < length ? at + line.chunk_tiles : length;
    for (int32_t task = line.chunk_task[chunk]; at < end; ++task) {
      const int64_t first = line.first_tile[task], last = line.first_tile[task + 1];
      if (at >= last) continue;
      if (task != opened) open(task);
      opened = task;
      for (; at < end && at < last; ++at) tile(task, (at - first) * kTile);
    }
  }
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

FUSEDOPT_HD inline Gradients gradients_of(const DeviceTask& task, const DeviceGrad& grad) {
  Operand operand = task.task.grad;
  operand.data = const_cast<void*>(grad.data);
  return {operand, grad.accumulated != 0 ? &task.extras.grad_sum : nullptr};
}

FUSEDOPT_HD inline bool takes_part(const DeviceGrad& grad) {
  return grad.data != nullptr || grad.accumulated != 0;
}

// What the lanes of a warp have in common, where they all can read it: the rule and its stages,
// made anew when the warp meets another group or step.
template <class Rule, class T>
struct WarpMemory {
  Verdict verdict;
  int32_t group;
  bool first;
  double before;
  Rule rule;
  TileStages<T> stages;
};

template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void prepare_rule(Warp& warp, WarpMemory<Rule, T>& memory,
                                     const DeviceLine& line, const DeviceTask& task) {
  const double before = task.step == nullptr ? 0 : load_scalar(task.step, task.step_dtype);
  const bool first = task.task.first && before == task.task.step;
  const int32_t number = task.task.group;
  if (number == memory.group && before == memory.before && first == memory.first) return;
  warp.once([&] {
    const DeviceGroup& device = line.groups[number];
    Group group = device.group;
    if (device.lr != nullptr) group.hyper[0] = load_scalar(device.lr, device.lr_dtype);
    memory.rule = Rule(group.hyper, before + 1, first);
    memory.stages = TileStages<T>(memory.verdict.stages, group, before + 1);
    memory.group = number, memory.before = before, memory.first = first;
  });
}

template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void update_warp_tile(Warp& warp, const Rule& rule, const TileStages<T>& stages,
                                         const Task& task, const Gradients& from, int64_t begin) {
  constexpr int64_t n = Lane::kElements;
  const bool draws = draws_for_states<Rule>(task);
  warp.each([&](int number, LaneTile<T>& tile) {
    const Lane lane(number, begin, task.numel);
    // (A pointer to the lane's registers must not be kept in them: they would go to memory.)
    if (draws) tile.tail = lane.draw(task.extras->seed, stages.step, kStateStream, tile.bits).tail;
    update_tile(lane, task, from, stages, tile.weights, tile.gradients,
                [&](T* p, const T* g, T multiplier) {
                  States<T> states = {};
                  FUSEDOPT_VECTORIZE
                  for (int k = 0; k < Rule::kStates; ++k) {
                    states.data[k] = open_state(lane, task, k, tile.states[k]);
                  }
                  apply_rule(rule, p, g, multiplier, stages.factor, states, NoAverage{}, n);
                });
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < Rule::kStates; ++k) {
      if (task.state[k].dtype != DType::kUInt8) {
        close_state(lane, task.state[k], k, tile.states[k], Random{draws, tile.bits, tile.tail});
        continue;
      }
      // The lanes' spare elements may have become anything.
      FUSEDOPT_VECTORIZE
      for (int i = 0; i < n; ++i) {
        if (!lane.has(i)) tile.states[k][i] = 0;
      }
      tile.largest[k] = largest_magnitude(tile.states[k], n);
    }
  });
  FUSEDOPT_VECTORIZE
  for (int k = 0; k < Rule::kStates; ++k) {
    if (task.state[k].dtype != DType::kUInt8) continue;
    const float scale =
        block_scale(warp.largest([&](const LaneTile<T>& tile) { return tile.largest[k]; }));
    warp.each([&](int number, LaneTile<T>& tile) {
      const Lane lane(number, begin, task.numel);
      if (number == 0) *lane.scale(task.extras->scale[k]) = scale;
      encode_state(lane, task, k, scale, tile.states[k], Random{draws, tile.bits, tile.tail});
    });
  }
}

// The update, for the tasks of one rule and type.
template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void update_warp(const UpdateArguments& arguments, Warp& warp,
                                    WarpMemory<Rule, T>& memory, int64_t number, int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  warp.once([&] {
    memory.verdict = Verdict(arguments.stages, *arguments.control);
    memory.group = -1;
  });
  if (memory.verdict.skip) return;
  DeviceGrad grad;
  walk(
      line, number, n_warps,
      [&](int32_t i) {
        grad = line.grads[i];
        if (takes_part(grad)) prepare_rule(warp, memory, line, line.tasks[i]);
      },
      [&](int32_t i, int64_t begin) {
        if (!takes_part(grad)) return;
        const DeviceTask& task = line.tasks[i];
        update_warp_tile<Rule, T>(warp, memory.rule, memory.stages, task.task,
                                  gradients_of(task, grad), begin);
      });
}

// When all warps are done with it: what one of `n` threads does.
FUSEDOPT_HD inline void finish_update(const UpdateArguments& arguments, int64_t thread, int64_t n) {
  const DeviceLine& line = arguments.line;
  const Verdict verdict(arguments.stages, *arguments.control);
  if (verdict.skip) {
    if (thread == 0 && arguments.last_launch) ++arguments.control->skipped;
    return;
  }
  for (int64_t i = thread; i < line.n_tasks; i += n) {
    const DeviceTask& task = line.tasks[i];
    if (task.step == nullptr || !takes_part(line.grads[i])) continue;
    if (task.step_dtype == DType::kFloat64) {
      *static_cast<double*>(task.step) += 1;
    } else {
      *static_cast<float*>(task.step) += 1;
    }
  }
}

// The norm's parts: one warp's.
template <class T, class Warp>
FUSEDOPT_HD inline void measure_warp(const MeasureArguments& arguments, Warp& warp, int64_t number,
                                     int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  const T multiplier = T(Verdict(arguments.stages).stages.grad_multiplier);
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int, LaneNorm& norm) { norm = {0, 0}; });
  const auto nothing = [](int32_t) {};
  walk(line, number, n_warps, nothing, [&](int32_t i, int64_t begin) {
    if (!takes_part(line.grads[i])) return;
    const DeviceTask& task = line.tasks[i];
    const Gradients from = gradients_of(task, line.grads[i]);
    warp.each([&](int lane, LaneNorm& norm) {
      T buffer[Lane::kElements];
      const T* const g = open_gradients(Lane(lane, begin, task.task.numel), from, buffer);
      bool finite = true;
      FUSEDOPT_VECTORIZE
      for (int j = 0; j < Lane::kElements; ++j) {
        finite = finite && magnitude_bits(g[j] * multiplier) < magnitude_bits(T(INFINITY));
        finite = finite && magnitude_bits(g[j]) < magnitude_bits(T(INFINITY));
        if (sums) {
          norm.sum = add_square(norm.sum, g[j]);
        } else {
          const uint64_t bits = magnitude_bits(double(g[j]));
          norm.largest = bits > norm.largest ? bits : norm.largest;
        }
      }
      if (!finite) warp.raise(&arguments.control->nonfinite, kFirstPlace - task.place);
    });
  });
  const double sum =
      sums ? warp.sum([](const LaneNorm& norm) { return norm.sum; })
           : bit_cast<double>(warp.largest([](const LaneNorm& norm) { return norm.largest; }));
  warp.each([&](int lane, LaneNorm&) {
    if (lane == 0) arguments.partial[number] = sum;
  });
}

// When all of them are there: what one warp does.
template <class Warp>
FUSEDOPT_HD inline void finish_measure(const MeasureArguments& arguments, Warp& warp,
                                       int64_t n_warps) {
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int lane, LaneNorm& norm) {
    norm = {0, 0};
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
  const double sum = warp.sum([](const LaneNorm& norm) { return norm.sum; });
  const double largest =
      bit_cast<double>(warp.largest([](const LaneNorm& norm) { return norm.largest; }));
  warp.each([&](int lane, LaneNorm&) {
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

// Micro-batches: one warp's.
template <class T, class Warp>
FUSEDOPT_HD inline void accumulate_warp(const DeviceLine& line, Warp& warp, int64_t number,
                                        int64_t n_warps) {
  const auto nothing = [](int32_t) {};
  walk(line, number, n_warps, nothing, [&](int32_t i, int64_t begin) {
    const DeviceGrad& grad = line.grads[i];
    if (grad.data == nullptr) return;
    const DeviceTask& task = line.tasks[i];
    warp.each([&](int number, LaneTile<T>& tile) {
      const Lane lane(number, begin, task.task.numel);
      Operand from = task.task.grad;
      from.data = const_cast<void*>(grad.data);
      const T* const g = lane.open(from, tile.gradients);
      const bool adds = grad.accumulated != 0;
      T* const sum = adds ? lane.open(task.extras.grad_sum, tile.weights) : tile.weights;
      accumulate(g, adds, sum, Lane::kElements);
      lane.close(task.extras.grad_sum, sum);
    });
  });
}

}  // namespace fusedopt::FUSEDOPT_ISA
