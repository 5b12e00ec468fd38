// sparsecnx::gather_tiles and scatter_tiles move values between dense images (B, C, H, W) and the rows of visible
// tiles. Each is the other's adjoint. Values are only moved, so the kernels know nothing but their size.
#include "op.h"

namespace sparsecnx {
namespace {

struct Shape {
  int64_t batch, channels, height, width, tile, tiles;
  const int64_t* index;           // (tiles): image * cells + raster position, ascending
  std::array<int64_t, 4> stride;  // of the images
  std::vector<int64_t> offset;    // of each site of a tile from its corner, in nested order

  int64_t cells() const { return height / tile * (width / tile); }
  int64_t sites() const { return tile * tile; }
  // Returns the offset of the corner of tile t in its image.
  int64_t corner(int64_t t) const {
    const int64_t cell = index[t] % cells(), across = width / tile;
    return tile * (cell / across * stride[2] + cell % across * stride[3]);
  }
};

// Checks the sizes of the images, of the tiles and the index, before anything of their sizes is made.
Shape check(std::array<int64_t, 4> images, const Tensor& index, int64_t tile) {
  const auto [batch, channels, height, width] = images;
  const int64_t smallest = std::min({batch, channels, height, width});
  STD_TORCH_CHECK(smallest >= 0, "sparsecnx: the images are (", batch, ", ", channels, ", ", height, ", ", width,
                  "), expected no negative size");
  check_size(tile, "tile", 1, kMostTile);
  STD_TORCH_CHECK(height % tile == 0 && width % tile == 0, "sparsecnx: tile is ", tile, ", expected a divisor of ",
                  height, " and ", width);
  STD_TORCH_CHECK(index.dim() == 1, "sparsecnx: index must be (tiles,), it has ", index.dim(), " dimensions");
  check_dense(index, "index", index.numel(), ScalarType::Long);
  Shape shape{batch, channels, height, width, tile, index.numel(), data<int64_t>(index), {}, {}};
  check_product({batch, channels, height, width}, "the images");
  const int64_t tiles = batch * shape.cells();
  const int64_t* end = shape.index + shape.tiles;
  STD_TORCH_CHECK(std::is_sorted(shape.index, end) && (shape.tiles == 0 || (*shape.index >= 0 && end[-1] < tiles)),
                  "sparsecnx: index must ascend within ", batch, " images of ", shape.cells(), " tiles");
  return shape;
}

// Takes the strides of the images. Call it when there are tiles and channels: otherwise nothing bounds the tile.
void set_strides(Shape& shape, const Tensor& dense) {
  shape.stride = {dense.stride(0), dense.stride(1), dense.stride(2), dense.stride(3)};
  shape.offset.resize(shape.sites());
  for (int64_t y = 0; y < shape.tile; ++y) {
    for (int64_t x = 0; x < shape.tile; ++x)
      shape.offset[nested_site(shape.tile, y, x)] = y * shape.stride[2] + x * shape.stride[3];
  }
}

// Calls f with an unsigned integer of the size of the tensor's elements.
template <class F>
void for_size(const Tensor& x, const F& f) {
  switch (x.element_size()) {
    case 1:
      return f(uint8_t());
    case 2:
      return f(uint16_t());
    case 4:
      return f(uint32_t());
    case 8:
      return f(uint64_t());
    default:
      STD_TORCH_CHECK(false, "sparsecnx: elements of ", x.element_size(), " bytes are not supported");
  }
}

Tensor gather_tiles(const Tensor& dense, const Tensor& index, int64_t tile) {
  STD_TORCH_CHECK(dense.is_cpu() && dense.dim() == 4, "sparsecnx: dense must be a CPU tensor (B, C, H, W), it has ",
                  dense.dim(), " dimensions");
  check_storage(dense, "dense");
  Shape shape = check({dense.size(0), dense.size(1), dense.size(2), dense.size(3)}, index, tile);
  Tensor rows = empty({shape.tiles * shape.sites(), shape.channels}, dense.scalar_type());
  if (rows.numel() == 0) return rows;
  set_strides(shape, dense);
  for_size(dense, [&]<class T>(T) {
    parallel_for(0, shape.tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* corner = data<T>(dense) + shape.index[t] / shape.cells() * shape.stride[0] + shape.corner(t);
        T* out = data<T>(rows) + t * shape.sites() * shape.channels;
        for (const int64_t site : shape.offset) {
          for (int64_t c = 0; c < shape.channels; ++c) *out++ = corner[site + c * shape.stride[1]];
        }
      }
    });
  });
  return rows;
}

Tensor scatter_tiles(const Tensor& rows, const Tensor& fill, const Tensor& index, int64_t batch, int64_t height,
                     int64_t width, int64_t tile) {
  const auto [count, channels] = feature_shape(rows, "rows");
  Shape shape = check({batch, channels, height, width}, index, tile);
  STD_TORCH_CHECK(count == shape.tiles * shape.sites(), "sparsecnx: rows has ", count, " rows, expected ",
                  shape.tiles * shape.sites());
  check_dense(fill, "fill", channels, rows.scalar_type());
  check_product({batch, channels, height, width, static_cast<int64_t>(rows.element_size())}, "the images");
  Tensor dense = empty({batch, channels, height, width}, rows.scalar_type());
  if (dense.numel() == 0) return dense;
  if (count > 0) set_strides(shape, dense);
  for_size(rows, [&]<class T>(T) {
    parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* image = data<T>(dense) + n * shape.channels * height * width;
        for (int64_t c = 0; c < shape.channels; ++c)
          std::fill_n(image + c * height * width, height * width, data<T>(fill)[c]);
        const int64_t* first = std::lower_bound(shape.index, shape.index + shape.tiles, n * shape.cells());
        const int64_t* last = std::lower_bound(first, shape.index + shape.tiles, (n + 1) * shape.cells());
        for (int64_t t = first - shape.index; t < last - shape.index; ++t) {
          T* corner = image + shape.corner(t);
          const T* from = data<T>(rows) + t * shape.sites() * shape.channels;
          for (const int64_t site : shape.offset) {
            for (int64_t c = 0; c < shape.channels; ++c) corner[site + c * height * width] = *from++;
          }
        }
      }
    });
  });
  return dense;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("gather_tiles", TORCH_BOX(&gather_tiles));
  m.impl("scatter_tiles", TORCH_BOX(&scatter_tiles));
}

}  // namespace
}  // namespace sparsecnx
