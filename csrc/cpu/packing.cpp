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

Shape check(const Tensor& dense, const Tensor& index, int64_t tile) {
  STD_TORCH_CHECK(dense.is_cpu() && dense.dim() == 4, "sparsecnx: dense must be a CPU tensor (B, C, H, W)");
  Shape shape{dense.size(0), dense.size(1), dense.size(2), dense.size(3), tile, index.numel(), nullptr, {}, {}};
  STD_TORCH_CHECK(tile >= 1 && shape.height % tile == 0 && shape.width % tile == 0, "sparsecnx: tile is ", tile,
                  ", expected a divisor of ", shape.height, " and ", shape.width);
  check_dense(index, "index", shape.tiles, ScalarType::Long);
  shape.index = data<int64_t>(index);
  const int64_t* end = shape.index + shape.tiles;
  STD_TORCH_CHECK(std::is_sorted(shape.index, end) &&
                      (shape.tiles == 0 || (*shape.index >= 0 && end[-1] < shape.batch * shape.cells())),
                  "sparsecnx: index must ascend within ", shape.batch, " images of ", shape.cells(), " tiles");
  shape.stride = {dense.stride(0), dense.stride(1), dense.stride(2), dense.stride(3)};
  shape.offset.resize(shape.sites());
  for (int64_t y = 0; y < tile; ++y) {
    for (int64_t x = 0; x < tile; ++x)
      shape.offset[nested_site(tile, y, x)] = y * shape.stride[2] + x * shape.stride[3];
  }
  return shape;
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
  const Shape shape = check(dense, index, tile);
  Tensor rows = empty({shape.tiles * shape.sites(), shape.channels}, dense.scalar_type());
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
  Tensor dense = empty({batch, channels, height, width}, rows.scalar_type());
  const Shape shape = check(dense, index, tile);
  STD_TORCH_CHECK(count == shape.tiles * shape.sites(), "sparsecnx: rows has ", count, " rows, expected ",
                  shape.tiles * shape.sites());
  check_dense(fill, "fill", channels, rows.scalar_type());
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
