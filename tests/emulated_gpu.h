// The CUDA engine's kernels without a GPU.
#pragma once

#include "cpu.h"

namespace fusedopt::emulated {

extern const Kernels kKernels;

}  // namespace fusedopt::emulated
