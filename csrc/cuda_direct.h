// The bodies of the CUDA kernels for one combination of storage formats (cuda_formats.h).
//
// Where formats are known when the kernel is compiled, there are no branches between an operand and
// the arithmetic: a lane reads its share of all of a tile's operands straight into registers, works
// on it, and writes it back. Warps need few registers, so many of them run at a time, and what they
// have on the way together is more than the memory delivers until the first of it comes.
//
// The host has seen to it that operands lie densely and aligned. Only tiles at tensors' ends, and
// those whose numbers are unusual, are read and written element by element.
#pragma once

#include "cuda_registers.h"

namespace fusedopt::FUSEDOPT_ISA {

// How many combinations have kernels of a rule: all where people train so, the first few where that
// is seldom. (Each takes its time to compile.)
template <class Rule>
constexpr int kDirectFormats = 2;
template <>
constexpr int kDirectFormats<Adam<float, false>> = kFormatCount;
template <>
constexpr int kDirectFormats<Sgd<float, true>> = 6;
template <>
constexpr int kDirectFormats<Sgd<float, false>> = 4;
template <>
constexpr int kDirectFormats<Rmsprop<float, false, false>> = 6;
template <>
constexpr int kDirectFormats<Adagrad<float>> = 6;

// The same by the rule's number.
struct CountDirectFormats {
  int* count;

  template <class Rule>
  void run() const {
    *count = kDirectFormats<Rule>;
  }
};
inline int direct_formats(int rule) {
  int count = 0;
  select_rule<float>(rule, CountDirectFormats{&count});
  return count;
}

// Calls f(Index<formats>), where there is such a kernel.
template <class Rule, int kFormat = 0, class F>
inline void with_direct_kernel(int formats, F&& f) {
  if constexpr (kFormat < kDirectFormats<Rule>) {
    if (formats == kFormat) return f(Index<kFormat>{});
    with_direct_kernel<Rule, kFormat + 1>(formats, f);
  }
}

// What a warp of these kernels has in common: the chunk that it works on, too, so that registers
// are left to its tiles.
template <class Rule>
struct DirectMemory : WarpMemory<Rule, float> {
  const DirectTask* task;
  const void* grad;
  int64_t begin;   // the chunk's first element
  int32_t length;  // and how many it has

  int32_t next_chunk, next_task;  // any task when there is no such chunk
  int32_t chunk_after;
};

// Has the rule ready for a task.
template <class Rule, class Warp>
FUSEDOPT_HD inline void prepare_direct(Warp& warp, DirectMemory<Rule>& memory,
                                       const DeviceGroup* groups, const DirectTask& task) {
  const double before = count_of(task.step, task.step_dtype);
  prepare_rule(warp, memory, groups, task.group, before, before == task.first_step);
}

FUSEDOPT_HD inline int32_t task_of(const DirectLine& line, int32_t chunk) {
  return chunk < line.n_chunks ? line.chunk_task[chunk] : 0;
}

// Has the rule ready for the first chunk of a warp, should it have one.
template <class Rule, class Warp>
FUSEDOPT_HD inline void begin_direct(const UpdateArguments<DirectLine>& arguments, Warp& warp,
                                     DirectMemory<Rule>& memory, int32_t number) {
  begin_update(arguments, warp, memory);
  const DirectLine& line = arguments.line;
  if (memory.verdict.skip || number >= line.n_chunks) return;
  const int32_t t = task_of(line, number);
  if (line.grads[t].data == nullptr) return;  // then its state may be anywhere
  prepare_direct(warp, memory, line.groups, line.tasks[t]);
}

// Calls f(Index<slot>) for the operands that a rule's tasks have.
template <int kFormat, class Rule, class F>
FUSEDOPT_ELEMENT inline void each_slot(F&& f) {
  each_index<kStateSlot + Rule::kStates>([&](auto slot) {
    if constexpr (KnownTask<kFormat>::exists(decltype(slot)::value)) f(slot);
  });
}

// Where an operand of the task begins.
template <int kSlot, class Rule>
FUSEDOPT_HD inline unsigned char* slot_data(const DirectMemory<Rule>& memory) {
  const DirectTask& task = *memory.task;
  const void* const data = kSlot == kParamSlot    ? task.param
                           : kSlot == kGradSlot   ? memory.grad
                           : kSlot == kHiddenSlot ? task.hidden
                           : kSlot == kEmaSlot    ? task.ema
                                                  : task.state[kSlot - kStateSlot];
  return static_cast<unsigned char*>(const_cast<void*>(in_global_memory(data)));
}

// For the random bits of the chunk's states. (A chunk's pairs are all of one block: chunks are
// powers of two.)
template <class Rule>
FUSEDOPT_HD inline RandomKey state_key(const DirectMemory<Rule>& memory) {
  return random_key(memory.task->seed, memory.stages.step, kStateStream, pair_block(memory.begin));
}

// The chunk's task, of known formats, and where its operands begin.
template <class Rule, int kFormat>
FUSEDOPT_HD inline Task placed_task(const DirectMemory<Rule>& memory, Extras* extras) {
  *extras = KnownTask<kFormat>::template extras<Rule>();
  Task task = KnownTask<kFormat>::template task<Rule>(extras);
  const auto place = [&](auto slot, Operand& operand) {
    if (operand.data != nullptr) operand.data = slot_data<decltype(slot)::value>(memory);
  };
  place(Index<kParamSlot>{}, task.param);
  place(Index<kGradSlot>{}, task.grad);
  place(Index<kHiddenSlot>{}, extras->hidden);
  place(Index<kEmaSlot>{}, extras->ema);
  each_index<Rule::kStates>([&](auto index) {
    constexpr int k = decltype(index)::value;
    place(Index<kStateSlot + k>{}, task.state[k]);
    extras->scale[k] = memory.task->scale[k];
  });
  return task;
}

// A tile, with each lane working on one element at a time: that which begins `at` elements after
// the chunk. For tiles at the ends of tensors, and those whose numbers are unusual: this takes
// longer, but little of the kernel.
template <class Rule, int kFormat, class Warp>
FUSEDOPT_HD inline void update_singly(Warp& warp, const DirectMemory<Rule>& memory, int at) {
  const int64_t begin = memory.begin + at;
  const int left = memory.length - at < kBlock ? memory.length - at : int(kBlock);
  constexpr int kScales = KnownTask<kFormat>::kCoded ? Rule::kStates : 0;
  float scale[kMaxStates] = {};
  // States in 8 bits are computed twice: all of a block must be known before any can be encoded.
  FUSEDOPT_KEEP_LOOP
  for (bool writes = kScales == 0;; writes = true) {
    if (!writes) {
      warp.each([&](int, auto& whole) {
        each_index<kScales>([&](auto index) { whole.largest[decltype(index)::value] = 0; });
      });
    }
    FUSEDOPT_KEEP_LOOP
    for (int row = 0; row < left; row += kWarpLanes) {
      warp.each([&](int number, auto& whole) {
        if (row + number >= left) return;
        Extras extras;
        const Task task = placed_task<Rule, kFormat>(memory, &extras);
        const ElementLane<kFormat> lane(begin + row + number, writes);
        LaneTile<float, 1> tile;
        Random random = {};
        if (kScales > 0) random = lane.draw(state_key(memory), tile.bits);
        update_lane_tile(lane, memory.rule, memory.stages, task, {task.grad, nullptr}, tile,
                         random);
        each_index<kScales>([&](auto index) {
          constexpr int k = decltype(index)::value;
          if (!writes) {
            const uint32_t largest = lane.largest(tile.states[k]);
            whole.largest[k] = largest > whole.largest[k] ? largest : whole.largest[k];
          } else {
            encode_state(lane, task, k, scale[k], tile.states[k], random);
          }
        });
      });
    }
    if (writes) break;
    each_index<kScales>([&](auto index) {
      constexpr int k = decltype(index)::value;
      scale[k] = block_scale(warp.largest([&](const auto& whole) { return whole.largest[k]; }));
    });
  }
  warp.wait_for_lanes();
  warp.each([&](int number, auto&) {
    each_index<kScales>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if (number == 0) memory.task->scale[k][begin / kBlock] = scale[k];
    });
  });
}

// The chunk that the warp's memory says.
template <class Rule, int kFormat, class Warp>
FUSEDOPT_HD inline void update_chunk(Warp& warp, const DirectMemory<Rule>& memory) {
  using Known = KnownTask<kFormat>;
  using Lane = DirectLane<kFormat>;
  constexpr int kScales = Known::kCoded ? Rule::kStates : 0;
  const Extras extras = Known::template extras<Rule>();
  const Task known = Known::template task<Rule>(&extras);
  const Gradients from = {known.grad, nullptr};

  warp.each([&](int lane, auto& tile) {
    each_slot<kFormat, Rule>([&](auto index) {
      constexpr int slot = decltype(index)::value;
      tile.data[slot] = slot_data<slot>(memory) + (memory.begin + lane * Known::kNeighbours) *
                                                      format_size(Known::dtype(slot));
    });
    each_index<kScales>([&](auto index) {
      constexpr int k = decltype(index)::value;
      tile.scales[k] = memory.task->scale[k] + memory.begin / kBlock;
    });
  });
  const RandomKey key = kScales > 0 ? state_key(memory) : RandomKey{};
  FUSEDOPT_KEEP_LOOP
  for (int at = 0; at < memory.length; at += kBlock) {
    bool done = memory.length - at >= kBlock;
    if (done) {
      warp.each([&](int, auto& tile) {
        each_slot<kFormat, Rule>([&](auto index) {
          constexpr int slot = decltype(index)::value;
          Known::template Rows<slot>::fetch(tile.stored[slot], tile.data[slot]);
        });
        each_index<kScales>([&](auto index) {
          constexpr int k = decltype(index)::value;
          tile.scale[k] = *tile.scales[k];
        });
      });
      update_warp_tile(
          warp, memory.rule, memory.stages, known, from,
          [&](int lane, auto& tile) {
            return Lane(tile, memory.begin, at + lane * Known::kNeighbours);
          },
          [&](const Lane& lane, auto& bits) { return lane.draw(key, bits); });
      done = warp.all([](const auto& tile) { return tile.exact; });
    }
    if (!done) update_singly<Rule, kFormat>(warp, memory, at);
    warp.each([&](int lane, auto& tile) {
      each_slot<kFormat, Rule>([&](auto index) {
        constexpr int slot = decltype(index)::value;
        if (slot != kGradSlot && done) {
          Known::template Rows<slot>::put(tile.stored[slot], tile.data[slot]);
        }
        tile.data[slot] += kBlock * format_size(Known::dtype(slot));
      });
      each_index<kScales>([&](auto index) {
        constexpr int k = decltype(index)::value;
        if (done && lane == 0) *tile.scales[k] = tile.scale[k];
        ++tile.scales[k];
      });
    });
  }
}

// The update: one warp's share. begin_direct() has been called.
template <class Rule, int kFormat, class Warp>
FUSEDOPT_HD inline void update_direct(const UpdateArguments<DirectLine>& arguments, Warp& warp,
                                      DirectMemory<Rule>& memory, int32_t number, int32_t n_warps) {
  if (memory.verdict.skip) return;
  const DirectLine& line = arguments.line;
  // Each warp begins with two chunks; of the others it takes one at a time, so that all end at
  // about the same time.
  warp.once([&] {
    memory.next_chunk = number, memory.next_task = task_of(line, number);
    memory.chunk_after = number + n_warps;
  });
  while (memory.next_chunk < line.n_chunks) {
    warp.once([&] {
      const DirectTask& task = line.tasks[memory.next_task];
      const int64_t most = line.chunk_tiles * kBlock;
      const int64_t begin = (memory.next_chunk - task.first_chunk) * most;
      const int64_t left = task.numel - begin;
      memory.task = &task, memory.grad = line.grads[memory.next_task].data;
      memory.begin = begin, memory.length = int32_t(left < most ? left : most);
      memory.next_chunk = memory.chunk_after, memory.next_task = task_of(line, memory.chunk_after);
      memory.chunk_after = 2 * n_warps + int32_t(warp.take(&arguments.control->chunks_taken));
    });
    if (memory.grad == nullptr) continue;
    prepare_direct(warp, memory, line.groups, *memory.task);
    warp.once([&] {
      const DirectTask& task = *memory.task;
      if (!task.one_chunk || task.step == nullptr) return;
      store_count(task.step, task.step_dtype, memory.before + 1);
    });
    update_chunk<Rule, kFormat>(warp, memory);
  }
}

// When all warps are done with it: what one of `n` threads does.
FUSEDOPT_OUTLINE void finish_update(const UpdateArguments<DirectLine>& arguments, int64_t thread,
                                    int64_t n) {
  if (thread == 0) arguments.control->chunks_taken = 0;
  if (was_skipped(arguments, thread)) return;
  const DirectLine& line = arguments.line;
  advance_counters(line, line.n_others, thread, n, [&](int64_t i) { return line.others[i]; });
}

// The norm's parts, of gradients in the format G: one warp's. The warps' shares are fixed, so that
// sums are the same at each step.
template <class G, class Warp>
FUSEDOPT_HD inline void measure_direct(const MeasureArguments<DirectLine>& arguments, Warp& warp,
                                       int32_t number, int32_t n_warps) {
  constexpr int kNeighbours = kLargestPiece / sizeof(G);
  using Rows = DirectRows<sizeof(G), kNeighbours>;
  constexpr int kTogether = 2;  // tiles
  const DirectLine& line = arguments.line;
  const float multiplier = float(Verdict(arguments.stages).stages.grad_multiplier);
  const bool sums = arguments.stages.norm != NormType::kInfinity;
  warp.each([&](int, LaneNorm<float>& norm) { norm = {0, 0, 0}; });
  for (int32_t chunk = number; chunk < line.n_chunks; chunk += n_warps) {
    const int32_t t = line.chunk_task[chunk];
    const DirectTask& task = line.tasks[t];
    if (line.grads[t].data == nullptr) continue;
    const int32_t place = task.place;
    const int64_t most = line.chunk_tiles * kBlock, begin = (chunk - task.first_chunk) * most;
    const int length = int(task.numel - begin < most ? task.numel - begin : most);
    const G* const grad = static_cast<const G*>(in_global_memory(line.grads[t].data)) + begin;
    FUSEDOPT_KEEP_LOOP
    for (int at = 0; at < length; at += kTogether * int(kBlock)) {
      warp.each([&](int lane, LaneNorm<float>& norm) {
        G elements[kTogether][kLaneElements];
        const int left = length - at - lane * kNeighbours;
        const G* const from = grad + at + lane * kNeighbours;
        FUSEDOPT_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          if (at + kTogether * int(kBlock) <= length) {
            uint32_t stored[kLaneElements];
            Rows::fetch(stored, from + i * kBlock);
            __builtin_memcpy(elements[i], stored, sizeof(elements[i]));
          } else {
            FUSEDOPT_UNROLL
            for (int j = 0; j < kLaneElements; ++j) {
              const int offset = i * int(kBlock) + Rows::offset(j);
              elements[i][j] = G{};
              if (offset < left) elements[i][j] = from[offset];
            }
          }
        }
        FUSEDOPT_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          float g[kLaneElements];
          FUSEDOPT_UNROLL
          for (int j = 0; j < kLaneElements; ++j) g[j] = load<float>(elements[i][j]);
          add_to_norm(norm, g, sums, multiplier, place);
        }
      });
    }
  }
  report_norm(arguments, warp, sums, number);
}

}  // namespace fusedopt::FUSEDOPT_ISA
