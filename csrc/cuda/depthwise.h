// Submanifold depthwise convolution on tiles: the interface between the operators (library.cpp) and the kernels. It
// needs neither torch nor CUDA's device code.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace sparsecnx::cuda {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Blocks of `size` that cover `count`.
constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Sizes along the axes z, y and x. Geometries of fewer axes have size 1 along the first ones.
using Sizes3 = std::array<int, 3>;
constexpr int64_t volume(const Sizes3& sizes) { return int64_t{sizes[0]} * sizes[1] * sizes[2]; }

// Says where the sites lie and which of them a kernel reaches.
struct DepthwiseGeometry {
  const int32_t* table;  // (tiles, volume(span)): neighbouring tiles of each tile, -1 where masked
  int64_t tiles;
  Sizes3 tile;    // sites of a tile
  Sizes3 span;    // tiles of a neighbourhood
  Sizes3 kernel;  // odd
  int channels;
  Dtype dtype;  // of rows and weight

  int64_t rows() const { return tiles * volume(tile); }
};

// out = conv(x) + bias + residual. With `rstd`, each row of it is normalised to zero mean and unit variance.
struct DepthwiseConv {
  DepthwiseGeometry geometry;
  const void* x;         // (rows, C)
  const void* weight;    // (C, 1, *kernel)
  const float* bias;     // (C) or null
  const void* residual;  // (rows, C) or null
  void* out;             // (rows, C)
  float* rstd;           // (rows) or null: 1 / sqrt(variance + eps)
  float eps;
  bool flip;  // mirror the kernel along all axes, as the gradient of x needs it
};
void run_depthwise_conv(const DepthwiseConv& job, cudaStream_t stream);

// Gradients of weight and bias: partial sums over ranges of sites, which are added up in a fixed order.
struct DepthwiseWeightGrad {
  DepthwiseGeometry geometry;
  const void* grad;   // (rows, C)
  const void* x;      // (rows, C)
  float* partial;     // (ranges, taps + 1, C), scratch
  int64_t ranges;     // from depthwise_ranges
  void* grad_weight;  // (C, 1, *kernel)
  float* grad_bias;   // (C)
};
void run_depthwise_weight_grad(const DepthwiseWeightGrad& job, cudaStream_t stream);

// Returns the number of ranges into which the sites are cut on the current device.
int64_t depthwise_ranges(const DepthwiseGeometry& geometry);

}  // namespace sparsecnx::cuda
