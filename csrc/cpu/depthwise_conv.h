// Parts of the depthwise convolution that the fused block uses too.
#pragma once

#include "tiles.h"

namespace sparsecnx {

// Returns how many tiles one call of the kernel takes: about 64 rows, which are still in cache for the next step.
inline int64_t tiles_per_call(int64_t sites) { return std::max<int64_t>(1, 64 / sites); }

// Checks the sizes of tile and kernel and the neighbour table, int32 (tiles, halo.table_width). Returns their geometry.
Halo check_geometry(const Tensor& table, int64_t rows, const Sizes& tile, const Sizes& kernel);

// Checks a weight (channels, 1, *kernel) and returns its kernel size.
Sizes check_kernel(const Tensor& weight, const char* name, int64_t channels, ScalarType dtype);

// Returns a weight (channels, 1, *kernel) as the kernels read it, (taps, channels); flipped, it is the kernel of the
// adjoint.
template <class S>
std::vector<Compute<S>> taps_first(const Tensor& weight, bool flipped) {
  const std::vector<Compute<S>> wide = widened<S>(weight);
  const int64_t channels = weight.size(0), taps = weight.numel() / channels;
  std::vector<Compute<S>> out(wide.size());
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) out[(flipped ? taps - 1 - k : k) * channels + c] = wide[c * taps + k];
  }
  return out;
}

// The gradient of the weight, summed over calls of `add`, as the kernels write it: (taps, channels).
template <class S>
class WeightGradSum {
  using A = Compute<S>;

 public:
  WeightGradSum(const Halo& halo, int64_t channels)
      : channels_(channels), taps_(halo.taps), sum_(taps_ * channels, A(0)) {}

  // Adds the contribution of tiles [begin, end). One thread sums each slab of tiles and slice of channels.
  void add(const DepthwiseWeightGrad<S>& job, int64_t begin, int64_t end, int64_t slabs) {
    constexpr int64_t kSlice = 512;  // channels of a task, which may list what is read for all of them at once
    const int64_t slices = (channels_ + kSlice - 1) / kSlice, count = end - begin;
    if (count == 0) return;
    std::vector<A> partial((slabs - 1) * taps_ * channels_, A(0));  // of all slabs but the first
    parallel_for(0, slabs * slices, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t slab = task % slabs, from = task / slabs * kSlice;
        A* out = slab == 0 ? sum_.data() : partial.data() + (slab - 1) * taps_ * channels_;
        kernels<S>().depthwise_weight_grad(job, begin + count * slab / slabs, begin + count * (slab + 1) / slabs, from,
                                           std::min(from + kSlice, channels_), out);
      }
    });
    for (int64_t slab = 1; slab < slabs; ++slab) add_from(partial.data() + (slab - 1) * taps_ * channels_);
  }
  void add(const WeightGradSum& other) { add_from(other.sum_.data()); }

  // Stores the sum in torch's layout (channels, 1, *kernel).
  void store(S* out) const {
    std::vector<A> total(sum_.size());
    for (int64_t k = 0; k < taps_; ++k) {
      for (int64_t c = 0; c < channels_; ++c) total[c * taps_ + k] = sum_[k * channels_ + c];
    }
    kernels<S>().narrow(total.data(), total.size(), out);
  }

 private:
  void add_from(const A* other) {
    for (size_t i = 0; i < sum_.size(); ++i) sum_[i] += other[i];
  }

  int64_t channels_, taps_;
  std::vector<A> sum_;
};

}  // namespace sparsecnx
