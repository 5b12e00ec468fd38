// sparsecnx::grn and its gradient: two passes over the rows of a segment each.
#include "grn.h"

#include "op.h"
#include "ops.h"

namespace sparsecnx {

std::tuple<Tensor, Tensor> grn(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& segments,
                               double eps) {
  const auto [rows, channels_] = feature_shape(x, "x");
  const int64_t channels = channels_;
  const int64_t* splits = check_splits(segments, "segments", rows);
  const int64_t count = segments.numel() - 1;
  Tensor out = torch::stable::empty_like(x);
  Tensor energy = empty({count, channels}, compute_dtype(x));
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const A* g = parameter<A>(gamma, "gamma", channels, x);
    const A* b = parameter<A>(beta, "beta", channels, x);
    const std::vector<RowBlock> blocks = split_rows(splits, 0, count, channels);
    BlockSums<A> sums(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock block = blocks[i];
      kernels<S>().energy(data<S>(x) + block.begin * channels, block.end - block.begin, channels, sums.at(i));
    });
    A* energies = data<A>(energy);
    std::fill_n(energies, count * channels, A(0));
    std::vector<std::vector<A>> scale(count);
    for_segments(blocks, [&](int64_t segment, int64_t first, int64_t last) {
      sums.add_to(energies + segment * channels, first, last);
      scale[segment] = GrnResponse<A>(energies + segment * channels, g, channels, eps).scale;
    });
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock block = blocks[i];
      kernels<S>().affine(data<S>(x) + block.begin * channels, scale[block.segment].data(), b, nullptr,
                          block.end - block.begin, channels, data<S>(out) + block.begin * channels);
    });
  });
  return {out, energy};
}

std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& segments, const Tensor& energy, double eps) {
  const auto [rows, channels_] = feature_shape(x, "x");
  const int64_t channels = channels_;
  check_dense(grad, "grad", x.numel());
  check_dtype(grad, "grad", x.scalar_type());
  const int64_t* splits = check_splits(segments, "segments", rows);
  const int64_t count = segments.numel() - 1;
  check_dense(energy, "energy", count * channels);
  check_dtype(energy, "energy", compute_dtype(x));
  Tensor x_grad = torch::stable::empty_like(x);
  Tensor gamma_grad = torch::stable::empty_like(gamma), beta_grad = torch::stable::empty_like(gamma);
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const A* g = parameter<A>(gamma, "gamma", channels, x);
    const std::vector<RowBlock> blocks = split_rows(splits, 0, count, channels);
    BlockSums<A> dot(blocks.size(), channels), total(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock block = blocks[i];
      const int64_t at = block.begin * channels;
      kernels<S>().dot_and_sum(data<S>(grad) + at, data<S>(x) + at, block.end - block.begin, channels, dot.at(i),
                               total.at(i));
    });
    A* dgamma = data<A>(gamma_grad);
    A* dbeta = data<A>(beta_grad);
    std::fill_n(dgamma, channels, A(0));
    std::fill_n(dbeta, channels, A(0));
    total.add_to(dbeta);
    std::vector<std::vector<A>> scale(count), p(count);
    for_segments(blocks, [&](int64_t segment, int64_t first, int64_t last) {
      std::vector<A> scale_grad(channels, A(0));
      dot.add_to(scale_grad.data(), first, last);
      const GrnResponse<A> response(data<A>(energy) + segment * channels, g, channels, eps);
      p[segment] = response.backward(scale_grad.data(), g, dgamma);
      scale[segment] = response.scale;
    });
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock block = blocks[i];
      const int64_t at = block.begin * channels;
      kernels<S>().combine(data<S>(grad) + at, data<S>(x) + at, scale[block.segment].data(), p[block.segment].data(),
                           block.end - block.begin, channels, data<S>(x_grad) + at);
    });
  });
  return {x_grad, gamma_grad, beta_grad};
}

}  // namespace sparsecnx
