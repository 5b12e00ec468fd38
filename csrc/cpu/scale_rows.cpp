// sparsecnx::scale_rows: the rows of image n times scale[n] (stochastic depth, and its own adjoint).
#include "op.h"
#include "ops.h"

namespace sparsecnx {

Tensor scale_rows(const Tensor& x, const Tensor& scale, const Tensor& splits) {
  const auto [rows, channels_] = feature_shape(x, "x");
  const int64_t channels = channels_;
  const int64_t* at = check_splits(splits, "splits", rows);
  const int64_t images = splits.numel() - 1;
  Tensor out = torch::stable::empty_like(x);
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Compute<S>* factor = parameter<Compute<S>>(scale, "scale", images, x);
    const std::vector<RowBlock> blocks = split_rows(at, 0, images, channels);
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock block = blocks[i];
      kernels<S>().scale_rows(data<S>(x) + block.begin * channels, factor[block.segment], block.end - block.begin,
                              channels, data<S>(out) + block.begin * channels);
    });
  });
  return out;
}

}  // namespace sparsecnx
