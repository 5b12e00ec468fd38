// Kernels that read every row once: normalisations, activations, sums over rows.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparsecnx::SPARSECNX_ISA {

// Calls f(column, lanes) for every register of a row.
template <class S, class F>
inline void for_columns(int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<S>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(c, W);
  if (c < channels) f(c, channels - c);
}

template <class A>
inline void accumulate(A* at, Vec<A> value, int64_t n) {
  store(at, load(at, n) + value, n);
}

// Calls f(d, at, c, n) for every register of a matrix: it holds n values from offset `at` of the matrix and channel c on,
// and d is the factor of its row (1 if row_scale is null).
template <class S, class F>
inline void for_values(const Compute<S>* row_scale, int64_t rows, int64_t channels, const F& f) {
  for (int64_t r = 0; r < rows; ++r) {
    const Compute<S> d = row_scale != nullptr ? row_scale[r] : Compute<S>(1);
    for_columns<S>(channels, [&](int64_t c, int64_t n) { f(d, r * channels + c, c, n); });
  }
}

template <class S, class A = Compute<S>>
void moments(const S* x, int64_t rows, int64_t channels, A eps, A* moments) {
  for (int64_t r = 0; r < rows; ++r, x += channels) {
    Vec<A> total{};
    for_columns<S>(channels, [&](int64_t c, int64_t n) { total += load(x + c, n); });
    const A mean = sum<A>(total) / channels;
    Vec<A> square{};
    for_columns<S>(channels, [&](int64_t c, int64_t n) {
      const Vec<A> centred = only(load(x + c, n) - mean, n);
      square += centred * centred;
    });
    moments[2 * r] = mean;
    moments[2 * r + 1] = A(1) / std::sqrt(sum<A>(square) / channels + eps);
  }
}

template <class S, class A = Compute<S>>
void normalise(const S* x, const A* moments, const A* weight, const A* bias, int64_t rows, int64_t channels, S* out) {
  for (int64_t r = 0; r < rows; ++r, x += channels, out += channels) {
    const A mean = moments[2 * r], rstd = moments[2 * r + 1];
    for_columns<S>(channels, [&](int64_t c, int64_t n) {
      store(out + c, (load(x + c, n) - mean) * rstd * load(weight + c, n) + load(bias + c, n), n);
    });
  }
}

// dx = rstd (w g - mean(w g) - xhat mean(w g xhat))
template <class S, class A = Compute<S>>
void layer_norm_backward(const S* grad, const S* x, const A* moments, const A* weight, int64_t rows, int64_t channels,
                         S* out, A* weight_grad, A* bias_grad) {
  for (int64_t r = 0; r < rows; ++r, grad += channels, x += channels, out += channels) {
    const A mean = moments[2 * r], rstd = moments[2 * r + 1];
    Vec<A> total{}, projection{};
    for_columns<S>(channels, [&](int64_t c, int64_t n) {
      const Vec<A> g = load(grad + c, n), xhat = (load(x + c, n) - mean) * rstd;
      const Vec<A> wg = load(weight + c, n) * g;
      total += wg;
      projection += wg * xhat;
      accumulate(weight_grad + c, g * xhat, n);
      accumulate(bias_grad + c, g, n);
    });
    const A a = sum<A>(total) / channels, b = sum<A>(projection) / channels;
    for_columns<S>(channels, [&](int64_t c, int64_t n) {
      const Vec<A> xhat = (load(x + c, n) - mean) * rstd;
      store(out + c, (load(weight + c, n) * load(grad + c, n) - a - xhat * b) * rstd, n);
    });
  }
}

template <class S, class A = Compute<S>>
void energy(const S* x, int64_t rows, int64_t channels, A* energy) {
  for_values<S>(nullptr, rows, channels, [&](A, int64_t at, int64_t c, int64_t n) {
    const Vec<A> value = load(x + at, n);
    accumulate(energy + c, value * value, n);
  });
}

template <class S, class A = Compute<S>>
void affine(const S* x, const A* scale, const A* shift, const A* row_scale, int64_t rows, int64_t channels, S* out) {
  for_values<S>(row_scale, rows, channels, [&](A d, int64_t at, int64_t c, int64_t n) {
    store(out + at, (load(x + at, n) * load(scale + c, n) + load(shift + c, n)) * d, n);
  });
}

template <class S, class A = Compute<S>>
void add_shift(const S* x, const A* shift, const A* row_scale, int64_t rows, int64_t channels, S* out) {
  for_values<S>(row_scale, rows, channels, [&](A d, int64_t at, int64_t c, int64_t n) {
    store(out + at, load(x + at, n) + load(shift + c, n) * d, n);
  });
}

template <class S, class A = Compute<S>>
void combine(const S* grad, const S* x, const A* a, const A* b, int64_t rows, int64_t channels, S* out) {
  for_values<S>(nullptr, rows, channels, [&](A, int64_t at, int64_t c, int64_t n) {
    store(out + at, load(grad + at, n) * load(a + c, n) + load(x + at, n) * load(b + c, n), n);
  });
}

template <class S, class A = Compute<S>>
void dot_and_sum(const S* grad, const S* x, int64_t rows, int64_t channels, A* dot, A* total) {
  for_values<S>(nullptr, rows, channels, [&](A, int64_t at, int64_t c, int64_t n) {
    const Vec<A> g = load(grad + at, n);
    accumulate(dot + c, g * load(x + at, n), n);
    accumulate(total + c, g, n);
  });
}

template <class S, class A = Compute<S>>
void column_sum(const S* x, const A* row_scale, int64_t rows, int64_t channels, A* total) {
  for_values<S>(row_scale, rows, channels,
                [&](A d, int64_t at, int64_t c, int64_t n) { accumulate(total + c, load(x + at, n) * d, n); });
}

template <class S, class A = Compute<S>>
void scale_rows(const S* x, A scale, int64_t rows, int64_t channels, S* out) {
  for_columns<S>(rows * channels, [&](int64_t i, int64_t n) { store(out + i, load(x + i, n) * scale, n); });
}

// Calls f(count, row, c, n) for every register of `count()` rows from `row` on, 4 or 1, and of n channels from c on: what it
// needs of the channels is loaded once for all of these rows.
template <class S, int COUNT, class F>
inline void for_these_rows(int64_t row, int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<S>;
  constexpr std::integral_constant<int, COUNT> count;
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(count, row, c, std::integral_constant<int64_t, W>());
  if (c < channels) f(count, row, c, channels - c);
}

template <class S, class F>
inline void for_four_rows(int64_t rows, int64_t channels, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) for_these_rows<S, 4>(r, channels, f);
  for (; r < rows; ++r) for_these_rows<S, 1>(r, channels, f);
}

template <class S, class A = Compute<S>>
void gelu_energy(const S* hidden, const A* bias, int64_t rows, int64_t channels, S* h, A* energy) {
  for_four_rows<S>(rows, channels, [&](auto count, int64_t row, int64_t c, auto n) {
    const Vec<A> offset = load(bias + c, n);
    Vec<A> total = load(energy + c, n);
    for (int r = 0; r < count(); ++r) {
      const int64_t at = (row + r) * channels + c;
      const Vec<A> value = gelu(load(hidden + at, n) + offset).value;
      store(h + at, value, n);
      total += value * value;
    }
    store(energy + c, total, n);
  });
}

template <class S, class A = Compute<S>>
void gelu_grn_sums(const S* hidden, const A* bias, const S* t, const A* row_scale, int64_t rows, int64_t channels,
                   A* scale_grad, A* beta_grad) {
  for_four_rows<S>(rows, channels, [&](auto count, int64_t row, int64_t c, auto n) {
    const Vec<A> offset = load(bias + c, n);
    Vec<A> scale_total = load(scale_grad + c, n), total = load(beta_grad + c, n);
    for (int r = 0; r < count(); ++r) {
      const int64_t at = (row + r) * channels + c;
      const Vec<A> g = load(t + at, n) * (row_scale != nullptr ? row_scale[row + r] : A(1));
      scale_total += g * gelu(load(hidden + at, n) + offset).value;
      total += g;
    }
    store(scale_grad + c, scale_total, n);
    store(beta_grad + c, total, n);
  });
}

template <class S, class A = Compute<S>>
void gelu_grn_backward(const S* hidden, const A* bias, S* t, const A* s, const A* beta, const A* p, const A* row_scale,
                       int64_t rows, int64_t channels, S* scaled, A* bias_grad) {
  for_four_rows<S>(rows, channels, [&](auto count, int64_t row, int64_t c, auto n) {
    const Vec<A> offset = load(bias + c, n), shift = load(beta + c, n);
    const Vec<A> scale = load(s + c, n), response = load(p + c, n);
    Vec<A> total = load(bias_grad + c, n);
    for (int r = 0; r < count(); ++r) {
      const int64_t at = (row + r) * channels + c;
      const A d = row_scale != nullptr ? row_scale[row + r] : A(1);
      const Gelu<A> h = gelu(load(hidden + at, n) + offset);
      const Vec<A> g = h.slope * (load(t + at, n) * (scale * d) + h.value * response);
      store(scaled + at, (h.value * scale + shift) * d, n);
      store(t + at, g, n);
      total += g;
    }
    store(bias_grad + c, total, n);
  });
}

// Converts to the computing type and back.
template <class S, class From, class To>
void convert(const From* x, int64_t count, To* out) {
  for_columns<S>(count, [&](int64_t i, int64_t n) { store(out + i, load(x + i, n), n); });
}

}  // namespace sparsecnx::SPARSECNX_ISA
