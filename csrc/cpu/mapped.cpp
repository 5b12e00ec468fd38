// sparsecnx::mapped_depthwise_conv on a kernel map, (rows_out, taps), and its weight gradient.
//
// The input gradient is the same operator on the inverse map, which holds for every input row the output row that reads
// it through each tap.
#include "mapped.h"

#include <algorithm>
#include <atomic>

namespace sparsecnx {

int64_t count_reads(const int32_t* map, int64_t count) {
  std::atomic<int64_t> total = 0;
  parallel_for(0, count, 1 << 16,
               [&](int64_t begin, int64_t end) { total += (end - begin) - std::count(map + begin, map + end, -1); });
  return total;
}

void contradict(const KernelMap& map, const int32_t* inverse) {
  const int64_t entries = map.rows_out * map.taps, reads = count_reads(map.given(), entries);
  int64_t missing = 0;
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t row = map.given()[i];
    missing += row >= 0 && inverse[row * map.taps + i % map.taps] != i / map.taps;
  }
  const int64_t others = count_reads(inverse, map.rows_in * map.taps) - (reads - missing);
  STD_TORCH_CHECK(false, "sparsecnx: inverse_map contradicts kernel_map: ", missing, " of ", reads,
                  " reads are not in it and it has ", others,
                  " others; leave it out, or pass the inverse of this kernel_map");
}

namespace {

constexpr int64_t kRows = 64;  // A thread takes at least this many.

Tensor mapped_depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& kernel_map, const std::optional<Tensor>& inverse_map, Sizes grid,
                             Sizes window) {
  const auto [rows, channels] = feature_shape(x, "x");
  const auto map = make_map(kernel_map, grid, window, rows);
  check_matrix(weight, "weight", map->taps, channels, x.scalar_type());
  const int32_t* inverse = nullptr;  // of a given map: the gradient gathers through it
  if (inverse_map && window.empty()) {
    check_matrix(*inverse_map, "inverse_map", rows, map->taps, ScalarType::Int);
    inverse = data<int32_t>(*inverse_map);
  }
  Tensor out = empty({map->rows_out, channels}, x.scalar_type());
  for_dtype(x, [&, channels = channels]<class S, class A>(Types<S, A>) {
    const std::vector<A> taps = widened<S>(weight);
    const A* offset = bias ? parameter<A>(*bias, "bias", channels, x) : nullptr;
    const MappedDepthwise<S> job{*map, inverse, channels, data<S>(x), taps.data(), offset, data<S>(out)};
    // The kernels compare the maps when they read them, while they are in cache.
    std::atomic<bool> agree = true;
    parallel_for(0, map->rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().mapped_depthwise(job, begin, end)) agree = false;
    });
    map->check();
    // With as many entries as reads, an inverse map that has every read has no other.
    const bool inverted = inverse == nullptr || (agree && count_reads(map->given(), map->rows_out * map->taps) ==
                                                              count_reads(inverse, map->rows_in * map->taps));
    if (!inverted) contradict(*map, inverse);
  });
  return out;
}

Tensor mapped_depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& kernel_map, Sizes grid,
                                         Sizes window) {
  const auto [rows, channels] = feature_shape(x, "x");
  const auto map = make_map(kernel_map, grid, window, rows);
  check_matrix(grad, "grad", map->rows_out, channels, x.scalar_type());
  Tensor out = empty({map->taps, channels}, x.scalar_type());
  for_dtype(x, [&, channels = channels]<class S, class A>(Types<S, A>) {
    const MappedDepthwiseWeightGrad<S> job{*map, channels, data<S>(x), data<S>(grad)};
    // One thread sums each slab of rows, and slabs are added up in order, so the result does not depend on timing.
    const int64_t width = map->taps * channels;
    const int64_t slabs = std::clamp<int64_t>(map->rows_out / kRows, 1, thread_count());
    BlockSums<A> sums(slabs, width);
    parallel_for(0, slabs, 1, [&](int64_t first, int64_t last) {
      for (int64_t slab = first; slab < last; ++slab) {
        const int64_t begin = map->rows_out * slab / slabs, end = map->rows_out * (slab + 1) / slabs;
        kernels<S>().mapped_depthwise_weight_grad(job, begin, end, sums.at(slab));
      }
    });
    map->check();
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
