// Storage types of features, and the types in which they are computed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sparsecnx {

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

// Products and sums of 16-bit and float storage are float, those of double are double.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  float value;
  if (magnitude < 0x400u) {  // zero and subnormal: multiples of 2^-24
    value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
  } else {
    const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    const uint32_t widened = (magnitude << 13) + exponent;
    std::memcpy(&value, &widened, sizeof(value));
  }
  uint32_t out;
  std::memcpy(&out, &value, sizeof(out));
  out |= sign;
  std::memcpy(&value, &out, sizeof(value));
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // subnormal: let float addition round to a multiple of 2^-24
    std::memcpy(&value, &bits, sizeof(value));
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace sparsecnx
