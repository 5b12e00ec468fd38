// sparsecnx::depthwise_conv and its weight gradient. The input gradient is the same operator with a flipped kernel.
#include "depthwise_conv.h"

namespace sparsecnx {

Halo check_geometry(const Tensor& table, int64_t rows, const Sizes& sides, const Sizes& kernel) {
  STD_TORCH_CHECK(kernel.size() == 2 && sides.size() == 2 && sides[0] == sides[1],
                  "sparsecnx: depthwise convolution takes square tiles of two dimensions");
  const int64_t tile = sides[0], kernel_h = kernel[0], kernel_w = kernel[1];
  check_size(tile, "tile", 1, kMostTile);
  STD_TORCH_CHECK(kernel_h > 0 && kernel_w > 0 && kernel_h % 2 == 1 && kernel_w % 2 == 1 &&
                      std::max(kernel_h, kernel_w) <= kMostKernel,
                  "sparsecnx: the kernel is ", kernel_h, "x", kernel_w, ", expected odd sizes up to ", kMostKernel);
  const int64_t sites = tile * tile;
  STD_TORCH_CHECK(rows % sites == 0, "sparsecnx: x has ", rows, " rows, expected a multiple of tile^2 = ", sites);
  Halo halo(tile, kernel_h, kernel_w);
  check_dense(table, "table", rows / sites * halo.table_width, ScalarType::Int);
  check_range(table, "table", rows / sites);
  if (rows > 0) halo.fill();  // Without rows nothing bounds the tile, and nobody reads these lists.
  return halo;
}

Sizes check_kernel(const Tensor& weight, const char* name, int64_t channels, ScalarType dtype) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1, "sparsecnx: ", name,
                  " must be (", channels, ", 1, kh, kw)");
  check_dense(weight, name, weight.numel(), dtype);
  return {weight.size(2), weight.size(3)};
}

namespace {

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& table,
                      Sizes tile) {
  const auto [rows, channels] = feature_shape(x, "x");
  const Halo halo = check_geometry(table, rows, tile, check_kernel(weight, "weight", channels, x.scalar_type()));
  Tensor out = torch::stable::empty_like(x);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const std::vector<A> taps = taps_first<S>(weight, false);
    const A* offset = bias ? parameter<A>(*bias, "bias", channels, x) : nullptr;
    const Depthwise<S> job{halo,    data<int32_t>(table), channels, data<S>(x), 0, taps.data(), offset,
                           nullptr, data<S>(out),         0};
    parallel_for(0, rows / product(tile), tiles_per_call(tile[0]),
                 [&](int64_t begin, int64_t end) { kernels<S>().depthwise(job, begin, end); });
  });
  return out;
}

Tensor depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& table, Sizes tile, Sizes kernel) {
  const auto [rows, channels] = feature_shape(x, "x");
  check_dense(grad, "grad", x.numel(), x.scalar_type());
  const Halo halo = check_geometry(table, rows, tile, kernel);
  Tensor out = empty({channels, 1, kernel[0], kernel[1]}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    WeightGradSum<S> sum(halo, channels);
    sum.add({halo, data<int32_t>(table), channels, data<S>(x), data<S>(grad), 0}, 0, rows / product(tile),
            torch::stable::get_num_threads());
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
