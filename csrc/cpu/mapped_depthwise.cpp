// sparsecnx::mapped_depthwise_conv and its weight gradient. The input gradient is the same operator on the map turned
// around: for every input row the output row that reads it through each tap.
#include <atomic>

#include "op.h"
#include "ops.h"

namespace sparsecnx {
namespace {

constexpr int64_t kRows = 64;  // that a thread takes at least

struct Shape {
  int64_t rows_in, channels, rows_out, taps;
  const int32_t* map;
};

Shape check(const Tensor& x, const Tensor& kernel_map) {
  const auto [rows, channels] = feature_shape(x, "x");
  STD_TORCH_CHECK(kernel_map.dim() == 2, "sparsecnx: kernel_map must be (rows_out, taps)");
  check_dense(kernel_map, "kernel_map", kernel_map.numel());
  check_dtype(kernel_map, "kernel_map", ScalarType::Int);
  return {rows, channels, kernel_map.size(0), kernel_map.size(1), data<int32_t>(kernel_map)};
}

}  // namespace

Tensor mapped_depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& kernel_map, const std::optional<Tensor>&) {
  const Shape shape = check(x, kernel_map);
  check_matrix(weight, "weight", shape.taps, shape.channels);
  check_dtype(weight, "weight", x.scalar_type());
  Tensor out = empty({shape.rows_out, shape.channels}, x.scalar_type());
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const std::vector<A> taps = widened<S>(weight);
    const A* offset = bias ? parameter<A>(*bias, "bias", shape.channels, x) : nullptr;
    const MappedDepthwise<S> job{shape.map,  shape.taps,  shape.channels, shape.rows_in,
                                 data<S>(x), taps.data(), offset,         data<S>(out)};
    // The kernels check the map as they come to it, while it is in cache.
    std::atomic<bool> good = true;
    parallel_for(0, shape.rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().mapped_depthwise(job, begin, end)) good = false;
    });
    if (!good) check_range(kernel_map, "kernel_map", shape.rows_in);
  });
  return out;
}

Tensor mapped_depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& kernel_map) {
  const Shape shape = check(x, kernel_map);
  check_matrix(grad, "grad", shape.rows_out, shape.channels);
  check_dtype(grad, "grad", x.scalar_type());
  Tensor out = empty({shape.taps, shape.channels}, x.scalar_type());
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const MappedDepthwiseWeightGrad<S> job{shape.map,     shape.taps, shape.channels,
                                           shape.rows_in, data<S>(x), data<S>(grad)};
    // Each slab of rows is summed by one thread, the slabs in order: the result does not depend on timing.
    const int64_t width = shape.taps * shape.channels;
    const int64_t slabs = std::clamp<int64_t>(shape.rows_out / kRows, 1, torch::stable::get_num_threads());
    BlockSums<A> sums(slabs, width);
    std::atomic<bool> good = true;
    parallel_for(0, slabs, 1, [&](int64_t first, int64_t last) {
      for (int64_t slab = first; slab < last; ++slab) {
        const int64_t begin = shape.rows_out * slab / slabs, end = shape.rows_out * (slab + 1) / slabs;
        if (!kernels<S>().mapped_depthwise_weight_grad(job, begin, end, sums.at(slab))) good = false;
      }
    });
    if (!good) check_range(kernel_map, "kernel_map", shape.rows_in);
    std::vector<const A*> rest;
    for (int64_t slab = 1; slab < slabs; ++slab) rest.push_back(sums.at(slab));
    add_up<S>(sums.at(0), rest, width, data<S>(out));
  });
  return out;
}

}  // namespace sparsecnx
