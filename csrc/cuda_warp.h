// The bodies of the CUDA kernels: what one warp does with its share of the work line.
//
// They are written for any `Warp`, which says what its 32 lanes are: threads of a GPU, each with
// its own registers (cuda.cu), or a loop over 32 structs, which is how tests run the very same
// bodies without a GPU.
//
//     each(f)          calls f(lane, state) for all lanes
//     once(f)          calls f() on one of them, while the others wait
//     largest(f)       the largest of f(state), an unsigned integer, over the lanes
//     sum(f)           the sum of f(state), a double, in a fixed order
//     raise(to, n)     *to = max(*to, n), among all warps
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

// Spans that a warp has on the way, with the one that it works on, at most.
constexpr int kMaxDepth = 8;

// A warp's buffers in shared memory: `depth` of them, each for a span.
struct Buffers {
  unsigned char* first;
  uint32_t bytes;  // of each
  int depth;

  FUSEDOPT_HD unsigned char* at(int i) const { return first + i * bytes; }
};

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

// A lane's part of a tile in a buffer: elements `begin` + row * kRow + lane * kQuad + 0 to 3.
// Beyond the tensor's end they are zeros, and may become anything.
class BufferLane : public LaneMemory<BufferLane> {
 public:
  // The tile is the i-th of the buffer's.
  FUSEDOPT_HD BufferLane(unsigned char* buffer, int i, int lane, int64_t begin, int64_t numel)
      : buffer_(buffer), i_(i), lane_(lane), first_(begin + lane * kQuad), numel_(numel) {}

  FUSEDOPT_HD int64_t index(int i) const { return first_ + i / kQuad * kRow + i % kQuad; }

  FUSEDOPT_HD uint32_t pair(int i) const { return uint32_t(uint64_t(index(i)) >> 1); }

  FUSEDOPT_HD uint32_t block() const { return pair_block(index(0)); }

  template <class Kind>
  FUSEDOPT_HD static constexpr bool has(Kind) {
    return true;
  }

  template <class Rule, class T>
  FUSEDOPT_HD void apply(const Rule& rule, T* p, const T* g, T multiplier, T factor,
                         const States<T>& states) const {
    apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, kElements);
  }

  // The bits of the largest magnitude. (Spare elements may have become anything.)
  template <class T>
  FUSEDOPT_HD uint32_t largest(T (&x)[kLaneElements]) const {
    const bool ends = first_ - lane_ * kQuad + kBlock > numel_;
    FUSEDOPT_VECTORIZE
    for (int i = 0; ends && i < kLaneElements; ++i) {
      if (index(i) >= numel_) x[i] = 0;
    }
    return largest_magnitude(x, kLaneElements);
  }

  template <class Stored>
  FUSEDOPT_HD const Stored* read(const Operand& operand, Stored* buffer) const {
    const Stored* const from = elements<Stored>(operand);
    FUSEDOPT_VECTORIZE
    for (int row = 0; row < kRows; ++row) {
      const Quad<Stored> quad = *reinterpret_cast<const Quad<Stored>*>(from + row * kRow);
      FUSEDOPT_VECTORIZE
      for (int j = 0; j < kQuad; ++j) buffer[row * kQuad + j] = quad.value[j];
    }
    return buffer;
  }

  template <class Stored, class F>
  FUSEDOPT_HD void write(const Operand& operand, F&& fill) const {
    Stored buffer[kElements];
    fill(buffer);
    Stored* const to = elements<Stored>(operand);
    FUSEDOPT_VECTORIZE
    for (int row = 0; row < kRows; ++row) {
      Quad<Stored> quad;
      FUSEDOPT_VECTORIZE
      for (int j = 0; j < kQuad; ++j) quad.value[j] = buffer[row * kQuad + j];
      *reinterpret_cast<Quad<Stored>*>(to + row * kRow) = quad;
    }
  }

  FUSEDOPT_HD float* scale(const float* place) const {
    return lane_scale(buffer_, place, i_, lane_);
  }

 private:
  template <class Stored>
  struct alignas(sizeof(Stored) * kQuad < kLargestPiece ? sizeof(Stored) * kQuad : kLargestPiece)
      Quad {
    Stored value[kQuad];
  };

  // Where the first four elements of an operand are; those of the next row are kRow further on.
  template <class Stored>
  FUSEDOPT_HD Stored* elements(const Operand& operand) const {
    const auto place = reinterpret_cast<uintptr_t>(operand.data);
    return reinterpret_cast<Stored*>(buffer_ + place) + i_ * kBlock + lane_ * kQuad;
  }

  unsigned char* buffer_;
  int i_, lane_;
  int64_t first_, numel_;
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

// Goes through the spans of a warp's share of the line, of the tasks that take part.
template <class T>
class Walk {
 public:
  FUSEDOPT_HD Walk(const DeviceLine& line, int64_t warp, int64_t n_warps)
      : line_(line), chunk_(warp), n_warps_(n_warps) {
    begin_chunk();
    settle();
  }

  FUSEDOPT_HD bool done() const { return chunk_ >= line_.n_chunks; }

  FUSEDOPT_HD int32_t task() const { return task_; }

  // The span's first element.
  FUSEDOPT_HD int64_t begin() const { return (at_ - first_) * (kSpanTiles<T> * kBlock); }

  FUSEDOPT_HD void advance() {
    ++at_;
    settle();
  }

 private:
  FUSEDOPT_HD void begin_chunk() {
    if (done()) return;
    at_ = chunk_ * line_.chunk_spans;
    const int64_t length = line_.first_span[line_.n_tasks];
    end_ = at_ + line_.chunk_spans < length ? at_ + line_.chunk_spans : length;
    begin_task(line_.chunk_task[chunk_]);
  }

  FUSEDOPT_HD void begin_task(int32_t task) {
    task_ = task;
    first_ = line_.first_span[task];
    last_ = line_.first_span[task + 1];
    if (!takes_part(line_.grads[task])) at_ = at_ < last_ ? last_ : at_;
  }

  FUSEDOPT_HD void settle() {
    while (!done() && (at_ >= end_ || at_ >= last_)) {
      if (at_ < end_) {
        begin_task(task_ + 1);
      } else {
        chunk_ += n_warps_;
        begin_chunk();
      }
    }
  }

  const DeviceLine& line_;
  int64_t chunk_, n_warps_;
  int64_t at_ = 0, end_ = 0;      // on the line: the span, and the chunk's end
  int64_t first_ = 0, last_ = 0;  // the task's spans
  int32_t task_ = -1;
};

// Calls use(task's number, first element, buffer) for the spans of a warp's share, when what
// fetch(the same) has begun to copy there has come.
template <class T, class Warp, class Fetch, class Use>
FUSEDOPT_HD inline void stream_spans(Warp& warp, const DeviceLine& line, const Buffers& buffers,
                                     int64_t number, int64_t n_warps, Fetch&& fetch, Use&& use) {
  Walk<T> ahead(line, number, n_warps), here(line, number, n_warps);
  int filled = 0, first = 0;  // buffers, in the order of a ring
  while (!here.done()) {
    for (; filled < buffers.depth; ++filled) {
      if (!ahead.done()) {
        const int last = first + filled;
        fetch(ahead.task(), ahead.begin(),
              buffers.at(last < buffers.depth ? last : last - buffers.depth));
        ahead.advance();
      }
      warp.commit();
    }
    warp.wait(buffers.depth - 1);
    use(here.task(), here.begin(), buffers.at(first));
    here.advance();
    first = first + 1 < buffers.depth ? first + 1 : 0;
    --filled;
  }
}

// Calls f(i, first element) for the tiles of a span.
template <class T, class F>
FUSEDOPT_HD inline void each_tile(int64_t begin, int64_t numel, F&& f) {
  FUSEDOPT_KEEP_LOOP
  for (int i = 0; i < kSpanTiles<T> && begin + i * kBlock < numel; ++i) f(i, begin + i * kBlock);
}

// Begins to copy a lane's part of the first `n` operands.
template <class T, class Warp>
FUSEDOPT_HD inline void fetch_operands(Warp& warp, const LaneSpan<T>& span, const DeviceTask& task,
                                       const DeviceGrad& grad, int n) {
  FUSEDOPT_KEEP_LOOP
  for (int k = 0; k < n; ++k) {
    const DeviceOperand& operand = task.operands[k];
    const void* data = k == kGradOperand ? grad.data : operand.data;
    if (k == kGradSumOperand && grad.accumulated == 0) data = nullptr;
    if (data != nullptr) span.fetch(warp, operand, data);
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
  if (grad.data == nullptr) operand.data = nullptr;
  return {operand, grad.accumulated != 0 ? &task.extras.grad_sum : nullptr};
}

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

// (A function of its own: it needs many registers, for the powers of doubles in it, and seldom
// runs.)
template <class Rule, class T>
FUSEDOPT_OUTLINE void make_rule(WarpMemory<Rule, T>& memory, const DeviceGroup& device,
                                double before, bool first) {
  if (device.lr != nullptr) memory.options.hyper[0] = load_scalar(device.lr, device.lr_dtype);
  memory.rule = Rule(memory.options.hyper, before + 1, first);
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

// The update, for the tasks of one rule and type.
template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void update_warp(const UpdateArguments<DeviceLine>& arguments, Warp& warp,
                                    WarpMemory<Rule, T>& memory, const Buffers& buffers,
                                    int64_t number, int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  begin_update(arguments, warp, memory);
  if (memory.verdict.skip) return;
  int32_t opened = -1;
  stream_spans<T>(
      warp, line, buffers, number, n_warps,
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        const DeviceGrad grad = line.grads[t];
        warp.each([&](int number, LaneTile<T>&) {
          const LaneSpan<T> span(buffer, number, begin, task.task.numel);
          fetch_operands(warp, span, task, grad, task.n_operands);
          for (int k = 0; k < Rule::kStates; ++k) {
            if (task.scale[k] == nullptr) continue;
            span.fetch_scales(warp, task.scale[k], task.extras.scale[k]);
          }
        });
      },
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        if (t != opened) {
          const double before = count_of(task.step, task.step_dtype);
          prepare_rule(warp, memory, line.groups, task.task.group, before,
                       task.task.first && before == task.task.step);
        }
        opened = t;
        const Gradients from = gradients_of(task, line.grads[t]);
        const int64_t numel = task.task.numel;
        each_tile<T>(begin, numel, [&](int i, int64_t begin) {
          update_warp_tile(
              warp, memory.rule, memory.stages, task.task, from,
              [&](int number, LaneTile<T>&) { return BufferLane(buffer, i, number, begin, numel); },
              [&](const BufferLane& lane, auto& bits) {
                return lane.draw(task.extras.seed, memory.stages.step, kStateStream, bits);
              });
        });
        warp.each([&](int number, LaneTile<T>&) {
          const LaneSpan<T> span(buffer, number, begin, task.task.numel);
          FUSEDOPT_KEEP_LOOP
          for (int k = kOtherOperands; k < task.n_operands; ++k) span.put(task.operands[k]);
          for (int k = 0; k < Rule::kStates; ++k) {
            if (task.scale[k] == nullptr) continue;
            span.put_scales(task.scale[k], task.extras.scale[k]);
          }
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
  constexpr int kBatch = 8;
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

// When all warps are done with it: what one of `n` threads does.
FUSEDOPT_OUTLINE void finish_update(const UpdateArguments<DeviceLine>& arguments, int64_t thread,
                                    int64_t n) {
  if (was_skipped(arguments, thread)) return;
  const DeviceLine& line = arguments.line;
  advance_counters(line, line.n_tasks, thread, n, [](int64_t i) { return int32_t(i); });
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

// The norm's parts: one warp's.
template <class T, class Warp>
FUSEDOPT_HD inline void measure_warp(const MeasureArguments<DeviceLine>& arguments, Warp& warp,
                                     const Buffers& buffers, int64_t number, int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  const T multiplier = T(Verdict(arguments.stages).stages.grad_multiplier);
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int, LaneNorm<T>& norm) { norm = {0, 0, 0}; });
  stream_spans<T>(
      warp, line, buffers, number, n_warps,
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        warp.each([&](int number, LaneNorm<T>&) {
          const LaneSpan<T> span(buffer, number, begin, task.task.numel);
          fetch_operands(warp, span, task, line.grads[t], kOtherOperands);
        });
      },
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        const int64_t numel = task.task.numel;
        const Gradients from = gradients_of(task, line.grads[t]);
        each_tile<T>(begin, numel, [&](int i, int64_t begin) {
          warp.each([&](int number, LaneNorm<T>& norm) {
            const BufferLane lane(buffer, i, number, begin, numel);
            T tile[kLaneElements];
            add_to_norm(norm, open_gradients(lane, from, tile), sums, multiplier, task.place);
          });
        });
      });
  report_norm(arguments, warp, sums, number);
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

// Micro-batches: one warp's.
template <class T, class Warp>
FUSEDOPT_HD inline void accumulate_warp(const DeviceLine& line, Warp& warp, const Buffers& buffers,
                                        int64_t number, int64_t n_warps) {
  stream_spans<T>(
      warp, line, buffers, number, n_warps,
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        warp.each([&](int number, LaneTile<T>&) {
          const LaneSpan<T> span(buffer, number, begin, task.task.numel);
          fetch_operands(warp, span, task, line.grads[t], kOtherOperands);
        });
      },
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        const DeviceGrad grad = line.grads[t];
        if (grad.data == nullptr) return;
        const int64_t numel = task.task.numel;
        each_tile<T>(begin, numel, [&](int i, int64_t begin) {
          warp.each([&](int number, LaneTile<T>& tile) {
            const BufferLane lane(buffer, i, number, begin, numel);
            const T* const g = lane.open(task.task.grad, tile.gradients);
            const bool adds = grad.accumulated != 0;
            T* const sum = adds ? lane.open(task.extras.grad_sum, tile.weights) : tile.weights;
            accumulate(g, adds, sum, kLaneElements);
            lane.close(task.extras.grad_sum, sum);
          });
        });
        warp.each([&](int number, LaneTile<T>&) {
          const LaneSpan<T> span(buffer, number, begin, numel);
          span.put(task.operands[kGradSumOperand]);
        });
      });
}

}  // namespace fusedopt::FUSEDOPT_ISA
