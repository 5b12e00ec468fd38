// Depthwise convolution on tiles in one to three dimensions, forward and weight gradient, in two ways.
//
// Large tiles and kernels slide. For one tile and one register of channels, the box of sites that the tile's outputs see
// (14x14x14 for a cube of 8 and a 7x7x7 kernel) is gathered slice by slice into a buffer in L1, with zeros where tiles are
// masked. A slice of the box serves up to kernel[0] slices of outputs, each with its own slice of the kernel; sums that
// are not complete wait in a ring. In a slice, a block of outputs of one row slides along the kernel row: OB + KW - 1 loads
// serve OB * KW multiply-adds. In two dimensions there is one slice, and no sum waits.
//
// Small ones list what their sites read, about 64 rows at a time, and go on as the convolution on a kernel map does: what
// is masked costs nothing. `slides` says which way is taken.
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

// Positions [begin, end) along an axis of the box.
struct Range {
  int64_t begin, end;
};

// Holds where the rows of each neighbouring tile begin. All sites of a masked tile read a row of zeros, so that no
// branch depends on the mask, which is random and would be mispredicted.
template <class S>
class Neighbours {
 public:
  Neighbours(const Halo& halo, int64_t channels)
      : halo_(halo),
        channels_(channels),
        zeros_(channels),
        begin_(halo.table_width),
        step_(halo.table_width),
        line_(halo.table_width),
        slice_(halo.table_width) {}

  // Finds the neighbours of one tile; x is row 0 of tile 0. Returns the slices of the box from the first to the last in
  // which anything is visible.
  Range visit(const int32_t* tiles, const S* x) {
    const int64_t size = halo_.sites * channels_;
    const auto [deep, high, wide] = Box{2 * halo_.reach[0] + 1, 2 * halo_.reach[1] + 1, 2 * halo_.reach[2] + 1};
    int64_t i = 0;
    for (int64_t z = 0; z < deep; ++z) {
      uint8_t& slice = slice_[i] = 0;
      for (int64_t y = 0; y < high; ++y) {
        uint8_t& line = line_[i] = 0;
        for (int64_t end = i + wide; i < end; ++i) {
          begin_[i] = tiles[i] < 0 ? zeros_.data() : x + tiles[i] * size;
          step_[i] = tiles[i] < 0 ? 0 : channels_;
          line |= tiles[i] >= 0;
        }
        slice |= line;
      }
    }
    return visible(halo_.slot[0], slice_.data());
  }

  // Fills slice z of the box with n channels from `channel` on. Returns its rows from the first to the last in which
  // anything is visible; the others are not filled.
  Range fill(int64_t z, int64_t channel, int64_t n, Vec<Compute<S>>* square) const {
    const Range rows = visible(halo_.slot[1], line_.data() + halo_.slot[0][z]);
    const int64_t side = halo_.tile[2], width = halo_.seen[2], before = halo_.kernel[2] / 2 % side;
    const int32_t* parts = halo_.part[2].data();
    square += rows.begin * width;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      int64_t slot = halo_.slot[0][z] + halo_.slot[1][y], i = 0;
      const int64_t part = halo_.part[0][z] + halo_.part[1][y];
      for (int64_t end = before > 0 ? before : side; i < width; end = std::min(end + side, width), ++slot) {
        const int64_t step = step_[slot];
        const S* from = begin_[slot] + part * step + channel;
        for (; i < end; ++i) *square++ = load(from + parts[i] * step, n);
      }
    }
    return rows;
  }

 private:
  // Returns the positions from the first to the last whose flag is set.
  static Range visible(const std::vector<int32_t>& slot, const uint8_t* flag) {
    Range range{0, static_cast<int64_t>(slot.size())};
    while (range.begin < range.end && !flag[slot[range.begin]]) ++range.begin;
    while (range.begin < range.end && !flag[slot[range.end - 1]]) --range.end;
    return range;
  }

  const Halo& halo_;
  int64_t channels_;
  std::vector<S> zeros_;
  std::vector<const S*> begin_;
  std::vector<int64_t> step_;
  std::vector<uint8_t> line_, slice_;  // whether anything is visible in the line and slice of tiles that begin there
};

// acc[o] += sum over rows of the kernel of weight * square, for OB adjacent outputs of a row. The kernel of the first
// starts at `square`. KW = 0: any width.
template <class A, int OB, int KW>
inline void slide(const Vec<A>* square, int64_t width, const Vec<A>* weight, int64_t rows, int64_t kernel_w,
                  Vec<A> (&acc)[OB]) {
  for (int64_t ky = 0; ky < rows; ++ky, square += width) {
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

// What one slice of the box adds to a slice of the outputs of a tile, for one register of channels.
template <class S>
struct SliceSums {
  using A = Compute<S>;

  const Depthwise<S>& job;
  const Vec<A>*square, *weight;  // of the slice of the box, and of the kernel
  Range rows;                    // of the square that are filled
  Vec<A>* waiting;               // sums of the slice of outputs
  bool first, last;              // whether nothing was added before, and nothing will be
  Vec<A> bias;
  int64_t out_row;  // of the tile's first site, counted from that of job.out
  int64_t z, channel, n;

  template <int OB>
  void write(const Vec<A> (&acc)[OB], int64_t y, int64_t x) const {
    const int64_t row = out_row + job.halo.output(z, y, 0);
    const int32_t* parts = &job.halo.part[2][job.halo.kernel[2] / 2 + x];
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) {
      const int64_t at = (row + parts[o]) * job.channels + channel;
      store(job.out + at, job.residual != nullptr ? acc[o] + load(job.residual + at, n) : acc[o], n);
    }
  }

  // Goes on with OB outputs of row y from column x on.
  template <int OB, int KW>
  void row(int64_t y, int64_t x) const {
    const Box &kernel = job.halo.kernel, &seen = job.halo.seen;
    const int64_t begin = std::max<int64_t>(rows.begin - y, 0), end = std::min(rows.end - y, kernel[1]);
    Vec<A>* const sums = waiting + y * job.halo.tile[2] + x;
    Vec<A> acc[OB];
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) acc[o] = first ? bias : sums[o];
    slide<A, OB, KW>(square + (y + begin) * seen[2] + x, seen[2], weight + begin * kernel[2], end - begin, kernel[2],
                     acc);
    if (last) return write(acc, y, x);
#pragma GCC unroll 16
    for (int o = 0; o < OB; ++o) sums[o] = acc[o];
  }
};

// Goes on with all outputs of a slice, in blocks that fit its side.
template <class S, int KW>
void slice_sums(const SliceSums<S>& sums) {
  const auto [depth, height, width] = sums.job.halo.tile;
  for (int64_t y = 0; y < height; ++y) {
    int64_t x = 0;
    for (; x + kOutputs <= width; x += kOutputs) sums.template row<kOutputs, KW>(y, x);
    if constexpr (kOutputs > 4) {
      for (; x + 4 <= width; x += 4) sums.template row<4, KW>(y, x);
    }
    for (; x + 2 <= width; x += 2) sums.template row<2, KW>(y, x);
    if (x < width) sums.template row<1, KW>(y, x);
  }
}

template <class S, int KW>
void depthwise_tiles(const Depthwise<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const Halo& halo = job.halo;
  const int64_t depth = halo.tile[0], kernel_d = halo.kernel[0], in_slice = halo.kernel[1] * halo.kernel[2];
  const int64_t outputs = halo.tile[1] * halo.tile[2], ring = std::min(depth, kernel_d);
  const S* x = job.x - job.x_first * halo.sites * job.channels;
  Registers<A> weight(halo.taps), square(halo.seen[1] * halo.seen[2]), waiting(ring * outputs);
  Neighbours<S> neighbours(halo, job.channels);
  for (int64_t c = 0; c < job.channels; c += W) {
    const int64_t n = std::min(W, job.channels - c);
    for (int64_t k = 0; k < halo.taps; ++k) weight[k] = load(job.weight + k * job.channels + c, n);
    const Vec<A> bias = job.bias != nullptr ? load(job.bias + c, n) : Vec<A>{};
    for (int64_t t = begin; t < end; ++t) {
      const Range slices = neighbours.visit(job.table + t * halo.table_width, x);
      for (int64_t s = slices.begin; s < slices.end; ++s) {
        const Range rows = neighbours.fill(s, c, n, square.data());
        // The tile's own slices are not empty, so that each slice of outputs has a first and a last slice of the box.
        for (int64_t z = std::max<int64_t>(s - kernel_d + 1, 0); z <= std::min(s, depth - 1); ++z) {
          const bool first = s == std::max(z, slices.begin), last = s + 1 == std::min(z + kernel_d, slices.end);
          slice_sums<S, KW>({job, square.data(), &weight[(s - z) * in_slice], rows, &waiting[z % ring * outputs], first,
                             last, bias, (t - job.out_first) * halo.sites, z, c, n});
        }
      }
    }
  }
}

// For one kernel row: sums[kx] += sum over `height` rows of outputs of grad * square.
template <class A, int KW>
inline void correlate_rows(const Vec<A>* square, const Vec<A>* grad, const Halo& halo, int64_t height, Vec<A>* sums) {
  const int64_t width = halo.tile[2], kernel_w = halo.kernel[2];
  for (int64_t y = 0; y < height; ++y, square += halo.seen[2], grad += width) {
    int64_t x = 0;
    for (; x + 4 <= width; x += 4) correlate<A, 4, KW>(square + x, grad + x, sums, kernel_w);
    for (; x + 2 <= width; x += 2) correlate<A, 2, KW>(square + x, grad + x, sums, kernel_w);
    if (x < width) correlate<A, 1, KW>(square + x, grad + x, sums, kernel_w);
  }
}

// Adds the products of a slice of the box and a slice of the outputs' gradient to a slice of the weight's gradient.
template <class A, int KW>
inline void correlate_slice(const Vec<A>* square, Range rows, const Vec<A>* grad, const Halo& halo, Vec<A>* acc) {
  const int64_t width = halo.seen[2], kernel_w = halo.kernel[2];
  for (int64_t ky = 0; ky < halo.kernel[1]; ++ky, acc += kernel_w) {
    const int64_t begin = std::max<int64_t>(rows.begin - ky, 0), end = std::min(rows.end - ky, halo.tile[1]);
    // A fixed-size copy of the kernel row's sums stays in registers.
    Vec<A> local[KW > 0 ? KW : 1];
    if constexpr (KW > 0) std::copy_n(acc, KW, local);
    correlate_rows<A, KW>(square + (begin + ky) * width, grad + begin * halo.tile[2], halo, end - begin,
                          KW > 0 ? local : acc);
    if constexpr (KW > 0) std::copy_n(local, KW, acc);
  }
}

template <class S, int KW>
void depthwise_weight_grad_tiles(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from,
                                 int64_t to, Compute<S>* weight_grad) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const Halo& halo = job.halo;
  const auto [depth, height, width] = halo.tile;
  const int64_t kernel_d = halo.kernel[0], in_slice = halo.kernel[1] * halo.kernel[2], outputs = height * width;
  const int64_t ring = std::min(depth, kernel_d);  // slices of the gradient that a slice of the box meets
  Registers<A> acc(halo.taps), square(halo.seen[1] * halo.seen[2]), grad(ring * outputs);
  Neighbours<S> neighbours(halo, job.channels);
  for (int64_t c = from; c < to; c += W) {
    const int64_t n = std::min(W, to - c);
    std::fill_n(acc.data(), halo.taps, Vec<A>{});
    for (int64_t t = begin; t < end; ++t) {
      const S* g = job.grad + (t - job.grad_first) * halo.sites * job.channels + c;
      const Range slices = neighbours.visit(job.table + t * halo.table_width, job.x);
      int64_t loaded = 0;
      for (int64_t s = slices.begin; s < slices.end; ++s) {
        for (; loaded <= std::min(s, depth - 1); ++loaded) {
          Vec<A>* at = &grad[loaded % ring * outputs];
          for (int64_t y = 0; y < height; ++y) {
            for (int64_t x = 0; x < width; ++x) *at++ = load(g + halo.output(loaded, y, x) * job.channels, n);
          }
        }
        const Range rows = neighbours.fill(s, c, n, square.data());
        for (int64_t z = std::max<int64_t>(s - kernel_d + 1, 0); z <= std::min(s, depth - 1); ++z)
          correlate_slice<A, KW>(square.data(), rows, &grad[z % ring * outputs], halo, &acc[(s - z) * in_slice]);
      }
    }
    for (int64_t k = 0; k < halo.taps; ++k) {
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

// Returns whether tiles slide. To gather a position of the box takes about 12 cycles and a tile as long as 8 of them; to
// multiply and add takes half a cycle. In a list a product takes one cycle and its entry five, once for all channels.
template <class S>
bool slides(const Halo& halo, int64_t channels) {
  const int64_t registers = (channels + kLanes<S> - 1) / kLanes<S>;
  return 24 * registers * (volume(halo.seen) + 8) < halo.sites * halo.taps * (registers + 10);
}

// The kernel map of a list, whole tiles or a slice of one: for every site and tap the row of x that is read, -1 where it is
// masked.
class TileMap {
 public:
  explicit TileMap(const Halo& halo)
      : halo_(halo),
        sites_(volume(halo.list)),
        tiles_(std::max<int64_t>(1, kBlock / sites_)),
        seen_((halo.list[0] + halo.kernel[0] - 1) * halo.slice_slot.size() + kRun),
        rows_(tiles_ * sites_),
        map_(tiles_ * sites_ * halo.taps) {}

  int64_t tiles() const { return tiles_; }           // at most
  int64_t sites() const { return tiles_ * sites_; }  // at most
  // The row of each site of the map, counted from that of the first tile on.
  const int32_t* rows() const { return rows_.data(); }

  // Calls f(first tile, number of sites, map) for all lists of tiles [begin, end), with rows of x counted from that of
  // tile `first` on.
  template <class F>
  void for_lists(const int32_t* table, int64_t begin, int64_t end, int64_t first, const F& f) {
    for (int64_t t = begin; t < end; t += tiles_) {
      const int64_t tiles = std::min(tiles_, end - t);
      for (int64_t z = 0; z < halo_.tile[0]; z += halo_.list[0]) {
        for (int64_t i = 0; i < tiles; ++i) fill(table + (t + i) * halo_.table_width, i, z, first);
        f(t, tiles * sites_, map_.data());
      }
    }
  }

 private:
  // Fills the map for tile i of the list, from slice z on.
  void fill(const int32_t* table, int64_t i, int64_t z, int64_t first) {
    const auto [depth, height, width] = halo_.list;
    const auto [kernel_d, kernel_h, kernel_w] = halo_.kernel;
    const int64_t wide = halo_.seen[2], in_slice = halo_.seen[1] * wide;
    int32_t* seen = seen_.data();
    for (int64_t s = z; s < z + depth + kernel_d - 1; ++s, seen += in_slice) {
      const int32_t *slot = halo_.slice_slot.data(), *part = halo_.slice_part.data();
      const int32_t* near = table + halo_.slot[0][s];
      for (int64_t j = 0; j < in_slice; ++j) {
        const int64_t tile = near[slot[j]];
        seen[j] = static_cast<int32_t>(tile < 0 ? -1 : (tile - first) * halo_.sites + halo_.part[0][s] + part[j]);
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t y = 0; y < height; ++y) {
        const int64_t site = i * sites_ + halo_.listed[0][d] + halo_.listed[1][y];
        const int64_t row = i * halo_.sites + halo_.output(z + d, y, 0);
        for (int64_t x = 0; x < width; ++x) {
          rows_[site + halo_.listed[2][x]] = static_cast<int32_t>(row + halo_.part[2][halo_.kernel[2] / 2 + x]);
          int32_t* at = map_.data() + (site + halo_.listed[2][x]) * halo_.taps;
          const int32_t* const end = at + halo_.taps;
          const int32_t* from = seen_.data() + d * in_slice + y * wide + x;
          for (int64_t kz = 0; kz < kernel_d; ++kz, from += in_slice) {
            for (int64_t ky = 0; ky < kernel_h; ++ky, at += kernel_w) copy_row(from + ky * wide, kernel_w, at, end);
          }
        }
      }
    }
  }

  // Copies a row of taps. A short one is copied with what follows it where the next rows of the site overwrite that.
  static void copy_row(const int32_t* from, int64_t count, int32_t* to, const int32_t* end) {
    if (count <= kRun && end - to >= kRun) {
      std::memcpy(to, from, kRun * sizeof(int32_t));
    } else {
      std::copy_n(from, count, to);
    }
  }

  static constexpr int64_t kRun = 8;

  const Halo& halo_;
  int64_t sites_, tiles_;
  std::vector<int32_t> seen_, rows_, map_;
};

template <class S>
void depthwise_listed(const Depthwise<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.halo.taps;
  const std::vector<S> zeros(channels);
  const BlockedWeight<S> weight(job.weight, taps, channels);
  TileMap map(job.halo);
  Reads reads(map.sites(), taps);
  map.for_lists(job.table, begin, end, job.x_first, [&](int64_t tile, int64_t sites, const int32_t* entries) {
    reads.clear();
    reads.add(entries, 0, sites, taps, taps, 1);
    const int64_t first = (tile - job.out_first) * job.halo.sites * channels;
    for_channel_blocks<S>(channels, [&](auto block) {
      const auto start = [&](int j) { return job.bias != nullptr ? block.get(job.bias, j) : Vec<A>{}; };
      const auto finish = [&](int64_t o, int j, Vec<A> sum) {
        const int64_t at = first + map.rows()[o] * channels;
        block.put(job.out + at, j, job.residual != nullptr ? sum + block.get(job.residual + at, j) : sum);
      };
      all_sums<S>(reads, weight.of(block), job.x, channels, zeros.data(), block, start, finish);
    });
  });
}

template <class S>
void depthwise_weight_grad_listed(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from,
                                  int64_t to, Compute<S>* weight_grad) {
  const int64_t channels = job.channels, taps = job.halo.taps;
  const std::vector<S> zeros(channels);
  TileMap map(job.halo);
  Reads reads(taps, map.sites());
  Registers<Compute<S>> grad(map.sites() * kMostRegisters);
  map.for_lists(job.table, begin, end, 0, [&](int64_t tile, int64_t sites, const int32_t* entries) {
    reads.clear();
    reads.add(entries, 0, taps, 1, sites, taps);
    const S* g = job.grad + (tile - job.grad_first) * job.halo.sites * channels;
    const auto grad_row = [&](int64_t site) { return g + map.rows()[site] * channels; };
    for_channel_blocks<S>(to - from, [&](auto block) {
      block.at += from;
      add_weight_grad<S>(reads, grad_row, sites, job.x, channels, zeros.data(), block, grad.data(), weight_grad);
    });
  });
}

template <class S>
void depthwise(const Depthwise<S>& job, int64_t begin, int64_t end) {
  if (!slides<S>(job.halo, job.channels)) return depthwise_listed(job, begin, end);
  for_width(job.halo.kernel[2], [&](auto width) { depthwise_tiles<S, width()>(job, begin, end); });
}

template <class S>
void depthwise_weight_grad(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t from, int64_t to,
                           Compute<S>* weight_grad) {
  if (!slides<S>(job.halo, job.channels)) return depthwise_weight_grad_listed(job, begin, end, from, to, weight_grad);
  for_width(job.halo.kernel[2],
            [&](auto width) { depthwise_weight_grad_tiles<S, width()>(job, begin, end, from, to, weight_grad); });
}

}  // namespace sparsecnx::SPARSECNX_ISA
