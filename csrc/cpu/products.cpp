// Matrix products, by the kernel of kernels_product.h. docs/dev/kernels.md says why not by torch's libraries, with times.
#include "products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // C functions, ABI-stable like the rest
#include <torch/headeronly/util/shim_utils.h>

namespace sparsecnx {
namespace {

template <class S>
constexpr ScalarType kDtype = std::is_same_v<S, float>      ? ScalarType::Float
                              : std::is_same_v<S, double>   ? ScalarType::Double
                              : std::is_same_v<S, bfloat16> ? ScalarType::BFloat16
                                                            : ScalarType::Half;

// Returns memory as a tensor.
template <class S>
Tensor view(Matrix<S> matrix) {
  const std::array<int64_t, 2> shape{matrix.rows, matrix.columns};
  const int64_t stride = std::max<int64_t>(matrix.transposed ? matrix.rows : matrix.columns, 1);
  const std::array<int64_t, 2> along_rows{stride, 1}, along_columns{1, stride};
  return torch::stable::from_blob(const_cast<S*>(matrix.at), shape, matrix.transposed ? along_columns : along_rows,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kDtype<S>);
}

template <class S>
void torch_product(Matrix<S> a, Matrix<S> b, S* out, bool add) {
  if (a.rows == 0 || b.columns == 0) return;
  const Tensor result = view(Matrix<S>{out, a.rows, b.columns}), left = view(a), right = view(b);
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

// Rows that are worth a pass over the panels, and rows that fill registers.
constexpr int64_t kRows = 64, kFewRows = 8;
// A sum over rows packs about kPacked values at a time, which stay in L2, and at most kDepth rows.
constexpr int64_t kDepth = 1024, kPacked = int64_t{1} << 16;
// Few rows take so many columns at a time. Fewer than kLeastRows would leave most of a register empty, and torch's library is
// quicker then.
constexpr int64_t kColumns = 64, kLeastRows = 10;

// Calls f(first row, last row, first panel, last panel) in parallel, for parts that cover all rows and panels. Rows are
// divided first: threads that share panels read them from a common cache.
template <class F>
void for_rectangles(int64_t rows, int64_t panels, const F& f) {
  const int64_t threads = thread_count(), many = std::max<int64_t>(panels, 1);
  const auto needed = [&](int64_t parts) { return (threads + parts - 1) / parts; };
  int64_t down = std::clamp<int64_t>(rows / kRows, 1, threads);
  const int64_t across = std::min(needed(down), many);
  down = std::max(down, std::min(needed(across), rows / kFewRows));
  parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / across, c = i % across;
      f(rows * r / down, rows * (r + 1) / down, panels * c / across, panels * (c + 1) / across);
    }
  });
}

}  // namespace

template <class S>
bool by_torch() {
  if constexpr (std::is_same_v<S, bfloat16>) return multiplies_bfloat16();
  return false;
}

template <class S>
Factor<S>::Factor(Matrix<S> b, bool many_rows)
    : b_(b),
      packed_(many_rows && !by_torch<S>()),
      rows_(0),
      panels_(packed_ ? b.rows * (b.columns + kernels<S>().lanes) : 0) {
  const Kernels<S>& k = kernels<S>();
  const int64_t width = k.product_panel, step = b.transposed ? b.rows : b.columns;
  const int64_t panels = packed_ ? (b.columns + width - 1) / width : 0;
  parallel_for(0, panels, 1 + (1 << 14) / std::max<int64_t>(b.rows * width, 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * width; c < std::min(end * width, b.columns); c += width)
      k.pack_panel(b.at + (b.transposed ? c * step : c), step, b.transposed, b.rows, std::min(width, b.columns - c),
                   panels_.data() + c * b.rows);
  });
}

template <class S>
Factor<S>::Factor(int64_t rows, int64_t columns)
    : b_{nullptr, rows, columns},
      packed_(!by_torch<S>()),
      rows_(packed_ ? 0 : rows * columns),
      panels_(packed_ ? rows * (columns + kernels<S>().lanes) : 0) {
  b_.at = rows_.data();
}

template <class S>
void Factor<S>::put(int64_t first, const S* from, int64_t rows) {
  const int64_t columns = b_.columns, width = kernels<S>().product_panel, lanes = kernels<S>().lanes;
  if (!packed_) {
    std::copy_n(from, rows * columns, rows_.data() + first * columns);
    return;
  }
  for (int64_t c = 0; c < columns; c += width) {
    const int64_t count = std::min(width, columns - c), whole = (count + lanes - 1) / lanes * lanes;
    kernels<S>().pack_panel(from + c, columns, false, rows, count, panels_.data() + c * b_.rows + first * whole);
  }
}

template <class S>
void Factor<S>::part(Matrix<S> a, int64_t first, int64_t last, int64_t from, int64_t to, A* out, int64_t out_step,
                     bool add) const {
  const Kernels<S>& k = kernels<S>();
  const int64_t rows = last - first, depth = a.columns, width = k.product_panel;
  Product<A> job{nullptr, depth, 1, depth, panels_.data() + from * width * depth, out, out_step, add};
  const Scratch<A> wide(std::is_same_v<S, A> ? 0 : rows * depth);
  if constexpr (std::is_same_v<S, A>) {
    job.a = a.at + first * (a.transposed ? 1 : depth);
    if (a.transposed) job.a_row_step = 1, job.a_depth_step = a.rows;
  } else if (a.transposed) {
    for (int64_t d = 0; d < depth; ++d) k.widen(a.at + d * a.rows + first, rows, wide.data() + d * rows);
    job.a = wide.data(), job.a_row_step = 1, job.a_depth_step = rows;
  } else {
    k.widen(a.at + first * depth, rows * depth, wide.data());
    job.a = wide.data();
  }
  k.product(job, rows, std::min(to * width, b_.columns) - from * width);
}

// Computes the transpose of out, b' a', some columns at a time, so that b is read once.
template <class S>
void Factor<S>::few_rows(Matrix<S> a, A* out, bool add) const {
  const Kernels<A>& k = kernels<A>();
  const int64_t rows = a.rows, columns = b_.columns, step = (rows + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t panels = (rows + k.product_panel - 1) / k.product_panel;
  const Factor<S> right(a.t(), true);
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> turned(kColumns * step);
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, columns); first += kColumns) {
      const int64_t last = std::min(first + kColumns, columns);
      for (int64_t r = 0; add && r < rows; r += k.lanes)
        k.columns_to_lanes(out + r * columns + first, columns, std::min(k.lanes, rows - r), last - first,
                           turned.data() + r, step);
      right.part(b_.t(), first, last, 0, panels, turned.data(), step, add);
      for (int64_t r = 0; r < rows; r += k.lanes)
        k.lanes_to_columns(turned.data() + r, step, std::min(k.lanes, rows - r), last - first,
                           out + r * columns + first, columns);
    }
  });
}

template <class S>
void Factor<S>::accumulate(Matrix<S> a, A* out, bool add) const {
  const Kernels<S>& k = kernels<S>();
  const int64_t columns = b_.columns, width = k.product_panel;
  if (by_torch<S>()) {
    const int64_t count = a.rows * columns;
    const Scratch<S> product(count);
    const Scratch<A> wide(add ? count : 0);
    torch_product(a, b_, product.data(), false);
    k.widen(product.data(), count, add ? wide.data() : out);
    parallel_for(0, add ? count : 0, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] += wide.data()[i];
    });
    return;
  }
  if constexpr (std::is_same_v<S, A>) {
    if (!packed_ && a.rows < kLeastRows) return torch_product(a, b_, out, add);
  }
  if (!packed_) return few_rows(a, out, add);
  for_rectangles(a.rows, (columns + width - 1) / width, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
    part(a, first, last, from, to, out + first * columns + from * width, columns, add);
  });
}

template <class S>
void Factor<S>::multiply(Matrix<S> a, S* out, bool add) const {
  if constexpr (std::is_same_v<S, A>) return accumulate(a, out, add);
  if (by_torch<S>()) return torch_product(a, b_, out, add);
  const int64_t count = a.rows * b_.columns;
  const Scratch<A> wide(count);
  if (add) kernels<S>().widen(out, count, wide.data());
  accumulate(a, wide.data(), add);
  kernels<S>().narrow(wide.data(), count, out);
}

namespace {

// Returns a weight (rows, columns), which may be the transpose of a matrix, as one.
template <class S>
Matrix<S> check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == x.size(1) && 1 <= weight.size(0) &&
                      weight.size(0) <= kMostChannels,
                  "sparsecnx: weight must be a CPU tensor (C_out, C) with C = ", x.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "sparsecnx: weight is ",
                  torch::headeronly::toString(weight.scalar_type()), ", expected ",
                  torch::headeronly::toString(x.scalar_type()));
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const bool transposed = !weight.is_contiguous() && weight.stride(0) == 1 && weight.stride(1) == rows;
  STD_TORCH_CHECK(transposed || weight.is_contiguous(),
                  "sparsecnx: weight must be contiguous or the transpose of a contiguous matrix");
  check_storage(weight, "weight");
  return {data<S>(weight), rows, columns, transposed};
}

// Returns rows of any strides as contiguous ones. A gradient may so keep a part of every few rows without a copy.
Tensor contiguous_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, "sparsecnx: x must be a CPU tensor (rows, channels)");
  if (x.is_contiguous()) return x;
  check_storage(x, "x");
  return torch::stable::contiguous(x);
}

// sparsecnx::linear: x weight' + bias. x (rows, C), weight (C_out, C) or the transpose of a matrix, bias (C_out).
Tensor linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor x = contiguous_rows(given);
  const auto [rows, channels] = feature_shape(x, "x");
  Tensor out;
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const Matrix<S> matrix = check_weight<S>(weight, x);
    if (bias) check_dense(*bias, "bias", matrix.rows, x.scalar_type());
    out = empty({rows, matrix.rows}, x.scalar_type());
    S* const to = data<S>(out);
    parallel_for(0, bias ? rows : 0, 1 + (1 << 14) / matrix.rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) std::copy_n(data<S>(*bias), matrix.rows, to + row * matrix.rows);
    });
    Factor<S>(matrix.t(), rows > matrix.rows).multiply({data<S>(x), rows, channels}, to, bias.has_value());
  });
  return out;
}

// The gradient of weight, grad' x: a sum over rows, some of them at a time. If the weight has more rows than columns its
// transpose is computed, whose panels have fewer columns left over.
Tensor linear_weight_grad(const Tensor& grad, const Tensor& given) {
  const Tensor x = contiguous_rows(given);
  const auto [rows, columns] = feature_shape(x, "x");
  const int64_t channels = feature_shape(grad, "grad")[1];
  check_matrix(grad, "grad", rows, channels, x.scalar_type());
  const Tensor out = empty({channels, columns}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const Kernels<S>& k = kernels<S>();
    S* const to = data<S>(out);
    Matrix<S> left{data<S>(grad), rows, channels}, right{data<S>(x), rows, columns};
    if (by_torch<S>()) return torch_product(left.t(), right, to, false);
    const bool turned = channels > columns;
    if (turned) std::swap(left, right);
    const Scratch<A> own(turned || !std::is_same_v<S, A> ? out.numel() : 0);
    A* const sum = turned || !std::is_same_v<S, A> ? own.data() : reinterpret_cast<A*>(to);
    const int64_t step = std::clamp<int64_t>(kPacked / right.columns, kRows, kDepth);
    for (int64_t row = 0; row == 0 || row < rows; row += step) {
      const int64_t count = std::min(step, rows - row);
      const Matrix<S> a{left.at + row * left.columns, count, left.columns};
      Factor<S>({right.at + row * right.columns, count, right.columns}, true).accumulate(a.t(), sum, row > 0);
    }
    if (turned) {
      for (int64_t r = 0; r < channels; r += k.lanes)
        k.lanes_to_columns(sum + r, channels, std::min(k.lanes, channels - r), columns, to + r * columns, columns);
    } else if (!std::is_same_v<S, A>) {
      k.narrow(sum, out.numel(), to);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_weight_grad", TORCH_BOX(&linear_weight_grad));
}

}  // namespace

template bool by_torch<float>();
template bool by_torch<double>();
template bool by_torch<bfloat16>();
template bool by_torch<half>();
template class Factor<float>;
template class Factor<double>;
template class Factor<bfloat16>;
template class Factor<half>;

}  // namespace sparsecnx
