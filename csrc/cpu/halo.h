// The geometry of a depthwise convolution on tiles: for each position of the square that the outputs of a tile see, the
// neighbouring tile and the site in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparsecnx {

// Returns the nested index of site (y, x) of a tile: raster over the odd factor of the side, Morton order below it.
inline int64_t nested_site(int64_t tile, int64_t y, int64_t x) {
  int64_t morton = 0, bit = 1;
  for (; tile % 2 == 0; tile /= 2, bit *= 4) {
    morton += bit * (2 * (y % 2) + x % 2);
    y /= 2;
    x /= 2;
  }
  return (y * tile + x) * bit + morton;
}

struct Halo {
  Halo(int64_t tile, int64_t kernel_h, int64_t kernel_w);

  int64_t tile, kernel_h, kernel_w;
  int64_t height, width;        // sites of the square: tile + kernel - 1
  int64_t table_width;          // neighbouring tiles listed for each tile
  std::vector<int32_t> slot;    // (height * width): the neighbouring tile of a position
  std::vector<int32_t> site;    // (height * width): its nested index there
  std::vector<int32_t> output;  // (tile * tile): nested index of each output in raster order
};

inline Halo::Halo(int64_t tile, int64_t kernel_h, int64_t kernel_w)
    : tile(tile), kernel_h(kernel_h), kernel_w(kernel_w), height(tile + kernel_h - 1), width(tile + kernel_w - 1) {
  const int64_t above = kernel_h / 2, left = kernel_w / 2;
  const int64_t reach = (std::max(above, left) + tile - 1) / tile;
  const int64_t side = 2 * reach + 1;
  table_width = side * side;
  for (int64_t row = 0; row < height; ++row) {
    for (int64_t column = 0; column < width; ++column) {
      // Shifted by whole tiles so that division rounds the same way everywhere.
      const int64_t y = row - above + reach * tile, x = column - left + reach * tile;
      slot.push_back(static_cast<int32_t>(y / tile * side + x / tile));
      site.push_back(static_cast<int32_t>(nested_site(tile, y % tile, x % tile)));
    }
  }
  for (int64_t y = 0; y < tile; ++y) {
    for (int64_t x = 0; x < tile; ++x) output.push_back(static_cast<int32_t>(nested_site(tile, y, x)));
  }
}

}  // namespace sparsecnx
