// Matrix products. A block of rows by a panel of columns fills the registers with sums, and the loop goes over the depth.
//
// The right-hand matrix is packed into panels, (panels, depth, whole registers of the panel), so that a panel is read in the
// order of memory. The left-hand matrix is read where it lies, transposed or not: a few rows of it stay in L1 while
// panels that fit L2 pass. If it is transposed and its lines lie in a few sets of the cache, two blocks of rows are copied
// first, which fill whole lines. A block does rows * registers multiply-adds for rows + registers loads.
#pragma once

#include "kernels_conv.h"

namespace sparsecnx::SPARSECNX_ISA {

// Rows of a block, and registers of a panel: with the sums, a row of the panel and a value of the left-hand matrix they
// fill 32 (AVX-512, ARM) or 16 registers.
#if defined(SPARSECNX_AVX512) || defined(__aarch64__)
constexpr int kProductRows = 8;
#else
constexpr int kProductRows = 4;
#endif
constexpr int kProductPanel = 3;

constexpr int64_t kDepthBlock = 1024, kCopiedDepth = 256;
constexpr int64_t kPassingBytes = int64_t{1} << 18;  // of panels that pass over all rows before the next ones do

// Packs at most a panel of columns of a matrix (depth, columns), or of the transpose of one.
template <class S>
void pack_panel(const S* from, int64_t step, bool transposed, int64_t depth, int64_t columns, Compute<S>* to) {
  constexpr int64_t W = kLanes<S>;
  const int64_t width = (columns + W - 1) / W * W;
  if (transposed) {
    for (int64_t c = 0; c < columns; c += W)
      columns_to_lanes<S>(from + c * step, step, std::min(W, columns - c), depth, to + c, width);
    return;
  }
  for (int64_t k = 0; k < depth; ++k, from += step, to += width) {
    for (int64_t c = 0; c < width; c += W) store(to + c, load(from + c, std::min(W, columns - c)));
  }
}

// out = a b, or out += a b, for M rows and a panel of V registers, whose last has `last` columns.
template <class A, int M, int V>
void product_block(const Product<A>& job, const A* a, const A* b, A* out, int64_t last) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      sum[m][v] = job.add ? load(out + m * job.out_step + v * W, v + 1 < V ? W : last) : Vec<A>{};
  }
  for (int64_t k = 0; k < job.depth; ++k, a += job.a_depth_step, b += V * W) {
    Vec<A> row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> value = splat<Vec<A>>(a[m * job.a_row_step]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[m][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(out + m * job.out_step + v * W, sum[m][v], v + 1 < V ? W : last);
  }
}

template <class A>
using ProductBlock = void (*)(const Product<A>&, const A* a, const A* b, A* out, int64_t last);

// The block of every number of rows and registers.
template <class A, int... I>
constexpr std::array<ProductBlock<A>, sizeof...(I)> product_blocks(std::integer_sequence<int, I...>) {
  return {product_block<A, I / kProductPanel + 1, I % kProductPanel + 1>...};
}

// Whether the lines of a transposed left-hand matrix fall on each other in the cache.
template <class A>
bool collides(const Product<A>& job) {
  constexpr int64_t kBytes = 1024;
  return job.a_row_step == 1 && job.depth > 1 && job.a_depth_step * sizeof(A) % kBytes == 0;
}

// Copies at most two blocks of rows of a transposed matrix, (blocks, depth, kProductRows).
template <class A>
void copy_blocks(const A* a, int64_t depth_step, int64_t depth, int64_t rows, A* to) {
  for (int64_t k = 0; k < depth; ++k, a += depth_step, to += kProductRows) {
    std::copy_n(a, std::min<int64_t>(rows, kProductRows), to);
    if (rows > kProductRows) std::copy_n(a + kProductRows, rows - kProductRows, to + depth * kProductRows);
  }
}

template <class A>
void product(const Product<A>& job, int64_t rows, int64_t columns) {
  constexpr auto kBlocks = product_blocks<A>(std::make_integer_sequence<int, kProductRows * kProductPanel>());
  constexpr int64_t W = kLanes<A>, panel = kProductPanel * W, together = 2 * kProductRows;
  const bool copies = collides(job);
  const int64_t depth = copies ? kCopiedDepth : kDepthBlock;
  std::vector<A> copied(copies ? depth * together : 0);
  Product<A> part = job;
  for (int64_t k = 0; k == 0 || k < job.depth; k += depth, part.add = true) {
    part.depth = std::min(depth, job.depth - k);
    if (copies) part.a_row_step = 1, part.a_depth_step = kProductRows;
    const int64_t bytes = std::max<int64_t>(part.depth, 1) * panel * sizeof(A);
    const int64_t passing = std::max<int64_t>(1, kPassingBytes / bytes) * panel;
    for (int64_t begin = 0; begin < columns; begin += passing) {
      const int64_t end = std::min(begin + passing, columns);
      for (int64_t row = 0; row < rows; row += kProductRows) {
        const int64_t count = std::min<int64_t>(kProductRows, rows - row);
        const A* a = job.a + row * job.a_row_step + k * job.a_depth_step;
        if (copies) {
          const int64_t block = row / kProductRows % 2;
          if (block == 0) copy_blocks(a, job.a_depth_step, part.depth, std::min(together, rows - row), copied.data());
          a = copied.data() + block * part.depth * kProductRows;
        }
        for (int64_t c = begin; c < end; c += panel) {
          const int64_t width = std::min(panel, end - c), registers = (width + W - 1) / W;
          kBlocks[(count - 1) * kProductPanel + registers - 1](part, a, job.b + c * job.depth + k * registers * W,
                                                               job.out + row * job.out_step + c,
                                                               width - (registers - 1) * W);
        }
      }
    }
  }
}

}  // namespace sparsecnx::SPARSECNX_ISA
