// The CPU engine's outside: which instruction set, and which thread does what.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "num.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fusedopt {
namespace {

struct Isa {
  const char* name;
  bool available;
  const Kernels* kernels;
};

// Best first. setup.py defines FUSEDOPT_X86 when it compiles the x86 kernels.
const Isa* isas() {
  static const Isa list[] = {
#ifdef FUSEDOPT_X86
      {"avx512",
       __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       &avx512::kKernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kKernels},
#endif
      {"base", true, &base::kKernels},
  };
  return list;
}

#ifdef FUSEDOPT_X86
constexpr int kIsas = 3;
#else
constexpr int kIsas = 1;
#endif

const Isa& pick() {
  const char* wanted = std::getenv("FUSEDOPT_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return *std::find_if(isas(), isas() + kIsas, [](const Isa& isa) { return isa.available; });
  }
  for (const Isa* isa = isas(); isa != isas() + kIsas; ++isa) {
    if (isa->available && std::string(wanted) == isa->name) return *isa;
  }
  throw std::runtime_error("FUSEDOPT_ISA is \"" + std::string(wanted) +
                           "\", but this build on this processor has only: " + cpu_isas());
}

const Isa& isa() {
  static const Isa& chosen = pick();
  return chosen;
}

#ifdef _OPENMP
// Below this length of the work line a second thread costs more than it brings.
constexpr int64_t kSerial = 1 << 17;
#endif

// How much of the line is worked off in the usual direction when the whole goes backwards.
constexpr int64_t kPiece = 1 << 16;

int64_t task_at(const Plan& plan, int64_t position) {
  return std::upper_bound(plan.begin, plan.begin + plan.n_tasks, position) - plan.begin - 1;
}

// Calls kernel(plan, first task, begin, end) for one stretch of the work line on every thread.
template <class Kernel>
void in_parallel(const Plan& plan, int threads, Kernel&& kernel) {
  const int64_t length = plan.begin[plan.n_tasks];
  const auto run_part = [&](int part, int parts) {
    // Every thread gets one stretch of the line, as torch's own operators split a tensor: memory
    // stays with the thread, and on machines with several memories with the socket, it was on.
    const int64_t begin = length / parts * part + length % parts * part / parts;
    const int64_t end = length / parts * (part + 1) + length % parts * (part + 1) / parts;
    kernel(plan, task_at(plan, begin), begin, end);
  };
#ifdef _OPENMP
  if (threads > 1 && length > kSerial) {
#pragma omp parallel num_threads(threads)
    run_part(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#else
  (void)threads;
#endif
  run_part(0, 1);
}

}  // namespace

const Kernels& cpu_kernels() { return *isa().kernels; }

const char* cpu_isa() { return isa().name; }

const char* cpu_isas() {
  static const std::string names = [] {
    std::string text;
    for (const Isa* isa = isas(); isa != isas() + kIsas; ++isa) {
      if (isa->available) text += (text.empty() ? "" : " ") + std::string(isa->name);
    }
    return text;
  }();
  return names.c_str();
}

bool cpu_has_threads() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void cpu_update(const Plan& plan, int threads, bool measured) {
  const auto update = cpu_kernels().update;
  if (!measured) return in_parallel(plan, threads, update);
  // The other way round: first what the measurement has read last.
  in_parallel(plan, threads, [&](const Plan&, int64_t, int64_t begin, int64_t end) {
    for (int64_t to = end, from; to > begin; to = from) {
      from = to - begin < kPiece ? begin : to - kPiece;
      update(plan, task_at(plan, from), from, to);
    }
  });
}

namespace {

Norm measure_scaled(const Plan& plan, NormType type, double scale, int threads) {
  std::vector<int64_t> first_chunk = {0};
  first_chunk.reserve(plan.n_tasks + 1);
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    first_chunk.push_back(first_chunk.back() +
                          (plan.tasks[i]->numel + kNormChunk - 1) / kNormChunk);
  }
  std::vector<ChunkNorm> chunks(first_chunk.back());
  const auto measure = cpu_kernels().measure;
  in_parallel(plan, threads, [&](const Plan&, int64_t task, int64_t begin, int64_t end) {
    measure(plan, type, scale, first_chunk.data(), task, begin, end, chunks.data());
  });

  Norm norm;
  norm.scale = scale;
  for (int64_t i = 0; i < plan.n_tasks; ++i) {
    for (int64_t c = first_chunk[i]; c < first_chunk[i + 1]; ++c) {
      if (!chunks[c].finite && norm.nonfinite_task < 0) norm.nonfinite_task = i;
      norm.total = type == NormType::kTwo ? norm.total + chunks[c].value
                                          : base::maximum(norm.total, chunks[c].value);
    }
  }
  return norm;
}

// Whether squares of doubles may have left the range of doubles, so that their sum is of no use.
// (Those of floats do not. Of a sum above the lower limit, those that vanish are no part.)
bool left_range(const Plan& plan, const Norm& norm) {
  if (norm.nonfinite_task >= 0 || (norm.total >= 0x1p-900 && norm.total < INFINITY)) return false;
  return std::any_of(plan.tasks, plan.tasks + plan.n_tasks,
                     [](const Task* task) { return task->param.dtype == DType::kFloat64; });
}

}  // namespace

Norm cpu_measure(const Plan& plan, NormType type, int threads) {
  const Norm norm = measure_scaled(plan, type, 1, threads);
  if (type != NormType::kTwo || !left_range(plan, norm)) return norm;
  const double largest = measure_scaled(plan, NormType::kInfinity, 1, threads).total;
  if (largest == 0) return norm;
  const int exponent = std::min(std::max(std::ilogb(largest), -1000), 1000);
  return measure_scaled(plan, type, std::ldexp(1, -exponent), threads);
}

void cpu_accumulate(const Plan& plan, int threads) {
  in_parallel(plan, threads, cpu_kernels().accumulate);
}

void cpu_average(const Plan& plan, double weight, int threads) {
  const auto average = cpu_kernels().average;
  in_parallel(plan, threads, [&](const Plan&, int64_t task, int64_t begin, int64_t end) {
    average(plan, weight, task, begin, end);
  });
}

}  // namespace fusedopt
