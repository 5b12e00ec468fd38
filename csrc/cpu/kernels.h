// The kernels, which are compiled once per instruction set, and the choice between them.
//
// A kernel works on raw rows in one thread. The operators (depthwise_conv.cpp, ...) divide work between threads,
// multiply matrices and allocate memory. S is the storage type of features; A = Compute<S> is the type of sums,
// statistics and per-channel parameters.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernel_map.h"
#include "types.h"

namespace sparsecnx {

// Sizes along the three axes: depth, height, width. Fewer dimensions have sizes of 1 in front.
using Box = std::array<int64_t, 3>;

inline int64_t volume(const Box& box) { return box[0] * box[1] * box[2]; }

// The geometry of a depthwise convolution on tiles. The outputs of a tile see a box of sites. Each of them lies in one of
// the neighbouring tiles; the number of that neighbour and the nested index of the site in it are sums over the axes.
struct Halo {
  Box tile, kernel;
  Box reach;            // neighbouring tiles on each side
  Box seen;             // sites of the box: tile + kernel - 1
  int64_t sites, taps;  // of a tile and of the kernel
  int64_t table_width;  // neighbouring tiles listed for each tile
  // For each position along an axis of the box: what it adds to the number of the neighbour, and to the nested index.
  std::array<std::vector<int32_t>, 3> slot, part;
  std::vector<int32_t> slice_slot, slice_part;  // the sums over the last two axes, for a slice of the box
  // Small tiles are listed as a whole, larger ones slice by slice.
  Box list;
  std::array<std::vector<int32_t>, 3> listed;  // what a site's place along an axis adds to its number in the list

  Halo(const Box& tile, const Box& kernel);

  // Fills the lists.
  void fill();

  // Returns the nested index of the output in row y and column x of slice z.
  int64_t output(int64_t z, int64_t y, int64_t x) const {
    return part[0][kernel[0] / 2 + z] + part[1][kernel[1] / 2 + y] + part[2][kernel[2] / 2 + x];
  }
};

// A depthwise convolution over tiles. Rows of tile t start at (t - first) * halo.sites * channels.
template <class S>
struct Depthwise {
  const Halo& halo;
  const int32_t* table;  // (tiles, halo.table_width): neighbouring tiles, -1 where masked
  int64_t channels;
  const S* x;  // rows of the input, from tile `x_first` on
  int64_t x_first;
  const Compute<S>* weight;  // (halo.taps, channels)
  const Compute<S>* bias;    // (channels) or null
  const S* residual;         // added to the result, rows as `out`, or null
  S* out;                    // rows of the output, from tile `out_first` on
  int64_t out_first;
};

// Weight gradient: sum over sites of grad[site] * x[site + offset], for every offset of the kernel.
template <class S>
struct DepthwiseWeightGrad {
  const Halo& halo;
  const int32_t* table;
  int64_t channels;
  const S* x;
  const S* grad;  // rows from tile `grad_first` on
  int64_t grad_first;
};

// A depthwise convolution on a kernel map.
template <class S>
struct MappedDepthwise {
  const KernelMap& map;
  const int32_t* inverse;  // (rows in, taps): row of out that reads it, or null
  int64_t channels;
  const S* x;
  const Compute<S>* weight;  // (taps, channels)
  const Compute<S>* bias;    // (channels) or null
  S* out;
};

// Weight gradient: sum over output rows of grad[o] * x[map[o, tap]], for every tap.
template <class S>
struct MappedDepthwiseWeightGrad {
  const KernelMap& map;
  int64_t channels;
  const S* x;
  const S* grad;
};

constexpr int64_t kMostShortTaps = 255;  // whose winners are uint8

// The maximum of the rows under a kernel map.
template <class S>
struct MaxPool {
  const KernelMap& map;
  int64_t channels;
  const S* x;
  S* out;        // 0 without any input
  void* winner;  // (rows out, channels): the first tap that has the maximum; uint8, beyond kMostShortTaps int32
};

// Its gradient: every row of x gathers from the output rows that took it.
template <class S>
struct MaxPoolGrad {
  const KernelMap& map;    // for every row of x and tap the row of out that reads it
  const int32_t* inverse;  // (rows out, taps), or null
  int64_t channels;
  const S* grad;
  const void* winner;
  S* out;
};

// The sum of the rows under a kernel map, times a factor.
template <class S>
struct SumPool {
  const KernelMap& map;
  int64_t channels;
  const S* x;
  Compute<S> factor;
  S* out;
};

// The activations after a normalization, in the order of ACTIVATIONS in sparsecnx/ops/site_normalization.
enum class Activation : int64_t { kNone, kRelu, kRelu6, kLeakyRelu, kSilu, kHardswish, kGelu };

// Batch, group or instance normalization of the rows of one segment, and its gradient. Everything is (channels).
template <class S>
struct SiteNorm {
  int64_t channels;
  Activation activation;
  Compute<S> slope;                                       // of the leaky ReLU below 0
  const Compute<S>*mean, *scale, *bias;                   // z = (x - mean) scale + bias
  const Compute<S>*along = nullptr, *constant = nullptr;  // for the gradient of x
};

// Pairs of rows whose products a convolution adds up, and the channels of the output that are computed together: a panel
// of at most kernels().panel of them. In the gradient of the weight `out` is the gradient of the output, and is read.
template <class A>
struct ConvPairs {
  const int32_t *from, *to;  // rows of x and of out
  int64_t count;
  const A* x;  // first of the input channels
  int64_t x_step;
  A* out;  // first channel of the panel
  int64_t out_step;
  int64_t channels;  // of the panel
};

// A matrix product (rows, columns) = a b. Value (r, k) of a is at r * a_row_step + k * a_depth_step. b is packed into panels
// of kernels().product_panel columns; the last may have fewer.
template <class A>
struct Product {
  const A* a;
  int64_t a_row_step, a_depth_step, depth;
  const A* b;
  A* out;
  int64_t out_step;
  bool add;  // to what is in out
};

// A grouped convolution with as many outputs as inputs, `width` to a group.
template <class S>
struct NarrowConv {
  int64_t taps, width, channels;
  const S* x;
  const Compute<S>* weight;  // (taps, width, channels)
  const Compute<S>* bias;    // (channels) or null
  S* out;                    // In the gradient of the weight it is that of the output, and is read.
};

template <class S>
struct Kernels {
  using A = Compute<S>;

  // out = conv(x) + bias + residual for the outputs of tiles [begin, end).
  void (*depthwise)(const Depthwise<S>&, int64_t begin, int64_t end);
  // weight_grad (halo.taps, channels) += contribution of tiles [begin, end), channels [from, to).
  void (*depthwise_weight_grad)(const DepthwiseWeightGrad<S>&, int64_t begin, int64_t end, int64_t from, int64_t to,
                                A* weight_grad);

  // Computes output rows [begin, end). Stops and returns false if an entry of the map is not in the inverse map.
  bool (*mapped_depthwise)(const MappedDepthwise<S>&, int64_t begin, int64_t end);
  // weight_grad (taps, channels) += contribution of output rows [begin, end).
  void (*mapped_depthwise_weight_grad)(const MappedDepthwiseWeightGrad<S>&, int64_t begin, int64_t end, A* weight_grad);

  // Compute output rows, or rows of x, [begin, end).
  void (*max_pool)(const MaxPool<S>&, int64_t begin, int64_t end);
  // Stops and returns false if an entry of the map is not in the inverse map.
  bool (*max_pool_grad)(const MaxPoolGrad<S>&, int64_t begin, int64_t end);
  void (*sum_pool)(const SumPool<S>&, int64_t begin, int64_t end);

  // moments (rows, 2): mean and 1 / sqrt(var + eps) of each row.
  void (*moments)(const S* x, int64_t rows, int64_t channels, A eps, A* moments);
  // out = (x - mean) * rstd * weight + bias
  void (*normalise)(const S* x, const A* moments, const A* weight, const A* bias, int64_t rows, int64_t channels,
                    S* out);
  // Gradient of `normalise(moments(x))` into out (may be grad); weight_grad and bias_grad accumulate.
  void (*layer_norm_backward)(const S* grad, const S* x, const A* moments, const A* weight, int64_t rows,
                              int64_t channels, S* out, A* weight_grad, A* bias_grad);

  // mean (channels) of the rows, and square (channels) = sum of (x - mean)^2.
  void (*column_moments)(const S* x, int64_t rows, int64_t channels, double* mean, double* square);
  // out = activation(z)
  void (*site_norm)(const SiteNorm<S>&, const S* x, int64_t rows, S* out);
  // With g = grad activation'(z): dot (channels) += g (x - mean), total (channels) += g
  void (*site_norm_sums)(const SiteNorm<S>&, const S* grad, const S* x, int64_t rows, A* dot, A* total);
  // out = g scale + (x - mean) along + constant
  void (*site_norm_grad)(const SiteNorm<S>&, const S* grad, const S* x, int64_t rows, S* out);

  // energy (channels) += x^2
  void (*energy)(const S* x, int64_t rows, int64_t channels, A* energy);
  // out = (x * scale[c] + shift[c]) * row_scale[r]; row_scale may be null.
  void (*affine)(const S* x, const A* scale, const A* shift, const A* row_scale, int64_t rows, int64_t channels,
                 S* out);
  // out = x + shift[c] * row_scale[r]; row_scale may be null.
  void (*add_shift)(const S* x, const A* shift, const A* row_scale, int64_t rows, int64_t channels, S* out);
  // out = grad * a[c] + x * b[c]
  void (*combine)(const S* grad, const S* x, const A* a, const A* b, int64_t rows, int64_t channels, S* out);
  // dot (channels) += grad * x, total (channels) += grad
  void (*dot_and_sum)(const S* grad, const S* x, int64_t rows, int64_t channels, A* dot, A* total);
  // total (channels) += x * row_scale[r]; row_scale may be null.
  void (*column_sum)(const S* x, const A* row_scale, int64_t rows, int64_t channels, A* total);
  // out = x * scale[r]
  void (*scale_rows)(const S* x, A scale, int64_t rows, int64_t channels, S* out);

  // The elementwise parts of the fused block, see convnextv2_block.cpp; `hidden` is before bias and activation.
  // h = gelu(hidden + bias), energy (channels) += h^2
  void (*gelu_energy)(const S* hidden, const A* bias, int64_t rows, int64_t channels, S* h, A* energy);
  // With h = gelu(hidden + bias) and d = row_scale (1 if null): scale_grad += d t h and beta_grad += d t
  void (*gelu_grn_sums)(const S* hidden, const A* bias, const S* t, const A* row_scale, int64_t rows, int64_t channels,
                        A* scale_grad, A* beta_grad);
  // scaled = d (h s + beta), t <- gelu'(hidden + bias) (d t s + h p), bias_grad += t
  void (*gelu_grn_backward)(const S* hidden, const A* bias, S* t, const A* s, const A* beta, const A* p,
                            const A* row_scale, int64_t rows, int64_t channels, S* scaled, A* bias_grad);

  // The columns of a panel of the right-hand matrix of a product.
  int64_t product_panel;
  // Packs at most a panel of columns of a matrix (depth, columns) or, if it is transposed, (columns, depth). The panel
  // has room for whole registers of them.
  void (*pack_panel)(const S* from, int64_t step, bool transposed, int64_t depth, int64_t columns, A* panel);
  void (*product)(const Product<A>&, int64_t rows, int64_t columns);

  // columns (count, channels) = x[map], 0 where -1.
  void (*gather_columns)(const A* x, const int32_t* map, int64_t count, int64_t channels, A* columns);
  // Returns whether all entries of a map are -1 or rows below `rows`.
  bool (*all_rows)(const int32_t* map, int64_t count, int64_t rows);

  // The most output channels of a panel: whole registers.
  int64_t panel;
  int64_t lanes;  // channels of a register
  // out[to] += x[from] weight over all pairs; weight (width, whole registers of the panel).
  void (*conv_pairs)(const ConvPairs<A>&, const A* weight, int64_t width);
  // sums (width, whole registers of the panel) += x[from] grad[to] over all pairs, for input channels [begin, end). The
  // sums start at zero if `fresh`.
  void (*conv_pairs_weight_grad)(const ConvPairs<A>&, int64_t begin, int64_t end, bool fresh, A* sums);
  // Computes output rows [begin, end), with the map of these rows.
  void (*conv_narrow)(const NarrowConv<S>&, const int32_t* map, int64_t begin, int64_t end);
  // sums (width, channels) += products of the pairs, for channels [begin, end).
  void (*conv_narrow_weight_grad)(const NarrowConv<S>&, const int32_t* from, const int32_t* to, int64_t count,
                                  int64_t begin, int64_t end, A* sums);
  // Whether conv_narrow has a kernel for that width.
  bool (*is_narrow)(int64_t width);
  // to[c, r] = from[r, c] for at most `lanes` rows; the other lanes of to are zeros.
  void (*columns_to_lanes)(const S* from, int64_t row_step, int64_t rows, int64_t columns, A* to, int64_t to_step);
  // The same way back.
  void (*lanes_to_columns)(const A* from, int64_t from_step, int64_t rows, int64_t columns, S* to, int64_t row_step);
  // Between storage and computing type.
  void (*widen)(const S* x, int64_t count, A* out);
  void (*narrow)(const A* x, int64_t count, S* out);
};

namespace baseline {
template <class S>
Kernels<S> make_kernels();
}
namespace avx2 {
template <class S>
Kernels<S> make_kernels();
}
namespace avx512 {
template <class S>
Kernels<S> make_kernels();
}

// Returns the instruction set of the kernels: 2 (AVX-512) or 1 (AVX2) where the machine has them, otherwise 0. The
// environment variable SPARSECNX_CPU_ISA=avx512|avx2|baseline, which is read once, asks for less.
int isa();
std::string cpu_isa();

// Returns whether the processor has products of bfloat16 (AVX512-BF16; every one with AMX has that too).
bool multiplies_bfloat16();

// Returns the kernels for this machine.
template <class S>
const Kernels<S>& kernels() {
#if defined(__x86_64__)
  static const Kernels<S> chosen = isa() == 2   ? avx512::make_kernels<S>()
                                   : isa() == 1 ? avx2::make_kernels<S>()
                                                : baseline::make_kernels<S>();
#else
  static const Kernels<S> chosen = baseline::make_kernels<S>();
#endif
  return chosen;
}

}  // namespace sparsecnx
