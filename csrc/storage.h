// The one place that checks a tensor's memory. Both compiled libraries include it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace sparsecnx {

// Raises unless all elements of x lie inside its storage. Whoever frees or cuts a storage, as sharding does with
// t.untyped_storage().resize_(0), leaves the sizes of its tensors as they were.
inline void check_storage(const torch::stable::Tensor& x, const char* name) {
  // Asking for the pointer gives a lazy copy memory of its own, which must not happen in the loop of parallel_for.
  const void* at = x.mutable_data_ptr();
  if (x.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  __int128 last = x.storage_offset();
  for (int64_t d = 0; d < x.dim(); ++d) last += static_cast<__int128>(x.size(d) - 1) * x.stride(d);
  const bool inside = at != nullptr && (last + 1) * x.element_size() <= bytes;
  STD_TORCH_CHECK(inside, "sparsecnx: ", name, " has ", x.numel(), " elements, but its storage holds ", bytes,
                  " bytes: it was freed or never allocated; call the operator while ", name, " has its memory");
}

}  // namespace sparsecnx
