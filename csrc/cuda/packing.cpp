// sparsecnx_cuda::gather_tiles and scatter_tiles: between dense tensors (B, C, H, W) and the rows of visible tiles.
// Each is the other's adjoint.
#include "packing.h"

#include "op.h"
#include "ops.h"

namespace sparsecnx::cuda {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // of what is counted in 32 bits
constexpr int64_t kLargestTile = 1 << 14;

// Raises unless the sizes can be worked with, and the tables are those of such a geometry.
void check(const DenseShape& shape, const Tensor& index, const Tensor& slots, const Tensor& like) {
  STD_TORCH_CHECK(
      shape.tile >= 1 && shape.tile <= kLargestTile && shape.height % shape.tile == 0 && shape.width % shape.tile == 0,
      "sparsecnx: tile is ", shape.tile, ", expected a divisor of ", shape.height, " and ", shape.width, ", at most ",
      kLargestTile);
  STD_TORCH_CHECK(shape.size == 1 || shape.size == 2 || shape.size == 4 || shape.size == 8, "sparsecnx: elements of ",
                  shape.size, " bytes are not supported");
  STD_TORCH_CHECK(shape.height < kMost && shape.width < kMost, "sparsecnx: images of ", shape.height, "x", shape.width,
                  " sites: expected fewer than 2^31 along each axis");
  STD_TORCH_CHECK(shape.channels >= 1 && shape.channels < kMost && shape.batch * shape.cells() < kMost,
                  "sparsecnx: ", shape.channels, " channels of ", shape.batch * shape.cells(),
                  " tiles: expected at least one channel and fewer than 2^31 of either");
  check_dense(index, "index", index.numel(), ScalarType::Long, like);
  check_dense(slots, "slots", shape.batch * shape.cells(), ScalarType::Int, like);
  STD_TORCH_CHECK(index.numel() <= slots.numel(), "sparsecnx: index has ", index.numel(), " tiles, expected at most ",
                  slots.numel());
}

}  // namespace

Tensor gather_tiles(const Tensor& dense, const Tensor& index, const Tensor& slots, int64_t tile) {
  STD_TORCH_CHECK(dense.dim() == 4, "sparsecnx: dense has ", dense.dim(), " dimensions, expected (B, C, H, W)");
  const DenseShape shape{.batch = dense.size(0),
                         .channels = dense.size(1),
                         .height = dense.size(2),
                         .width = dense.size(3),
                         .tile = tile,
                         .size = static_cast<int64_t>(dense.element_size())};
  check(shape, index, slots, dense);
  const OnDevice device(dense);
  const Tensor rows = empty_on(dense, {index.numel() * tile * tile, shape.channels}, dense.scalar_type());
  launch_gather_tiles(shape,
                      {.dense = data(dense),
                       .strides = {dense.stride(0), dense.stride(1), dense.stride(2), dense.stride(3)},
                       .index = data<int64_t>(index),
                       .tiles = index.numel(),
                       .rows = data(rows)},
                      current_stream(dense));
  return rows;
}

Tensor scatter_tiles(const Tensor& rows, const Tensor& fill, const Tensor& index, const Tensor& slots, int64_t batch,
                     int64_t height, int64_t width, int64_t tile) {
  const auto [count, channels] = feature_shape(rows, "rows");
  const DenseShape shape{.batch = batch,
                         .channels = channels,
                         .height = height,
                         .width = width,
                         .tile = tile,
                         .size = static_cast<int64_t>(rows.element_size())};
  STD_TORCH_CHECK(batch >= 0 && height >= 0 && width >= 0, "sparsecnx: batch, height and width are ", batch, ", ",
                  height, ", ", width, ", expected none below 0");
  check(shape, index, slots, rows);
  STD_TORCH_CHECK(count == index.numel() * tile * tile, "sparsecnx: rows has ", count, " rows, expected ",
                  index.numel() * tile * tile);
  check_dense(fill, "fill", channels, rows.scalar_type(), rows);
  const OnDevice device(rows);
  const Tensor dense = empty_on(rows, {batch, channels, height, width}, rows.scalar_type());
  launch_scatter_tiles(shape, {.rows = data(rows), .fill = data(fill), .slots = data<int>(slots), .dense = data(dense)},
                       current_stream(rows));
  return dense;
}

}  // namespace sparsecnx::cuda
