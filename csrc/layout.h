// How tensors of one shape but different strides walk together.
//
// Elements are numbered in the parameter's own memory order, so a parameter that fills its memory
// without gaps, and whatever has the same strides (its state, usually its gradient), is a plain
// array, be it row-major, channels-last or transposed. Everything else gets a Layout.
#pragma once

#include <stdint.h>

#include "plan.h"

namespace fusedopt {

constexpr int kHost = -1;

// A strided tensor of real or complex numbers; sizes and strides in elements.
struct View {
  char* data;
  int device;  // the CUDA device's number, or kHost
  DType dtype;
  bool complex;
  int ndim;
  const int64_t* size;
  const int64_t* stride;  // null: row-major
};

// A shape with strides, to recognise a tensor by.
class Shape {
 public:
  // False when the view cannot be remembered: it has too many dimensions, or no strides.
  bool remember(const View& view);
  bool matches(const View& view) const {
    if (view.ndim != ndim_ || view.stride == nullptr) return false;
    for (int d = 0; d < ndim_; ++d) {
      if (view.size[d] != size_[d] || view.stride[d] != stride_[d]) return false;
    }
    return true;
  }

 private:
  static constexpr int kDims = 5;
  int ndim_ = -1;
  int64_t size_[kDims];
  int64_t stride_[kDims];
};

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16: return 2;
    case DType::kUInt8: return 1;
  }
  return 0;
}

bool is_float(DType dtype);

// Elements of the view, a complex one counting as one.
int64_t count(const View& view);

// Bytes from the view's first element to the end of its last one.
int64_t span(const View& view);

bool is_row_major(const View& view);

bool same_shape(const View& a, const View& b);

// True when two different indices certainly lead to two different elements: each stride steps
// over all that the smaller ones reach. (False for a few tensors that do not overlap either.)
bool never_overlaps(const View& view);

// The dimensions of a parameter, outermost first in memory, without those of size 1.
struct Order {
  int ndim;
  int dim[kMaxDims];
};

Order memory_order(const View& parameter);

// Describes `view`, walked in that order, in `layout`. False when no layout is needed, because
// the elements lie one after another.
bool describe(const View& view, const Order& order, Layout* layout);

}  // namespace fusedopt
