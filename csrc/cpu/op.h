// Shared by the operators: dispatch on dtype, typed access to tensors, GEMMs, division of work between threads.
// Only PyTorch's ABI-stable headers are used, so that one build serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "storage.h"

namespace sparsecnx {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// The storage type of a floating dtype, and the type that it is computed in.
template <class S, class A = Compute<S>>
struct Types {};

// Calls f(Types<S>()) for the dtype of a tensor.
template <class F>
void for_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(Types<float>());
    case ScalarType::Double:
      return f(Types<double>());
    case ScalarType::BFloat16:
      return f(Types<bfloat16>());
    case ScalarType::Half:
      return f(Types<half>());
    default:
      STD_TORCH_CHECK(false, "sparsecnx: dtype ", torch::headeronly::toString(x.scalar_type()),
                      " is not supported; expected float32, float64, bfloat16 or float16");
  }
}

// Returns the data of a contiguous CPU tensor. T is the storage type and is not checked against the dtype.
template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Limits of sizes that no memory bounds: a tensor of 0 rows can have 2^60 channels. Below them, no product of a kernel's
// sizes overflows, and no loop runs for ever. Tiles and kernels have the limits of the CUDA operators.
constexpr int64_t kMostChannels = 1 << 20, kMostTaps = 1 << 20, kMostTile = 1 << 15, kMostKernel = 1023;

// Raises unless `value`, called `what`, is in [low, high].
void check_size(int64_t value, const char* what, int64_t low, int64_t high);

// Raises unless int64 holds the product of sizes that are not negative, with 0 counted as 1, as strides count it.
void check_product(const std::vector<int64_t>& sizes, const char* name);

// Raises unless x is a contiguous CPU tensor of that many elements and that dtype, with memory for them.
void check_dense(const Tensor& x, const char* name, int64_t numel, ScalarType dtype);

// Raises unless x is a contiguous (rows, columns) CPU tensor of that dtype.
void check_matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType dtype);

// Checks a feature matrix and returns (rows, channels); there is at least one channel.
std::array<int64_t, 2> feature_shape(const Tensor& x, const char* name);

// Raises unless all entries of an int32 table are -1 or positions below `count`.
void check_range(const int32_t* table, int64_t entries, const char* name, int64_t count);
inline void check_range(const Tensor& table, const char* name, int64_t count) {
  check_range(data<int32_t>(table), table.numel(), name, count);
}

// Returns the dtype of per-channel parameters and statistics.
inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks a per-channel parameter and returns its data.
template <class A>
const A* parameter(const Tensor& value, const char* name, int64_t channels, const Tensor& x) {
  check_dense(value, name, channels, compute_dtype(x));
  return data<A>(value);
}

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

// --- division of work between threads --------------------------------------------------------------------------------

// A run of rows of one group (the rows that GRN normalises together).
struct RowBlock {
  int64_t group, begin, end;

  int64_t rows() const { return end - begin; }
};

// Divides the rows of groups [first, last) into blocks that occupy a thread for about ten microseconds.
std::vector<RowBlock> split_rows(const int64_t* splits, int64_t first, int64_t last, int64_t channels);

// Checks the boundaries of groups (groups + 1 ascending positions that cover all rows) and returns them.
const int64_t* check_groups(const Tensor& splits, const char* name, int64_t rows);

// Calls f(index, block) for every block, in parallel.
template <class F>
void for_blocks(const std::vector<RowBlock>& blocks, const F& f) {
  parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, blocks[i]);
  });
}

// Sums over rows. Each block has a partial sum; they are added up in order, so the result does not depend on timing.
template <class A>
class BlockSums {
 public:
  BlockSums(size_t blocks, int64_t width) : width_(width), partial_(blocks * width, A(0)) {}
  A* at(int64_t block) { return partial_.data() + block * width_; }
  // total += partial sums of blocks [first, last)
  void add_to(A* total, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const A* row = at(i);
      for (int64_t c = 0; c < width_; ++c) total[c] += row[c];
    }
  }
  void add_to(A* total) { add_to(total, 0, width_ == 0 ? 0 : static_cast<int64_t>(partial_.size()) / width_); }
  // total = partial sums of all blocks
  void store(A* total) {
    std::fill_n(total, width_, A(0));
    add_to(total);
  }

 private:
  int64_t width_;
  std::vector<A> partial_;
};

// Calls f(group, first block, last block) for every run of blocks of one group.
template <class F>
void for_groups(const std::vector<RowBlock>& blocks, const F& f) {
  for (size_t first = 0; first < blocks.size();) {
    size_t last = first;
    while (last < blocks.size() && blocks[last].group == blocks[first].group) ++last;
    f(blocks[first].group, static_cast<int64_t>(first), static_cast<int64_t>(last));
    first = last;
  }
}

// --- matrix products (products.cpp) ----------------------------------------------------------------------------------

// A row-major matrix in memory that it does not own, or the transpose of one.
template <class T>
struct Matrix {
  T* at;
  int64_t rows, columns;
  bool transposed = false;  // `at` holds (columns, rows)

  Matrix t() const { return {at, columns, rows, !transposed}; }
};

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float>      ? ScalarType::Float
                              : std::is_same_v<T, double>   ? ScalarType::Double
                              : std::is_same_v<T, bfloat16> ? ScalarType::BFloat16
                                                            : ScalarType::Half;

void gemm_raw(void* out, Matrix<void> a, Matrix<void> b, ScalarType dtype, bool add);

// out = a b or, with `add`, out += a b
template <class T>
void gemm(T* out, Matrix<T> a, Matrix<T> b, bool add = false) {
  gemm_raw(out, {a.at, a.rows, a.columns, a.transposed}, {b.at, b.rows, b.columns, b.transposed}, kDtype<T>, add);
}

// out (columns, rows) = the transpose of a matrix (rows, columns), in one thread
void transpose(const float* from, int64_t rows, int64_t columns, float* out);

// out (rows, columns) = a sum of products in the computing type. Each 16-bit product is rounded once, their sum never.
// The memory belongs to the caller and need not be cleared.
template <class S>
class GemmSum {
  using A = Compute<S>;

 public:
  GemmSum(A* out, int64_t rows, int64_t columns) : out_(out), rows_(rows), columns_(columns), count_(rows * columns) {}
  void add(Matrix<S> a, Matrix<S> b) {
    if constexpr (!std::is_same_v<S, A>) {
      product_.resize(count_);
      widened_.resize(count_);
      gemm(product_.data(), a, b);
      kernels<S>().widen(product_.data(), count_, empty_ ? out_ : widened_.data());
      for (int64_t i = 0; !empty_ && i < count_; ++i) out_[i] += widened_[i];
    } else if (turned()) {
      gemm(out_, b.t(), a.t(), !empty_);
    } else {
      gemm(out_, a, b, !empty_);
    }
    empty_ = false;
  }
  // Completes the sum, which is zero if nothing was added.
  void finish() {
    if (empty_) std::fill_n(out_, count_, A(0));
    if constexpr (std::is_same_v<S, float>) {
      if (!empty_ && turned()) {
        const std::vector<float> sum(out_, out_ + count_);
        transpose(sum.data(), columns_, rows_, out_);
      }
    }
    empty_ = false;
  }

 private:
  // Whether the sum is kept transposed: oneDNN is quicker where the first matrix is the smaller one (products.cpp).
  bool turned() const { return std::is_same_v<S, float> && rows_ > columns_; }

  A* out_;
  int64_t rows_, columns_, count_;
  bool empty_ = true;
  std::vector<S> product_;
  std::vector<A> widened_;
};

void* push_scratch(int64_t bytes);
void pop_scratch(void* at, int64_t bytes);

// Uninitialised memory that an operator needs while it runs. It comes from a stack that the calling thread keeps
// between calls, up to a limit, so that training does not pay for fresh pages at every operator. The thread that made
// an object must destroy it. Neighbours in the stack may be destroyed in any order if nothing new is made in between.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(count * static_cast<int64_t>(sizeof(T))), at_(push_scratch(bytes_)) {}
  ~Scratch() {
    if (at_ != nullptr) pop_scratch(at_, bytes_);
  }
  Scratch(Scratch&& other) noexcept : bytes_(other.bytes_), at_(std::exchange(other.at_, nullptr)) {}
  T* data() const { return static_cast<T*>(at_); }

 private:
  int64_t bytes_;
  void* at_;
};

// Adds `rest` to `total` in order and narrows the sum into `out`, which may be `total`. Elements are divided between
// threads.
template <class S>
void add_up(Compute<S>* total, const std::vector<const Compute<S>*>& rest, int64_t count, S* out) {
  parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (const Compute<S>* other : rest) {
      for (int64_t i = begin; i < end; ++i) total[i] += other[i];
    }
    if (static_cast<void*>(total) != static_cast<void*>(out))
      kernels<S>().narrow(total + begin, end - begin, out + begin);
  });
}

// Returns the values of a tensor in the computing type.
template <class S>
std::vector<Compute<S>> widened(const Tensor& x) {
  std::vector<Compute<S>> out(x.numel());
  kernels<S>().widen(data<S>(x), x.numel(), out.data());
  return out;
}

}  // namespace sparsecnx
