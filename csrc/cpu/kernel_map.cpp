// Kernel maps of convolutions on tiles, and sparsecnx::kernel_map, which lists one.
//
// A tap takes a site of a tile to a site of a neighbouring tile, and where in that tile does not depend on the tile. So
// an entry of the map is the first row of one of a tile's few neighbours plus the place in it, and both the number of the
// neighbour and the place are sums over the axes.
#include "mapped.h"

namespace sparsecnx {

namespace {

constexpr int32_t kNone = INT32_MIN;  // the first row of a tile that is masked or outside: no place makes it positive

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// A convolution of a layout, with one entry for each axis.
struct Window {
  bool inverse;  // the other way: from the rows that are read to those that read them
  int64_t batch;
  Sizes grid, tile, kernel, stride, padding, dilation;
};

Window read_window(const Sizes& numbers) {
  const size_t axes = (std::max<size_t>(numbers.size(), 2) - 2) / 6;
  STD_TORCH_CHECK(
      axes >= 1 && axes <= 3 && numbers.size() == 2 + 6 * axes, "sparsecnx: window has ", numbers.size(),
      " entries, expected inverse, batch, and grid, tile, kernel, stride, padding and dilation of 1 to 3 axes");
  const auto part = [&](size_t i) {
    const auto begin = numbers.begin() + static_cast<int64_t>(2 + i * axes);
    return Sizes(begin, begin + static_cast<int64_t>(axes));
  };
  const Window window{numbers[0] != 0, numbers[1], part(0), part(1), part(2), part(3), part(4), part(5)};
  constexpr int64_t kMostSteps = 1 << 20;
  check_size(window.batch, "batch", 0, int64_t{1} << 40);
  check_sizes(window.grid, "grid", axes, 0, int64_t{1} << 40);
  check_sizes(window.tile, "tile", axes, 1, kMostTile);
  check_sizes(window.kernel, "kernel", axes, 1, kMostKernel);
  check_sizes(window.stride, "stride", axes, 1, kMostTile);
  check_sizes(window.padding, "padding", axes, -kMostSteps, kMostSteps);
  check_sizes(window.dilation, "dilation", axes, 1, kMostSteps);
  for (size_t axis = 0; axis < axes; ++axis)
    STD_TORCH_CHECK(window.tile[axis] % window.stride[axis] == 0, "sparsecnx: stride is ", window.stride[axis],
                    ", expected a divisor of the tile's ", window.tile[axis], " sites");
  Sizes cells = window.grid;
  cells.push_back(window.batch);
  check_product(cells, "the grid");
  return window;
}

}  // namespace

class TileMap {
 public:
  int64_t count, sites, sites_read, taps;  // sites of an output tile and of one that is read

  TileMap(const Tensor& index, const char* name, const Window& window);

  // Writes the entries of output rows [begin, end).
  void write(int64_t begin, int64_t end, int32_t* out) const;

 private:
  // Where the taps lead along an axis or in a slice, for each place in a tile and tap.
  struct Axis {
    int64_t kernel = 1;
    Sizes steps = {};  // distinct, in tiles
    std::vector<int32_t> step,
        inside;  // (places, kernel): what it adds to the number of the neighbour, and in that tile
  };
  // A site's place along depth and in the slice, times the taps of each. Where all taps of the slice lead to one tile, as
  // they do from most sites, `only` is their step, otherwise -1.
  struct Place {
    int32_t depth, slice, only;
  };
  // The sum of the steps of a neighbour, and its number.
  struct Neighbour {
    int64_t shift, number;
  };

  int32_t first_row(int64_t cell) const {
    if (!first_.empty()) return first_[cell];
    const auto after = std::upper_bound(centre_.begin(), centre_.end(), cell);
    if (after == centre_.begin() || after[-1] != cell) return kNone;
    return static_cast<int32_t>((after - centre_.begin() - 1) * sites_read);
  }

  std::array<Axis, 3> axes_;  // those in front of the window's have one place
  Axis slice_;                // the last two together
  int64_t numbers_ = 1;       // of neighbours
  std::vector<Neighbour> neighbours_;
  std::vector<Place> places_;   // of the sites, in nested order
  Sizes centre_;                // the visible tiles, in a grid with masked margins
  std::vector<int32_t> first_;  // the first row of each of its cells; a large grid has none and is searched
};

TileMap::TileMap(const Tensor& index, const char* name, const Window& window) {
  const auto& [inverse, batch, grid, tile, kernel, stride, padding, dilation] = window;
  const size_t ndim = grid.size(), front = 3 - ndim;
  const int64_t* tiles = check_index(index, name, batch, product(grid));
  count = index.numel();
  Sizes coarse = tile;
  for (size_t axis = 0; axis < ndim; ++axis) coarse[axis] /= stride[axis];
  const Sizes &from = inverse ? tile : coarse, &to = inverse ? coarse : tile;
  for (const Sizes& side : {from, to}) {
    Sizes rows = side;
    rows.push_back(count);
    check_product(rows, "the rows");
    check_size(product(rows), "the number of rows", 0, INT32_MAX);
  }
  sites = product(from);
  sites_read = product(to);
  taps = product(kernel);
  check_size(taps, "the number of taps", 1, kMostTaps);

  // A step that leads nowhere has the number after the others. The neighbours are numbered with the last axis fastest.
  const std::vector<Sizes> parts = nested_parts(to);
  std::array<int64_t, 3> weight = {};
  for (size_t axis = ndim; axis-- > 0;) {
    Axis& at = axes_[front + axis];
    at.kernel = kernel[axis];
    const int64_t side = to[axis];
    bool everywhere = true;
    for (int64_t site = 0; site < from[axis]; ++site) {
      for (int64_t tap = 0; tap < kernel[axis]; ++tap) {
        const int64_t place = inverse ? site + padding[axis] - tap * dilation[axis]
                                      : site * stride[axis] - padding[axis] + tap * dilation[axis];
        const bool exists = !inverse || place % stride[axis] == 0;
        const int64_t position = inverse ? floor_divide(place, stride[axis]) : place;
        const int64_t step = floor_divide(position, side);
        const auto known = std::find(at.steps.begin(), at.steps.end(), step);
        at.step.push_back(exists ? static_cast<int32_t>(known - at.steps.begin()) : -1);
        at.inside.push_back(exists ? static_cast<int32_t>(parts[axis][position - step * side]) : 0);
        if (exists && known == at.steps.end()) at.steps.push_back(step);
        everywhere &= exists;
      }
    }
    const int64_t steps = static_cast<int64_t>(at.steps.size());
    weight[front + axis] = numbers_;
    for (int32_t& step : at.step) step = static_cast<int32_t>((step < 0 ? steps : step) * numbers_);
    numbers_ *= everywhere ? steps : steps + 1;
    check_size(numbers_, "the number of neighbouring tiles", 0, INT32_MAX);
  }
  for (size_t axis = 0; axis < front; ++axis) axes_[axis] = {1, {}, {0}, {0}};

  // The tiles lie in a grid with masked margins, so wide that no step leaves its image.
  Sizes low(ndim, 0), padded = grid;
  for (size_t axis = 0; axis < ndim; ++axis) {
    Sizes& steps = axes_[front + axis].steps;
    // A step as long as the image leads outside from everywhere.
    for (int64_t& step : steps) step = std::clamp(step, -grid[axis], grid[axis]);
    if (steps.empty()) continue;
    const auto [least, most] = std::minmax_element(steps.begin(), steps.end());
    low[axis] = std::max<int64_t>(0, -*least);
    padded[axis] += low[axis] + std::max<int64_t>(0, *most);
  }
  padded.push_back(batch);
  check_product(padded, "the grid with its margins");
  neighbours_ = {{0, 0}};
  int64_t along = 1;  // cells from one to the next along the axis
  for (size_t axis = ndim; axis-- > 0; along *= padded[axis]) {
    const Sizes& steps = axes_[front + axis].steps;
    std::vector<Neighbour> longer;
    for (const auto [shift, number] : neighbours_) {
      for (size_t i = 0; i < steps.size(); ++i)
        longer.push_back({shift + steps[i] * along, number + static_cast<int64_t>(i) * weight[front + axis]});
    }
    neighbours_ = longer;
  }
  centre_.assign(count, 0);
  for (int64_t t = 0; t < count; ++t) {
    int64_t rest = tiles[t], step = 1;
    for (size_t axis = ndim; axis-- > 0; rest /= grid[axis], step *= padded[axis])
      centre_[t] += (rest % grid[axis] + low[axis]) * step;
    centre_[t] += rest * step;
  }
  const int64_t cells = product(padded);
  if (cells <= std::max<int64_t>(1 << 20, 64 * count)) {
    first_.assign(cells, kNone);
    for (int64_t t = 0; t < count; ++t) first_[centre_[t]] = static_cast<int32_t>(t * sites_read);
  }
  if (count == 0) return;
  const Axis &rows = axes_[1], &columns = axes_[2];
  const int64_t height = static_cast<int64_t>(rows.step.size()), width = static_cast<int64_t>(columns.step.size());
  slice_.kernel = rows.kernel * columns.kernel;
  for (int64_t y = 0; y < height; y += rows.kernel) {
    for (int64_t x = 0; x < width; x += columns.kernel) {
      for (int64_t i = y; i < y + rows.kernel; ++i) {
        for (int64_t j = x; j < x + columns.kernel; ++j) {
          slice_.step.push_back(rows.step[i] + columns.step[j]);
          slice_.inside.push_back(rows.inside[i] + columns.inside[j]);
        }
      }
    }
  }
  places_.resize(sites);
  for_sites(from, [&](int64_t nested, const Sizes& site) {
    const int64_t z = ndim == 3 ? site[0] : 0, y = ndim >= 2 ? site[ndim - 2] : 0, x = site[ndim - 1];
    const int64_t place = (y * width / columns.kernel + x) * slice_.kernel;
    const int32_t* step = slice_.step.data() + place;
    const bool one = std::all_of(step, step + slice_.kernel, [&](int32_t other) { return other == *step; });
    places_[nested] = {static_cast<int32_t>(z * axes_[0].kernel), static_cast<int32_t>(place), one ? *step : -1};
  });
}

void TileMap::write(int64_t begin, int64_t end, int32_t* out) const {
  const Axis& depth = axes_[0];
  std::vector<int32_t> near(numbers_, kNone);  // the first row of each neighbour
  int64_t tile = -1;
  for (int64_t row = begin; row < end; ++row) {
    if (row / sites != tile) {
      tile = row / sites;
      for (const auto [shift, number] : neighbours_) near[number] = first_row(centre_[tile] + shift);
    }
    const auto [z, in_slice, only] = places_[row - tile * sites];
    const int32_t *step = slice_.step.data() + in_slice, *inside = slice_.inside.data() + in_slice;
    for (int64_t i = z; i < z + depth.kernel; ++i, out += slice_.kernel) {
      const int32_t* first = near.data() + depth.step[i];
      const int32_t start = depth.inside[i];
      if (only < 0) {
        for (int64_t k = 0; k < slice_.kernel; ++k) out[k] = std::max(first[step[k]] + start + inside[k], -1);
      } else if (first[only] < 0) {
        std::fill_n(out, slice_.kernel, -1);
      } else {
        const int32_t from = first[only] + start;
        for (int64_t k = 0; k < slice_.kernel; ++k) out[k] = from + inside[k];
      }
    }
  }
}

KernelMap::KernelMap(const int32_t* entries, int64_t rows_out, int64_t rows_in, int64_t taps, const char* name)
    : rows_out(rows_out), rows_in(rows_in), taps(taps), entries_(entries), name_(name) {}

KernelMap::KernelMap(std::unique_ptr<const TileMap> tiles)
    : rows_out(tiles->count * tiles->sites),
      rows_in(tiles->count * tiles->sites_read),
      taps(tiles->taps),
      tiles_(std::move(tiles)) {}

KernelMap::~KernelMap() = default;

const int32_t* KernelMap::rows(int64_t begin, int64_t end, std::vector<int32_t>& room) const {
  const int64_t count = (end - begin) * taps;
  if (tiles_ != nullptr) {
    room.resize(count);
    tiles_->write(begin, end, room.data());
    return room.data();
  }
  const int32_t* entries = entries_ + begin * taps;
  if (kernels<float>().all_rows(entries, count, rows_in)) return entries;
  good_ = false;
  room.assign(count, -1);
  return room.data();
}

void KernelMap::check() const {
  if (!good_) check_range(entries_, rows_out * taps, name_, rows_in);
}

std::unique_ptr<const KernelMap> make_map(const Tensor& map, const Sizes& window, int64_t rows_in, const char* name) {
  if (!window.empty()) {
    auto found = std::make_unique<KernelMap>(std::make_unique<const TileMap>(map, name, read_window(window)));
    STD_TORCH_CHECK(rows_in == found->rows_in, "sparsecnx: x has ", rows_in, " rows, expected ", found->rows_in,
                    " of the visible tiles");
    return found;
  }
  STD_TORCH_CHECK(map.dim() == 2, "sparsecnx: ", name, " must be (rows_out, taps), it has ", map.dim(), " dimensions");
  STD_TORCH_CHECK(1 <= map.size(1) && map.size(1) <= kMostTaps, "sparsecnx: ", name, " has ", map.size(1),
                  " taps, expected 1 to ", kMostTaps);
  check_dense(map, name, map.numel(), ScalarType::Int);
  return std::make_unique<KernelMap>(data<int32_t>(map), map.size(0), rows_in, map.size(1), name);
}

Sizes inverted(Sizes window) {
  if (!window.empty()) window[0] = window[0] == 0;
  return window;
}

namespace {

// Returns the map of a window on visible tiles.
Tensor kernel_map(const Tensor& index, Sizes window) {
  const TileMap tiles(index, "index", read_window(window));
  const int64_t rows = tiles.count * tiles.sites;
  check_product({rows, tiles.taps, 4}, "the map");
  Tensor out = empty({rows, tiles.taps}, ScalarType::Int);
  parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / tiles.taps),
               [&](int64_t begin, int64_t end) { tiles.write(begin, end, data<int32_t>(out) + begin * tiles.taps); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) { m.impl("kernel_map", TORCH_BOX(&kernel_map)); }

}  // namespace
}  // namespace sparsecnx
