// sparsecnx_cuda::tile_index and sparsecnx_cuda::neighbour_table.
#include "layout.h"

#include "op.h"
#include "ops.h"

namespace sparsecnx::cuda {
namespace {

constexpr int64_t kMostCells = (int64_t{1} << 31) - 1;  // slots number them in 32 bits
constexpr int64_t kWidest = 1 << 24;                    // entries of the table of one tile

}  // namespace

std::tuple<Tensor, Tensor, Tensor> tile_index(const Tensor& mask, int64_t count, int64_t visible) {
  check_dtype(mask, "mask", ScalarType::Bool);
  STD_TORCH_CHECK(mask.dim() == 2 && mask.is_contiguous(), "sparsecnx: mask must be contiguous, (images, cells)");
  const int64_t images = mask.size(0), cells = mask.size(1);
  STD_TORCH_CHECK(mask.numel() <= kMostCells, "sparsecnx: mask has ", mask.numel(), " cells, expected fewer than 2^31");
  STD_TORCH_CHECK(images < kMostCells, "sparsecnx: mask has ", images, " images, expected fewer than 2^31 - 1");
  STD_TORCH_CHECK(0 <= count && count <= mask.numel(), "sparsecnx: count is ", count, ", expected 0 to ", mask.numel());
  STD_TORCH_CHECK(visible == -1 || (0 <= visible && visible <= cells && visible * images == count),
                  "sparsecnx: visible is ", visible, ", expected -1 or count / images, count is ", count,
                  " and mask has ", images, " images");
  const OnDevice device(mask);
  const Tensor index = empty_on(mask, {count}, ScalarType::Long);
  const Tensor splits = empty_on(mask, {images + 1}, ScalarType::Long);
  const Tensor slots = empty_on(mask, {images * cells}, ScalarType::Int);
  const Tensor chunk_visible = empty_on(mask, {tile_index_chunks(images, cells)}, ScalarType::Int);
  launch_tile_index({.mask = data<uint8_t>(mask),
                     .images = images,
                     .cells = cells,
                     .count = count,
                     .visible = visible,
                     .index = data<int64_t>(index),
                     .splits = data<int64_t>(splits),
                     .slots = data<int32_t>(slots),
                     .chunk_visible = data<int32_t>(chunk_visible)},
                    current_stream(mask));
  return {index, splits, slots};
}

Tensor neighbour_table(const Tensor& index, const Tensor& slots, std::vector<int64_t> grid, int64_t radius) {
  STD_TORCH_CHECK(index.dim() == 1, "sparsecnx: index must be (tiles,)");
  check_dense(index, "index", index.numel(), ScalarType::Long, index);
  STD_TORCH_CHECK(1 <= grid.size() && grid.size() <= 3, "sparsecnx: grid has ", grid.size(), " axes, expected 1 to 3");
  STD_TORCH_CHECK(radius >= 0 && radius < kMostCells, "sparsecnx: radius is ", radius, ", expected 0 or more");
  NeighbourTable job{.grid = {1, 1, 1}, .radius = {0, 0, 0}};
  int64_t cells = 1, width = 1;
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    STD_TORCH_CHECK(1 <= grid[axis] && grid[axis] <= kMostCells / cells, "sparsecnx: grid has ", grid[axis],
                    " tiles along axis ", axis, ", expected 1 or more, and fewer than 2^31 in all");
    cells *= grid[axis];
    width *= 2 * radius + 1;
    STD_TORCH_CHECK(width <= kWidest, "sparsecnx: radius is ", radius, ", expected at most ", kWidest,
                    " neighbours of a tile");
    job.grid[3 - grid.size() + axis] = static_cast<int>(grid[axis]);
    job.radius[3 - grid.size() + axis] = static_cast<int>(radius);
  }
  STD_TORCH_CHECK(slots.numel() % cells == 0 && slots.numel() <= kMostCells, "sparsecnx: slots has ", slots.numel(),
                  " elements, expected one for each of ", cells, " cells of every image, and fewer than 2^31");
  check_dense(slots, "slots", slots.numel(), ScalarType::Int, index);
  STD_TORCH_CHECK(index.numel() <= slots.numel(), "sparsecnx: index has ", index.numel(), " tiles, slots has ",
                  slots.numel(), " cells");
  const OnDevice device(index);
  const Tensor table = empty_on(index, {index.numel(), width}, ScalarType::Int);
  job.index = data<int64_t>(index);
  job.slots = data<int32_t>(slots);
  job.count = index.numel();
  job.table = data<int32_t>(table);
  launch_neighbour_table(job, current_stream(index));
  return table;
}

}  // namespace sparsecnx::cuda
