// sparsecnx::depthwise_conv and its weight gradient. The input gradient is the same operator with a flipped kernel.
#include "depthwise_conv.h"

namespace sparsecnx {

namespace {

constexpr int64_t kListed = 64;  // the most sites of a tile that is listed as a whole

// Returns sizes along one to three axes as those along three.
Box boxed(const Sizes& sizes) {
  Box box{1, 1, 1};
  std::copy_backward(sizes.begin(), sizes.end(), box.end());
  return box;
}

}  // namespace

Halo::Halo(const Box& tile, const Box& kernel)
    : tile(tile), kernel(kernel), sites(volume(tile)), taps(volume(kernel)), table_width(1), list(tile) {
  for (int axis = 0; axis < 3; ++axis) {
    reach[axis] = (kernel[axis] / 2 + tile[axis] - 1) / tile[axis];
    seen[axis] = tile[axis] + kernel[axis] - 1;
    table_width *= 2 * reach[axis] + 1;
  }
  if (sites > kListed) list[0] = 1;
}

void Halo::fill() {
  const std::vector<Sizes> parts = nested_parts({tile.begin(), tile.end()});
  const std::vector<Sizes> list_parts = nested_parts({list.begin(), list.end()});
  int64_t weight = 1;  // of a step to the next tile
  for (int axis = 2; axis >= 0; --axis) {
    for (int64_t i = 0; i < seen[axis]; ++i) {
      // Shifted by whole tiles so that division rounds the same way everywhere.
      const int64_t at = i - kernel[axis] / 2 + reach[axis] * tile[axis];
      slot[axis].push_back(static_cast<int32_t>(at / tile[axis] * weight));
      part[axis].push_back(static_cast<int32_t>(parts[axis][at % tile[axis]]));
    }
    for (const int64_t index : list_parts[axis]) listed[axis].push_back(static_cast<int32_t>(index));
    weight *= 2 * reach[axis] + 1;
  }
  for (int64_t y = 0; y < seen[1]; ++y) {
    for (int64_t x = 0; x < seen[2]; ++x) {
      slice_slot.push_back(slot[1][y] + slot[2][x]);
      slice_part.push_back(part[1][y] + part[2][x]);
    }
  }
}

Halo check_geometry(const Tensor& table, int64_t rows, const Sizes& tile, const Sizes& kernel) {
  const size_t axes = tile.size();
  check_size(static_cast<int64_t>(axes), "the number of axes", 1, 3);
  check_sizes(tile, "tile", axes, 1, kMostTile);
  check_sizes(kernel, "kernel", axes, 1, kMostKernel);
  for (const int64_t size : kernel)
    STD_TORCH_CHECK(size % 2 == 1, "sparsecnx: kernel is ", size, " sites wide, expected odd sizes");
  Halo halo(boxed(tile), boxed(kernel));
  check_size(halo.taps, "the number of taps", 1, kMostTaps);
  check_size(rows, "the number of rows", 0, INT32_MAX);
  STD_TORCH_CHECK(rows % halo.sites == 0, "sparsecnx: x has ", rows, " rows, expected a multiple of the tile's ",
                  halo.sites, " sites");
  check_dense(table, "table", rows / halo.sites * halo.table_width, ScalarType::Int);
  check_range(table, "table", rows / halo.sites);
  if (rows > 0) halo.fill();  // Without rows nothing bounds the tile, and nobody reads these lists.
  return halo;
}

Sizes check_kernel(const Tensor& weight, const char* name, int64_t channels, ScalarType dtype) {
  STD_TORCH_CHECK(weight.dim() > 2 && weight.size(0) == channels && weight.size(1) == 1, "sparsecnx: ", name,
                  " must be (", channels, ", 1, *kernel)");
  check_dense(weight, name, weight.numel(), dtype);
  Sizes kernel;
  for (int64_t axis = 2; axis < weight.dim(); ++axis) kernel.push_back(weight.size(axis));
  return kernel;
}

namespace {

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      Sizes tile) {
  const auto [rows, channels] = feature_shape(x, "x");
  const Halo halo = check_geometry(table, rows, tile, check_kernel(weight, "weight", channels, x.scalar_type()));
  Tensor out = fresh_like(x);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const std::vector<A> taps = taps_first<S>(weight, false);
    const A* offset = bias ? parameter<A>(*bias, "bias", channels, x) : nullptr;
    const Depthwise<S> job{halo,    data<int32_t>(table), channels, data<S>(x), 0, taps.data(), offset,
                           nullptr, data<S>(out),         0};
    parallel_for(0, rows / halo.sites, tiles_per_call(halo.sites),
                 [&](int64_t begin, int64_t end) { kernels<S>().depthwise(job, begin, end); });
  });
  return out;
}

Tensor depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table, Sizes tile, Sizes kernel) {
  const auto [rows, channels] = feature_shape(x, "x");
  check_dense(grad, "grad", x.numel(), x.scalar_type());
  const Halo halo = check_geometry(table, rows, tile, kernel);
  Sizes shape{channels, 1};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor out = empty(shape, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    WeightGradSum<S> sum(halo, channels);
    sum.add({halo, data<int32_t>(table), channels, data<S>(x), data<S>(grad), 0}, 0, rows / halo.sites, thread_count());
    sum.store(data<S>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_weight_grad", TORCH_BOX(&depthwise_conv_weight_grad));
}

}  // namespace
}  // namespace sparsecnx
