// Depthwise convolution on tiles, forward and weight gradient.
//
// For one tile and one register of channels, the square of sites that the tile's outputs see (14x14 for a tile
// of 8 and a 7x7 kernel) is gathered into a buffer in L1, zeros where tiles are masked. A block of outputs of one
// row then slides along the kernel row: OB + KW - 1 loads serve OB * KW multiply-adds.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparsecnx::SPARSECNX_ISA {

// Outputs of one row computed together: as many as fit the 32 (AVX-512) or 16 registers beside their inputs.
#if defined(SPARSECNX_AVX512)
constexpr int kOutputs = 8;
#else
constexpr int kOutputs = 4;
#endif

template <class S>
void fill_halo(const Halo& halo, const int32_t* neighbours, const S* x, int64_t channels, int64_t n,
               Vec<Compute<S>>* square) {
  const int64_t sites = halo.tile * halo.tile;
  const int64_t count = halo.height * halo.width;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = neighbours[halo.slot[i]];
    square[i] = tile < 0 ? Vec<Compute<S>>{} : load(x + (tile * sites + halo.site[i]) * channels, n);
  }
}

// acc[o] += sum over the kernel of weight * square, for OB outputs whose kernels start at `square`. KW = 0: any width.
template <class A, int OB, int KW>
inline void slide(const Vec<A>* square, int64_t width, const Vec<A>* weight, int64_t kernel_h, int64_t kernel_w,
                  Vec<A> (&acc)[OB]) {
  for (int64_t ky = 0; ky < kernel_h; ++ky, square += width) {
    if constexpr (KW > 0) {
      Vec<A> in[OB + KW - 1];
#pragma GCC unroll 16
      for (int i = 0; i < OB + KW - 1; ++i) in[i] = square[i];
#pragma GCC unroll 16
      for (int kx = 0; kx < KW; ++kx) {
        const Vec<A> w = weight[ky * KW + kx];
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) acc[o] += w * in[o + kx];
      }
    } else {
      for (int64_t kx = 0; kx < kernel_w; ++kx) {
        const Vec<A> w = weight[ky * kernel_w + kx];
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) acc[o] += w * square[o + kx];
      }
    }
  }
}

// acc[kx] += sum over OB outputs of grad * square, for one kernel row.
template <class A, int OB, int KW>
inline void correlate(const Vec<A>* square, const Vec<A>* grad, Vec<A>* acc, int64_t kernel_w) {
  if constexpr (KW > 0) {
    Vec<A> in[OB + KW - 1];
#pragma GCC unroll 16
    for (int i = 0; i < OB + KW - 1; ++i) in[i] = square[i];
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) {
      const Vec<A> g = grad[o];
#pragma GCC unroll 16
      for (int kx = 0; kx < KW; ++kx) acc[kx] += g * in[o + kx];
    }
  } else {
    for (int64_t kx = 0; kx < kernel_w; ++kx) {
      for (int o = 0; o < OB; ++o) acc[kx] += grad[o] * square[o + kx];
    }
  }
}

template <class S, int OB, int KW>
inline void outputs(const Depthwise<S>& job, const Vec<Compute<S>>* square, const Vec<Compute<S>>* weight,
                    Vec<Compute<S>> bias, int64_t tile, int64_t y, int64_t x, int64_t channel, int64_t n) {
  using A = Compute<S>;
  const Halo& halo = job.halo;
  Vec<A> acc[OB];
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o) acc[o] = bias;
  slide<A, OB, KW>(square + y * halo.width + x, halo.width, weight, halo.kernel_h, halo.kernel_w, acc);
  const int64_t rows = (tile - job.out_first) * halo.tile * halo.tile;
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o) {
    const int64_t at = (rows + halo.output[y * halo.tile + x + o]) * job.channels + channel;
    store(job.out + at, job.residual != nullptr ? acc[o] + load(job.residual + at, n) : acc[o], n);
  }
}

// Tiles of one site: nothing to share between outputs, so masked neighbours are skipped.
template <class S>
void depthwise_site(const Depthwise<S>& job, const Vec<Compute<S>>* weight, Vec<Compute<S>> bias, int64_t site,
                    int64_t channel, int64_t n) {
  const Halo& halo = job.halo;
  const int32_t* neighbours = job.table + site * halo.table_width;
  const S* x = job.x + channel - job.x_first * job.channels;
  const int64_t taps = halo.height * halo.width;
  Vec<Compute<S>> acc = bias;
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t row = neighbours[halo.slot[k]];
    if (row >= 0) acc += weight[k] * load(x + row * job.channels, n);
  }
  const int64_t at = (site - job.out_first) * job.channels + channel;
  store(job.out + at, job.residual != nullptr ? acc + load(job.residual + at, n) : acc, n);
}

template <class S, int KW>
void depthwise_tiles(const Depthwise<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const Halo& halo = job.halo;
  const int64_t tile = halo.tile, taps = halo.kernel_h * halo.kernel_w;
  Registers<A> weight(taps), square(halo.height * halo.width);
  for (int64_t c = 0; c < job.channels; c += W) {
    const int64_t n = std::min(W, job.channels - c);
    for (int64_t k = 0; k < taps; ++k) weight[k] = load(job.weight + k * job.channels + c, n);
    const Vec<A> bias = job.bias != nullptr ? load(job.bias + c, n) : Vec<A>{};
    for (int64_t t = begin; t < end; ++t) {
      if (tile == 1) {
        depthwise_site(job, weight.data(), bias, t, c, n);
        continue;
      }
      fill_halo(halo, job.table + t * halo.table_width, job.x - job.x_first * tile * tile * job.channels + c,
                job.channels, n, square.data());
      for (int64_t y = 0; y < tile; ++y) {
        int64_t x = 0;
        for (; x + kOutputs <= tile; x += kOutputs)
          outputs<S, kOutputs, KW>(job, square.data(), weight.data(), bias, t, y, x, c, n);
        if constexpr (kOutputs > 4) {
          for (; x + 4 <= tile; x += 4) outputs<S, 4, KW>(job, square.data(), weight.data(), bias, t, y, x, c, n);
        }
        for (; x + 2 <= tile; x += 2) outputs<S, 2, KW>(job, square.data(), weight.data(), bias, t, y, x, c, n);
        if (x < tile) outputs<S, 1, KW>(job, square.data(), weight.data(), bias, t, y, x, c, n);
      }
    }
  }
}

template <class S, int KW>
void depthwise_weight_grad_tiles(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from,
                                 int64_t to, Compute<S>* weight_grad) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const Halo& halo = job.halo;
  const int64_t tile = halo.tile, sites = tile * tile, taps = halo.kernel_h * halo.kernel_w;
  Registers<A> acc(taps), square(halo.height * halo.width), grad(sites);
  for (int64_t c = from; c < to; c += W) {
    const int64_t n = std::min(W, to - c);
    std::fill_n(acc.data(), taps, Vec<A>{});
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* neighbours = job.table + t * halo.table_width;
      const S* g = job.grad + (t - job.grad_first) * sites * job.channels + c;
      if (tile == 1) {
        const Vec<A> value = load(g, n);
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t row = neighbours[halo.slot[k]];
          if (row >= 0) acc[k] += value * load(job.x + row * job.channels + c, n);
        }
        continue;
      }
      fill_halo(halo, neighbours, job.x + c, job.channels, n, square.data());
      for (int64_t i = 0; i < sites; ++i) grad[i] = load(g + halo.output[i] * job.channels, n);
      for (int64_t ky = 0; ky < halo.kernel_h; ++ky) {
        // A fixed-size copy of the kernel row's sums stays in registers over the tile.
        Vec<A> local[KW > 0 ? KW : 1];
        if constexpr (KW > 0) std::copy_n(&acc[ky * KW], KW, local);
        Vec<A>* sums = KW > 0 ? local : &acc[ky * halo.kernel_w];
        for (int64_t y = 0; y < tile; ++y) {
          const Vec<A>* row = square.data() + (y + ky) * halo.width;
          const Vec<A>* g_row = grad.data() + y * tile;
          int64_t x = 0;
          for (; x + 4 <= tile; x += 4) correlate<A, 4, KW>(row + x, g_row + x, sums, halo.kernel_w);
          for (; x + 2 <= tile; x += 2) correlate<A, 2, KW>(row + x, g_row + x, sums, halo.kernel_w);
          if (x < tile) correlate<A, 1, KW>(row + x, g_row + x, sums, halo.kernel_w);
        }
        if constexpr (KW > 0) std::copy_n(local, KW, &acc[ky * KW]);
      }
    }
    for (int64_t k = 0; k < taps; ++k) {
      A* at = weight_grad + k * job.channels + c;
      store(at, load(at, n) + acc[k], n);
    }
  }
}

template <class S>
void depthwise(const Depthwise<S>& job, int64_t begin, int64_t end) {
  switch (job.halo.kernel_w) {
    case 3:
      return depthwise_tiles<S, 3>(job, begin, end);
    case 5:
      return depthwise_tiles<S, 5>(job, begin, end);
    case 7:
      return depthwise_tiles<S, 7>(job, begin, end);
    default:
      return depthwise_tiles<S, 0>(job, begin, end);
  }
}

template <class S>
void depthwise_weight_grad(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from, int64_t to,
                           Compute<S>* weight_grad) {
  switch (job.halo.kernel_w) {
    case 3:
      return depthwise_weight_grad_tiles<S, 3>(job, begin, end, from, to, weight_grad);
    case 5:
      return depthwise_weight_grad_tiles<S, 5>(job, begin, end, from, to, weight_grad);
    case 7:
      return depthwise_weight_grad_tiles<S, 7>(job, begin, end, from, to, weight_grad);
    default:
      return depthwise_weight_grad_tiles<S, 0>(job, begin, end, from, to, weight_grad);
  }
}

}  // namespace sparsecnx::SPARSECNX_ISA
