#include "kernels.h"

#include <cstdlib>

namespace sparsecnx {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

// Returns which instruction set of kNames to use.
int detect() {
  int best = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      best = 2;
    }
  }
#endif
  const char* asked = std::getenv("SPARSECNX_CPU_ISA");
  for (int isa = 0; asked != nullptr && isa < best; ++isa) {
    if (std::strcmp(asked, kNames[isa]) == 0) best = isa;
  }
  return best;
}

}  // namespace

int isa() {
  static const int chosen = detect();
  return chosen;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool there = isa() == 2 && __builtin_cpu_supports("avx512bf16");
  return there;
#else
  return false;
#endif
}

std::string cpu_isa() { return kNames[isa()]; }

}  // namespace sparsecnx
