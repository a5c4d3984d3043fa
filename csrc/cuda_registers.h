// Between device memory and the registers of a lane, where storage formats are known when the
// kernel is compiled (cuda_formats.h): its part of a tile, as it is stored and as tile.h asks for
// it.
#pragma once

#include "cuda_formats.h"
#include "cuda_warp.h"

namespace fusedopt::FUSEDOPT_ISA {

// The same pointer, to what is in device memory: the compiler need not find out whether it is in a
// block's shared memory.
template <class T>
FUSEDOPT_HD inline T* in_global_memory(T* data) {
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

// What a lane has of a tile: operands as they are stored, and what it works on.
struct DirectTile : LaneTile<float> {
  unsigned char* data[kSlots];  // where its first elements are
  uint32_t stored[kSlots][kLaneElements];
  float* scales[kMaxStates];  // of the tile's states in 8 bits
  float scale[kMaxStates];
  bool exact;  // what has been computed
};

// A lane's part of a tile in registers, rows of neighbours. The first is element `begin` + `at` of
// the tensor, where `begin`, an even number, is that of a chunk.
template <int kFormat>
class DirectLane : public LaneMemory<DirectLane<kFormat>> {
 public:
  using Known = KnownTask<kFormat>;

  FUSEDOPT_HD DirectLane(DirectTile& tile, int64_t begin, int at)
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

  FUSEDOPT_HD uint32_t pair(int i) const {
    return uint32_t(uint64_t(begin_) >> 1) +
           (at_ + Known::template Rows<kParamSlot>::offset(i)) / 2u;
  }

  template <class Stored>
  FUSEDOPT_HD const Stored* read(const Operand& operand, Stored* buffer) const {
    at_slot<sizeof(Stored)>(operand, [&](const uint32_t* stored) {
      __builtin_memcpy(buffer, stored, kLaneElements * sizeof(Stored));
    });
    return buffer;
  }

  template <class Stored, class F>
  FUSEDOPT_HD void write(const Operand& operand, F&& fill) const {
    Stored buffer[kLaneElements];
    fill(buffer);
    at_slot<sizeof(Stored)>(operand, [&](uint32_t* stored) {
      __builtin_memcpy(stored, buffer, kLaneElements * sizeof(Stored));
    });
  }

  FUSEDOPT_HD float* scale(const float* number) const {
    return &tile_.scale[reinterpret_cast<uintptr_t>(number)];
  }

  // Quickly, and notes whether that was exact.
  template <class Rule>
  FUSEDOPT_HD void apply(const Rule& rule, float* p, const float* g, float multiplier, float factor,
                         const States<float>& states) const {
    tile_.exact = true;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      tile_.exact &=
          apply_to_element<Quick>(rule, p, g, multiplier, factor, states, NoAverage{}, i);
    }
  }

  FUSEDOPT_HD uint32_t largest(const float (&x)[kLaneElements]) const {
    return largest_magnitude(x, kLaneElements);
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

  DirectTile& tile_;
  int64_t begin_;
  int at_;
};

// One element of a task, which is worked on where it lies in memory.
template <int kFormat>
class ElementLane : public LaneMemory<ElementLane<kFormat>, 1> {
 public:
  FUSEDOPT_HD ElementLane(int64_t element, bool writes) : element_(element), writes_(writes) {}

  template <class Kind>
  FUSEDOPT_HD static constexpr bool has(Kind kind) {
    return DirectLane<kFormat>::has(kind);
  }

  FUSEDOPT_HD uint32_t pair(int) const { return uint32_t(uint64_t(element_) >> 1); }
  FUSEDOPT_HD bool is_second() const { return element_ % 2 != 0; }

  template <class Stored>
  FUSEDOPT_HD const Stored* read(const Operand& operand, Stored* buffer) const {
    const auto bits = *element<sizeof(Stored)>(operand);
    __builtin_memcpy(buffer, &bits, sizeof(Stored));
    return buffer;
  }

  template <class Stored, class F>
  FUSEDOPT_HD void write(const Operand& operand, F&& fill) const {
    if (!writes_) return;
    Stored buffer[1];
    fill(buffer);
    __builtin_memcpy(element<sizeof(Stored)>(operand), buffer, sizeof(Stored));
  }

  FUSEDOPT_HD const float* scale(const float* scales) const { return scales + element_ / kBlock; }

  template <class Rule>
  FUSEDOPT_HD void apply(const Rule& rule, float* p, const float* g, float multiplier, float factor,
                         const States<float>& states) const {
    apply_rule(rule, p, g, multiplier, factor, states, NoAverage{}, 1);
  }

  FUSEDOPT_HD uint32_t largest(const float (&x)[1]) const { return largest_magnitude(x, 1); }

 private:
  template <int kSize>
  FUSEDOPT_HD auto element(const Operand& operand) const {
    return static_cast<typename ElementOf<kSize>::type*>(in_global_memory(operand.data)) + element_;
  }

  int64_t element_;
  bool writes_;
};

}  // namespace fusedopt::FUSEDOPT_ISA
