// Depthwise convolution on tiles, forward and weight gradient, in two ways.
//
// Large tiles and kernels slide. For one tile and one register of channels, the square of sites that the tile's outputs
// see (14x14 for a tile of 8 and a 7x7 kernel) is gathered into a buffer in L1, with zeros where tiles are masked. Then a
// block of outputs of one row slides along the kernel row: OB + KW - 1 loads serve OB * KW multiply-adds.
//
// Small ones list what their sites read, about 64 rows at a time, and go on as the convolution on a kernel map does: what
// is masked costs nothing. On a core with AVX-512 that was faster for tiles below 8, and for tiles of 8 under 3x3 kernels.
#pragma once

#include "kernels_mapped.h"

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

// acc[o] += sum over the kernel of weight * square, for OB adjacent outputs of a row. The kernel of the first starts at
// `square`. KW = 0: any width.
template <class A, int OB, int KW>
inline void slide(const Vec<A>* square, int64_t width, const Vec<A>* weight, int64_t kernel_h, int64_t kernel_w,
                  Vec<A> (&acc)[OB]) {
  for (int64_t ky = 0; ky < kernel_h; ++ky, square += width) {
    if constexpr (KW == 0) {
      for (int64_t kx = 0; kx < kernel_w; ++kx) {
        const Vec<A> w = weight[ky * kernel_w + kx];
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) acc[o] += w * square[o + kx];
      }
    } else {
      Vec<A> in[OB + KW - 1];
#pragma GCC unroll 16
      for (int i = 0; i < OB + KW - 1; ++i) in[i] = square[i];
#pragma GCC unroll 16
      for (int kx = 0; kx < KW; ++kx) {
        const Vec<A> w = weight[ky * KW + kx];
#pragma GCC unroll 16
        for (int o = 0; o < OB; ++o) acc[o] += w * in[o + kx];
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

  // Computes OB outputs of row y from column x on.
  template <int OB, int KW>
  void row(int64_t y, int64_t x) const {
    const Halo& halo = job.halo;
    Vec<A> acc[OB];
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) acc[o] = bias;
    slide<A, OB, KW>(square + y * halo.width + x, halo.width, weight, halo.kernel_h, halo.kernel_w, acc);
    write(acc, y, x);
  }
};

// Computes all outputs of a tile, in blocks that fit its side.
template <class S, int KW>
void tile_outputs(const TileOutput<S>& out) {
  const int64_t side = out.job.halo.tile;
  for (int64_t y = 0; y < side; ++y) {
    int64_t x = 0;
    for (; x + kOutputs <= side; x += kOutputs) out.template row<kOutputs, KW>(y, x);
    if constexpr (kOutputs > 4) {
      for (; x + 4 <= side; x += 4) out.template row<4, KW>(y, x);
    }
    for (; x + 2 <= side; x += 2) out.template row<2, KW>(y, x);
    if (x < side) out.template row<1, KW>(y, x);
  }
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
  Registers<A> acc(taps), square(seen), grad(sites);
  Neighbours<S> neighbours(halo, job.channels);
  for (int64_t c = from; c < to; c += W) {
    const int64_t n = std::min(W, to - c);
    std::fill_n(acc.data(), taps, Vec<A>{});
    for (int64_t t = begin; t < end; ++t) {
      const S* g = job.grad + (t - job.grad_first) * sites * job.channels + c;
      neighbours.visit(job.table + t * halo.table_width, job.x);
      neighbours.fill(c, n, square.data());
      for (int64_t site = 0; site < sites; ++site) grad[site] = load(g + halo.output[site] * job.channels, n);
      for (int64_t ky = 0; ky < halo.kernel_h; ++ky) {
        // A fixed-size copy of the kernel row's sums stays in registers.
        Vec<A> local[KW > 0 ? KW : 1];
        if constexpr (KW > 0) std::copy_n(&acc[ky * KW], KW, local);
        Vec<A>* sums = KW > 0 ? local : &acc[ky * halo.kernel_w];
        correlate_tile<A, KW>(square.data() + ky * halo.width, grad.data(), halo, sums);
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

// Returns whether tiles of this geometry slide; where they list, lists stay in cache.
inline bool slides(const Halo& halo) {
  return halo.tile > 16 || (halo.tile >= 8 && halo.kernel_h * halo.kernel_w >= 25);
}

// The kernel map of a few tiles: for every site and tap the row of x that is read, -1 where it is masked.
class TileMap {
 public:
  explicit TileMap(const Halo& halo)
      : halo_(halo),
        sites_(halo.tile * halo.tile),
        taps_(halo.kernel_h * halo.kernel_w),
        tiles_(std::max<int64_t>(1, kBlock / sites_)),
        rows_(halo.height * halo.width),
        map_(tiles_ * sites_ * taps_) {}

  int64_t tiles() const { return tiles_; }           // at most
  int64_t sites() const { return tiles_ * sites_; }  // at most

  // Fills the map of tiles whose neighbours are listed in `table`. Rows are counted from that of tile `first` on.
  const int32_t* fill(const int32_t* table, int64_t tiles, int64_t first) {
    const int64_t kernel_w = halo_.kernel_w, positions = halo_.height * halo_.width;
    for (int64_t t = 0; t < tiles; ++t, table += halo_.table_width) {
      for (int64_t i = 0; i < positions; ++i) {
        const int64_t tile = table[halo_.slot[i]];
        rows_[i] = static_cast<int32_t>(tile < 0 ? -1 : (tile - first) * sites_ + halo_.site[i]);
      }
      for (int64_t y = 0; y < halo_.tile; ++y) {
        for (int64_t x = 0; x < halo_.tile; ++x) {
          int32_t* at = map_.data() + (t * sites_ + halo_.output[y * halo_.tile + x]) * taps_;
          for (int64_t ky = 0; ky < halo_.kernel_h; ++ky, at += kernel_w)
            std::copy_n(rows_.data() + (y + ky) * halo_.width + x, kernel_w, at);
        }
      }
    }
    return map_.data();
  }

 private:
  const Halo& halo_;
  int64_t sites_, taps_, tiles_;
  std::vector<int32_t> rows_, map_;
};

template <class S>
void depthwise_listed(const Depthwise<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const Halo& halo = job.halo;
  const int64_t channels = job.channels, taps = halo.kernel_h * halo.kernel_w, sites = halo.tile * halo.tile;
  const std::vector<S> zeros(channels);
  const BlockedWeight<S> weight(job.weight, taps, channels);
  TileMap map(halo);
  Reads reads(map.sites(), taps);
  for (int64_t t = begin; t < end; t += map.tiles()) {
    const int64_t tiles = std::min(map.tiles(), end - t), rows = tiles * sites;
    reads.clear();
    reads.add(map.fill(job.table + t * halo.table_width, tiles, job.x_first), 0, rows, taps, taps, 1);
    const int64_t first = (t - job.out_first) * sites * channels;
    for_channel_blocks<S>(channels, [&](auto block) {
      const auto start = [&](int j) { return job.bias != nullptr ? block.get(job.bias, j) : Vec<A>{}; };
      const auto finish = [&](int64_t o, int j, Vec<A> sum) {
        const int64_t at = first + o * channels;
        block.put(job.out + at, j, job.residual != nullptr ? sum + block.get(job.residual + at, j) : sum);
      };
      all_sums<S>(reads, weight.of(block), job.x, channels, zeros.data(), block, start, finish);
    });
  }
}

template <class S>
void depthwise_weight_grad_listed(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from,
                                  int64_t to, Compute<S>* weight_grad) {
  const Halo& halo = job.halo;
  const int64_t channels = job.channels, taps = halo.kernel_h * halo.kernel_w, sites = halo.tile * halo.tile;
  const std::vector<S> zeros(channels);
  TileMap map(halo);
  Reads reads(taps, map.sites());
  Registers<Compute<S>> grad(map.sites() * kMostRegisters);
  for (int64_t t = begin; t < end; t += map.tiles()) {
    const int64_t tiles = std::min(map.tiles(), end - t), rows = tiles * sites;
    reads.clear();
    reads.add(map.fill(job.table + t * halo.table_width, tiles, 0), 0, taps, 1, rows, taps);
    const S* g = job.grad + (t - job.grad_first) * sites * channels;
    for_channel_blocks<S>(to - from, [&](auto block) {
      block.at += from;
      add_weight_grad<S>(reads, g, rows, job.x, channels, zeros.data(), block, grad.data(), weight_grad);
    });
  }
}

template <class S>
void depthwise(const Depthwise<S>& job, int64_t begin, int64_t end) {
  if (!slides(job.halo)) return depthwise_listed(job, begin, end);
  for_width(job.halo.kernel_w, [&](auto width) { depthwise_tiles<S, width()>(job, begin, end); });
}

template <class S>
void depthwise_weight_grad(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from, int64_t to,
                           Compute<S>* weight_grad) {
  if (!slides(job.halo)) return depthwise_weight_grad_listed(job, begin, end, from, to, weight_grad);
  for_width(job.halo.kernel_w,
            [&](auto width) { depthwise_weight_grad_tiles<S, width()>(job, begin, end, from, to, weight_grad); });
}

}  // namespace sparsecnx::SPARSECNX_ISA
