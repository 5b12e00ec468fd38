#include "op.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // C functions, ABI-stable like the rest
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
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
    }
    if (wanted_ == 0) highest_ = 0;
  }

 private:
  char* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;   // of the stack itself
  int64_t wanted_ = 0, highest_ = 0;  // including what was allocated separately
};

thread_local ScratchStack scratch_stack;

}  // namespace

ScratchBytes::ScratchBytes(int64_t bytes)
    : bytes_((std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment) {
  at_ = scratch_stack.push(bytes_);
}

ScratchBytes::~ScratchBytes() {
  if (at_ != nullptr) scratch_stack.pop(at_, bytes_);
}

void check_range(const Tensor& table, const char* name, int64_t count) {
  const int32_t* at = data<int32_t>(table);
  int32_t low = -1, high = -1;
  for (int64_t i = 0; i < table.numel(); ++i) {
    low = std::min(low, at[i]);
    high = std::max(high, at[i]);
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
  check_dense(splits, name, splits.numel());
  check_dtype(splits, name, ScalarType::Long);
  const int64_t count = splits.numel();
  STD_TORCH_CHECK(count >= 1, "sparsecnx: ", name, " is empty, expected groups + 1 positions");
  const int64_t* at = data<int64_t>(splits);
  STD_TORCH_CHECK(at[0] == 0 && at[count - 1] == rows && std::is_sorted(at, at + count), "sparsecnx: ", name,
                  " must ascend from 0 to the number of rows, ", rows);
  return at;
}

namespace {

// Returns memory as a tensor. Strides make it transposed.
Tensor view(const void* at, int64_t rows, int64_t columns, bool transposed, ScalarType dtype) {
  const std::array<int64_t, 2> shape{rows, columns};
  const std::array<int64_t, 2> strides = transposed ? std::array<int64_t, 2>{1, std::max<int64_t>(rows, 1)}
                                                    : std::array<int64_t, 2>{std::max<int64_t>(columns, 1), 1};
  return torch::stable::from_blob(const_cast<void*>(at), shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

}  // namespace

void gemm_raw(void* out, const void* a, bool a_transposed, const void* b, bool b_transposed, int64_t rows,
              int64_t inner, int64_t columns, ScalarType dtype, bool accumulate) {
  if (rows == 0 || columns == 0) return;
  const Tensor result = view(out, rows, columns, false, dtype);
  const Tensor left = view(a, rows, inner, a_transposed, dtype);
  const Tensor right = view(b, inner, columns, b_transposed, dtype);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

}  // namespace sparsecnx
