// Depthwise convolution on tiles, forward and weight gradient.
//
// For one tile and one register of channels, the square of sites that the tile's outputs see (14x14 for a tile of 8 and
// a 7x7 kernel) is gathered into a buffer in L1, with zeros where tiles are masked. Then a block of outputs of one row
// slides along the kernel row: OB + KW - 1 loads serve OB * KW multiply-adds.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparsecnx::SPARSECNX_ISA {

// The number of outputs of a row that are computed together: as many as fit 32 (AVX-512) or 16 registers with their
// inputs.
#if defined(SPARSECNX_AVX512)
constexpr int kOutputs = 8;
#else
constexpr int kOutputs = 4;
#endif

// Holds where the rows of each neighbouring tile begin. All sites of a masked tile read a row of zeros, so that no
// branch depends on the mask, which is random and would be mispredicted.
template <class S>
class Neighbours {
 public:
  Neighbours(const Halo& halo, int64_t channels)
      : halo_(halo), channels_(channels), zeros_(channels), begin_(halo.table_width), step_(halo.table_width) {}

  // Finds the neighbours of one tile. x is row 0 of tile 0.
  void visit(const int32_t* tiles, const S* x) {
    const int64_t size = halo_.tile * halo_.tile * channels_;
    for (int64_t i = 0; i < halo_.table_width; ++i) {
      begin_[i] = tiles[i] < 0 ? zeros_.data() : x + tiles[i] * size;
      step_[i] = tiles[i] < 0 ? 0 : channels_;
    }
  }

  // Fills the square of sites that the tile's outputs see with n channels from `channel` on.
  void fill(int64_t channel, int64_t n, Vec<Compute<S>>* square) const {
    const int64_t count = halo_.height * halo_.width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = halo_.slot[i];
      square[i] = load(begin_[slot] + halo_.site[i] * step_[slot] + channel, n);
    }
  }

 private:
  const Halo& halo_;
  int64_t channels_;
  std::vector<S> zeros_;
  std::vector<const S*> begin_;
  std::vector<int64_t> step_;
};

// acc[r][o] += sum over the kernel of weight * square, for OB outputs of each of R adjacent rows. The kernel of the first
// starts at `square`. Rows share the inputs that they load: where a row has few outputs, two of them keep enough
// independent sums in flight. KW = 0: any width.
template <class A, int R, int OB, int KW>
inline void slide(const Vec<A>* square, int64_t width, const Vec<A>* weight, int64_t kernel_h, int64_t kernel_w,
                  Vec<A> (&acc)[R][OB]) {
  if constexpr (KW == 0) {
    static_assert(R == 1);
    for (int64_t ky = 0; ky < kernel_h; ++ky, square += width) {
      for (int64_t kx = 0; kx < kernel_w; ++kx) {
        const Vec<A> w = weight[ky * kernel_w + kx];
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) acc[0][o] += w * square[o + kx];
      }
    }
  } else {
    for (int64_t row = 0; row < kernel_h + R - 1; ++row, square += width) {
      Vec<A> in[OB + KW - 1];
#pragma GCC unroll 16
      for (int i = 0; i < OB + KW - 1; ++i) in[i] = square[i];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        if (row < r || row - r >= kernel_h) continue;
#pragma GCC unroll 16
        for (int kx = 0; kx < KW; ++kx) {
          const Vec<A> w = weight[(row - r) * KW + kx];
#pragma GCC unroll 16
          for (int o = 0; o < OB; ++o) acc[r][o] += w * in[o + kx];
        }
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

// The outputs of one tile for one register of channels.
template <class S>
struct TileOutput {
  using A = Compute<S>;

  const Depthwise<S>& job;
  const Vec<A>*square, *weight;
  Vec<A> bias;
  int64_t tile, channel, n;

  template <int OB>
  void write(const Vec<A> (&acc)[OB], int64_t y, int64_t x) const {
    const Halo& halo = job.halo;
    const int64_t rows = (tile - job.out_first) * halo.tile * halo.tile;
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) {
      const int64_t at = (rows + halo.output[y * halo.tile + x + o]) * job.channels + channel;
      store(job.out + at, job.residual != nullptr ? acc[o] + load(job.residual + at, n) : acc[o], n);
    }
  }

  // Computes OB outputs from column x on of each of R rows from row y on.
  template <int R, int OB, int KW>
  void rows(int64_t y, int64_t x) const {
    const Halo& halo = job.halo;
    Vec<A> acc[R][OB];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int o = 0; o < OB; ++o) acc[r][o] = bias;
    }
    slide<A, R, OB, KW>(square + y * halo.width + x, halo.width, weight, halo.kernel_h, halo.kernel_w, acc);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) write(acc[r], y + r, x);
  }
};

// Computes all outputs of a tile, in blocks that fit its side.
template <class S, int KW>
void tile_outputs(const TileOutput<S>& out) {
  const int64_t side = out.job.halo.tile;
  if constexpr (KW > 0) {
    if (side == 4 || side == 2) {
      for (int64_t y = 0; y < side; y += 2)
        side == 4 ? out.template rows<2, 4, KW>(y, 0) : out.template rows<2, 2, KW>(y, 0);
      return;
    }
  }
  for (int64_t y = 0; y < side; ++y) {
    int64_t x = 0;
    for (; x + kOutputs <= side; x += kOutputs) out.template rows<1, kOutputs, KW>(y, x);
    if constexpr (kOutputs > 4) {
      for (; x + 4 <= side; x += 4) out.template rows<1, 4, KW>(y, x);
    }
    for (; x + 2 <= side; x += 2) out.template rows<1, 2, KW>(y, x);
    if (x < side) out.template rows<1, 1, KW>(y, x);
  }
}

// Computes a tile of one site. Outputs share nothing, so masked neighbours are skipped.
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
  const int64_t taps = halo.kernel_h * halo.kernel_w;
  const S* x = job.x - job.x_first * halo.tile * halo.tile * job.channels;
  Registers<A> weight(taps), square(halo.height * halo.width);
  Neighbours<S> neighbours(halo, job.channels);
  for (int64_t c = 0; c < job.channels; c += W) {
    const int64_t n = std::min(W, job.channels - c);
    for (int64_t k = 0; k < taps; ++k) weight[k] = load(job.weight + k * job.channels + c, n);
    const Vec<A> bias = job.bias != nullptr ? load(job.bias + c, n) : Vec<A>{};
    for (int64_t t = begin; t < end; ++t) {
      if (halo.tile == 1) {
        depthwise_site(job, weight.data(), bias, t, c, n);
        continue;
      }
      neighbours.visit(job.table + t * halo.table_width, x);
      neighbours.fill(c, n, square.data());
      tile_outputs<S, KW>({job, square.data(), weight.data(), bias, t, c, n});
    }
  }
}

// For one kernel row: sums[kx] += sum over the sites of a tile of grad * square.
template <class A, int KW>
inline void correlate_tile(const Vec<A>* square, const Vec<A>* grad, const Halo& halo, Vec<A>* sums) {
  for (int64_t y = 0; y < halo.tile; ++y, square += halo.width, grad += halo.tile) {
    int64_t x = 0;
    for (; x + 4 <= halo.tile; x += 4) correlate<A, 4, KW>(square + x, grad + x, sums, halo.kernel_w);
    for (; x + 2 <= halo.tile; x += 2) correlate<A, 2, KW>(square + x, grad + x, sums, halo.kernel_w);
    if (x < halo.tile) correlate<A, 1, KW>(square + x, grad + x, sums, halo.kernel_w);
  }
}

template <class S, int KW>
void depthwise_weight_grad_tiles(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from,
                                 int64_t to, Compute<S>* weight_grad) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const Halo& halo = job.halo;
  const int64_t sites = halo.tile * halo.tile, seen = halo.height * halo.width;
  const int64_t taps = halo.kernel_h * halo.kernel_w;
  // Small tiles are taken several at a time, so that a kernel row's sums stay in registers for longer.
  const int64_t together = std::max<int64_t>(1, 16 / sites);
  Registers<A> acc(taps), square(together * seen), grad(together * sites);
  Neighbours<S> neighbours(halo, job.channels);
  for (int64_t c = from; c < to; c += W) {
    const int64_t n = std::min(W, to - c);
    std::fill_n(acc.data(), taps, Vec<A>{});
    for (int64_t t = begin; t < end; t += together) {
      const int64_t tiles = std::min(together, end - t);
      const S* g = job.grad + (t - job.grad_first) * sites * job.channels + c;
      if (halo.tile == 1) {
        for (int64_t i = 0; i < tiles; ++i) {
          const int32_t* rows = job.table + (t + i) * halo.table_width;
          const Vec<A> value = load(g + i * job.channels, n);
          for (int64_t k = 0; k < taps; ++k) {
            const int64_t row = rows[halo.slot[k]];
            if (row >= 0) acc[k] += value * load(job.x + row * job.channels + c, n);
          }
        }
        continue;
      }
      for (int64_t i = 0; i < tiles; ++i) {
        neighbours.visit(job.table + (t + i) * halo.table_width, job.x);
        neighbours.fill(c, n, square.data() + i * seen);
        for (int64_t site = 0; site < sites; ++site)
          grad[i * sites + site] = load(g + (i * sites + halo.output[site]) * job.channels, n);
      }
      for (int64_t ky = 0; ky < halo.kernel_h; ++ky) {
        // A fixed-size copy of the kernel row's sums stays in registers.
        Vec<A> local[KW > 0 ? KW : 1];
        if constexpr (KW > 0) std::copy_n(&acc[ky * KW], KW, local);
        Vec<A>* sums = KW > 0 ? local : &acc[ky * halo.kernel_w];
        for (int64_t i = 0; i < tiles; ++i)
          correlate_tile<A, KW>(square.data() + i * seen + ky * halo.width, grad.data() + i * sites, halo, sums);
        if constexpr (KW > 0) std::copy_n(local, KW, &acc[ky * KW]);
      }
    }
    for (int64_t k = 0; k < taps; ++k) {
      A* at = weight_grad + k * job.channels + c;
      store(at, load(at, n) + acc[k], n);
    }
  }
}

// Calls f(integral_constant<int, KW>) for a kernel width that is compiled on its own, otherwise with KW = 0.
template <class F>
void for_width(int64_t kernel_w, const F& f) {
  switch (kernel_w) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

template <class S>
void depthwise(const Depthwise<S>& job, int64_t begin, int64_t end) {
  for_width(job.halo.kernel_w, [&](auto width) { depthwise_tiles<S, width()>(job, begin, end); });
}

template <class S>
void depthwise_weight_grad(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from, int64_t to,
                           Compute<S>* weight_grad) {
  for_width(job.halo.kernel_w,
            [&](auto width) { depthwise_weight_grad_tiles<S, width()>(job, begin, end, from, to, weight_grad); });
}

}  // namespace sparsecnx::SPARSECNX_ISA
