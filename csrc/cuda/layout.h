// The geometry of sparsecnx/layout.py on the device: visible tiles of a mask, and the table of neighbouring tiles.
#pragma once

#include "dtype.h"

namespace sparsecnx::cuda {

struct TileIndex {
  const uint8_t* mask;     // (images, cells): not 0 where masked
  int64_t images, cells;   // fewer than 2^31 cells in all
  int64_t count;           // tiles that the mask is said to keep
  int64_t visible;         // and to keep in every image, or -1
  int64_t* index;          // (count), out: the visible cells, ascending
  int64_t* splits;         // (images + 1), out: where in `index` each image begins
  int32_t* slots;          // (images * cells), out: place in `index` of each cell, -1 where masked
  int32_t* chunk_visible;  // (tile_index_chunks()), scratch
};

// Chunks that a mask is cut into.
int64_t tile_index_chunks(int64_t images, int64_t cells);

// A mask that does not keep what it is said to keep gives -1 as the end of the last image. Then too index holds cells of
// the mask, and slots and splits places in index.
void launch_tile_index(const TileIndex& job, cudaStream_t stream);

struct NeighbourTable {
  const int64_t* index;  // (count)
  const int32_t* slots;  // (images * prod(grid))
  int64_t count;
  int grid[3];     // tiles per axis; 1 along the axes in front that are not there
  int radius[3];   // tiles to each side; 0 along those
  int32_t* table;  // (count, width()), out

  int width() const { return (2 * radius[0] + 1) * (2 * radius[1] + 1) * (2 * radius[2] + 1); }
};
void launch_neighbour_table(const NeighbourTable& job, cudaStream_t stream);

}  // namespace sparsecnx::cuda
