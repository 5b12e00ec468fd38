// Kernel maps of convolutions on tiles, and sparsecnx::kernel_map, which lists one.
//
// A tap takes a site of a tile to a site of a neighbouring tile, and where in that tile does not depend on the tile. So
// an entry of the map is the first row of one of a tile's few neighbours plus the place in it, and both the number of the
// neighbour and the place are sums over the axes.
#include <map>
#include <mutex>

#include "mapped.h"

namespace sparsecnx {

namespace {

constexpr int32_t kNone = INT32_MIN;  // the first row of a tile that is masked or outside: no place makes it positive
constexpr size_t kKept = 32;          // reaches, which are kept: 16 MB at most
constexpr int64_t kMostKeptEntries = 1 << 16;  // of one of them, of 6 or 8 bytes

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Fewer than three axes have sides of 1 in front.
constexpr size_t kAxes = 3;

// A convolution of a layout, or the way back.
struct Window {
  bool inverse;
  Box tile, kernel, stride, padding, dilation;

  explicit Window(const Sizes& numbers);

  Box coarse() const { return {tile[0] / stride[0], tile[1] / stride[1], tile[2] / stride[2]}; }
  Box from() const { return inverse ? tile : coarse(); }  // sides of an output tile, and of one that is read
  Box to() const { return inverse ? coarse() : tile; }
};

Window::Window(const Sizes& numbers) {
  const size_t axes = numbers.size() / 5;
  STD_TORCH_CHECK(axes >= 1 && axes <= kAxes && numbers.size() == 1 + 5 * axes, "sparsecnx: window has ",
                  numbers.size(), " entries, expected inverse, and tile, kernel, stride, padding and dilation of 1 to ",
                  kAxes, " axes");
  constexpr int64_t kMostSteps = 1 << 20;
  const int64_t* at = numbers.data() + 1;
  const auto next = [&](const char* what, int64_t missing, int64_t low, int64_t high) {
    Box box{missing, missing, missing};
    for (size_t axis = kAxes - axes; axis < kAxes; ++axis) check_size(box[axis] = *at++, what, low, high);
    return box;
  };
  inverse = numbers[0] != 0;
  tile = next("tile", 1, 1, kMostTile);
  kernel = next("kernel", 1, 1, kMostKernel);
  stride = next("stride", 1, 1, kMostTile);
  padding = next("padding", 0, -kMostSteps, kMostSteps);
  dilation = next("dilation", 1, 1, kMostSteps);
  for (size_t axis = 0; axis < kAxes; ++axis)
    STD_TORCH_CHECK(tile[axis] % stride[axis] == 0, "sparsecnx: stride is ", stride[axis],
                    ", expected a divisor of the tile's ", tile[axis], " sites");
  check_size(volume(kernel), "the number of taps", 1, kMostTaps);
  check_size(volume(tile), "the sites of a tile", 1, INT32_MAX);
}

// Where the taps lead along an axis of a tile: for each place and tap, what it adds to the number of the neighbouring
// tile, and to the place in that tile.
struct Taps {
  int64_t count;
  std::vector<int32_t> step, inside;  // (places, count)
  std::vector<int32_t> only;          // (places): the step of all taps, as most places have it, or kNone
};

// Where the taps lead from the sites of a tile, whichever tiles are visible.
struct Reach {
  std::array<Taps, kAxes> taps;
  std::array<Sizes, kAxes> steps;                  // in tiles, those that occur along each axis
  Box weight;                                      // of a step's position there in the number of the neighbour
  int64_t numbers = 1;                             // of neighbours
  std::vector<std::array<int16_t, kAxes>> places;  // of the sites along each axis, in nested order

  explicit Reach(const Window& window);

 private:
  Taps along(const Window& window, size_t axis, const Sizes& parts);
};

// A step that leads nowhere has the position after the others.
Taps Reach::along(const Window& window, size_t axis, const Sizes& parts) {
  const int64_t side = window.to()[axis], stride = window.stride[axis], padding = window.padding[axis];
  Taps taps{window.kernel[axis], {}, {}, {}};
  Sizes& known = steps[axis];
  bool everywhere = true;
  for (int64_t site = 0; site < window.from()[axis]; ++site) {
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      const int64_t move = tap * window.dilation[axis];
      const int64_t place = window.inverse ? site + padding - move : site * stride - padding + move;
      const bool exists = !window.inverse || place % stride == 0;
      const int64_t position = window.inverse ? floor_divide(place, stride) : place;
      const int64_t step = floor_divide(position, side);
      const auto found = std::find(known.begin(), known.end(), step);
      taps.step.push_back(exists ? static_cast<int32_t>(found - known.begin()) : -1);
      taps.inside.push_back(exists ? static_cast<int32_t>(parts[position - step * side]) : 0);
      if (exists && found == known.end()) known.push_back(step);
      everywhere &= exists;
    }
  }
  const int64_t count = static_cast<int64_t>(known.size());
  weight[axis] = numbers;
  for (int32_t& step : taps.step) step = static_cast<int32_t>((step < 0 ? count : step) * numbers);
  for (auto step = taps.step.begin(); step != taps.step.end(); step += taps.count) {
    const bool one = std::all_of(step, step + taps.count, [&](int32_t other) { return other == *step; });
    taps.only.push_back(one ? *step : kNone);
  }
  numbers *= everywhere ? count : count + 1;
  check_size(numbers, "the number of neighbouring tiles", 0, INT32_MAX);
  return taps;
}

Reach::Reach(const Window& window) {
  const Box to = window.to(), from = window.from();
  const std::vector<Sizes> parts = nested_parts(Sizes(to.begin(), to.end()));
  for (size_t axis = kAxes; axis-- > 0;) taps[axis] = along(window, axis, parts[axis]);
  places.resize(volume(from));
  for_sites(Sizes(from.begin(), from.end()), [&](int64_t nested, const Sizes& site) {
    for (size_t axis = 0; axis < kAxes; ++axis) places[nested][axis] = static_cast<int16_t>(site[axis]);
  });
}

// Returns the reach of a window. A network has few of them, and asks for them at every step.
std::shared_ptr<const Reach> reach_of(const Sizes& numbers, const Window& window) {
  static std::mutex mutex;
  static std::map<Sizes, std::shared_ptr<const Reach>> kept;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = kept.find(numbers); found != kept.end()) return found->second;
  }
  auto reach = std::make_shared<const Reach>(window);
  int64_t entries = volume(window.tile);
  for (size_t axis = 0; axis < kAxes; ++axis) entries += window.tile[axis] * window.kernel[axis];
  if (entries <= kMostKeptEntries) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (kept.size() == kKept) kept.clear();
    kept.emplace(numbers, reach);
  }
  return reach;
}

}  // namespace

class TileMap {
 public:
  int64_t count, sites, sites_read, taps;  // sites of an output tile and of one that is read

  TileMap(const Tensor& index, const char* name, const Sizes& batch_and_grid, const Sizes& numbers);

  // Writes the entries of output rows [begin, end).
  void write(int64_t begin, int64_t end, int32_t* out) const;

 private:
  template <int WIDTH>  // of the kernel along the last axis, as a constant, or 0
  void write_rows(int64_t begin, int64_t end, int32_t* out) const;

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

  std::shared_ptr<const Reach> reach_;
  std::vector<Neighbour> neighbours_;
  Sizes centre_;                // the visible tiles, in a grid with masked margins
  std::vector<int32_t> first_;  // the first row of each of its cells; a large grid has none and is searched
};

TileMap::TileMap(const Tensor& index, const char* name, const Sizes& batch_and_grid, const Sizes& numbers) {
  const Window window(numbers);
  STD_TORCH_CHECK(batch_and_grid.size() == 1 + numbers.size() / 5, "sparsecnx: grid has ", batch_and_grid.size(),
                  " entries, expected the batch, and one for each of ", numbers.size() / 5, " axes");
  for (const int64_t size : batch_and_grid) check_size(size, "grid", 0, int64_t{1} << 40);
  check_product(batch_and_grid, "the grid");
  const int64_t batch = batch_and_grid[0];
  Box grid{1, 1, 1};
  std::copy(batch_and_grid.begin() + 1, batch_and_grid.end(), grid.end() - (batch_and_grid.size() - 1));
  const int64_t* tiles = check_index(index, name, batch, volume(grid));
  count = index.numel();
  sites = volume(window.from());
  sites_read = volume(window.to());
  taps = volume(window.kernel);
  for (const int64_t side : {sites, sites_read}) {
    check_product({side, count}, "the rows");
    check_size(side * count, "the number of rows", 0, INT32_MAX);
  }
  if (count == 0) return;
  reach_ = reach_of(numbers, window);

  // The tiles lie in a grid with masked margins, so wide that no step leaves its image. A step as long as the image leads
  // outside from everywhere.
  Box low{}, padded = grid;
  int64_t neighbours = 1;
  for (size_t axis = 0; axis < kAxes; ++axis) {
    int64_t least = 0, most = 0;
    for (const int64_t step : reach_->steps[axis]) {
      least = std::min(least, step);
      most = std::max(most, step);
    }
    low[axis] = std::min(-least, grid[axis]);
    padded[axis] += low[axis] + std::min(most, grid[axis]);
    neighbours *= static_cast<int64_t>(reach_->steps[axis].size());
  }
  check_product({batch, padded[0], padded[1], padded[2]}, "the grid with its margins");
  neighbours_.reserve(neighbours);
  const auto for_steps = [&](size_t axis, const auto& f) {
    for (size_t i = 0; i < reach_->steps[axis].size(); ++i)
      f(std::clamp(reach_->steps[axis][i], -grid[axis], grid[axis]), static_cast<int64_t>(i) * reach_->weight[axis]);
  };
  for_steps(0, [&](int64_t z, int64_t of_z) {
    for_steps(1, [&](int64_t y, int64_t of_y) {
      for_steps(2, [&](int64_t x, int64_t of_x) {
        neighbours_.push_back({(z * padded[1] + y) * padded[2] + x, of_z + of_y + of_x});
      });
    });
  });
  centre_.resize(count);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t x = tiles[t] % grid[2], rest = tiles[t] / grid[2], y = rest % grid[1], image = rest / grid[1];
    const int64_t z = image % grid[0] + low[0] + image / grid[0] * padded[0];
    centre_[t] = (z * padded[1] + y + low[1]) * padded[2] + x + low[2];
  }
  const int64_t cells = batch * volume(padded);
  if (cells <= std::max<int64_t>(1 << 20, 64 * count)) {
    first_.assign(cells, kNone);
    for (int64_t t = 0; t < count; ++t) first_[centre_[t]] = static_cast<int32_t>(t * sites_read);
  }
}

void TileMap::write(int64_t begin, int64_t end, int32_t* out) const {
  if (begin == end) return;
  reach_->taps[2].count == 3 ? write_rows<3>(begin, end, out) : write_rows<0>(begin, end, out);
}

template <int WIDTH>
void TileMap::write_rows(int64_t begin, int64_t end, int32_t* out) const {
  const auto& [depth, rows, columns] = reach_->taps;
  std::vector<int32_t> near(reach_->numbers, kNone);  // the first row of each neighbour
  const int64_t width = WIDTH > 0 ? WIDTH : columns.count;
  int64_t tile = -1;
  for (int64_t row = begin; row < end; ++row) {
    if (row / sites != tile) {
      tile = row / sites;
      for (const auto [shift, number] : neighbours_) near[number] = first_row(centre_[tile] + shift);
    }
    const auto [z, y, x] = reach_->places[row - tile * sites];
    const int32_t *z_step = depth.step.data() + z * depth.count, *z_inside = depth.inside.data() + z * depth.count;
    const int32_t *y_step = rows.step.data() + y * rows.count, *y_inside = rows.inside.data() + y * rows.count;
    const int32_t* x_step = columns.step.data() + x * width;
    const int32_t* x_inside = columns.inside.data() + x * width;
    const bool one = rows.only[y] != kNone && columns.only[x] != kNone;  // tile for all taps of a slice
    const int32_t only = one ? rows.only[y] + columns.only[x] : 0;
    for (int64_t i = 0; i < depth.count; ++i) {
      const int32_t* slice = near.data() + z_step[i];
      if (one && slice[only] < 0) {
        out = std::fill_n(out, rows.count * width, -1);
        continue;
      }
      for (int64_t j = 0; j < rows.count; ++j, out += width) {
        const int32_t start = z_inside[i] + y_inside[j], *line = slice + y_step[j];
        if (one) {
          const int32_t first = slice[only] + start;
          for (int64_t k = 0; k < width; ++k) out[k] = first + x_inside[k];
        } else {
          for (int64_t k = 0; k < width; ++k) out[k] = std::max(line[x_step[k]] + start + x_inside[k], -1);
        }
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

std::unique_ptr<const KernelMap> make_map(const Tensor& map, const Sizes& grid, const Sizes& window, int64_t rows_in,
                                          const char* name) {
  if (!window.empty()) {
    auto found = std::make_unique<KernelMap>(std::make_unique<const TileMap>(map, name, grid, window));
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
Tensor kernel_map(const Tensor& index, Sizes grid, Sizes window) {
  const TileMap tiles(index, "index", grid, window);
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
