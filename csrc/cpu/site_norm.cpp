// sparsecnx::site_norm: batch, group and instance normalization with the activation that follows, and its gradient.
//
// The rows are in segments and the channels in groups; each segment and group has a mean and a biased variance. With
// z = (x - mean) scale + bias, where scale = weight rstd, and out = activation(z), the gradient of x is
//
//   g = grad activation'(z),  rstd (weight g - mean(weight g) - xhat mean(weight g xhat)),  xhat = (x - mean) rstd,
//
// means over a segment and group. Nothing of the size of x is kept but x.
#include "op.h"

namespace sparsecnx {
namespace {

// The sizes of a normalization.
struct Sizes {
  int64_t rows, channels, segments, groups, width;  // width: channels of a group
  const int64_t* bounds;                            // (segments + 1) rows
  Activation activation;
};

Sizes check_sizes(const Tensor& x, const Tensor& splits, int64_t groups, int64_t activation) {
  const auto [rows, channels] = feature_shape(x, "x");
  const int64_t* bounds = check_groups(splits, "splits", rows);
  check_size(groups, "groups", 1, channels);
  STD_TORCH_CHECK(channels % groups == 0, "sparsecnx: groups is ", groups, ", expected a divisor of ", channels);
  check_size(activation, "activation", 0, static_cast<int64_t>(Activation::kGelu));
  return {rows, channels, splits.numel() - 1, groups, channels / groups, bounds, static_cast<Activation>(activation)};
}

// What the kernels need: mean, scale and rstd of every segment and channel, (segments, channels) each, and the bias.
template <class A>
struct Affine {
  std::vector<A> mean, scale, rstd, bias;

  Affine(const Sizes& sizes, const A* means, const A* variances, const A* weight, const A* biases, double eps)
      : mean(sizes.segments * sizes.channels), scale(mean.size()), rstd(mean.size()), bias(sizes.channels, A(0)) {
    if (biases != nullptr) std::copy_n(biases, sizes.channels, bias.data());
    for (int64_t i = 0; i < sizes.segments * sizes.groups; ++i) {
      const double r = 1 / std::sqrt(static_cast<double>(variances[i]) + eps);
      for (int64_t at = i * sizes.width; at < (i + 1) * sizes.width; ++at) {
        mean[at] = means[i];
        rstd[at] = static_cast<A>(r);
        scale[at] = weight != nullptr ? static_cast<A>(weight[at % sizes.channels] * r) : rstd[at];
      }
    }
  }
};

template <class A>
const A* optional_parameter(const std::optional<Tensor>& value, const char* name, int64_t count, const Tensor& x) {
  return value ? parameter<A>(*value, name, count, x) : nullptr;
}

// Merges the moments of blocks of rows, and of the channels of a group (Chan, Golub and LeVeque, 1979), in double.
template <class S, class A = Compute<S>>
void moments(const Sizes& sizes, const std::vector<RowBlock>& blocks, const S* x, A* mean, A* variance) {
  const int64_t channels = sizes.channels;
  std::vector<double> means(blocks.size() * channels), squares(means.size());
  for_blocks(blocks, [&](int64_t i, RowBlock block) {
    kernels<S>().column_moments(x + block.begin * channels, block.rows(), channels, means.data() + i * channels,
                                squares.data() + i * channels);
  });
  std::fill_n(mean, sizes.segments * sizes.groups, A(0));
  std::fill_n(variance, sizes.segments * sizes.groups, A(0));
  for_groups(blocks, [&](int64_t segment, int64_t first, int64_t last) {
    double* m = means.data() + first * channels;
    double* q = squares.data() + first * channels;
    double count = blocks[first].rows();
    for (int64_t i = 1; i < last - first; ++i) {
      const double more = blocks[first + i].rows(), share = more / (count + more);
      const double *other = m + i * channels, *other_q = q + i * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double step = other[c] - m[c];
        m[c] += step * share;
        q[c] += other_q[c] + step * step * count * share;
      }
      count += more;
    }
    for (int64_t group = 0; group < sizes.groups; ++group, m += sizes.width, q += sizes.width) {
      double middle = 0, square = 0;
      for (int64_t c = 0; c < sizes.width; ++c) middle += m[c];
      middle /= static_cast<double>(sizes.width);
      for (int64_t c = 0; c < sizes.width; ++c) square += q[c] + count * (m[c] - middle) * (m[c] - middle);
      mean[segment * sizes.groups + group] = static_cast<A>(middle);
      variance[segment * sizes.groups + group] = static_cast<A>(square / (count * sizes.width));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> site_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& bias, const Tensor& splits, int64_t groups,
                                             double eps, int64_t activation, double slope) {
  const Sizes sizes = check_sizes(x, splits, groups, activation);
  Tensor out = fresh_like(x);
  Tensor mean = empty({sizes.segments, groups}, compute_dtype(x));
  Tensor variance = fresh_like(mean);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const std::vector<RowBlock> blocks = split_rows(sizes.bounds, 0, sizes.segments, sizes.channels);
    moments(sizes, blocks, data<S>(x), data<A>(mean), data<A>(variance));
    const Affine<A> affine(sizes, data<A>(mean), data<A>(variance),
                           optional_parameter<A>(weight, "weight", sizes.channels, x),
                           optional_parameter<A>(bias, "bias", sizes.channels, x), eps);
    for_blocks(blocks, [&](int64_t, RowBlock block) {
      const int64_t at = block.group * sizes.channels, begin = block.begin * sizes.channels;
      const SiteNorm<S> norm{sizes.channels,          sizes.activation,         static_cast<A>(slope),
                             affine.mean.data() + at, affine.scale.data() + at, affine.bias.data()};
      kernels<S>().site_norm(norm, data<S>(x) + begin, block.rows(), data<S>(out) + begin);
    });
  });
  return {out, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> site_norm_backward(const Tensor& grad, const Tensor& x,
                                                      const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const Tensor& mean,
                                                      const Tensor& variance, const Tensor& splits, int64_t groups,
                                                      double eps, int64_t activation, double slope, bool needs_x) {
  const Sizes sizes = check_sizes(x, splits, groups, activation);
  const int64_t channels = sizes.channels, count = sizes.segments * groups;
  check_dense(grad, "grad", x.numel(), x.scalar_type());
  Tensor x_grad = empty({needs_x ? sizes.rows : 0, channels}, x.scalar_type());
  Tensor weight_grad = empty({channels}, compute_dtype(x)), bias_grad = fresh_like(weight_grad);
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* w = optional_parameter<A>(weight, "weight", channels, x);
    const Affine<A> affine(sizes, parameter<A>(mean, "mean", count, x), parameter<A>(variance, "variance", count, x), w,
                           optional_parameter<A>(bias, "bias", channels, x), eps);
    std::vector<A> along(affine.scale.size(), A(0)), constant(affine.scale.size(), A(0));
    const auto norm = [&](int64_t segment) {
      const int64_t at = segment * channels;
      return SiteNorm<S>{channels,
                         sizes.activation,
                         static_cast<A>(slope),
                         affine.mean.data() + at,
                         affine.scale.data() + at,
                         affine.bias.data(),
                         along.data() + at,
                         constant.data() + at};
    };
    const std::vector<RowBlock> blocks = split_rows(sizes.bounds, 0, sizes.segments, channels);
    BlockSums<A> dots(blocks.size(), channels), totals(blocks.size(), channels);
    for_blocks(blocks, [&](int64_t i, RowBlock block) {
      const int64_t at = block.begin * channels;
      kernels<S>().site_norm_sums(norm(block.group), data<S>(grad) + at, data<S>(x) + at, block.rows(), dots.at(i),
                                  totals.at(i));
    });
    std::vector<double> weight_sum(channels, 0.0), bias_sum(channels, 0.0);
    for_groups(blocks, [&](int64_t segment, int64_t first, int64_t last) {
      std::vector<double> dot(channels, 0.0), total(channels, 0.0);
      for (int64_t i = first; i < last; ++i) {
        const A *more_dot = dots.at(i), *more_total = totals.at(i);
        for (int64_t c = 0; c < channels; ++c) {
          dot[c] += more_dot[c];
          total[c] += more_total[c];
        }
      }
      const A* rstd = affine.rstd.data() + segment * channels;
      for (int64_t c = 0; c < channels; ++c) {
        dot[c] *= rstd[c];
        weight_sum[c] += dot[c];
        bias_sum[c] += total[c];
      }
      const double size = static_cast<double>(sizes.bounds[segment + 1] - sizes.bounds[segment]) * sizes.width;
      for (int64_t group = 0; group < groups; ++group) {
        double mean_dot = 0, mean_total = 0;
        for (int64_t c = group * sizes.width; c < (group + 1) * sizes.width; ++c) {
          const double factor = w != nullptr ? w[c] : 1.0;
          mean_dot += factor * dot[c] / size;
          mean_total += factor * total[c] / size;
        }
        const double r = rstd[group * sizes.width];
        const int64_t at = segment * channels + group * sizes.width;
        std::fill_n(along.data() + at, sizes.width, static_cast<A>(-r * r * mean_dot));
        std::fill_n(constant.data() + at, sizes.width, static_cast<A>(-r * mean_total));
      }
    });
    std::copy_n(weight_sum.data(), channels, data<A>(weight_grad));
    std::copy_n(bias_sum.data(), channels, data<A>(bias_grad));
    if (needs_x) {
      for_blocks(blocks, [&](int64_t, RowBlock block) {
        const int64_t at = block.begin * channels;
        kernels<S>().site_norm_grad(norm(block.group), data<S>(grad) + at, data<S>(x) + at, block.rows(),
                                    data<S>(x_grad) + at);
      });
    }
  });
  return {x_grad, weight_grad, bias_grad};
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("site_norm", TORCH_BOX(&site_norm));
  m.impl("site_norm_backward", TORCH_BOX(&site_norm_backward));
}

}  // namespace
}  // namespace sparsecnx
