// sparsecnx::gather_tiles and scatter_tiles move values between dense images (B, C, *spatial) and the rows of visible
// tiles. Each is the other's adjoint. Values are only moved, so the kernels know nothing but their size.
#include <string>

#include "tiles.h"

namespace sparsecnx {
namespace {

struct Images {
  int64_t batch, channels;
  Sizes shape, tile, grid;  // sites of an image, sites of a tile, tiles of an image
  int64_t cells, sites;     // tiles of an image, sites of a tile
  int64_t tiles = 0;
  const int64_t* index = nullptr;  // (tiles): image * cells + raster position, ascending
  Sizes stride;                    // of the images along the spatial axes
  Sizes offset;                    // of each site of a tile from its corner, in nested order

  // Returns the offset of the corner of tile t in its image.
  int64_t corner(int64_t t) const {
    int64_t cell = index[t] % cells, offset = 0;
    for (size_t axis = grid.size(); axis-- > 0; cell /= grid[axis])
      offset += cell % grid[axis] * tile[axis] * stride[axis];
    return offset;
  }
};

// Checks the sizes of the images, of the tiles and the index, before anything of their sizes is made.
Images check(int64_t batch, int64_t channels, const Sizes& shape, const Tensor& index, const Sizes& tile) {
  Sizes all = shape;
  all.insert(all.begin(), {batch, channels});
  std::string listed;
  for (const int64_t size : all) listed += (listed.empty() ? "(" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(*std::min_element(all.begin(), all.end()) >= 0, "sparsecnx: the images are ", listed,
                  "), expected no negative size");
  STD_TORCH_CHECK(!shape.empty(), "sparsecnx: the images have no spatial axis");
  check_sizes(tile, "tile", shape.size(), 1, kMostTile);
  Images images{batch, channels, shape, tile, {}, 1, 1};
  check_product(all, "the images");
  check_product(tile, "a tile");
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    STD_TORCH_CHECK(shape[axis] % tile[axis] == 0, "sparsecnx: tile is ", tile[axis], ", expected a divisor of ",
                    shape[axis]);
    images.grid.push_back(shape[axis] / tile[axis]);
  }
  images.cells = product(images.grid);
  images.sites = product(tile);
  images.tiles = index.numel();
  images.index = check_index(index, "index", batch, images.cells);
  return images;
}

// Takes the strides of the images. Call it when there are tiles and channels: otherwise nothing bounds the tile.
void set_strides(Images& images, const Tensor& dense) {
  for (int64_t axis = 2; axis < dense.dim(); ++axis) images.stride.push_back(dense.stride(axis));
  images.offset.resize(images.sites);
  for_sites(images.tile, [&](int64_t nested, const Sizes& at) {
    int64_t offset = 0;
    for (size_t axis = 0; axis < at.size(); ++axis) offset += at[axis] * images.stride[axis];
    images.offset[nested] = offset;
  });
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

Tensor gather_tiles(const Tensor& dense, const Tensor& index, Sizes tile) {
  STD_TORCH_CHECK(dense.is_cpu() && dense.dim() >= 3, "sparsecnx: dense must be a CPU tensor (B, C, *spatial), it has ",
                  dense.dim(), " dimensions");
  check_storage(dense, "dense");
  Sizes shape;
  for (int64_t axis = 2; axis < dense.dim(); ++axis) shape.push_back(dense.size(axis));
  Images images = check(dense.size(0), dense.size(1), shape, index, tile);
  Tensor rows = empty({images.tiles * images.sites, images.channels}, dense.scalar_type());
  if (rows.numel() == 0) return rows;
  set_strides(images, dense);
  const int64_t channels = images.channels, image_stride = dense.stride(0), channel_stride = dense.stride(1);
  for_size(dense, [&]<class T>(T) {
    parallel_for(0, images.tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* corner = data<T>(dense) + images.index[t] / images.cells * image_stride + images.corner(t);
        T* out = data<T>(rows) + t * images.sites * channels;
        for (const int64_t site : images.offset) {
          for (int64_t c = 0; c < channels; ++c) *out++ = corner[site + c * channel_stride];
        }
      }
    });
  });
  return rows;
}

Tensor scatter_tiles(const Tensor& rows, const Tensor& fill, const Tensor& index, int64_t batch, Sizes shape,
                     Sizes tile) {
  const auto [count, channels] = feature_shape(rows, "rows");
  Images images = check(batch, channels, shape, index, tile);
  STD_TORCH_CHECK(count == images.tiles * images.sites, "sparsecnx: rows has ", count, " rows, expected ",
                  images.tiles * images.sites);
  check_dense(fill, "fill", channels, rows.scalar_type());
  Sizes all = shape;
  all.insert(all.begin(), {batch, channels});
  Sizes bytes = all;
  bytes.push_back(static_cast<int64_t>(rows.element_size()));
  check_product(bytes, "the images");
  Tensor dense = empty(all, rows.scalar_type());
  if (dense.numel() == 0) return dense;
  if (count > 0) set_strides(images, dense);
  const int64_t plane = product(shape), width = shape.back(), lines = plane / width;
  for_size(rows, [&]<class T>(T) {
    parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* image = data<T>(dense) + n * images.channels * plane;
        for (int64_t c = 0; c < images.channels; ++c) std::fill_n(image + c * plane, plane, data<T>(fill)[c]);
        const int64_t* first = std::lower_bound(images.index, images.index + images.tiles, n * images.cells);
        const int64_t* last = std::lower_bound(first, images.index + images.tiles, (n + 1) * images.cells);
        for (int64_t t = first - images.index; t < last - images.index; ++t) {
          T* corner = image + images.corner(t);
          const T* from = data<T>(rows) + t * images.sites * images.channels;
          for (const int64_t site : images.offset) {
            // A stride of one factor makes GCC vectorise this loop, which takes a quarter longer.
            for (int64_t c = 0; c < images.channels; ++c) corner[site + c * lines * width] = *from++;
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
