// sparsecnx_cuda::grn and its gradient.
#include "grn.h"

#include "op.h"
#include "ops.h"

namespace sparsecnx::cuda {
namespace {

GrnRows check(const Tensor& x, const Tensor& gamma, const Tensor& segments) {
  const auto [rows, channels] = feature_shape(x, "x");
  const Dtype dtype = dtype_of(x, "x");
  check_dense(gamma, "gamma", channels, ScalarType::Float, x);
  STD_TORCH_CHECK(segments.dim() == 1 && segments.numel() >= 1, "sparsecnx: segments must be (groups + 1,)");
  const int64_t groups = segments.numel() - 1;
  STD_TORCH_CHECK(groups < (int64_t{1} << 31), "sparsecnx: segments has ", groups, " groups, expected fewer than 2^31");
  STD_TORCH_CHECK(groups > 0 || rows == 0, "sparsecnx: segments has no groups, x has ", rows, " rows");
  check_dense(segments, "segments", groups + 1, ScalarType::Long, x);
  return {rows, channels, groups, data<int64_t>(segments), dtype};
}

}  // namespace

std::tuple<Tensor, Tensor> grn(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& segments,
                               double eps) {
  const GrnRows rows = check(x, gamma, segments);
  check_dense(beta, "beta", rows.channels, ScalarType::Float, x);
  const OnDevice device(x);
  const Tensor out = empty_on(x, {rows.rows, rows.channels}, x.scalar_type());
  const Tensor energy = empty_on(x, {rows.groups, rows.channels}, ScalarType::Float);
  const Tensor work = empty_on(x, {grn_work(rows, 1)}, ScalarType::Float);
  launch_grn(rows,
             {.x = data(x),
              .gamma = data<float>(gamma),
              .beta = data<float>(beta),
              .eps = static_cast<float>(eps),
              .out = data(out),
              .energy = data<float>(energy),
              .work = data<float>(work)},
             current_stream(x));
  return {out, energy};
}

std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& segments, const Tensor& energy, double eps) {
  const GrnRows rows = check(x, gamma, segments);
  check_dense(grad, "grad", x.numel(), x.scalar_type(), x);
  check_dense(energy, "energy", rows.groups * rows.channels, ScalarType::Float, x);
  const OnDevice device(x);
  const Tensor grad_x = empty_on(x, {rows.rows, rows.channels}, x.scalar_type());
  const Tensor grad_gamma = empty_on(x, {rows.channels}, ScalarType::Float);
  const Tensor grad_beta = empty_on(x, {rows.channels}, ScalarType::Float);
  const Tensor work = empty_on(x, {grn_work(rows, 2)}, ScalarType::Float);
  launch_grn_backward(rows,
                      {.grad = data(grad),
                       .x = data(x),
                       .gamma = data<float>(gamma),
                       .energy = data<float>(energy),
                       .eps = static_cast<float>(eps),
                       .grad_x = data(grad_x),
                       .grad_gamma = data<float>(grad_gamma),
                       .grad_beta = data<float>(grad_beta),
                       .work = data<float>(work)},
                      current_stream(x));
  return {grad_x, grad_gamma, grad_beta};
}

}  // namespace sparsecnx::cuda
