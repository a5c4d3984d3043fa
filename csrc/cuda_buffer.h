// Between device memory and the lanes of a warp: spans of tensors on their way.
//
// A GPU hides what its memory takes to answer by having much on the way at a time. Formats of
// operands are chosen at run time, by branches; and what a branch has loaded into registers must
// arrive before the next one begins. So nothing is loaded there. Spans are copied into a buffer in
// shared memory, by copies that nobody waits for until the span's turn comes, all operands at a
// time and some spans ahead. The branches read from the buffer, and write to it; from there the
// results go to memory.
//
// A lane copies what itself will use, so none waits for another.
//
// What is not dense, not aligned, a double among floats, or the end of a tensor, is copied element
// by element, and looks like all else in the buffer. Beyond the end there are zeros.
#pragma once

#include "cuda_plan.h"
#include "store.h"

namespace fusedopt::FUSEDOPT_ISA {

#if defined(__CUDACC__)
#define FUSEDOPT_OUTLINE __host__ __device__ __noinline__ inline
#define FUSEDOPT_UNROLL _Pragma("unroll")
#define FUSEDOPT_KEEP_LOOP _Pragma("unroll 1")
#else
#define FUSEDOPT_OUTLINE inline
#define FUSEDOPT_UNROLL
#define FUSEDOPT_KEEP_LOOP
#endif

// A span's tiles are of two rows of 128 elements, of which each lane has four neighbours: accesses
// of 16 bytes for floats, 8 for halves, next to those of the neighbouring lanes.
constexpr int kWarpLanes = 32;
constexpr int kQuad = 4;
constexpr int kRow = kWarpLanes * kQuad;
constexpr int kRows = int(kBlock) / kRow;
constexpr int kLaneElements = kRows * kQuad;  // of a tile
template <class T>
constexpr int kSpanTiles = span_tiles(sizeof(T) == 8);
static_assert(kScaleBytes == kWarpLanes * sizeof(float), "one for each lane");

// Four elements, or as many bytes of them as one access can have.
template <int kBytes>
struct alignas(kBytes) Piece {
  unsigned char bytes[kBytes];
};
constexpr int kLargestPiece = 16;

// Where an element lies: divisions of 64 bits, which are long.
FUSEDOPT_HD inline int64_t offset_in(const Layout& layout, int64_t index) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    offset += index % layout.size[d] * layout.stride[d];
    index /= layout.size[d];
  }
  return offset;
}

template <class Stored>
FUSEDOPT_HD inline void copy_element(void* to, const void* from) {
  *static_cast<Stored*>(to) = *static_cast<const Stored*>(from);
}

FUSEDOPT_HD inline void copy_element(void* to, const void* from, int size) {
  switch (size) {
    case 1: return copy_element<uint8_t>(to, from);
    case 2: return copy_element<uint16_t>(to, from);
    case 4: return copy_element<uint32_t>(to, from);
    case 8: return copy_element<uint64_t>(to, from);
  }
}

// Calls f(in device memory, in the buffer) with the places of elements [at, at + kQuad), as far as
// the tensor reaches.
template <class F>
FUSEDOPT_HD inline void each_element(const DeviceOperand& operand, const void* data,
                                     unsigned char* buffered, int64_t at, int64_t numel, F&& f) {
  for (int n = 0; n < kQuad && at + n < numel; ++n) {
    const int64_t i = operand.layout == nullptr ? at + n : offset_in(*operand.layout, at + n);
    f(const_cast<unsigned char*>(static_cast<const unsigned char*>(data)) + i * operand.size,
      buffered + n * operand.buffered_size);
  }
}

// Four elements, one by one.
FUSEDOPT_OUTLINE void gather(const DeviceOperand& operand, const void* data,
                             unsigned char* buffered, int64_t at, int64_t numel) {
  // As many words as an element has bytes.
  for (int i = 0; i < operand.buffered_size; ++i) reinterpret_cast<uint32_t*>(buffered)[i] = 0;
  each_element(operand, data, buffered, at, numel, [&](const void* from, void* to) {
    if (operand.size == operand.buffered_size) return copy_element(to, from, operand.size);
    *static_cast<float*>(to) = load<float>(*static_cast<const double*>(from));
  });
}

FUSEDOPT_OUTLINE void scatter(const DeviceOperand& operand, unsigned char* buffered, int64_t at,
                              int64_t numel) {
  each_element(operand, operand.data, buffered, at, numel, [&](void* to, const void* from) {
    if (operand.size == operand.buffered_size) return copy_element(to, from, operand.size);
    store(*static_cast<const float*>(from), *static_cast<double*>(to));
  });
}

// A lane's copy of the scale of a span's i-th tile.
FUSEDOPT_HD inline float* lane_scale(unsigned char* buffer, const float* place, int i, int lane) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(place) + i * kScaleBytes;
  return reinterpret_cast<float*>(buffer + at) + lane;
}

// What of a span one lane has: elements `begin` + row * kRow + lane * kQuad + 0 to 3.
template <class T>
class LaneSpan {
 public:
  FUSEDOPT_HD LaneSpan(unsigned char* buffer, int lane, int64_t begin, int64_t numel)
      : buffer_(buffer), lane_(lane), begin_(begin), numel_(numel) {
    const int64_t left = numel - begin;
    left_ = left < kSpanRows * kRow ? int(left) : kSpanRows * kRow;
  }

  // Begins to copy an operand's elements from `data`, which is the operand's, or the gradient's.
  template <class Warp>
  FUSEDOPT_HD void fetch(Warp& warp, const DeviceOperand& in_memory, const void* data) const {
    const DeviceOperand operand = in_memory;
    const bool pieces = in_pieces(operand, data);
    if (pieces) {
      const auto* const from = static_cast<const unsigned char*>(data) + first() * operand.size;
      each_piece(place(operand), from, operand.size,
                 [&](auto* to, const auto* from) { warp.copy(to, from); });
    }
    const bool single = operand.dense && operand.size == sizeof(uint32_t);
    each_rest(operand, pieces, [&](unsigned char* buffered, int64_t at) {
      // As gradients of 32 bits in one buffer for many tensors are: not aligned.
      if (!single) return gather(in_memory, data, buffered, at, numel_);
      const auto* const from = static_cast<const uint32_t*>(data) + at;
      auto* const to = reinterpret_cast<uint32_t*>(buffered);
      FUSEDOPT_UNROLL
      for (int j = 0; j < kQuad; ++j) {
        if (at + j < numel_) {
          warp.copy(to + j, from + j);
        } else {
          to[j] = 0;
        }
      }
    });
  }

  // Writes them back.
  FUSEDOPT_HD void put(const DeviceOperand& in_memory) const {
    const DeviceOperand operand = in_memory;
    const bool pieces = in_pieces(operand, operand.data);
    if (pieces) {
      auto* const to = static_cast<unsigned char*>(operand.data) + first() * operand.size;
      each_piece(to, place(operand), operand.size, [](auto* to, const auto* from) { *to = *from; });
    }
    each_rest(operand, pieces, [&](unsigned char* buffered, int64_t at) {
      scatter(in_memory, buffered, at, numel_);
    });
  }

  // The same for the scales of 8-bit state, of which the buffer has a copy for each lane.
  template <class Warp>
  FUSEDOPT_HD void fetch_scales(Warp& warp, const float* scales, const float* place) const {
    for (int tile = 0; tile * kBlock < left_; ++tile) {
      warp.copy(lane_scale(buffer_, place, tile, lane_), scales + begin_ / kBlock + tile);
    }
  }

  FUSEDOPT_HD void put_scales(float* scales, const float* place) const {
    if (lane_ != 0) return;
    for (int tile = 0; tile * kBlock < left_; ++tile) {
      scales[begin_ / kBlock + tile] = *lane_scale(buffer_, place, tile, lane_);
    }
  }

 private:
  static constexpr int kSpanRows = kSpanTiles<T> * kRows;

  // The lane's first element.
  FUSEDOPT_HD int64_t first() const { return begin_ + lane_ * kQuad; }

  FUSEDOPT_HD bool full() const { return left_ == kSpanRows * kRow; }

  // Whether the tensor reaches so far, and whether that row's tile has any elements.
  FUSEDOPT_HD bool whole(int row) const { return row * kRow + lane_ * kQuad + kQuad <= left_; }
  FUSEDOPT_HD bool begun(int row) const { return row / kRows * int(kBlock) < left_; }

  // Whether four elements can be had at a time. (Views need not be aligned.)
  FUSEDOPT_HD static bool in_pieces(const DeviceOperand& operand, const void* data) {
    return operand.dense && (reinterpret_cast<uintptr_t>(data) & operand.misaligned) == 0;
  }

  FUSEDOPT_HD unsigned char* place(const DeviceOperand& operand) const {
    return buffer_ + operand.place + lane_ * kQuad * operand.buffered_size;
  }

  // Calls copy(to, from) for the pieces of the whole rows.
  template <class F>
  FUSEDOPT_HD void each_piece(unsigned char* to, const unsigned char* from, int size,
                              F&& copy) const {
    switch (size) {
      case 1: return each_piece<1>(to, from, copy);
      case 2: return each_piece<2>(to, from, copy);
      case 4: return each_piece<4>(to, from, copy);
      case 8: return each_piece<8>(to, from, copy);
    }
  }

  template <int kSize, class F>
  FUSEDOPT_HD void each_piece(unsigned char* to, const unsigned char* from, F&& copy) const {
    constexpr int kBytes = kQuad * kSize < kLargestPiece ? kQuad * kSize : kLargestPiece;
    using P = Piece<kBytes>;
    const auto copy_row = [&](int row) {
      FUSEDOPT_UNROLL
      for (int i = 0; i < kQuad * kSize; i += kBytes) {
        const int at = row * kRow * kSize + i;
        copy(reinterpret_cast<P*>(to + at), reinterpret_cast<const P*>(from + at));
      }
    };
    if (full()) {
      FUSEDOPT_UNROLL
      for (int row = 0; row < kSpanRows; ++row) copy_row(row);
    } else {
      FUSEDOPT_KEEP_LOOP
      for (int row = 0; row < kSpanRows && whole(row); ++row) copy_row(row);
    }
  }

  // Calls copy(in the buffer, first element) for the other rows, or all, of the tiles begun.
  template <class F>
  FUSEDOPT_HD void each_rest(const DeviceOperand& operand, bool pieces, F&& copy) const {
    if (pieces && full()) return;
    FUSEDOPT_KEEP_LOOP
    for (int row = 0; row < kSpanRows && begun(row); ++row) {
      if (pieces && whole(row)) continue;
      copy(place(operand) + row * kRow * operand.buffered_size, first() + row * kRow);
    }
  }

  unsigned char* buffer_;
  int lane_;
  int64_t begin_, numel_;
  int left_;  // elements from there to the tensor's end, or to the span's
};

}  // namespace fusedopt::FUSEDOPT_ISA
