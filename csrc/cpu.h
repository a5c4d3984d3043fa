// The CPU engine.
#pragma once

#include "plan.h"

namespace fusedopt {

// The norm's chunks: their bounds depend on the tensor only, so that the sum does, too.
constexpr int64_t kNormChunk = 16384;

struct ChunkNorm {
  double value;  // the squared 2-norm, or the largest magnitude
  bool finite;   // neither nan nor inf among the gradients
};

// The kernels, one copy per instruction set (cpu.inl). Each works off [begin, end) of the plan's
// work line, of which first_task covers `begin`.
struct Kernels {
  void (*update)(const Plan& plan, int64_t first_task, int64_t begin, int64_t end);
  // Measures the chunks that begin there, of gradients times `scale` when squares are summed. Chunk
  // c of task i is out[first_chunk[i] + c].
  void (*measure)(const Plan& plan, NormType type, double scale, const int64_t* first_chunk,
                  int64_t first_task, int64_t begin, int64_t end, ChunkNorm* out);
  void (*accumulate)(const Plan& plan, int64_t first_task, int64_t begin, int64_t end);
  // Takes the parameters into their averages, extras->ema, with that weight; all dense.
  void (*average)(const Plan& plan, double weight, int64_t first_task, int64_t begin, int64_t end);
  // What a step does on the way, on its own and for one dense parameter: its full weights, from
  // them parameter and hidden part, the values of state[0] in 8 bits, and back (to the nearest).
  void (*join_weights)(const Task& task, float* whole);
  void (*split_weights)(const Task& task, const float* whole);
  void (*decode_state)(const Task& task, float* values);
  void (*encode_state)(const Task& task, const float* values);
};

namespace base {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

// Carries out the plan on up to `threads` threads. The result does not depend on their number.
// `measured`: cpu_measure() came just before, and has left gradients in the caches.
void cpu_update(const Plan& plan, int threads, bool measured);

// The norm of the plan's gradients, unclipped.
Norm cpu_measure(const Plan& plan, NormType type, int threads);

// Adds the gradients to the tasks' grad_sum, or writes them there when nothing is accumulated.
void cpu_accumulate(const Plan& plan, int threads);

// The averages' part of a step on its own. Averages are float32 or float64, parameters any float;
// all dense.
void cpu_average(const Plan& plan, double weight, int threads);

const Kernels& cpu_kernels();

// The name of the instruction set in use: the best one that was compiled and that this processor
// has, or the one that the environment variable FUSEDOPT_ISA names. Throws std::runtime_error
// when that one is unknown or not to be had here.
const char* cpu_isa();

// The names of those to be had here, best first, separated by spaces.
const char* cpu_isas();

// False when the compiler had no OpenMP: then everything runs on the calling thread.
bool cpu_has_threads();

}  // namespace fusedopt
