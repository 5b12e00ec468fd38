// sparsecnx::max_pool, the maximum of the rows under a kernel map, its gradient, and sparsecnx::sum_pool, their sum.
#include <atomic>

#include "mapped.h"

namespace sparsecnx {
namespace {

constexpr int64_t kRows = 64;  // A thread takes at least this many.

ScalarType winner_dtype(int64_t taps) { return taps <= kMostShortTaps ? ScalarType::Byte : ScalarType::Int; }

// The inverse map of a given map is for the gradient alone, which compares it with the kernel map.
void check_inverse(const std::optional<Tensor>& inverse_map, const KernelMap& map) {
  if (inverse_map) check_matrix(*inverse_map, "inverse_map", map.rows_in, map.taps, ScalarType::Int);
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& x, const Tensor& kernel_map, const std::optional<Tensor>& inverse_map,
                                    Sizes grid, Sizes window) {
  const auto [rows, channels] = feature_shape(x, "x");
  const auto map = make_map(kernel_map, grid, window, rows);
  check_inverse(inverse_map, *map);
  Tensor out = empty({map->rows_out, channels}, x.scalar_type());
  Tensor winner = empty({map->rows_out, channels}, winner_dtype(map->taps));
  for_dtype(x, [&, channels = channels]<class S, class A>(Types<S, A>) {
    const MaxPool<S> job{*map, channels, data<S>(x), data<S>(out), winner.mutable_data_ptr()};
    parallel_for(0, map->rows_out, kRows, [&](int64_t begin, int64_t end) { kernels<S>().max_pool(job, begin, end); });
    map->check();
  });
  return {out, winner};
}

// The window is that of max_pool. A given kernel map needs its inverse.
Tensor max_pool_backward(const Tensor& grad, const Tensor& winner, const Tensor& kernel_map,
                         const std::optional<Tensor>& inverse_map, Sizes grid, Sizes window) {
  const auto [rows_out, channels] = feature_shape(grad, "grad");
  const bool given = window.empty();
  STD_TORCH_CHECK(!given || inverse_map, "sparsecnx: inverse_map is missing");
  const auto map = given ? make_map(*inverse_map, grid, window, rows_out, "inverse_map")
                         : make_map(kernel_map, grid, inverted(window), rows_out);
  if (given) check_matrix(kernel_map, "kernel_map", rows_out, map->taps, ScalarType::Int);
  check_matrix(winner, "winner", rows_out, channels, winner_dtype(map->taps));
  const int32_t* inverse = given ? data<int32_t>(kernel_map) : nullptr;
  Tensor out = empty({map->rows_out, channels}, grad.scalar_type());
  for_dtype(grad, [&, channels = channels]<class S, class A>(Types<S, A>) {
    const MaxPoolGrad<S> job{*map, inverse, channels, data<S>(grad), winner.mutable_data_ptr(), data<S>(out)};
    std::atomic<bool> agree = true;
    parallel_for(0, map->rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().max_pool_grad(job, begin, end)) agree = false;
    });
    map->check();
    // With as many entries as reads, an inverse map that agrees where it has entries has all of them.
    const int64_t entries = map->rows_out * map->taps;
    if (!given || (agree && count_reads(map->given(), entries) == count_reads(inverse, map->rows_in * map->taps)))
      return;
    check_range(kernel_map, "kernel_map", map->rows_out);
    contradict(KernelMap(inverse, map->rows_in, map->rows_out, map->taps, "kernel_map"), map->given());
  });
  return out;
}

// Its gradient is this operator with the maps exchanged.
Tensor sum_pool(const Tensor& x, const Tensor& kernel_map, const std::optional<Tensor>& inverse_map, double factor,
                Sizes grid, Sizes window) {
  const auto [rows, channels] = feature_shape(x, "x");
  const auto map = make_map(kernel_map, grid, window, rows);
  check_inverse(inverse_map, *map);
  Tensor out = empty({map->rows_out, channels}, x.scalar_type());
  for_dtype(x, [&, channels = channels]<class S, class A>(Types<S, A>) {
    const SumPool<S> job{*map, channels, data<S>(x), static_cast<A>(factor), data<S>(out)};
    parallel_for(0, map->rows_out, kRows, [&](int64_t begin, int64_t end) { kernels<S>().sum_pool(job, begin, end); });
    map->check();
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
  m.impl("sum_pool", TORCH_BOX(&sum_pool));
}

}  // namespace
}  // namespace sparsecnx
