// Shared by the operators: dispatch on dtype, typed access to tensors, division of work between threads.
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

// Returns how many threads parallel_for has: 1 within a call of it.
int64_t thread_count();

// Whether the calling thread is in a call of parallel_for.
bool& in_parallel();

struct InParallel {
  InParallel() { in_parallel() = true; }
  ~InParallel() { in_parallel() = false; }
};

// Calls f(begin, end) for parts of a range, of at least `grain`, in several threads. Within a call of itself it is one call.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (in_parallel() || end - begin <= grain) return f(begin, end);
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const InParallel inside;
    f(first, last);
  });
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

// Asks the kernel for large pages of memory that was just allocated, if it is large itself: one fault then maps 2 MiB.
// Otherwise a training step takes a fault for every 4 KiB of its gradients.
void ask_for_large_pages(void* at, int64_t bytes);

inline Tensor with_large_pages(Tensor x) {
  ask_for_large_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x;
}

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) {
  return with_large_pages(torch::stable::empty(shape, dtype, std::nullopt, std::nullopt, std::nullopt, std::nullopt));
}

inline Tensor fresh_like(const Tensor& x) { return with_large_pages(torch::stable::empty_like(x)); }

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
