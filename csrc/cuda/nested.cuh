// The nested order of the sites of a tile (sparsecnx/geometry/nested_order.py): of any tile, bit by bit, and of squares
// in fewer steps. A tile side is odd * 2^levels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "depthwise.h"

namespace sparsecnx::cuda {

// The nested order of a tile with sides along z, y and x. The index of a site is the sum of a part for each axis.
struct NestedOrder {
  Sizes3 side, levels{};
  Sizes3 bits{};  // of the index that are those of a position below its odd part
  Sizes3 weight;  // of the odd part, in the index

  explicit NestedOrder(const Sizes3& tile) : side(tile) {
    int next = 1, odd = 1;
    for (bool halved = true; halved;) {
      halved = false;
      for (int axis = 2; axis >= 0; --axis) {
        if (side[axis] % (2 << levels[axis]) != 0) continue;
        ++levels[axis];
        bits[axis] += next;
        next *= 2;
        halved = true;
      }
    }
    for (int axis = 2; axis >= 0; --axis) {
      weight[axis] = odd * next;
      odd *= side[axis] >> levels[axis];
    }
  }

  __device__ int sites() const { return static_cast<int>(volume(side)); }

  // Returns what a position along an axis adds to the index of a site.
  __device__ int part(int axis, int position) const {
    int index = (position >> levels[axis]) * weight[axis];
    for (int left = bits[axis]; left != 0; left &= left - 1, position >>= 1) index += (position & 1) * (left & -left);
    return index;
  }

  // Returns the position along an axis of the site with that index.
  __device__ int position(int axis, int index) const {
    int found = index / weight[axis] % (side[axis] >> levels[axis]) << levels[axis], bit = 1;
    for (int left = bits[axis]; left != 0; left &= left - 1, bit *= 2) found += index & left & -left ? bit : 0;
    return found;
  }
};

// The side of a square tile. The index of site (y, x) is nested_line(y) + nested_column(x).
struct TileSide {
  int side, levels;

  explicit TileSide(int64_t tile) : side(static_cast<int>(tile)), levels(0) {
    while (side % (2 << levels) == 0) ++levels;
  }
  __host__ __device__ int sites() const { return side * side; }
  __host__ __device__ int odd() const { return side >> levels; }
};

// Moves bit b of a number below 2^15 to bit 2b.
inline __host__ __device__ int spread_bits(int value) {
  value = (value | value << 8) & 0x00ff00ff;
  value = (value | value << 4) & 0x0f0f0f0f;
  value = (value | value << 2) & 0x33333333;
  return (value | value << 1) & 0x55555555;
}

// Reverses spread_bits and drops the odd bits.
inline __host__ __device__ int collect_bits(int value) {
  value &= 0x55555555;
  value = (value | value >> 1) & 0x33333333;
  value = (value | value >> 2) & 0x0f0f0f0f;
  value = (value | value >> 4) & 0x00ff00ff;
  return (value | value >> 8) & 0x0000ffff;
}

inline __host__ __device__ int nested_line(TileSide tile, int y) {
  const int below = (1 << tile.levels) - 1;
  return ((y >> tile.levels) * tile.odd() << 2 * tile.levels) + 2 * spread_bits(y & below);
}

inline __host__ __device__ int nested_column(TileSide tile, int x) {
  const int below = (1 << tile.levels) - 1;
  return ((x >> tile.levels) << 2 * tile.levels) + spread_bits(x & below);
}

// Return the row and the column of the site with that nested index.
inline __host__ __device__ int site_line(TileSide tile, int site) {
  return ((site >> 2 * tile.levels) / tile.odd() << tile.levels) + (collect_bits(site >> 1) & ((1 << tile.levels) - 1));
}

inline __host__ __device__ int site_column(TileSide tile, int site) {
  return ((site >> 2 * tile.levels) % tile.odd() << tile.levels) + (collect_bits(site) & ((1 << tile.levels) - 1));
}

}  // namespace sparsecnx::cuda
