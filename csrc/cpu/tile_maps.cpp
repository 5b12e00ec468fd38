// sparsecnx::kernel_map and inverse_map list the row that each tap of a convolution reads, and the row that reads it.
//
// A tap takes a site of a tile to a site of a neighbouring tile, and where in that tile does not depend on the tile. So
// an entry of the map is the first row of one of a tile's few neighbours plus an offset from a table for all tiles.
#include "tiles.h"

namespace sparsecnx {
namespace {

constexpr int32_t kNone = INT32_MIN;  // the first row of a tile that is masked or outside: no offset makes it positive

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Where the taps lead along one axis, for each position in a tile and tap: the number of the step in `steps`, or -1 for
// no site, and the part of the nested index in the tile that is reached.
struct Axis {
  Sizes steps;  // distinct, in tiles
  std::vector<int32_t> step, part;

  void add(bool exists, int64_t position, const Sizes& parts) {
    const int64_t side = static_cast<int64_t>(parts.size()), tiles = floor_divide(position, side);
    const auto known = std::find(steps.begin(), steps.end(), tiles);
    step.push_back(exists ? static_cast<int32_t>(known - steps.begin()) : -1);
    part.push_back(exists ? static_cast<int32_t>(parts[position - tiles * side]) : 0);
    if (exists && known == steps.end()) steps.push_back(tiles);
  }
};

// Where the taps lead from each site of a tile, sites in nested order, taps in raster order.
struct Table {
  int64_t neighbours = 1;             // combinations of steps, the last axis fastest, and one more: nothing
  std::vector<int32_t> step, offset;  // (sites, taps): the neighbour, and the nested index in it
};

Table combine(const std::vector<Axis>& axes, const Sizes& from, const Sizes& kernel) {
  Table table;
  for (const Axis& axis : axes) table.neighbours *= static_cast<int64_t>(axis.steps.size());
  const int64_t taps = product(kernel);
  table.step.resize(product(from) * taps);
  table.offset.resize(product(from) * taps);
  for_sites(from, [&](int64_t nested, const Sizes& site) {
    Sizes tap(kernel.size(), 0);
    for (int64_t k = 0; k < taps; ++k) {
      int64_t step = 0, offset = 0;
      for (size_t axis = 0; axis < axes.size(); ++axis) {
        const int64_t entry = site[axis] * kernel[axis] + tap[axis];
        const bool none = step == table.neighbours || axes[axis].step[entry] < 0;
        step = none ? table.neighbours : step * static_cast<int64_t>(axes[axis].steps.size()) + axes[axis].step[entry];
        offset += axes[axis].part[entry];
      }
      table.step[nested * taps + k] = static_cast<int32_t>(step);
      table.offset[nested * taps + k] = static_cast<int32_t>(offset);
      for (size_t axis = tap.size(); axis-- > 0 && ++tap[axis] == kernel[axis];) tap[axis] = 0;
    }
  });
  return table;
}

// The convolution of a layout, with one entry for each axis.
struct Window {
  Sizes tile, kernel, stride, padding, dilation;
};

template <bool inverse>
Tensor site_map(const Tensor& index, int64_t batch, const Sizes& grid, const Window& window) {
  const auto& [tile, kernel, stride, padding, dilation] = window;
  const size_t ndim = grid.size();
  constexpr int64_t kMostSteps = 1 << 20;
  check_size(batch, "batch", 0, int64_t{1} << 40);
  check_sizes(grid, "grid", ndim, 0, int64_t{1} << 40);
  check_sizes(tile, "tile", ndim, 1, kMostTile);
  check_sizes(kernel, "kernel", ndim, 1, kMostKernel);
  check_sizes(stride, "stride", ndim, 1, kMostTile);
  check_sizes(padding, "padding", ndim, -kMostSteps, kMostSteps);
  check_sizes(dilation, "dilation", ndim, 1, kMostSteps);
  Sizes cells = grid;
  cells.push_back(batch);
  check_product(cells, "the grid");
  const int64_t* tiles = check_index(index, batch, product(grid));
  const int64_t count = index.numel();

  Sizes coarse = tile;
  for (size_t axis = 0; axis < ndim; ++axis) {
    STD_TORCH_CHECK(tile[axis] % stride[axis] == 0, "sparsecnx: stride is ", stride[axis],
                    ", expected a divisor of the tile's ", tile[axis], " sites");
    coarse[axis] /= stride[axis];
  }
  const Sizes &from = inverse ? tile : coarse, &to = inverse ? coarse : tile;
  Sizes rows = to;
  rows.push_back(count);
  check_product(rows, "the rows");
  const int64_t sites = product(to), taps = product(kernel);
  check_size(count * sites, "the number of rows", 0, INT32_MAX);
  Sizes entries = from;
  entries.insert(entries.end(), {count, taps, 4});
  check_product(entries, "the map");
  Tensor map = empty({count * product(from), taps}, ScalarType::Int);
  if (count == 0) return map;

  const std::vector<Sizes> parts = nested_parts(to);
  std::vector<Axis> axes(ndim);
  for (size_t axis = 0; axis < ndim; ++axis) {
    for (int64_t site = 0; site < from[axis]; ++site) {
      for (int64_t tap = 0; tap < kernel[axis]; ++tap) {
        if constexpr (inverse) {
          const int64_t place = site + padding[axis] - tap * dilation[axis];
          axes[axis].add(place % stride[axis] == 0, floor_divide(place, stride[axis]), parts[axis]);
        } else {
          axes[axis].add(true, site * stride[axis] - padding[axis] + tap * dilation[axis], parts[axis]);
        }
      }
    }
  }
  const Table table = combine(axes, from, kernel);

  // The rows of the tiles lie in a grid with masked margins, so wide that no step leaves its image.
  Sizes low(ndim, 0), padded = grid, shift(table.neighbours, 0);
  for (size_t axis = 0; axis < ndim; ++axis) {
    // A step as long as the image leads outside from everywhere.
    for (int64_t& step : axes[axis].steps) step = std::clamp(step, -grid[axis], grid[axis]);
    const auto [least, most] = std::minmax_element(axes[axis].steps.begin(), axes[axis].steps.end());
    low[axis] = std::max<int64_t>(0, -*least);
    padded[axis] += low[axis] + std::max<int64_t>(0, *most);
  }
  for (int64_t i = 0; i < table.neighbours; ++i) {
    int64_t number = i, weight = 1;
    for (size_t axis = ndim; axis-- > 0; weight *= padded[axis]) {
      const int64_t steps = static_cast<int64_t>(axes[axis].steps.size());
      shift[i] += axes[axis].steps[number % steps] * weight;
      number /= steps;
    }
  }
  Sizes centre(count, 0);
  for (int64_t t = 0; t < count; ++t) {
    int64_t rest = tiles[t], weight = 1;
    for (size_t axis = ndim; axis-- > 0; rest /= grid[axis], weight *= padded[axis])
      centre[t] += (rest % grid[axis] + low[axis]) * weight;
    centre[t] += rest * weight;
  }
  padded.push_back(batch);
  check_product(padded, "the grid with its margins");
  // A grid of few tiles has a table of all its cells; a larger one is searched.
  const int64_t cells_with_margins = product(padded);
  std::vector<int32_t> first;
  if (cells_with_margins <= std::max<int64_t>(1 << 20, 64 * count)) {
    first.assign(cells_with_margins, kNone);
    for (int64_t t = 0; t < count; ++t) first[centre[t]] = static_cast<int32_t>(t * sites);
  }
  const auto first_row = [&](int64_t cell) {
    if (!first.empty()) return first[cell];
    const auto after = std::upper_bound(centre.begin(), centre.end(), cell);
    if (after == centre.begin() || after[-1] != cell) return kNone;
    return static_cast<int32_t>((after - centre.begin() - 1) * sites);
  };

  const int64_t size = static_cast<int64_t>(table.step.size());
  parallel_for(0, count, std::max<int64_t>(1, (1 << 14) / size), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> near(table.neighbours + 1, kNone);  // first row of each neighbour
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < table.neighbours; ++i) near[i] = first_row(centre[t] + shift[i]);
      int32_t* out = data<int32_t>(map) + t * size;
      for (int64_t i = 0; i < size; ++i) out[i] = std::max(near[table.step[i]] + table.offset[i], -1);
    }
  });
  return map;
}

Tensor kernel_map(const Tensor& index, int64_t batch, Sizes grid, Sizes tile, Sizes kernel, Sizes stride, Sizes padding,
                  Sizes dilation) {
  return site_map<false>(index, batch, grid, {tile, kernel, stride, padding, dilation});
}

Tensor inverse_map(const Tensor& index, int64_t batch, Sizes grid, Sizes tile, Sizes kernel, Sizes stride,
                   Sizes padding, Sizes dilation) {
  return site_map<true>(index, batch, grid, {tile, kernel, stride, padding, dilation});
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("kernel_map", TORCH_BOX(&kernel_map));
  m.impl("inverse_map", TORCH_BOX(&inverse_map));
}

}  // namespace
}  // namespace sparsecnx
