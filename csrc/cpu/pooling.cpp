// sparsecnx::max_pool, the maximum of the rows under a kernel map, its gradient, and sparsecnx::sum_pool, their sum.
#include <atomic>

#include "mapped.h"

namespace sparsecnx {
namespace {

constexpr int64_t kRows = 64;  // A thread takes at least this many.

ScalarType winner_dtype(int64_t taps) { return taps <= kMostShortTaps ? ScalarType::Byte : ScalarType::Int; }

// The inverse map is for the gradient alone, which compares it with the kernel map.
std::tuple<Tensor, Tensor> max_pool(const Tensor& x, const Tensor& kernel_map,
                                    const std::optional<Tensor>& inverse_map) {
  const Mapped shape = check_map(x, kernel_map);
  if (inverse_map) check_matrix(*inverse_map, "inverse_map", shape.rows_in, shape.taps, ScalarType::Int);
  Tensor out = empty({shape.rows_out, shape.channels}, x.scalar_type());
  Tensor winner = empty({shape.rows_out, shape.channels}, winner_dtype(shape.taps));
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const MaxPool<S> job{shape.map,  shape.taps,   shape.channels,           shape.rows_in,
                         data<S>(x), data<S>(out), winner.mutable_data_ptr()};
    std::atomic<bool> good = true;
    parallel_for(0, shape.rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().max_pool(job, begin, end)) good = false;
    });
    if (!good) check_range(kernel_map, "kernel_map", shape.rows_in);
  });
  return {out, winner};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& winner, const Tensor& kernel_map,
                         const Tensor& inverse_map) {
  const auto [rows_out, channels] = feature_shape(grad, "grad");
  STD_TORCH_CHECK(kernel_map.dim() == 2 && 1 <= kernel_map.size(1) && kernel_map.size(1) <= kMostTaps,
                  "sparsecnx: kernel_map must be (rows_out, taps) with 1 to ", kMostTaps, " taps");
  const int64_t taps = kernel_map.size(1), rows_in = inverse_map.size(0);
  check_matrix(kernel_map, "kernel_map", rows_out, taps, ScalarType::Int);
  check_matrix(inverse_map, "inverse_map", rows_in, taps, ScalarType::Int);
  check_matrix(winner, "winner", rows_out, channels, winner_dtype(taps));
  const Mapped shape{rows_in, channels, rows_out, taps, data<int32_t>(kernel_map)};
  const int32_t* inverse = data<int32_t>(inverse_map);
  Tensor out = empty({rows_in, channels}, grad.scalar_type());
  for_dtype(grad, [&]<class S, class A>(Types<S, A>) {
    const MaxPoolGrad<S> job{inverse,     shape.map, taps, channels, rows_out, data<S>(grad), winner.mutable_data_ptr(),
                             data<S>(out)};
    std::atomic<bool> good = true;
    parallel_for(0, rows_in, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().max_pool_grad(job, begin, end)) good = false;
    });
    // With as many entries as reads, an inverse map that agrees where it has entries has all of them.
    if (good && count_reads(shape.map, rows_out * taps) == count_reads(inverse, rows_in * taps)) return;
    check_range(kernel_map, "kernel_map", rows_in);
    check_range(inverse_map, "inverse_map", rows_out);
    contradict(shape, inverse);
  });
  return out;
}

// The inverse map is for the gradient alone: this operator with the maps exchanged.
Tensor sum_pool(const Tensor& x, const Tensor& kernel_map, const std::optional<Tensor>& inverse_map, double factor) {
  const Mapped shape = check_map(x, kernel_map);
  if (inverse_map) check_matrix(*inverse_map, "inverse_map", shape.rows_in, shape.taps, ScalarType::Int);
  Tensor out = empty({shape.rows_out, shape.channels}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const SumPool<S> job{shape.map,   shape.taps, shape.channels, shape.rows_in, data<S>(x), static_cast<A>(factor),
                         data<S>(out)};
    std::atomic<bool> good = true;
    parallel_for(0, shape.rows_out, kRows, [&](int64_t begin, int64_t end) {
      if (!kernels<S>().sum_pool(job, begin, end)) good = false;
    });
    if (!good) check_range(kernel_map, "kernel_map", shape.rows_in);
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
