// The combinations of storage formats that have kernels of their own (cuda_direct.h): what people
// train with. All else takes the general kernel (cuda_general.h), which asks for formats as it
// runs.
#pragma once

#include "plan.h"

namespace fusedopt {

struct Formats {
  DType param, grad, state;
  WeightPrecision precision = WeightPrecision::kNearest;
  bool ema = false;  // an average of the weights, in float32
};

// What a weight's hidden part is stored in (store.h).
constexpr DType hidden_format(WeightPrecision precision) {
  return precision == WeightPrecision::kMaster ? DType::kFloat32 : DType::kInt16;
}

// (Rules without state take the first that fits. Of each rule the first so many have kernels.)
constexpr Formats kFormats[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32, WeightPrecision::kRemainder},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32, WeightPrecision::kMaster},
    {DType::kFloat32, DType::kFloat32, DType::kUInt8},
    {DType::kBFloat16, DType::kBFloat16, DType::kUInt8, WeightPrecision::kRemainder},
    {DType::kFloat32, DType::kFloat32, DType::kFloat32, WeightPrecision::kNearest, true},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, WeightPrecision::kNearest, true},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32, WeightPrecision::kRemainder, true},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32, WeightPrecision::kMaster, true},
    {DType::kFloat32, DType::kFloat32, DType::kUInt8, WeightPrecision::kNearest, true},
    {DType::kBFloat16, DType::kBFloat16, DType::kUInt8, WeightPrecision::kRemainder, true},
};
constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);
constexpr int kAnyFormats = -1;  // the general kernel

// All operands of such tasks are aligned to this, so that a lane's share is one or two accesses.
constexpr uintptr_t kDirectAlignment = 16;

// The number of a task's formats among the first n, or kAnyFormats. A gradient that is not there
// fits.
int formats_of(const Task& task, int n);

}  // namespace fusedopt
