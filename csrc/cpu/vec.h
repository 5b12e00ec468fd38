// A register of lanes for the instruction set SPARSECNX_ISA. Each isa_*.cpp file includes it once and defines:
//   SPARSECNX_ISA         namespace of everything compiled for it
//   SPARSECNX_BYTES       bytes of a register
//   SPARSECNX_AVX2/_AVX512  whether the intrinsics for partial loads and half precision may be used
//
// Storage types (float, double, bfloat16, half) are loaded into lanes of the type they are computed in:
// float, or double for double.
#pragma once

#include <new>

#include "types.h"

namespace sparsecnx::SPARSECNX_ISA {

template <class A>
  requires std::is_arithmetic_v<A>
struct Lanes {
  typedef A type __attribute__((vector_size(SPARSECNX_BYTES)));
};
template <class A>
using Vec = typename Lanes<A>::type;
using Ints = Vec<int32_t>;

// The number of lanes of a register for storage type S.
template <class S>
constexpr int64_t kLanes = SPARSECNX_BYTES / sizeof(Compute<S>);

template <class V, class A>
inline V splat(A value) {
  return value - V{};
}

// An uninitialised, aligned array of registers in memory. std::vector does not align vector types.
template <class A>
class Registers {
 public:
  explicit Registers(int64_t count) : at_(::operator new(count * sizeof(Vec<A>), kAlignment)) {}
  ~Registers() { ::operator delete(at_, kAlignment); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
  Vec<A>* data() { return static_cast<Vec<A>*>(at_); }
  const Vec<A>* data() const { return static_cast<const Vec<A>*>(at_); }
  Vec<A>& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{SPARSECNX_BYTES};
  void* at_;
};

// --- loads and stores of the first n lanes; the others are zero -------------------------------------------

template <class A>
inline Vec<A> load_some(const A* p, int64_t n) {
  Vec<A> v{};
  std::memcpy(&v, p, n * sizeof(A));
  return v;
}

template <class A>
inline void store_some(A* p, Vec<A> v, int64_t n) {
  std::memcpy(p, &v, n * sizeof(A));
}

#if defined(SPARSECNX_AVX512)
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
inline Vec<float> load_some(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(first(n), p);
}
template <>
inline void store_some(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first(n), (__m512)v);
}
#elif defined(SPARSECNX_AVX2)
inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vec<float> load_some(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first(n));
}
template <>
inline void store_some(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first(n), (__m256)v);
}
#endif

template <class A>
inline Vec<A> load(const A* p, int64_t n = kLanes<A>) {
  if (n < kLanes<A>) return load_some(p, n);
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v, int64_t n = kLanes<A>) {
  if (n < kLanes<A>) return store_some(p, v, n);
  std::memcpy(p, &v, sizeof(v));
}

// Values of 16 bits are moved first, all or some of them, and then widened.
typedef uint16_t Bits16 __attribute__((vector_size(SPARSECNX_BYTES / 2)));
using Bits32 = Vec<uint32_t>;

inline Bits16 load_bits(const void* p, int64_t n) {
  Bits16 bits{};
  n >= kLanes<float> ? std::memcpy(&bits, p, sizeof(bits)) : std::memcpy(&bits, p, n * sizeof(uint16_t));
  return bits;
}

inline void store_bits(void* p, Bits16 bits, int64_t n) {
  n >= kLanes<float> ? std::memcpy(p, &bits, sizeof(bits)) : std::memcpy(p, &bits, n * sizeof(uint16_t));
}

inline Vec<float> load(const bfloat16* p, int64_t n = kLanes<float>) {
  return (Vec<float>)(__builtin_convertvector(load_bits(p, n), Bits32) << 16);
}

inline void store(bfloat16* p, Vec<float> v, int64_t n = kLanes<float>) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;  // to nearest, ties to even
  const Bits32 nan = (bits >> 16) | 0x40u;                                // rounding must not carry a NaN away
  const Bits32 is_nan = (Bits32)(v != v);
  store_bits(p, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Bits16), n);
}

inline Vec<float> load(const half* p, int64_t n = kLanes<float>) {
  const Bits16 bits = load_bits(p, n);
#if defined(SPARSECNX_AVX512)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(SPARSECNX_AVX2)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec<float> v{};
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(bits[i]);
  return v;
#endif
}

inline void store(half* p, Vec<float> v, int64_t n = kLanes<float>) {
#if defined(SPARSECNX_AVX512)
  store_bits(p, (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT), n);
#elif defined(SPARSECNX_AVX2)
  store_bits(p, (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), n);
#else
  Bits16 bits{};
  for (int64_t i = 0; i < kLanes<float>; ++i) bits[i] = float_to_half(v[i]);
  store_bits(p, bits, n);
#endif
}

// --- reductions and functions ------------------------------------------------------------------------------

template <class A>
inline A sum(Vec<A> v) {
  A total = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// Returns the first n lanes, and zeros in the others.
template <class V>
inline V only(V v, int64_t n) {
  for (int64_t i = n; i < static_cast<int64_t>(sizeof(V) / sizeof(v[0])); ++i) v[i] = 0;
  return v;
}

inline Vec<double> exp(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Returns 1 / x to 2^-23, for x in [2^-100, 2^100].
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(SPARSECNX_AVX512)
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, for |x| <= 128: exp(r) = 1 + r + r^2 Q(r), a minimax fit with relative error 3e-9.
inline Vec<float> exp_bounded(Vec<float> x) {
  const Vec<float> shift = splat<Vec<float>>(12582912.0f);  // 1.5 * 2^23 rounds to an integer
  const Vec<float> n = (x * 1.44269504f + shift) - shift;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = splat<Vec<float>>(1.381453826e-3f);
  y = y * r + 8.368745446e-3f;
  y = y * r + 4.166838899e-2f;
  y = y * r + 1.666652113e-1f;
  y = y * r + 4.999999404e-1f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
#if defined(SPARSECNX_AVX512)
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  // Two factors, since 2^n itself may be too large or too small.
  const Ints power = __builtin_convertvector(n, Ints), half = power >> 1;
  return y * (Vec<float>)((half + 127) << 23) * (Vec<float>)((power - half + 127) << 23);
#endif
}

// From -104 down it rounds to 0, from 89 up to infinity. A NaN fails both comparisons and stays.
inline Vec<float> exp(Vec<float> x) {
  x = x < -104.0f ? splat<Vec<float>>(-104.0f) : x;
  return exp_bounded(x > 89.0f ? splat<Vec<float>>(89.0f) : x);
}

// The exact GELU x Phi(x) and its derivative Phi(x) + x phi(x).
template <class A>
struct Gelu {
  Vec<A> value, slope;
};

inline Gelu<double> gelu(Vec<double> x) {
  Gelu<double> out;
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    const double cdf = 0.5 * std::erfc(-x[i] * 0.70710678118654752);
    out.value[i] = x[i] * cdf;
    out.slope[i] = cdf + x[i] * 0.39894228040143268 * std::exp(-0.5 * x[i] * x[i]);
  }
  return out;
}

// erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + 0.33 z), z = |x| / sqrt(2): P is a minimax fit on 0 <= z <= 9.6 with
// relative error 8e-8. One exponential serves the value and the slope. From |x| = 15 on it is 0.
inline Gelu<float> gelu(Vec<float> x) {
  Vec<float> magnitude = (Vec<float>)((Ints)x & 0x7fffffff);
  magnitude = magnitude > 15.0f ? splat<Vec<float>>(15.0f) : magnitude;
  const Vec<float> t = reciprocal(1.0f + (0.33f * 0.70710678f) * magnitude);
  const Vec<float> e = exp_bounded(magnitude * magnitude * -0.5f);
  Vec<float> p = splat<Vec<float>>(0.5f * -1.359294056e-01f);
  p = p * t + 0.5f * 4.626909441e-01f;
  p = p * t - 0.5f * 3.554439919e-01f;
  p = p * t + 0.5f * 4.125466753e-01f;
  p = p * t + 0.5f * 4.500768980e-02f;
  p = p * t + 0.5f * 2.019248218e-01f;
  p = p * t + 0.5f * 1.828370617e-01f;
  p = p * t + 0.5f * 1.863661232e-01f;
  const Vec<float> tail = p * (t * e);
  const Vec<float> cdf = x < 0.0f ? tail : 1.0f - tail;
  return {x * cdf, cdf + x * e * 0.39894228f};
}

}  // namespace sparsecnx::SPARSECNX_ISA
