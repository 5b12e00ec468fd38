// Geometry of a depthwise convolution on tiles: which site of which neighbouring tile lies at each position of
// the square that the outputs of one tile can see.
#pragma once

#include <cstdint>
#include <vector>

namespace sparsecnx {

// Index of site (y, x) of a tile in nested order: raster over the odd factor of the side, Morton order below it.
int64_t nested_site(int64_t tile, int64_t y, int64_t x);

struct Halo {
  Halo(int64_t tile, int64_t kernel_h, int64_t kernel_w);

  int64_t tile, kernel_h, kernel_w;
  int64_t height, width;        // sites of the square: tile + kernel - 1
  int64_t table_width;          // neighbouring tiles listed for each tile
  std::vector<int32_t> slot;    // (height * width): which neighbouring tile a position lies in
  std::vector<int32_t> site;    // (height * width): its nested index there
  std::vector<int32_t> output;  // (tile * tile): nested index of each output in raster order
};

}  // namespace sparsecnx
