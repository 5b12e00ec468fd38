#include "kernels.h"

#include <cstdlib>
#include <string>

namespace sparsecnx {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa detect() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* asked = std::getenv("SPARSECNX_CPU_ISA");
  if (asked != nullptr) {
    const std::string name(asked);
    if (name == "baseline") return Isa::kBaseline;
    if (name == "avx2") return std::min(best, Isa::kAvx2);
  }
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

template <class S>
Kernels<S> choose() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::make_kernels<S>();
  if (isa() == Isa::kAvx2) return avx2::make_kernels<S>();
#endif
  return baseline::make_kernels<S>();
}

}  // namespace

template <class S>
const Kernels<S>& kernels() {
  static const Kernels<S> chosen = choose<S>();
  return chosen;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<bfloat16>& kernels();
template const Kernels<half>& kernels();

const char* cpu_isa() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace sparsecnx
