// The arithmetic of Global Response Normalization for one group, on C values. It reads no rows.
#pragma once

#include <cmath>
#include <vector>

#include "types.h"

namespace sparsecnx {

// G = sqrt(energy), N = G / (mean(G) + eps), scale = 1 + gamma N.
template <class A>
struct GrnResponse {
  std::vector<A> norm, response, scale;
  A denominator;  // mean(G) + eps

  GrnResponse(const A* energy, const A* gamma, int64_t channels, double eps)
      : norm(channels), response(channels), scale(channels) {
    double total = 0;
    for (int64_t c = 0; c < channels; ++c) {
      norm[c] = std::sqrt(energy[c]);
      total += norm[c];
    }
    denominator = static_cast<A>(total / std::max<int64_t>(channels, 1) + eps);
    for (int64_t c = 0; c < channels; ++c) {
      response[c] = norm[c] / denominator;
      scale[c] = A(1) + gamma[c] * response[c];
    }
  }

  // From scale_grad = dL/dscale: adds dL/dgamma to gamma_grad and returns p with dL/dx += x p, that is
  // 2 dL/denergy = dL/dG / G (0 where G = 0, torch.norm's subgradient).
  std::vector<A> backward(const A* scale_grad, const A* gamma, A* gamma_grad) const {
    const int64_t channels = static_cast<int64_t>(norm.size());
    double projection = 0;
    for (int64_t c = 0; c < channels; ++c) projection += double(scale_grad[c]) * gamma[c] * norm[c];
    const A shared = static_cast<A>(projection / (double(denominator) * denominator * channels));
    std::vector<A> p(channels);
    for (int64_t c = 0; c < channels; ++c) {
      gamma_grad[c] += scale_grad[c] * response[c];
      const A norm_grad = scale_grad[c] * gamma[c] / denominator - shared;
      p[c] = norm[c] > 0 ? norm_grad / norm[c] : A(0);
    }
    return p;
  }
};

}  // namespace sparsecnx
