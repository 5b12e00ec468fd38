// sparsecnx::layer_norm and its gradient.
#include "op.h"
#include "ops.h"

namespace sparsecnx {

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const auto [rows_, channels_] = feature_shape(x, "x");
  const int64_t rows = rows_, channels = channels_;
  Tensor out = torch::stable::empty_like(x);
  Tensor moments = empty({rows, 2}, compute_dtype(x));
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const A* w = parameter<A>(weight, "weight", channels, x);
    const A* b = parameter<A>(bias, "bias", channels, x);
    parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      const S* at = data<S>(x) + begin * channels;
      A* m = data<A>(moments) + 2 * begin;
      kernels<S>().moments(at, end - begin, channels, static_cast<A>(eps), m);
      kernels<S>().normalise(at, m, w, b, end - begin, channels, data<S>(out) + begin * channels);
    });
  });
  return {out, moments};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& moments) {
  const auto [rows_, channels_] = feature_shape(x, "x");
  const int64_t rows = rows_, channels = channels_;
  check_dense(grad, "grad", x.numel());
  check_dtype(grad, "grad", x.scalar_type());
  check_dense(moments, "moments", 2 * rows);
  check_dtype(moments, "moments", compute_dtype(x));
  Tensor x_grad = torch::stable::empty_like(x);
  Tensor weight_grad = torch::stable::empty_like(weight), bias_grad = torch::stable::empty_like(weight);
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const A* w = parameter<A>(weight, "weight", channels, x);
    const std::array<int64_t, 2> all{0, rows};
    const std::vector<RowBlock> blocks = split_rows(all.data(), 0, 1, channels);
    BlockSums<A> dw(blocks.size(), channels), db(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i) {
      const int64_t at = blocks[i].begin * channels;
      kernels<S>().layer_norm_backward(data<S>(grad) + at, data<S>(x) + at, data<A>(moments) + 2 * blocks[i].begin, w,
                                       blocks[i].end - blocks[i].begin, channels, data<S>(x_grad) + at, dw.at(i),
                                       db.at(i));
    });
    std::fill_n(data<A>(weight_grad), channels, A(0));
    std::fill_n(data<A>(bias_grad), channels, A(0));
    dw.add_to(data<A>(weight_grad));
    db.add_to(data<A>(bias_grad));
  });
  return {x_grad, weight_grad, bias_grad};
}

}  // namespace sparsecnx
