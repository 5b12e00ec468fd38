// While operators are being written: those without a binding raise. To be deleted when all are there.
#include <stdexcept>

#include "ops.h"

namespace sparsecnx::cuda {
namespace {
[[noreturn]] void absent() { throw std::runtime_error("the emulator was built without this operator"); }
}  // namespace

[[gnu::weak]] Tensor depthwise_conv(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                    int64_t) {
  absent();
}
[[gnu::weak]] std::tuple<Tensor, Tensor> depthwise_conv_fused(const Tensor&, const Tensor&,
                                                              const std::optional<Tensor>&,
                                                              const std::optional<Tensor>&, const Tensor&, int64_t,
                                                              bool, std::optional<double>) {
  absent();
}
[[gnu::weak]] std::tuple<Tensor, Tensor> depthwise_conv_weight_grad(const Tensor&, const Tensor&, const Tensor&,
                                                                    int64_t, int64_t, int64_t) {
  absent();
}
[[gnu::weak]] std::tuple<Tensor, Tensor> grn(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double) {
  absent();
}
[[gnu::weak]] std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor&, const Tensor&, const Tensor&,
                                                              const Tensor&, const Tensor&, double) {
  absent();
}
[[gnu::weak]] Tensor gather_tiles(const Tensor&, const Tensor&, const Tensor&, int64_t) { absent(); }
[[gnu::weak]] Tensor scatter_tiles(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                                   int64_t, int64_t) {
  absent();
}
[[gnu::weak]] std::tuple<Tensor, Tensor, Tensor> tile_index(const Tensor&, int64_t, int64_t) { absent(); }
[[gnu::weak]] Tensor neighbour_table(const Tensor&, const Tensor&, std::vector<int64_t>, int64_t) { absent(); }

}  // namespace sparsecnx::cuda
