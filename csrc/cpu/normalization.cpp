// Operators that normalise or scale rows: Global Response Normalization, LayerNorm, stochastic depth.
#include "grn.h"
#include "op.h"

namespace sparsecnx {
namespace {

// Global Response Normalization reads the rows of a group twice: for its energy, then to scale them.
std::tuple<Tensor, Tensor> grn(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& splits,
                               double eps) {
  const auto [rows, channels] = feature_shape(x, "x");
  const int64_t* bounds = check_groups(splits, "splits", rows);
  const int64_t count = splits.numel() - 1;
  Tensor out = fresh_like(x);
  Tensor energy = empty({count, channels}, compute_dtype(x));
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* g = parameter<A>(gamma, "gamma", channels, x);
    const A* b = parameter<A>(beta, "beta", channels, x);
    const std::vector<RowBlock> blocks = split_rows(bounds, 0, count, channels);
    BlockSums<A> sums(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      kernels<S>().energy(data<S>(x) + block.begin * channels, block.rows(), channels, sums.at(i));
    });
    A* energies = data<A>(energy);
    std::fill_n(energies, count * channels, A(0));
    std::vector<std::vector<A>> scale(count);
    for_groups(blocks, [&](int64_t group, int64_t first, int64_t last) {
      sums.add_to(energies + group * channels, first, last);
      scale[group] = GrnResponse<A>(energies + group * channels, g, channels, eps).scale;
    });
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      kernels<S>().affine(data<S>(x) + block.begin * channels, scale[block.group].data(), b, nullptr, block.rows(),
                          channels, data<S>(out) + block.begin * channels);
    });
  });
  return {out, energy};
}

std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& splits, const Tensor& energy, double eps) {
  const auto [rows, channels] = feature_shape(x, "x");
  check_dense(grad, "grad", x.numel(), x.scalar_type());
  const int64_t* bounds = check_groups(splits, "splits", rows);
  const int64_t count = splits.numel() - 1;
  check_dense(energy, "energy", count * channels, compute_dtype(x));
  check_dense(gamma, "gamma", channels, compute_dtype(x));
  Tensor x_grad = fresh_like(x);
  Tensor gamma_grad = fresh_like(gamma), beta_grad = fresh_like(gamma);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* g = data<A>(gamma);
    const std::vector<RowBlock> blocks = split_rows(bounds, 0, count, channels);
    BlockSums<A> dot(blocks.size(), channels), total(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      const int64_t at = block.begin * channels;
      kernels<S>().dot_and_sum(data<S>(grad) + at, data<S>(x) + at, block.rows(), channels, dot.at(i), total.at(i));
    });
    A* dgamma = data<A>(gamma_grad);
    std::fill_n(dgamma, channels, A(0));
    total.store(data<A>(beta_grad));
    std::vector<std::vector<A>> scale(count), p(count);
    for_groups(blocks, [&](int64_t group, int64_t first, int64_t last) {
      std::vector<A> scale_grad(channels, A(0));
      dot.add_to(scale_grad.data(), first, last);
      const GrnResponse<A> response(data<A>(energy) + group * channels, g, channels, eps);
      p[group] = response.backward(scale_grad.data(), g, dgamma);
      scale[group] = response.scale;
    });
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      const int64_t at = block.begin * channels;
      kernels<S>().combine(data<S>(grad) + at, data<S>(x) + at, scale[block.group].data(), p[block.group].data(),
                           block.rows(), channels, data<S>(x_grad) + at);
    });
  });
  return {x_grad, gamma_grad, beta_grad};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const auto [rows, channels] = feature_shape(x, "x");
  Tensor out = fresh_like(x);
  Tensor moments = empty({rows, 2}, compute_dtype(x));
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
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
  const auto [rows, channels] = feature_shape(x, "x");
  check_dense(grad, "grad", x.numel(), x.scalar_type());
  check_dense(moments, "moments", 2 * rows, compute_dtype(x));
  check_dense(weight, "weight", channels, compute_dtype(x));
  Tensor x_grad = fresh_like(x);
  Tensor weight_grad = fresh_like(weight), bias_grad = fresh_like(weight);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* w = data<A>(weight);
    const std::array<int64_t, 2> all{0, rows};
    const std::vector<RowBlock> blocks = split_rows(all.data(), 0, 1, channels);
    BlockSums<A> dw(blocks.size(), channels), db(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      const int64_t at = block.begin * channels;
      kernels<S>().layer_norm_backward(data<S>(grad) + at, data<S>(x) + at, data<A>(moments) + 2 * block.begin, w,
                                       block.rows(), channels, data<S>(x_grad) + at, dw.at(i), db.at(i));
    });
    dw.store(data<A>(weight_grad));
    db.store(data<A>(bias_grad));
  });
  return {x_grad, weight_grad, bias_grad};
}

// Multiplies the rows of group n by scale[n] (stochastic depth). It is its own adjoint.
Tensor scale_rows(const Tensor& x, const Tensor& scale, const Tensor& splits) {
  const auto [rows, channels] = feature_shape(x, "x");
  const int64_t* bounds = check_groups(splits, "splits", rows);
  const int64_t images = splits.numel() - 1;
  Tensor out = fresh_like(x);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* factor = parameter<A>(scale, "scale", images, x);
    const std::vector<RowBlock> blocks = split_rows(bounds, 0, images, channels);
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      kernels<S>().scale_rows(data<S>(x) + block.begin * channels, factor[block.group], block.rows(), channels,
                              data<S>(out) + block.begin * channels);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("grn", TORCH_BOX(&grn));
  m.impl("grn_backward", TORCH_BOX(&grn_backward));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
}

}  // namespace
}  // namespace sparsecnx
