// The CPU engine.
#pragma once

#include "plan.h"

namespace fusedopt {

// The kernels, one copy per instruction set (cpu.inl): work off [begin, end) of the plan's work
// line, of which first_task covers `begin`.
namespace base {
void update_range(const Plan& plan, int64_t first_task, int64_t begin, int64_t end);
}
namespace avx2 {
void update_range(const Plan& plan, int64_t first_task, int64_t begin, int64_t end);
}
namespace avx512 {
void update_range(const Plan& plan, int64_t first_task, int64_t begin, int64_t end);
}

// Carries out the plan on up to `threads` threads. The result does not depend on their number.
void cpu_run(const Plan& plan, int threads);

// The name of the instruction set in use: the best one that was compiled and that this processor
// has, or the one that the environment variable FUSEDOPT_ISA names. Throws std::runtime_error
// when that one is unknown or not to be had here.
const char* cpu_isa();

// The names of those to be had here, best first, separated by spaces.
const char* cpu_isas();

// False when the compiler had no OpenMP: then everything runs on the calling thread.
bool cpu_has_threads();

}  // namespace fusedopt
