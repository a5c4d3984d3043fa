// The bodies of the general CUDA kernels, which ask for the storage formats as they run: tensors in
// all of them share a launch, on their way through buffers in shared memory (cuda_buffer.h).
#pragma once

#include "cuda_warp.h"

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

// Any of the rules that have kN states: which one, is told as the kernel runs. Most of a general
// kernel is between the formats and the arithmetic, and the same for all of them.
template <class T, int kN>
class AnyRule {
 public:
  static constexpr int kStates = kN;

  AnyRule() = default;
  FUSEDOPT_HD AnyRule(const Group& group, double step, bool first) : number_(group.rule) {
    visit([&](auto rule) {
      rule = decltype(rule)(group.hyper, step, first);
      static_assert(sizeof(rule) <= sizeof(bytes_) && sizeof(rule) % sizeof(T) == 0, "room for it");
      __builtin_memcpy(bytes_, &rule, sizeof(rule));
    });
  }

  FUSEDOPT_HD void apply(T* p, const T* g, T multiplier, T factor, const States<T>& states,
                         int64_t n) const {
    visit([&](auto rule) {
      __builtin_memcpy(&rule, bytes_, sizeof(rule));
      apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, n);
    });
  }

 private:
  template <class F>
  struct Visitor {
    F& f;

    template <class Rule>
    FUSEDOPT_HD void run() const {
      if constexpr (Rule::kStates == kN) f(Rule());
    }
  };

  // Calls f(some rule of that kind).
  template <class F>
  FUSEDOPT_HD void visit(F&& f) const {
    select_rule<T>(number_, Visitor<F>{f});
  }

  int32_t number_;
  alignas(16) unsigned char bytes_[12 * sizeof(T)];
};

template <class T, int kN>
FUSEDOPT_HD inline void make(AnyRule<T, kN>& rule, const Group& group, double step, bool first) {
  rule = AnyRule<T, kN>(group, step, first);
}

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

  template <class T, int kN>
  FUSEDOPT_HD void apply(const AnyRule<T, kN>& rule, T* p, const T* g, T multiplier, T factor,
                         const States<T>& states) const {
    rule.apply(p, g, multiplier, factor, states, kElements);
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

FUSEDOPT_HD inline Gradients gradients_of(const DeviceTask& task, const DeviceGrad& grad) {
  Operand operand = task.task.grad;
  if (grad.data == nullptr) operand.data = nullptr;
  return {operand, grad.accumulated != 0 ? &task.extras.grad_sum : nullptr};
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

// When all warps are done with it: what one of `n` threads does.
FUSEDOPT_OUTLINE void finish_update(const UpdateArguments<DeviceLine>& arguments, int64_t thread,
                                    int64_t n) {
  if (was_skipped(arguments, thread)) return;
  const DeviceLine& line = arguments.line;
  advance_counters(line, line.n_tasks, thread, n, [](int64_t i) { return int32_t(i); });
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
