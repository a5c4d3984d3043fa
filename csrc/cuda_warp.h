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

// What of a tile one lane has, in a buffer: elements `begin` + row * kRow + lane * kQuad + 0 to 3.
// Beyond the tensor's end they are zeros, and may become anything.
class Lane {
 public:
  static constexpr int64_t kElements = kRows * kQuad;

  // The tile is the i-th of the buffer's.
  FUSEDOPT_HD Lane(unsigned char* buffer, int i, int lane, int64_t begin, int64_t numel)
      : buffer_(buffer), i_(i), lane_(lane), first_(begin + lane * kQuad), numel_(numel) {}

  FUSEDOPT_HD static constexpr int64_t length() { return kElements; }

  // Whether the tensor has a lane's i-th element.
  FUSEDOPT_HD bool has(int i) const { return index(i / kQuad) + i % kQuad < numel_; }

  template <class T>
  FUSEDOPT_HD static constexpr bool in_place(const Operand&) {
    return false;
  }

  template <class T>
  FUSEDOPT_HD T* open(const Operand& operand, T* buffer) const {
    with_buffered_format<T>(operand.dtype, [&](auto format) {
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
    with_buffered_format<T>(operand.dtype, [&](auto format) {
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

  FUSEDOPT_HD Random draw(uint64_t seed, uint64_t step, uint32_t stream,
                          uint16_t (&bits)[kElements]) const {
    const RandomKey key = random_key(seed, step, stream, uint32_t(uint64_t(index(0)) / 2 >> 32));
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

  FUSEDOPT_HD int64_t index(int row) const { return first_ + row * kRow; }

  // As with_format(), but that among floats no buffer holds doubles.
  template <class T, class F>
  FUSEDOPT_HD static void with_buffered_format(DType dtype, F&& f) {
    if constexpr (sizeof(T) == 4) {
      switch (dtype) {
        case DType::kBFloat16: return f(BFloat16{});
        case DType::kFloat16: return f(Float16{});
        default: return f(float{});
      }
    } else {
      with_format(dtype, f);
    }
  }

  unsigned char* buffer_;
  int i_, lane_;
  int64_t first_, numel_;
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
  uint64_t nonfinite;  // as in DeviceControl
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
                                         const Task& task, const Gradients& from, int i,
                                         int64_t begin, unsigned char* buffer) {
  constexpr int64_t n = Lane::kElements;
  const bool draws = draws_for_states<Rule>(task);
  const bool ends = begin + kBlock > task.numel;
  warp.each([&](int number, LaneTile<T>& tile) {
    const Lane lane(buffer, i, number, begin, task.numel);
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
      for (int i = 0; ends && i < n; ++i) {
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
      const Lane lane(buffer, i, number, begin, task.numel);
      *lane.scale(task.extras->scale[k]) = scale;
      encode_state(lane, task, k, scale, tile.states[k], Random{draws, tile.bits, tile.tail});
    });
  }
}

// The update, for the tasks of one rule and type.
template <class Rule, class T, class Warp>
FUSEDOPT_HD inline void update_warp(const UpdateArguments& arguments, Warp& warp,
                                    WarpMemory<Rule, T>& memory, const Buffers& buffers,
                                    int64_t number, int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  warp.once([&] {
    memory.verdict = Verdict(arguments.stages, *arguments.control);
    memory.group = -1;
  });
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
        if (t != opened) prepare_rule(warp, memory, line, task);
        opened = t;
        const Gradients from = gradients_of(task, line.grads[t]);
        each_tile<T>(begin, task.task.numel, [&](int i, int64_t begin) {
          update_warp_tile<Rule, T>(warp, memory.rule, memory.stages, task.task, from, i, begin,
                                    buffer);
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

// When all warps are done with it: what one of `n` threads does.
FUSEDOPT_HD inline void finish_update(const UpdateArguments& arguments, int64_t thread, int64_t n) {
  const DeviceLine& line = arguments.line;
  const Verdict verdict(arguments.stages, *arguments.control);
  if (verdict.skip) {
    if (thread == 0 && arguments.last_launch) ++arguments.control->skipped;
    return;
  }
  // Some at a time, so that a thread does not wait for each of the thousands that there may be.
  constexpr int kBatch = 8;
  for (int64_t first = thread; first < line.n_tasks; first += kBatch * n) {
    void* steps[kBatch];
    DType dtypes[kBatch];
    double counts[kBatch];
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = first + k * n;
      steps[k] = i < line.n_tasks && takes_part(line.grads[i]) ? line.tasks[i].step : nullptr;
      dtypes[k] = steps[k] == nullptr ? DType::kFloat32 : line.tasks[i].step_dtype;
    }
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) {
      counts[k] = steps[k] == nullptr ? 0 : load_scalar(steps[k], dtypes[k]);
    }
    FUSEDOPT_VECTORIZE
    for (int k = 0; k < kBatch; ++k) {
      if (steps[k] == nullptr) continue;
      if (dtypes[k] == DType::kFloat64) {
        *static_cast<double*>(steps[k]) = counts[k] + 1;
      } else {
        *static_cast<float*>(steps[k]) = float(counts[k] + 1);
      }
    }
  }
}

// The norm's parts: one warp's.
template <class T, class Warp>
FUSEDOPT_HD inline void measure_warp(const MeasureArguments& arguments, Warp& warp,
                                     const Buffers& buffers, int64_t number, int64_t n_warps) {
  const DeviceLine& line = arguments.line;
  const T multiplier = T(Verdict(arguments.stages).stages.grad_multiplier);
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int, LaneNorm& norm) { norm = {0, 0, 0}; });
  stream_spans<T>(
      warp, line, buffers, number, n_warps,
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        warp.each([&](int number, LaneNorm&) {
          const LaneSpan<T> span(buffer, number, begin, task.task.numel);
          fetch_operands(warp, span, task, line.grads[t], kOtherOperands);
        });
      },
      [&](int32_t t, int64_t begin, unsigned char* buffer) {
        const DeviceTask& task = line.tasks[t];
        const int64_t numel = task.task.numel;
        const Gradients from = gradients_of(task, line.grads[t]);
        each_tile<T>(begin, numel, [&](int i, int64_t begin) {
          warp.each([&](int number, LaneNorm& norm) {
            const Lane lane(buffer, i, number, begin, numel);
            T tile[Lane::kElements];
            const T* const g = open_gradients(lane, from, tile);
            auto largest = magnitude_bits(g[0]);
            FUSEDOPT_VECTORIZE
            for (int j = 0; j < Lane::kElements; ++j) {
              const auto bits = magnitude_bits(g[j]);
              largest = bits > largest ? bits : largest;
              if (sums) norm.sum = add_square(norm.sum, g[j]);
            }
            const T magnitude = bit_cast<T>(largest);
            // The largest tells of all, also when it is multiplied; inf and nan are largest.
            const auto infinity = magnitude_bits(T(INFINITY));
            if (largest >= infinity || magnitude_bits(magnitude * multiplier) >= infinity) {
              const uint64_t place = kFirstPlace - task.place;
              norm.nonfinite = place > norm.nonfinite ? place : norm.nonfinite;
            }
            const uint64_t bits = magnitude_bits(double(magnitude));
            norm.largest = bits > norm.largest ? bits : norm.largest;
          });
        });
      });
  const double sum =
      sums ? warp.sum([](const LaneNorm& norm) { return norm.sum; })
           : bit_cast<double>(warp.largest([](const LaneNorm& norm) { return norm.largest; }));
  const uint64_t nonfinite = warp.largest([](const LaneNorm& norm) { return norm.nonfinite; });
  warp.each([&](int lane, LaneNorm&) {
    if (lane != 0) return;
    arguments.partial[number] = sum;
    if (nonfinite != 0) warp.raise(&arguments.control->nonfinite, nonfinite);
  });
}

// When all of them are there: what one warp does.
template <class Warp>
FUSEDOPT_HD inline void finish_measure(const MeasureArguments& arguments, Warp& warp,
                                       int64_t n_warps) {
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int lane, LaneNorm& norm) {
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
            const Lane lane(buffer, i, number, begin, numel);
            const T* const g = lane.open(task.task.grad, tile.gradients);
            const bool adds = grad.accumulated != 0;
            T* const sum = adds ? lane.open(task.extras.grad_sum, tile.weights) : tile.weights;
            accumulate(g, adds, sum, Lane::kElements);
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
