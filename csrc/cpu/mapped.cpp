// sparsecnx::mapped_depthwise_conv on an explicit kernel map, (rows_out, taps), and its weight gradient.
//
// The input gradient is the same operator on the inverse map, which holds for every input row the output row that reads
// it through each tap.
#include "mapped.h"

#include <algorithm>
#include <atomic>

namespace sparsecnx {

Mapped check_map(const Tensor& x, const Tensor& kernel_map) {
  const auto [rows, channels] = feature_shape(x, "x");
  STD_TORCH_CHECK(kernel_map.dim() == 2, "sparsecnx: kernel_map must be (rows_out, taps), it has ", kernel_map.dim(),
                  " dimensions");
  STD_TORCH_CHECK(1 <= kernel_map.size(1) && kernel_map.size(1) <= kMostTaps, "sparsecnx: kernel_map has ",
                  kernel_map.size(1), " taps, expected 1 to ", kMostTaps);
  check_dense(kernel_map, "kernel_map", kernel_map.numel(), ScalarType::Int);
  return {rows, channels, kernel_map.size(0), kernel_map.size(1), data<int32_t>(kernel_map)};
}

int64_t count_reads(const int32_t* map, int64_t count) {
  std::atomic<int64_t> total = 0;
  parallel_for(0, count, 1 << 16,
               [&](int64_t begin, int64_t end) { total += (end - begin) - std::count(map + begin, map + end, -1); });
  return total;
}

void contradict(const Mapped& shape, const int32_t* inverse) {
  const int64_t reads = count_reads(shape.map, shape.rows_out * shape.taps);
  int64_t missing = 0;
  for (int64_t i = 0; i < shape.rows_out * shape.taps; ++i) {
    const int64_t row = shape.map[i];
    missing += row >= 0 && inverse[row * shape.taps + i % shape.taps] != i / shape.taps;
  }
  const int64_t others = count_reads(inverse, shape.rows_in * shape.taps) - (reads - missing);
  STD_TORCH_CHECK(false, "sparsecnx: inverse_map contradicts kernel_map: ", missing, " of ", reads,
                  " reads are not in it and it has ", others,
                  " others; leave it out, or pass the inverse of this kernel_map");
}

namespace {

constexpr int64_t kRows = 64;  // A thread takes at least this many.

Tensor mapped_depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& kernel_map, const std::optional<Tensor>& inverse_map) {
  const Mapped shape = check_map(x, kernel_map);
  check_matrix(weight, "weight", shape.taps, shape.channels, x.scalar_type());
  const int32_t* inverse = nullptr;  // The gradient gathers through it.
  if (inverse_map) {
    check_matrix(*inverse_map, "inverse_map", shape.rows_in, shape.taps, ScalarType::Int);
    inverse = data<int32_t>(*inverse_map);
  }
  Tensor out = empty({shape.rows_out, shape.channels}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const std::vector<A> taps = widened<S>(weight);
    const A* offset = bias ? parameter<A>(*bias, "bias", shape.channels, x) : nullptr;
    const MappedDepthwise<S> job{shape.map,  inverse,     shape.taps, shape.channels, shape.rows_in,
                                 data<S>(x), taps.data(), offset,     data<S>(out)};
    // The kernels check the maps when they read them, while they are in cache.
    std::atomic<bool> good = true;
    parallel_for(0, shape.rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().mapped_depthwise(job, begin, end)) good = false;
    });
    if (!good) check_range(kernel_map, "kernel_map", shape.rows_in);
    // With as many entries as reads, an inverse map that has every read has no other.
    const bool inverted = inverse == nullptr || (good && count_reads(shape.map, shape.rows_out * shape.taps) ==
                                                             count_reads(inverse, shape.rows_in * shape.taps));
    if (!inverted) contradict(shape, inverse);
  });
  return out;
}

Tensor mapped_depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& kernel_map) {
  const Mapped shape = check_map(x, kernel_map);
  check_matrix(grad, "grad", shape.rows_out, shape.channels, x.scalar_type());
  Tensor out = empty({shape.taps, shape.channels}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const MappedDepthwiseWeightGrad<S> job{shape.map,     shape.taps, shape.channels,
                                           shape.rows_in, data<S>(x), data<S>(grad)};
    // One thread sums each slab of rows, and slabs are added up in order, so the result does not depend on timing.
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

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("mapped_depthwise_conv", TORCH_BOX(&mapped_depthwise_conv));
  m.impl("mapped_depthwise_conv_weight_grad", TORCH_BOX(&mapped_depthwise_conv_weight_grad));
}

}  // namespace
}  // namespace sparsecnx
