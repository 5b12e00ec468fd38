// sparsecnx::conv: a general submanifold convolution, chunk by chunk: gather the rows under the kernel, one GEMM.
#include "op.h"
#include "ops.h"

namespace sparsecnx {
namespace {

// Output rows gathered at a time: 2^20 values, which stay in a shared cache.
int64_t chunk_rows(int64_t width) { return std::max<int64_t>(64, (int64_t{1} << 20) / std::max<int64_t>(width, 1)); }

struct Shape {
  int64_t rows_in, in, rows_out, taps, out;
  const int32_t* map;
};

Shape check(const Tensor& x, const Tensor& weight, const Tensor& kernel_map) {
  const auto [rows, channels] = feature_shape(x, "x");
  STD_TORCH_CHECK(kernel_map.dim() == 2, "sparsecnx: kernel_map must be (rows_out, taps)");
  check_dense(kernel_map, "kernel_map", kernel_map.numel());
  check_dtype(kernel_map, "kernel_map", ScalarType::Int);
  check_range(kernel_map, "kernel_map", rows);
  const int64_t taps = kernel_map.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == taps * channels, "sparsecnx: weight must be (C_out, ",
                  taps * channels, ")");
  check_dense(weight, "weight", weight.numel());
  check_dtype(weight, "weight", x.scalar_type());
  return {rows, channels, kernel_map.size(0), taps, weight.size(0), data<int32_t>(kernel_map)};
}

template <class S>
void gather(const Shape& shape, const Tensor& x, int64_t first, int64_t rows, S* columns) {
  parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
    kernels<S>().gather(data<S>(x), shape.map + (first + begin) * shape.taps, end - begin, shape.taps, shape.in,
                        columns + begin * shape.taps * shape.in);
  });
}

}  // namespace

Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& kernel_map) {
  const Shape shape = check(x, weight, kernel_map);
  Tensor out = empty({shape.rows_out, shape.out}, x.scalar_type());
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t width = shape.taps * shape.in, step = std::min(chunk_rows(width), shape.rows_out);
    std::vector<S> columns(step * width);
    const Matrix<S> w{data<S>(weight), shape.out, width};
    for (int64_t first = 0; first < shape.rows_out; first += step) {
      const int64_t rows = std::min(step, shape.rows_out - first);
      gather(shape, x, first, rows, columns.data());
      gemm<S>(data<S>(out) + first * shape.out, {columns.data(), rows, width}, w.t());
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const Tensor& kernel_map, bool needs_x) {
  const Shape shape = check(x, weight, kernel_map);
  check_dense(grad, "grad", shape.rows_out * shape.out);
  check_dtype(grad, "grad", x.scalar_type());
  Tensor x_grad = empty({needs_x ? shape.rows_in : 0, shape.in}, x.scalar_type());
  Tensor weight_grad = torch::stable::empty_like(weight);
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t width = shape.taps * shape.in, step = std::min(chunk_rows(width), shape.rows_out);
    std::vector<S> columns(step * width);
    std::vector<Compute<S>> sum(x_grad.numel(), Compute<S>(0));
    const Matrix<S> w{data<S>(weight), shape.out, width};
    const Scratch<Compute<S>> weight_sum(shape.out * width);
    GemmSum<S> dw(weight_sum.data(), shape.out, width);
    for (int64_t first = 0; first < shape.rows_out; first += step) {
      const int64_t rows = std::min(step, shape.rows_out - first);
      const Matrix<S> g{data<S>(grad) + first * shape.out, rows, shape.out};
      gather(shape, x, first, rows, columns.data());
      dw.add(g.t(), {columns.data(), rows, width});
      if (!needs_x) continue;
      gemm<S>(columns.data(), g, w);
      // Rows overlap under the kernel: each thread adds a range of channels, in the order of the rows.
      constexpr int64_t kSlice = 16;
      parallel_for(0, (shape.in + kSlice - 1) / kSlice, 1, [&](int64_t begin, int64_t end) {
        kernels<S>().scatter_add(columns.data(), shape.map + first * shape.taps, rows, shape.taps, shape.in,
                                 begin * kSlice, std::min(end * kSlice, shape.in), sum.data());
      });
    }
    kernels<S>().narrow(sum.data(), sum.size(), data<S>(x_grad));
    dw.finish();
    kernels<S>().narrow(weight_sum.data(), shape.out * width, data<S>(weight_grad));
  });
  return {x_grad, weight_grad};
}

}  // namespace sparsecnx
