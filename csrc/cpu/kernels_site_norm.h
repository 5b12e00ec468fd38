// Batch, group and instance normalization: moments of columns, and the scale, shift and activation of rows, with gradients.
#pragma once

#include "kernels_rows.h"

namespace sparsecnx::SPARSECNX_ISA {

// An activation and its derivative at z, as torch defines them. A NaN stays one.
template <class A>
struct Activated {
  Vec<A> value, slope;
};

template <class A>
inline Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exp(-z));
}

template <Activation ACTIVATION, class A>
inline Activated<A> activated(Vec<A> z, A negative_slope) {
  const Vec<A> zero{}, one = splat<Vec<A>>(A(1));
  if constexpr (ACTIVATION == Activation::kNone) return {z, one};
  if constexpr (ACTIVATION == Activation::kRelu) return {z < zero ? zero : z, z <= zero ? zero : one};
  if constexpr (ACTIVATION == Activation::kRelu6) {
    const Vec<A> six = splat<Vec<A>>(A(6)), low = z < zero ? zero : z, inside = z >= six ? zero : one;
    return {low > six ? six : low, z <= zero ? zero : inside};
  }
  if constexpr (ACTIVATION == Activation::kLeakyRelu) {
    const Vec<A> below = splat<Vec<A>>(negative_slope);
    return {z > zero ? z : z * below, z > zero ? one : below};
  }
  if constexpr (ACTIVATION == Activation::kSilu) {
    const Vec<A> s = sigmoid<A>(z);
    return {z * s, s * (one + z * (one - s))};
  }
  if constexpr (ACTIVATION == Activation::kHardswish) {
    const Vec<A> three = splat<Vec<A>>(A(3));
    const Vec<A> above = z >= three ? z : z * (z + three) / A(6), slope = z >= three ? one : z / A(3) + A(0.5);
    return {z <= -three ? zero : above, z <= -three ? zero : slope};
  }
  if constexpr (ACTIVATION == Activation::kGelu) {
    const Gelu<A> found = gelu(z);
    return {found.value, found.slope};
  }
}

// Calls f with an activation that is known at compile time.
template <class F>
inline void for_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kRelu6:
      return f(std::integral_constant<Activation, Activation::kRelu6>());
    case Activation::kLeakyRelu:
      return f(std::integral_constant<Activation, Activation::kLeakyRelu>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kHardswish:
      return f(std::integral_constant<Activation, Activation::kHardswish>());
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
  }
}

// Sums are those of differences from the first row, or from the mean: they do not lose what is small beside the mean.
// The block stays in cache for the second pass.
template <class S, class A = Compute<S>>
void column_moments(const S* x, int64_t rows, int64_t channels, double* mean, double* square) {
  std::vector<A> total(channels, A(0)), centre(channels);
  for_four_rows<S>(rows, channels, [&](auto count, int64_t row, int64_t c, auto n) {
    const Vec<A> first = load(x + c, n);
    Vec<A> sum = load(total.data() + c, n);
    for (int r = 0; r < count(); ++r) sum += load(x + (row + r) * channels + c, n) - first;
    store(total.data() + c, sum, n);
  });
  for_columns<S>(channels, [&](int64_t c, int64_t n) { store(centre.data() + c, load(x + c, n), n); });
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = centre[c] + static_cast<double>(total[c]) / rows;
    centre[c] = static_cast<A>(mean[c]);
    total[c] = A(0);
  }
  for_four_rows<S>(rows, channels, [&](auto count, int64_t row, int64_t c, auto n) {
    const Vec<A> middle = load(centre.data() + c, n);
    Vec<A> sum = load(total.data() + c, n);
    for (int r = 0; r < count(); ++r) {
      const Vec<A> centred = load(x + (row + r) * channels + c, n) - middle;
      sum += centred * centred;
    }
    store(total.data() + c, sum, n);
  });
  for (int64_t c = 0; c < channels; ++c) square[c] = total[c];
}

template <class S>
void site_norm(const SiteNorm<S>& norm, const S* x, int64_t rows, S* out) {
  using A = Compute<S>;
  for_activation(norm.activation, [&](auto activation) {
    for_four_rows<S>(rows, norm.channels, [&](auto count, int64_t row, int64_t c, auto n) {
      const Vec<A> mean = load(norm.mean + c, n), scale = load(norm.scale + c, n), bias = load(norm.bias + c, n);
      for (int r = 0; r < count(); ++r) {
        const int64_t i = (row + r) * norm.channels + c;
        store(out + i, activated<activation(), A>((load(x + i, n) - mean) * scale + bias, norm.slope).value, n);
      }
    });
  });
}

template <class S>
void site_norm_sums(const SiteNorm<S>& norm, const S* grad, const S* x, int64_t rows, Compute<S>* dot,
                    Compute<S>* total) {
  using A = Compute<S>;
  for_activation(norm.activation, [&](auto activation) {
    for_four_rows<S>(rows, norm.channels, [&](auto count, int64_t row, int64_t c, auto n) {
      const Vec<A> mean = load(norm.mean + c, n), scale = load(norm.scale + c, n), bias = load(norm.bias + c, n);
      Vec<A> along = load(dot + c, n), sum = load(total + c, n);
      for (int r = 0; r < count(); ++r) {
        const int64_t i = (row + r) * norm.channels + c;
        const Vec<A> centred = load(x + i, n) - mean;
        const Vec<A> g = load(grad + i, n) * activated<activation(), A>(centred * scale + bias, norm.slope).slope;
        along += g * centred;
        sum += g;
      }
      store(dot + c, along, n);
      store(total + c, sum, n);
    });
  });
}

template <class S>
void site_norm_grad(const SiteNorm<S>& norm, const S* grad, const S* x, int64_t rows, S* out) {
  using A = Compute<S>;
  for_activation(norm.activation, [&](auto activation) {
    for_four_rows<S>(rows, norm.channels, [&](auto count, int64_t row, int64_t c, auto n) {
      const Vec<A> mean = load(norm.mean + c, n), scale = load(norm.scale + c, n), bias = load(norm.bias + c, n);
      const Vec<A> along = load(norm.along + c, n), constant = load(norm.constant + c, n);
      for (int r = 0; r < count(); ++r) {
        const int64_t i = (row + r) * norm.channels + c;
        const Vec<A> centred = load(x + i, n) - mean;
        const Vec<A> g = load(grad + i, n) * activated<activation(), A>(centred * scale + bias, norm.slope).slope;
        store(out + i, g * scale + (centred * along + constant), n);
      }
    });
  });
}

}  // namespace sparsecnx::SPARSECNX_ISA
