#include "layout.h"

#include <algorithm>

namespace fusedopt {
namespace {

// The strides of a row-major view are known without being told.
int64_t stride_of(const View& view, int dim) {
  if (view.stride != nullptr) return view.stride[dim];
  int64_t stride = 1;
  for (int d = view.ndim - 1; d > dim; --d) stride *= view.size[d];
  return stride;
}

}  // namespace

bool Shape::remember(const View& view) {
  ndim_ = -1;
  if (view.ndim > kDims || view.stride == nullptr) return false;
  ndim_ = view.ndim;
  std::copy(view.size, view.size + view.ndim, size_);
  std::copy(view.stride, view.stride + view.ndim, stride_);
  return true;
}

bool is_float(DType dtype) {
  return dtype != DType::kInt16 && dtype != DType::kInt64 && dtype != DType::kUInt8;
}

int64_t count(const View& view) {
  int64_t n = 1;
  for (int d = 0; d < view.ndim; ++d) n *= view.size[d];
  return n;
}

int64_t span(const View& view) {
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.size[d] == 0) return 0;
    last += (view.size[d] - 1) * stride_of(view, d);
  }
  return (last + 1) * item_size(view.dtype) * (view.complex ? 2 : 1);
}

bool is_row_major(const View& view) {
  if (view.stride == nullptr) return true;
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.size[d] != 1 && view.stride[d] != expected) return false;
    expected *= view.size[d];
  }
  return true;
}

bool same_shape(const View& a, const View& b) {
  return a.ndim == b.ndim && std::equal(a.size, a.size + a.ndim, b.size);
}

Order memory_order(const View& parameter) {
  Order order{0, {}};
  for (int d = 0; d < parameter.ndim; ++d) {
    if (parameter.size[d] != 1) order.dim[order.ndim++] = d;
  }
  std::stable_sort(order.dim, order.dim + order.ndim,
                   [&](int a, int b) { return stride_of(parameter, a) > stride_of(parameter, b); });
  return order;
}

bool never_overlaps(const View& view) {
  const Order order = memory_order(view);
  int64_t reach = 0;  // the farthest element that the inner dimensions lead to
  for (int k = order.ndim - 1; k >= 0; --k) {
    const int64_t size = view.size[order.dim[k]];
    if (size == 0) return true;
    const int64_t stride = stride_of(view, order.dim[k]);
    if (stride <= reach) return false;
    reach += (size - 1) * stride;
  }
  return true;
}

bool describe(const View& view, const Order& order, Layout* layout) {
  const int64_t unit = view.complex ? 2 : 1;  // reals to an element
  int n = 0;
  const auto append = [&](int64_t size, int64_t stride) {
    // A dimension that continues the one outside it becomes one with it.
    if (n > 0 && layout->stride[n - 1] == stride * size) {
      layout->size[n - 1] *= size;
      layout->stride[n - 1] = stride;
    } else {
      layout->size[n] = size;
      layout->stride[n++] = stride;
    }
  };
  for (int k = 0; k < order.ndim; ++k) {
    append(view.size[order.dim[k]], stride_of(view, order.dim[k]) * unit);
  }
  if (view.complex) append(2, 1);
  layout->ndim = n;
  return !(n == 0 || (n == 1 && layout->stride[0] == 1));
}

}  // namespace fusedopt
