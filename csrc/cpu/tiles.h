// Visible tiles and the order of their rows, as sparsecnx/geometry describes them, in any number of dimensions.
#pragma once

#include "op.h"

namespace sparsecnx {

using Sizes = std::vector<int64_t>;  // one for each axis

inline int64_t product(const Sizes& sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) total *= size;
  return total;
}

// Raises unless `sizes`, called `what`, has one entry for each axis, all of them in [low, high].
inline void check_sizes(const Sizes& sizes, const char* what, size_t axes, int64_t low, int64_t high) {
  STD_TORCH_CHECK(sizes.size() == axes, "sparsecnx: ", what, " has ", sizes.size(),
                  " entries, expected one for each of ", axes, " axes");
  for (const int64_t size : sizes) check_size(size, what, low, high);
}

// Checks the visible tiles of a batch, `image * cells + raster position` ascending, and returns them.
inline const int64_t* check_index(const Tensor& index, const char* name, int64_t batch, int64_t cells) {
  STD_TORCH_CHECK(index.dim() == 1, "sparsecnx: ", name, " must be (tiles,), it has ", index.dim(), " dimensions");
  check_dense(index, name, index.numel(), ScalarType::Long);
  const int64_t *first = data<int64_t>(index), *end = first + index.numel();
  STD_TORCH_CHECK(std::is_sorted(first, end) && (first == end || (*first >= 0 && end[-1] < batch * cells)),
                  "sparsecnx: ", name, " must ascend within ", batch, " images of ", cells, " tiles");
  return first;
}

// Returns what each position along each axis adds to the nested index of a site: the index is the sum over the axes.
// The finest levels halve all sides that are even; above them the odd sides that are left are in raster order.
inline std::vector<Sizes> nested_parts(const Sizes& tile) {
  std::vector<Sizes> parts;
  for (const int64_t side : tile) parts.emplace_back(side, 0);
  Sizes left = tile;
  int64_t weight = 1;  // of the next digit of the index
  for (bool finest = true; finest;) {
    finest = std::any_of(left.begin(), left.end(), [](int64_t side) { return side % 2 == 0; });
    Sizes branches = left;  // at the coarsest level
    if (finest)
      std::transform(left.begin(), left.end(), branches.begin(), [](int64_t side) { return side % 2 ? 1 : 2; });
    for (size_t axis = tile.size(); axis-- > 0;) {
      const int64_t below = tile[axis] / left[axis];
      for (int64_t p = 0; p < tile[axis]; ++p) parts[axis][p] += p / below % branches[axis] * weight;
      weight *= branches[axis];
      left[axis] /= branches[axis];
    }
  }
  return parts;
}

// Calls f(nested index, position along each axis) for every site of a tile, in raster order.
template <class F>
void for_sites(const Sizes& tile, const F& f) {
  const std::vector<Sizes> parts = nested_parts(tile);
  Sizes at(tile.size(), 0);
  for (int64_t left = product(tile); left > 0; --left) {
    int64_t nested = 0;
    for (size_t axis = 0; axis < tile.size(); ++axis) nested += parts[axis][at[axis]];
    f(nested, at);
    for (size_t axis = tile.size(); axis-- > 0 && ++at[axis] == tile[axis];) at[axis] = 0;
  }
}

}  // namespace sparsecnx
