// The CPU engine's outside: which instruction set, and which thread does what.
#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fusedopt {
namespace {

struct Isa {
  const char* name;
  bool available;
  decltype(&base::update_range) update_range;
};

// Best first. setup.py defines FUSEDOPT_X86 when it compiles the x86 kernels.
const Isa* isas() {
  static const Isa list[] = {
#ifdef FUSEDOPT_X86
      {"avx512",
       __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       avx512::update_range},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::update_range},
#endif
      {"base", true, base::update_range},
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

}  // namespace

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

void cpu_run(const Plan& plan, int threads) {
  const auto update_range = isa().update_range;
  const int64_t length = plan.begin[plan.n_tasks];
  const auto run_part = [&](int part, int parts) {
    // Every thread gets one stretch of the line, as torch's own operators split a tensor: memory
    // stays with the thread, and on machines with several memories with the socket, it was on.
    const int64_t begin = length / parts * part + length % parts * part / parts;
    const int64_t end = length / parts * (part + 1) + length % parts * (part + 1) / parts;
    const int64_t* const task = std::upper_bound(plan.begin, plan.begin + plan.n_tasks, begin) - 1;
    update_range(plan, task - plan.begin, begin, end);
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

}  // namespace fusedopt
