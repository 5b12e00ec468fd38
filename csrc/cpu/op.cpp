#include "op.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>

namespace sparsecnx {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKept = int64_t{128} << 20;  // bytes a thread keeps between operators

// A stack of memory. What does not fit is allocated separately, and the stack grows to that size once it is empty.
class ScratchStack {
 public:
  ~ScratchStack() { std::free(base_); }

  void* push(int64_t bytes) {
    void* at = nullptr;
    if (used_ + bytes <= capacity_) {
      at = base_ + used_;
      used_ += bytes;
    } else {
      at = std::aligned_alloc(kAlignment, bytes);
      STD_TORCH_CHECK(at != nullptr, "sparsecnx: cannot allocate ", bytes, " bytes of scratch memory");
    }
    wanted_ += bytes;
    highest_ = std::max(highest_, wanted_);
    return at;
  }

  void pop(void* at, int64_t bytes) {
    wanted_ -= bytes;
    if (base_ <= at && at < base_ + capacity_) {
      used_ -= bytes;
    } else {
      std::free(at);
    }
    if (wanted_ == 0 && highest_ > capacity_ && highest_ <= kKept) {
      std::free(base_);
      base_ = static_cast<char*>(std::aligned_alloc(kAlignment, highest_));
      capacity_ = base_ == nullptr ? 0 : highest_;
      ask_for_large_pages(base_, capacity_);
    }
    if (wanted_ == 0) highest_ = 0;
  }

 private:
  char* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;   // of the stack itself
  int64_t wanted_ = 0, highest_ = 0;  // including what was allocated separately
};

thread_local ScratchStack scratch_stack;

int64_t whole_lines(int64_t bytes) { return (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

bool& in_parallel() {
  thread_local bool inside = false;
  return inside;
}

int64_t thread_count() { return in_parallel() ? 1 : torch::stable::get_num_threads(); }

void* push_scratch(int64_t bytes) { return scratch_stack.push(whole_lines(bytes)); }

void pop_scratch(void* at, int64_t bytes) { scratch_stack.pop(at, whole_lines(bytes)); }

void ask_for_large_pages(void* at, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(at) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

void check_size(int64_t value, const char* what, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= value && value <= high, "sparsecnx: ", what, " is ", value, ", expected ", low, " to ", high);
}

void check_product(const std::vector<int64_t>& sizes, const char* name) {
  int64_t total = 1;
  bool fits = true;
  for (const int64_t size : sizes) fits = !__builtin_mul_overflow(total, std::max<int64_t>(size, 1), &total) && fits;
  STD_TORCH_CHECK(fits, "sparsecnx: the sizes of ", name, " multiply to 2^63 or more");
}

void check_dense(const Tensor& x, const char* name, int64_t numel, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "sparsecnx: ", name, " must be a contiguous CPU tensor");
  STD_TORCH_CHECK(x.numel() == numel, "sparsecnx: ", name, " has ", x.numel(), " elements, expected ", numel);
  STD_TORCH_CHECK(x.scalar_type() == dtype, "sparsecnx: ", name, " is ", torch::headeronly::toString(x.scalar_type()),
                  ", expected ", torch::headeronly::toString(dtype));
  check_storage(x, name);
}

void check_matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, "sparsecnx: ", name, " must be (", rows,
                  ", ", columns, ")");
  check_dense(x, name, rows * columns, dtype);
}

std::array<int64_t, 2> feature_shape(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, "sparsecnx: ", name, " must be (rows, channels), it has ", x.dim(), " dimensions");
  STD_TORCH_CHECK(1 <= x.size(1) && x.size(1) <= kMostChannels, "sparsecnx: ", name, " has ", x.size(1),
                  " channels, expected 1 to ", kMostChannels);
  check_dense(x, name, x.numel(), x.scalar_type());
  return {x.size(0), x.size(1)};
}

void check_range(const int32_t* table, int64_t entries, const char* name, int64_t count) {
  int32_t low = -1, high = -1;
  for (int64_t i = 0; i < entries; ++i) {
    low = std::min(low, table[i]);
    high = std::max(high, table[i]);
  }
  STD_TORCH_CHECK(low == -1 && high < count, "sparsecnx: ", name, " has entries from ", low, " to ", high,
                  ", expected -1 to ", count - 1);
}

std::vector<RowBlock> split_rows(const int64_t* splits, int64_t first, int64_t last, int64_t channels) {
  const int64_t size = std::clamp<int64_t>((int64_t{1} << 15) / std::max<int64_t>(channels, 1), 8, 512);
  std::vector<RowBlock> blocks;
  for (int64_t group = first; group < last; ++group) {
    for (int64_t row = splits[group]; row < splits[group + 1]; row += size)
      blocks.push_back({group, row, std::min(row + size, splits[group + 1])});
  }
  return blocks;
}

const int64_t* check_groups(const Tensor& splits, const char* name, int64_t rows) {
  check_dense(splits, name, splits.numel(), ScalarType::Long);
  const int64_t count = splits.numel();
  STD_TORCH_CHECK(splits.dim() == 1 && count >= 1, "sparsecnx: ", name, " has ", splits.dim(), " dimensions and ",
                  count, " positions, expected one dimension of groups + 1 positions");
  const int64_t* at = data<int64_t>(splits);
  STD_TORCH_CHECK(at[0] == 0 && at[count - 1] == rows && std::is_sorted(at, at + count), "sparsecnx: ", name,
                  " must ascend from 0 to the number of rows, ", rows);
  return at;
}

}  // namespace sparsecnx
