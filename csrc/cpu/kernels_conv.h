// Convolution on an explicit kernel map: only pairs of an output row and an input row that exist are multiplied.
//
// The rows under a tap are listed as pairs, (to, from). A block of pairs and a panel of up to kPanel registers of output
// channels fill the registers with sums: they are loaded from the output rows, the products over all input channels are
// added, and they are stored again. Nothing is gathered, and nothing is multiplied by zero. The gradient of x is the
// same kernel on the inverse map, with the weight transposed. In the gradient of the weight the sums are a block of
// input channels by a panel, and the loop goes over the pairs.
//
// Weights are packed, so that a panel is read in the order of memory: (taps, input channels, channels of the panel).
#pragma once

#include <utility>

#include "kernels.h"
#include "vec.h"

namespace sparsecnx::SPARSECNX_ISA {

// Registers of a panel, and of all sums of a block: the others hold a row of the panel and what multiplies it.
#if defined(SPARSECNX_AVX512)
constexpr int kPanel = 4, kSums = 24;
#else
constexpr int kPanel = 2, kSums = 12;
#endif

// The most rows of a block with V registers of each.
template <int V>
constexpr int kMostRows = kSums / V < 12 ? kSums / V : 12;

// Holds V registers of channels of a row, of which the last may be partial.
template <class A, int V>
struct PanelRow {
  int64_t last;  // channels of the last register

  Vec<A> get(const A* row, int v) const { return load(row + v * kLanes<A>, v + 1 < V ? kLanes<A> : last); }
  void put(A* row, int v, Vec<A> value) const { store(row + v * kLanes<A>, value, v + 1 < V ? kLanes<A> : last); }
};

// out[to[i]] += x[from[i]] weight for M pairs, over `depth` input channels.
template <class A, int V, int M>
void multiply_pairs(const ConvPairs<A>& job, int64_t first, const A* x, const A* weight, int64_t depth) {
  const PanelRow<A, V> panel{job.channels - (V - 1) * kLanes<A>};
  const A* row[M];
  Vec<A> sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    row[m] = x + job.from[first + m] * job.x_step;
    const A* out = job.out + job.to[first + m] * job.out_step;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = panel.get(out, v);
  }
  for (int64_t k = 0; k < depth; ++k, weight += V * kLanes<A>) {
    Vec<A> w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load(weight + v * kLanes<A>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<A> value = splat<Vec<A>>(row[m][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += value * w[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    A* out = job.out + job.to[first + m] * job.out_step;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) panel.put(out, v, sum[m][v]);
  }
}

// sums (M, panel) += x[from[i], M channels] grad[to[i], panel], over all pairs; the sums start at zero if `fresh`.
template <class A, int V, int M>
void multiply_channels(const ConvPairs<A>& job, const A* x, bool fresh, A* sums) {
  const PanelRow<A, V> panel{job.channels - (V - 1) * kLanes<A>};
  Vec<A> sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = fresh ? Vec<A>{} : load(sums + (m * V + v) * kLanes<A>);
  }
  for (int64_t i = 0; i < job.count; ++i) {
    const A* row = x + job.from[i] * job.x_step;
    const A* grad = job.out + job.to[i] * job.out_step;
    Vec<A> g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[v] = panel.get(grad, v);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<A> value = splat<Vec<A>>(row[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += value * g[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + (m * V + v) * kLanes<A>, sum[m][v]);
  }
}

// Calls f with M = rows as a constant, 1 to Most.
template <int Most, class F>
void with_rows(int64_t rows, const F& f) {
  [&]<int... M>(std::integer_sequence<int, M...>) {
    ((rows == M + 1 ? f(std::integral_constant<int, M + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, Most>());
}

// Divides `count` into as few blocks of at most Most as possible, of nearly the same size: f(first, size as a constant).
template <int Most, class F>
void for_blocks_of(int64_t count, const F& f) {
  const int64_t blocks = (count + Most - 1) / Most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = count * b / blocks, end = count * (b + 1) / blocks;
    with_rows<Most>(end - first, [&](auto size) { f(first, size); });
  }
}

// Calls f with the registers of a panel as a constant.
template <class A, class F>
void with_panel(int64_t channels, const F& f) {
  with_rows<kPanel>((channels + kLanes<A> - 1) / kLanes<A>, f);
}

template <class A>
void conv_pairs(const ConvPairs<A>& job, const A* weight, int64_t width) {
  with_panel<A>(job.channels, [&](auto registers) {
    constexpr int V = registers;
    for_blocks_of<kMostRows<V>>(
        job.count, [&](int64_t first, auto rows) { multiply_pairs<A, V, rows>(job, first, job.x, weight, width); });
  });
}

template <class A>
void conv_pairs_weight_grad(const ConvPairs<A>& job, int64_t begin, int64_t end, bool fresh, A* sums) {
  with_panel<A>(job.channels, [&](auto registers) {
    constexpr int V = registers;
    for_blocks_of<kMostRows<V>>(end - begin, [&](int64_t first, auto rows) {
      multiply_channels<A, V, rows>(job, job.x + begin + first, fresh, sums + (begin + first) * V * kLanes<A>);
    });
  });
}

// Copies rows of C channels, a number that the compiler knows, or of any number where C = 0.
template <class A, int C>
void gather_rows(const A* x, const int32_t* map, int64_t count, int64_t channels, A* columns) {
  const std::vector<A> zeros(channels);
  if constexpr (C > 0) channels = C;
  for (int64_t i = 0; i < count; ++i, columns += channels) {
    const int64_t row = map[i];
    std::memcpy(columns, row >= 0 ? x + row * channels : zeros.data(), channels * sizeof(A));
  }
}

template <class A>
void gather_columns(const A* x, const int32_t* map, int64_t count, int64_t channels, A* columns) {
  const auto gather = channels == 1   ? gather_rows<A, 1>
                      : channels == 2 ? gather_rows<A, 2>
                      : channels == 3 ? gather_rows<A, 3>
                      : channels == 4 ? gather_rows<A, 4>
                                      : gather_rows<A, 0>;
  gather(x, map, count, channels, columns);
}

// The lanes of two registers in turn: their first halves, or their second.
template <class V, size_t... I>
inline V interleave(V a, V b, size_t half, std::index_sequence<I...>) {
  constexpr int W = sizeof...(I);
  return half == 0 ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...)
                   : __builtin_shufflevector(a, b, (W / 2 + I / 2 + I % 2 * W)...);
}

// Transposes a square of registers: after as many rounds as a lane's number has bits, each of which interleaves the first
// half of the registers with the second.
template <class A>
inline void transpose_square(Vec<A>* square) {
  constexpr int W = kLanes<A>;
  constexpr auto lanes = std::make_index_sequence<W>();
  for (int round = 1; round < W; round *= 2) {
    Vec<A> next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave(square[i], square[i + W / 2], 0, lanes);
      next[2 * i + 1] = interleave(square[i], square[i + W / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = next[i];
  }
}

// Columns of a matrix of at most as many rows as a register has lanes, each into a register: to[c] = from[:, c], and
// zeros in the lanes that have no row.
template <class S>
void columns_to_lanes(const S* from, int64_t row_step, int64_t rows, int64_t columns, Compute<S>* to, int64_t to_step) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = std::min(W, columns - c);
    Vec<A> square[W];
    for (int64_t r = 0; r < W; ++r) square[r] = r < rows ? load(from + r * row_step + c, n) : Vec<A>{};
    transpose_square<A>(square);
    for (int64_t i = 0; i < n; ++i) store(to + (c + i) * to_step, square[i]);
  }
}

// The same way back: to[:, c] = from[c].
template <class S>
void lanes_to_columns(const Compute<S>* from, int64_t from_step, int64_t rows, int64_t columns, S* to,
                      int64_t row_step) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = std::min(W, columns - c);
    Vec<A> square[W];
    for (int64_t i = 0; i < W; ++i) square[i] = i < n ? load(from + (c + i) * from_step, rows) : Vec<A>{};
    transpose_square<A>(square);
    for (int64_t r = 0; r < rows; ++r) store(to + r * row_step + c, square[r], n);
  }
}

}  // namespace sparsecnx::SPARSECNX_ISA
