// Matrix products. Those in float32 that are large enough go to oneDNN, the others to torch's BLAS.
//
// On AMD's processors MKL, torch's BLAS, uses AVX2 where there is AVX-512, and oneDNN is more than twice as fast
// (docs/dev/kernels.md). Torch takes oneDNN itself for 16 bits, and for convolutions.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // C functions, ABI-stable like the rest
#include <torch/headeronly/util/shim_utils.h>

#include "op.h"

// From shim_cpu.h, which includes what is not stable. Torch lacks the function where it was built without oneDNN.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_cpu__linear_pointwise(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, const double**,
                                 int64_t, const char**, AtenTensorHandle*);

namespace sparsecnx {
namespace {

// The least rows * depth * columns of a product by oneDNN. Below it a call costs more than it saves: 64^3 takes 13 us,
// 7 through MKL; 128^3 takes 28 us, 40 through MKL. A size that is new costs oneDNN 0.3 ms once.
constexpr int64_t kLeastProduct = int64_t{1} << 21;
// A product into memory that is there already is copied to it, which short sums do not repay: their product goes to
// oneDNN where it has at most so many values, long sums always.
constexpr int64_t kMostCopied = int64_t{1} << 20, kLongSum = 512;
// Rows of a step of a weight gradient. With 1024 the transposed step would have all its rows in the same set of L1.
constexpr int64_t kGradRows = 1008;

bool by_onednn(int64_t rows, int64_t depth, int64_t columns, ScalarType dtype) {
  static const bool there = &aoti_torch_cpu__linear_pointwise != nullptr && isa() == 2;
  return there && dtype == ScalarType::Float && rows * columns >= (kLeastProduct + depth - 1) / depth;
}

// Returns memory as a tensor.
Tensor view(Matrix<void> matrix, ScalarType dtype) {
  const std::array<int64_t, 2> shape{matrix.rows, matrix.columns};
  const int64_t stride = std::max<int64_t>(matrix.transposed ? matrix.rows : matrix.columns, 1);
  const std::array<int64_t, 2> along_rows{stride, 1}, along_columns{1, stride};
  return torch::stable::from_blob(matrix.at, shape, matrix.transposed ? along_columns : along_rows,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// Returns x weight' + bias by oneDNN. The rows of x are contiguous; weight may be the transpose of a matrix.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  AtenTensorHandle out = nullptr, offset = bias == nullptr ? nullptr : bias->get();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias == nullptr ? nullptr : &offset,
                                                          "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, float* out) {
  const int64_t lanes = kernels<float>().lanes;
  for (int64_t c = 0; c < columns; c += lanes)
    kernels<float>().lanes_to_columns(from + c, columns, std::min(lanes, columns - c), rows, out + c * rows, rows);
}

void gemm_raw(void* out, Matrix<void> a, Matrix<void> b, ScalarType dtype, bool add) {
  if (a.rows == 0 || b.columns == 0) return;
  const bool repaid = a.columns >= kLongSum || a.rows * b.columns <= kMostCopied;
  if (a.columns > 0 && repaid && by_onednn(a.rows, a.columns, b.columns, dtype)) {
    const Scratch<float> packed(a.transposed ? a.rows * a.columns : 0);
    if (a.transposed) {
      transpose(static_cast<const float*>(a.at), a.columns, a.rows, packed.data());
      a = {packed.data(), a.rows, a.columns};
    }
    const Tensor product = onednn_linear(view(a, dtype), view(b.t(), dtype), nullptr);
    const float* from = data<float>(product);
    float* to = static_cast<float*>(out);
    parallel_for(0, product.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      if (!add) return static_cast<void>(std::copy(from + begin, from + end, to + begin));
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
    return;
  }
  const Tensor result = view({out, a.rows, b.columns}, dtype), left = view(a, dtype), right = view(b, dtype);
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

namespace {

// Returns a weight (rows, columns), which may be the transpose of a matrix, as one.
Matrix<void> check_weight(const Tensor& weight, const Tensor& x) {
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
  return {weight.mutable_data_ptr(), rows, columns, transposed};
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
  const Matrix<void> matrix = check_weight(weight, x);
  const ScalarType dtype = x.scalar_type();
  if (bias) check_dense(*bias, "bias", matrix.rows, dtype);
  if (by_onednn(rows, channels, matrix.rows, dtype))
    return onednn_linear(x, view(matrix, dtype), bias ? &*bias : nullptr);
  Tensor out = empty({rows, matrix.rows}, dtype);
  const Tensor right = view(matrix.t(), dtype);
  if (rows == 0) return out;
  if (bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias->get(), x.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), x.get(), right.get()));
  }
  return out;
}

// The gradient of weight: grad' x. Each thread sums a slab of rows step by step, and slabs are added up in order.
Tensor linear_weight_grad(const Tensor& grad, const Tensor& given) {
  const Tensor x = contiguous_rows(given);
  const auto [rows, columns] = feature_shape(x, "x");
  const int64_t channels = feature_shape(grad, "grad")[1];
  check_matrix(grad, "grad", rows, channels, x.scalar_type());
  const Tensor out = empty({channels, columns}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const int64_t count = channels * columns;
    if (rows < kLongSum && count > kMostCopied)
      return gemm(data<S>(out), Matrix<S>{data<S>(grad), rows, channels}.t(), Matrix<S>{data<S>(x), rows, columns});
    const int64_t slabs = std::clamp<int64_t>(rows / kGradRows, 1, torch::stable::get_num_threads());
    std::vector<Scratch<A>> memory;
    std::vector<A*> sums;
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const bool in_place = slab == 0 && std::is_same_v<S, A>;
      memory.emplace_back(in_place ? 0 : count);
      sums.push_back(in_place ? data<A>(out) : memory.back().data());
    }
    const auto sum = [&](int64_t slab) {
      GemmSum<S> total(sums[slab], channels, columns);
      const int64_t end = rows * (slab + 1) / slabs;
      for (int64_t row = rows * slab / slabs; row < end; row += kGradRows) {
        const int64_t step = std::min(kGradRows, end - row);
        total.add(Matrix<S>{data<S>(grad) + row * channels, step, channels}.t(),
                  Matrix<S>{data<S>(x) + row * columns, step, columns});
      }
      total.finish();
    };
    if (slabs == 1) {
      sum(0);  // A single slab has all threads.
    } else {
      parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slab = begin; slab < end; ++slab) sum(slab);
      });
    }
    add_up<S>(sums[0], {sums.begin() + 1, sums.end()}, count, data<S>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_weight_grad", TORCH_BOX(&linear_weight_grad));
}

}  // namespace
}  // namespace sparsecnx
