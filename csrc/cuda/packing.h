// Between dense tensors and the rows of their visible tiles: launchers of the kernels in packing.cu. Values are only
// moved, so that of their dtype only the size matters.
#pragma once

#include "dtype.h"

namespace sparsecnx::cuda {

struct DenseShape {
  int64_t batch, channels, height, width, tile;
  int64_t size;  // bytes of a value: 1, 2, 4 or 8

  int64_t cells_x() const { return width / tile; }
  int64_t cells() const { return height / tile * cells_x(); }
};

struct Gather {
  const void* dense;     // (B, C, H, W)
  int64_t strides[4];    // of dense, in values
  const int64_t* index;  // (tiles): image * cells + cell of each visible tile
  int64_t tiles;
  void* rows;  // (tiles * tile^2, C), out
};

struct Scatter {
  const void* rows;  // (tiles * tile^2, C)
  const void* fill;  // (C)
  const int* slots;  // (B * cells): position of each tile among the visible ones, -1 where masked
  void* dense;       // (B, C, H, W), contiguous, out
};

void launch_gather_tiles(const DenseShape& shape, const Gather& values, cudaStream_t stream);
void launch_scatter_tiles(const DenseShape& shape, const Scatter& values, cudaStream_t stream);

}  // namespace sparsecnx::cuda
