// The bodies of the CUDA kernels for one combination of storage formats (cuda_formats.h).
//
// Where formats are known when the kernel is compiled, there are no branches between an operand and
// the arithmetic: a lane reads its share of all of a tile's operands straight into registers, works
// on it, and writes it back. Warps need few registers, so many of them run at a time, and what they
// have on the way together is more than the memory delivers until the first of it comes.
//
// The host has seen to it that operands lie densely and aligned. Only the tile at a tensor's end is
// read and written element by element.
//
// Bodies are written for any `Warp`, as those in cuda_warp.h. Here it has, too,
//
//     take(counter)    the counter's value, which then is one more; for one lane
//     all(f)           whether f(state) holds for all lanes
//     wait_for_lanes() until all lanes have come here
#pragma once

#include "cuda_formats.h"
#include "cuda_warp.h"

namespace fusedopt::FUSEDOPT_ISA {

// The same pointer, to what is in device memory: the compiler need not find out whether it is in a
// block's shared memory.
FUSEDOPT_HD inline const void* in_global_memory(const void* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

template <int kSize>
struct ElementOf;
template <>
struct ElementOf<1> {
  using type __attribute__((may_alias)) = uint8_t;
};
template <>
struct ElementOf<2> {
  using type __attribute__((may_alias)) = uint16_t;
};
template <>
struct ElementOf<4> {
  using type __attribute__((may_alias)) = uint32_t;
};

// A lane's part of a tile: rows of neighbours, as many as one access may have, kLaneRow elements
// from row to row. `data` is where the lane's first element is, of kSize bytes.
template <int kSize, int kNeighbours>
struct DirectRows {
  static constexpr int kLaneRow = kWarpLanes * kNeighbours;

  // The lane's i-th element, counted from its first.
  FUSEDOPT_HD static constexpr int offset(int i) {
    return i / kNeighbours * kLaneRow + i % kNeighbours;
  }

  // From memory to registers.
  FUSEDOPT_HD static void fetch(uint32_t* stored, const void* data) {
    FUSEDOPT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Row piece = static_cast<const Row*>(data)[row * kWarpLanes];
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWords; ++i) stored[row * kWords + i] = piece.words[i];
    }
  }

  // And back.
  FUSEDOPT_HD static void put(const uint32_t* stored, void* data) {
    FUSEDOPT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      Row piece;
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWords; ++i) piece.words[i] = stored[row * kWords + i];
      static_cast<Row*>(data)[row * kWarpLanes] = piece;
    }
  }

  using Element = typename ElementOf<kSize>::type;

 private:
  static constexpr int kRows = kLaneElements / kNeighbours;
  static constexpr int kWords = kNeighbours * kSize / int(sizeof(uint32_t));
  struct __attribute__((may_alias, aligned(kWords * sizeof(uint32_t)))) Row {
    uint32_t words[kWords];
  };
};

// Where the operands of a task of known formats are, among those that a lane has read.
enum Slot { kParamSlot, kGradSlot, kHiddenSlot, kEmaSlot, kStateSlot };
constexpr int kSlots = kStateSlot + kMaxStates;

FUSEDOPT_HD constexpr int format_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 || dtype == DType::kInt16 ? 2 : 1;
}

// A task whose operands' data are slots and all else is known: what is decided by it is decided
// when the kernel is compiled.
template <int kFormat>
struct KnownTask {
  static constexpr Formats kOf = kFormats[kFormat];
  static constexpr DType kHidden = hidden_format(kOf.precision);
  static constexpr bool kHides = kOf.precision != WeightPrecision::kNearest;
  static constexpr bool kCoded = kOf.state == DType::kUInt8;

  // Neighbours that a lane has: as many as 16 bytes of the widest operand hold.
  static constexpr bool kNarrow = format_size(kOf.param) < 4 && format_size(kOf.state) < 4 &&
                                  !kOf.ema && !(kHides && kHidden == DType::kFloat32);
  static constexpr int kNeighbours = kNarrow ? 8 : 4;

  FUSEDOPT_HD static constexpr bool exists(int slot) {
    return slot == kHiddenSlot ? kHides : slot == kEmaSlot ? kOf.ema : true;
  }
  FUSEDOPT_HD static constexpr DType dtype(int slot) {
    return slot == kParamSlot    ? kOf.param
           : slot == kGradSlot   ? kOf.grad
           : slot == kHiddenSlot ? kHidden
           : slot == kEmaSlot    ? DType::kFloat32
                                 : kOf.state;
  }

  // A lane's part of an operand.
  template <int kSlot>
  using Rows = DirectRows<format_size(KnownTask<kFormat>::dtype(kSlot)), kNeighbours>;

  FUSEDOPT_HD static Operand operand(int slot) {
    if (!exists(slot)) return {};
    return {reinterpret_cast<void*>(uintptr_t(slot + 1)), dtype(slot), nullptr};
  }
  FUSEDOPT_HD static int slot(const Operand& operand) {
    return int(reinterpret_cast<uintptr_t>(operand.data)) - 1;
  }

  template <class Rule>
  FUSEDOPT_HD static Extras extras() {
    Extras extras;
    extras.precision = kOf.precision;
    extras.hidden = operand(kHiddenSlot);
    extras.ema = operand(kEmaSlot);
    each_index<Rule::kStates>([&](auto index) {
      constexpr int k = decltype(index)::value;
      extras.scale[k] = reinterpret_cast<float*>(uintptr_t(k));
      extras.square[k] = IsSquare<Rule, k>::value;
    });
    return extras;
  }

  template <class Rule>
  FUSEDOPT_HD static Task task(const Extras* extras) {
    Task task;
    task.param = operand(kParamSlot);
    task.grad = operand(kGradSlot);
    each_index<Rule::kStates>([&](auto index) {
      constexpr int k = decltype(index)::value;
      task.state[k] = operand(kStateSlot + k);
    });
    task.extras = extras;
    return task;
  }

 private:
  template <class Rule, int k>
  struct IsSquare {
    static constexpr bool value = Rule::is_square(k);
  };
};

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

// What a lane has of a tile: operands as they are stored, and what it works on.
template <int kFormat, int kElements>
struct DirectTile : LaneTile<float, kElements> {
  unsigned char* data[kSlots];  // where its first elements are
  uint32_t stored[kSlots][kElements];
  float* scales[kMaxStates];  // of the tile's states in 8 bits
  float scale[kMaxStates];
  bool exact;  // what has been computed
};

// What a lane computes with that has so many elements.
template <int kElements>
struct NumberOf {
  using type = Quick;
};
template <>
struct NumberOf<1> {
  using type = float;
};

// A lane's part of a tile in registers: several elements, rows of neighbours, or one. The first is
// element `begin` + `at` of the tensor, where `begin`, an even number, is that of a chunk.
template <int kFormat, int kElements>
class DirectLane : public LaneMemory<DirectLane<kFormat, kElements>, kElements> {
 public:
  using Known = KnownTask<kFormat>;

  FUSEDOPT_HD DirectLane(DirectTile<kFormat, kElements>& tile, int64_t begin, int at)
      : tile_(tile), begin_(begin), at_(at) {}

  FUSEDOPT_HD static constexpr bool has(WeightPrecision precision) {
    return precision == Known::kOf.precision;
  }
  FUSEDOPT_HD static constexpr bool has(DType dtype) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (Known::exists(slot) && Known::dtype(slot) == dtype) return true;
    }
    return false;
  }

  FUSEDOPT_HD uint32_t block() const { return pair_block(begin_); }
  FUSEDOPT_HD uint32_t pair(int i) const {
    return uint32_t(uint64_t(begin_) >> 1) +
           (at_ + Known::template Rows<kParamSlot>::offset(i)) / 2u;
  }
  FUSEDOPT_HD bool is_second() const { return at_ % 2 != 0; }

  template <class Stored>
  FUSEDOPT_HD const Stored* read(const Operand& operand, Stored* buffer) const {
    at_slot<sizeof(Stored)>(operand, [&](const uint32_t* stored) {
      __builtin_memcpy(buffer, stored, kElements * sizeof(Stored));
    });
    return buffer;
  }

  template <class Stored, class F>
  FUSEDOPT_HD void write(const Operand& operand, F&& fill) const {
    Stored buffer[kElements];
    fill(buffer);
    at_slot<sizeof(Stored)>(operand, [&](uint32_t* stored) {
      __builtin_memcpy(stored, buffer, kElements * sizeof(Stored));
    });
  }

  FUSEDOPT_HD float* scale(const float* number) const {
    return &tile_.scale[reinterpret_cast<uintptr_t>(number)];
  }

  // Several quickly, and notes whether that was exact; one exactly.
  template <class Rule>
  FUSEDOPT_HD void apply(const Rule& rule, float* p, const float* g, float multiplier, float factor,
                         const States<float>& states) const {
    using E = typename NumberOf<kElements>::type;
    tile_.exact = true;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kElements; ++i) {
      tile_.exact &= apply_to_element<E>(rule, p, g, multiplier, factor, states, NoAverage{}, i);
    }
  }

  FUSEDOPT_HD uint32_t largest(const float (&x)[kElements]) const {
    return largest_magnitude(x, kElements);
  }

 private:
  // Calls f(where an operand is). Registers have no addresses to choose by, so all that may be
  // meant are compared.
  template <int kSize, class F>
  FUSEDOPT_HD void at_slot(const Operand& operand, F&& f) const {
    each_index<kSlots>([&](auto index) {
      constexpr int slot = decltype(index)::value;
      if constexpr (Known::exists(slot) && format_size(Known::dtype(slot)) == kSize) {
        if (slot == Known::slot(operand)) f(tile_.stored[slot]);
      }
    });
  }

  DirectTile<kFormat, kElements>& tile_;
  int64_t begin_;
  int at_;
};

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

// A tile, with each lane working on one element at a time: that which begins `at` elements after
// the chunk. For tiles at the ends of tensors, and those whose numbers are unusual: this takes
// longer, but little of the kernel.
template <class Rule, int kFormat, class Warp>
FUSEDOPT_HD inline void update_singly(Warp& warp, const DirectMemory<Rule>& memory, int at) {
  const int64_t begin = memory.begin + at;
  const int left = memory.length - at < kBlock ? memory.length - at : int(kBlock);
  using Known = KnownTask<kFormat>;
  const Extras extras = Known::template extras<Rule>();
  const Task known = Known::template task<Rule>(&extras);
  const Gradients from = {known.grad, nullptr};
  constexpr int kScales = Known::kCoded ? Rule::kStates : 0;
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
        const int64_t first = begin + row + number;
        DirectTile<kFormat, 1> tile = {};
        const DirectLane<kFormat, 1> lane(tile, memory.begin, at + row + number);
        each_slot<kFormat, Rule>([&](auto index) {
          constexpr int slot = decltype(index)::value;
          using Element = typename Known::template Rows<slot>::Element;
          tile.stored[slot][0] = reinterpret_cast<const Element*>(slot_data<slot>(memory))[first];
        });
        each_index<kScales>([&](auto index) {
          constexpr int k = decltype(index)::value;
          tile.scale[k] = memory.task->scale[k][begin / kBlock];
        });
        Random random = {};
        if (kScales > 0) {
          random = lane.draw(state_key(memory), tile.bits);
        }
        update_lane_tile(lane, memory.rule, memory.stages, known, from, tile, random);
        each_index<kScales>([&](auto index) {
          constexpr int k = decltype(index)::value;
          if (!writes) {
            const uint32_t largest = lane.largest(tile.states[k]);
            whole.largest[k] = largest > whole.largest[k] ? largest : whole.largest[k];
          } else {
            encode_state(lane, known, k, whole.scale[k], tile.states[k], random);
          }
        });
        if (!writes) return;
        each_slot<kFormat, Rule>([&](auto index) {
          constexpr int slot = decltype(index)::value;
          using Element = typename Known::template Rows<slot>::Element;
          if constexpr (slot == kGradSlot) return;
          reinterpret_cast<Element*>(slot_data<slot>(memory))[first] =
              Element(tile.stored[slot][0]);
        });
      });
    }
    if (writes) break;
    each_index<kScales>([&](auto index) {
      constexpr int k = decltype(index)::value;
      const float scale =
          block_scale(warp.largest([&](const auto& whole) { return whole.largest[k]; }));
      warp.each([&](int, auto& whole) { whole.scale[k] = scale; });
    });
  }
  warp.wait_for_lanes();
  warp.each([&](int number, auto& whole) {
    each_index<kScales>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if (number == 0) memory.task->scale[k][begin / kBlock] = whole.scale[k];
    });
  });
}

// The chunk that the warp's memory says.
template <class Rule, int kFormat, class Warp>
FUSEDOPT_HD inline void update_chunk(Warp& warp, const DirectMemory<Rule>& memory) {
  using Known = KnownTask<kFormat>;
  using Lane = DirectLane<kFormat, kLaneElements>;
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
