// Submanifold depthwise convolution on tiles: what the launchers take. No torch here.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sparsecnx::cuda {

// Where the sites lie, and which of them a kernel reaches.
struct DepthwiseGeometry {
  const int32_t* table;  // (tiles, span * span): neighbouring tiles of each tile, -1 where masked
  int64_t tiles;
  int tile;                // sites per side
  int span;                // tiles per side of a neighbourhood
  int kernel_h, kernel_w;  // odd
  int channels;
  Dtype dtype;  // of rows and weight

  int64_t rows() const { return tiles * tile * tile; }
};

// out = conv(x) + bias + residual; with `rstd`, each row of it to zero mean and unit variance.
struct DepthwiseConv {
  DepthwiseGeometry geometry;
  const void* x;         // (rows, C)
  const void* weight;    // (C, 1, kernel_h, kernel_w)
  const float* bias;     // (C) or null
  const void* residual;  // (rows, C) or null
  void* out;             // (rows, C)
  float* rstd;           // (rows) or null: 1 / sqrt(variance + eps)
  float eps;
  bool flip;  // with the kernel turned by half a turn, as the gradient of x needs it
};
void depthwise_conv(const DepthwiseConv& job, cudaStream_t stream);

// Gradients of weight and bias: partial sums over ranges of sites, added up in a fixed order.
struct DepthwiseWeightGrad {
  DepthwiseGeometry geometry;
  const void* grad;   // (rows, C)
  const void* x;      // (rows, C)
  float* partial;     // (ranges, kernel_h * kernel_w + 1, C), scratch
  int64_t ranges;     // as depthwise_ranges says
  void* grad_weight;  // (C, 1, kernel_h, kernel_w)
  float* grad_bias;   // (C)
};
void depthwise_conv_weight_grad(const DepthwiseWeightGrad& job, cudaStream_t stream);

// Into how many ranges the sites are cut on the current device.
int64_t depthwise_ranges(const DepthwiseGeometry& geometry);

}  // namespace sparsecnx::cuda
