// sparsecnx::convnextv2_block: the fused ConvNeXt V2 block and its gradient.
//
//   u = dwconv(x) + b      v = LN(u)      a = v W1'      h = gelu(a + b1)
//   energy[n] = sum over rows of group n of h^2,  s[n] = 1 + gamma N(energy[n])
//   y = x + d ((h s[n] + beta) W2' + b2)                                 d: stochastic depth of the row's image
//
// block_work.h says in which order rows pass through it. The gradient needs x, u, the moments of u, the energies, and a unless
// it is computed again.
//
// Gradient, with g = dL/dy, per chunk:
//   t = g W2                                   scale_grad[n] = sum d t h        beta_grad += d t
//   W2_grad += g' (d (h s + beta))             p[n], gamma_grad from scale_grad (grn.h)
//   da = gelu'(a + b1) (d t s + h p)           b1_grad += da                    W1_grad += da' v
//   dv = da W1                                 du = LN'(dv)                     dx = g + dwconv'(du)
#include "block_work.h"
#include "depthwise_conv.h"
#include "grn.h"
#include "products.h"

namespace sparsecnx {
namespace {

// Checks and holds the arguments that forward and backward share.
template <class S>
struct Block {
  using A = Compute<S>;

  int64_t rows, channels, hidden, groups;
  double eps, grn_eps;  // of LayerNorm and of GRN
  Halo halo;
  const S* x;
  const A *dwconv_bias, *norm_weight, *norm_bias, *pwconv1_bias, *gamma, *beta, *pwconv2_bias, *row_scale;
  Matrix<S> w1, w2;  // (hidden, channels), (channels, hidden)
  const int32_t* table;
  const int64_t* splits;
  Work work;

  Block(const Tensor& x_, const Tensor& dwconv_weight, const Tensor& dwconv_bias_, const Tensor& norm_weight_,
        const Tensor& norm_bias_, const Tensor& pwconv1_weight, const Tensor& pwconv1_bias_, const Tensor& gamma_,
        const Tensor& beta_, const Tensor& pwconv2_weight, const Tensor& pwconv2_bias_,
        const std::optional<Tensor>& row_scale_, const Tensor& table_, const Tensor& splits_, const Sizes& tile,
        double eps_, double grn_eps_, int64_t worker_bytes)
      : rows(feature_shape(x_, "x")[0]),
        channels(feature_shape(x_, "x")[1]),
        hidden(feature_shape(pwconv1_weight, "pwconv1_weight")[0]),
        groups(splits_.numel() - 1),
        eps(eps_),
        grn_eps(grn_eps_),
        halo(check_geometry(table_, rows, tile,
                            check_kernel(dwconv_weight, "dwconv_weight", channels, x_.scalar_type()))),
        x(data<S>(x_)),
        dwconv_bias(parameter<A>(dwconv_bias_, "dwconv_bias", channels, x_)),
        norm_weight(parameter<A>(norm_weight_, "norm_weight", channels, x_)),
        norm_bias(parameter<A>(norm_bias_, "norm_bias", channels, x_)),
        pwconv1_bias(parameter<A>(pwconv1_bias_, "pwconv1_bias", hidden, x_)),
        gamma(parameter<A>(gamma_, "grn_gamma", hidden, x_)),
        beta(parameter<A>(beta_, "grn_beta", hidden, x_)),
        pwconv2_bias(parameter<A>(pwconv2_bias_, "pwconv2_bias", channels, x_)),
        row_scale(row_scale_ ? parameter<A>(*row_scale_, "row_scale", rows, x_) : nullptr),
        w1{data<S>(pwconv1_weight), hidden, channels},
        w2{data<S>(pwconv2_weight), channels, hidden},
        table(data<int32_t>(table_)),
        splits(check_groups(splits_, "splits", rows)),
        work(split_work<S>(splits, groups, channels, hidden, halo.sites, worker_bytes)) {
    check_matrix(pwconv1_weight, "pwconv1_weight", hidden, channels, x_.scalar_type());
    check_matrix(pwconv2_weight, "pwconv2_weight", channels, hidden, x_.scalar_type());
    for (int64_t n = 0; n <= groups; ++n)
      STD_TORCH_CHECK(splits[n] % halo.sites == 0, "sparsecnx: groups must be whole tiles of ", halo.sites, " rows");
    for (int64_t n = 0; n < groups; ++n) check_neighbours(splits[n] / halo.sites, splits[n + 1] / halo.sites);
  }

  // Raises unless the neighbours of tiles [first, last), which are a group, are among them.
  void check_neighbours(int64_t first, int64_t last) const {
    int32_t low = static_cast<int32_t>(last), high = -1;
    for (int64_t i = first * halo.table_width; i < last * halo.table_width; ++i) {
      low = std::min(low, table[i] < 0 ? low : table[i]);
      high = std::max(high, table[i]);
    }
    STD_TORCH_CHECK(low >= first && high < last, "sparsecnx: table has neighbours from ", low, " to ", high,
                    " for the tiles of a group, expected ", first, " to ", last - 1);
  }

  const A* row_scale_at(int64_t row) const { return row_scale == nullptr ? nullptr : row_scale + row; }

  // Calls f(worker) for every worker, each in its own thread. A single worker has all threads.
  template <class F>
  void for_workers(const F& f) const {
    if (work.count() == 1) return f(0);
    parallel_for(0, work.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) f(worker);
    });
  }

  // Calls f(piece) for every piece of a run, in parallel.
  template <class F>
  void for_pieces(const Chunk& chunk, const Run& run, const F& f) const {
    parallel_for(run.first_piece, run.last_piece, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(chunk.pieces[i]);
    });
  }

  // Calls before(piece), multiply(rows) and after(piece) for every piece of a run, in parallel. If products are of whole
  // runs, multiply is called once.
  template <class Before, class Multiply, class After>
  void for_pieces(const Chunk& chunk, const Run& run, const Before& before, const Multiply& multiply,
                  const After& after) const {
    if (work.whole) {
      for_pieces(chunk, run, before);
      multiply(run);
      return for_pieces(chunk, run, after);
    }
    for_pieces(chunk, run, [&](const Piece& piece) {
      before(piece);
      multiply(piece);
      after(piece);
    });
  }

  // Calls f(number, part) for every part of a piece.
  template <class F>
  void for_parts(const Chunk& chunk, const Piece& piece, const F& f) const {
    for (int64_t i = piece.first_part; i < piece.last_part; ++i) f(i, chunk.parts[i]);
  }

  // Calls f(first tile, last tile) over the tiles of a piece, so few at a time that their rows stay in L1.
  template <class F>
  void for_tiles(const Piece& piece, const F& f) const {
    const int64_t step = tiles_per_call(halo.sites), last = piece.end / halo.sites;
    for (int64_t tile = piece.begin / halo.sites; tile < last; tile += step) f(tile, std::min(tile + step, last));
  }
};

// The outputs of forward.
template <class S>
struct Outputs {
  S *y, *u;
  Compute<S>*moments, *energy;
  S* hidden;  // or null
};

template <class S>
void forward_chunk(const Block<S>& block, const Chunk& chunk, const Depthwise<S>& conv, const Factor<S>& w1,
                   const Factor<S>& w2, const Outputs<S>& out, S* v, S* h) {
  using A = Compute<S>;
  const Kernels<S>& k = kernels<S>();
  const int64_t C = block.channels, H = block.hidden, sites = block.halo.sites;
  S* const hidden = out.hidden != nullptr ? out.hidden + chunk.begin * H : h;
  BlockSums<A> sums(chunk.parts.size(), H);
  const auto normalise = [&](const Piece& piece) {
    block.for_tiles(piece, [&](int64_t first, int64_t last) {
      k.depthwise(conv, first, last);
      const int64_t row = first * sites, count = (last - first) * sites;
      A* moments = out.moments + 2 * row;
      k.moments(out.u + row * C, count, C, static_cast<A>(block.eps), moments);
      k.normalise(out.u + row * C, moments, block.norm_weight, block.norm_bias, count, C, v + (row - chunk.begin) * C);
    });
  };
  const auto expand = [&](const auto& span) {
    const int64_t row = span.begin - chunk.begin;
    w1.multiply({v + row * C, span.rows(), C}, hidden + row * H);
  };
  const auto activate = [&](const Piece& piece) {
    block.for_parts(chunk, piece, [&](int64_t i, RowBlock part) {
      const int64_t at = (part.begin - chunk.begin) * H;
      k.gelu_energy(hidden + at, block.pwconv1_bias, part.rows(), H, h + at, sums.at(i));
    });
  };
  block.for_pieces(chunk, chunk.all(), normalise, expand, activate);

  std::vector<std::vector<A>> scale(chunk.groups());
  for_groups(chunk.parts, [&](int64_t group, int64_t first, int64_t last) {
    A* energy = out.energy + group * H;
    sums.add_to(energy, first, last);
    scale[group - chunk.first_group] = GrnResponse<A>(energy, block.gamma, H, block.grn_eps).scale;
  });

  const auto respond = [&](const Piece& piece) {
    block.for_parts(chunk, piece, [&](int64_t, RowBlock part) {
      const A* d = block.row_scale_at(part.begin);
      S* at = h + (part.begin - chunk.begin) * H;
      k.affine(at, scale[part.group - chunk.first_group].data(), block.beta, d, part.rows(), H, at);
      k.add_shift(block.x + part.begin * C, block.pwconv2_bias, d, part.rows(), C, out.y + part.begin * C);
    });
  };
  const auto contract = [&](const auto& span) {
    w2.multiply({h + (span.begin - chunk.begin) * H, span.rows(), H}, out.y + span.begin * C, true);
  };
  block.for_pieces(chunk, chunk.all(), respond, contract, [](const Piece&) {});
}

template <class S>
void forward(const Block<S>& block, const Tensor& dwconv_weight, const Outputs<S>& out) {
  using A = Compute<S>;
  const std::vector<A> taps = taps_first<S>(dwconv_weight, false);
  const Depthwise<S> conv{block.halo,  block.table,       block.channels, block.x, 0,
                          taps.data(), block.dwconv_bias, nullptr,        out.u,   0};
  std::fill_n(out.energy, block.groups * block.hidden, A(0));
  const bool many_rows = !block.work.whole;
  const Factor<S> w1(block.w1.t(), many_rows), w2(block.w2.t(), many_rows);
  block.for_workers([&](int64_t worker) {
    const std::vector<Chunk>& chunks = block.work.workers[worker];
    const Scratch<S> v(longest(chunks) * block.channels), h(longest(chunks) * block.hidden);
    for (const Chunk& chunk : chunks) forward_chunk(block, chunk, conv, w1, w2, out, v.data(), h.data());
  });
}

// The tensors that forward kept for backward, and the incoming gradient.
template <class S>
struct Kept {
  const S *grad, *u;
  const Compute<S>*moments, *energy;
  const S* hidden;  // or null
};

// The per-channel parameters.
enum Vector { kDwconvBias, kNormWeight, kNormBias, kPwconv1Bias, kGamma, kBeta, kPwconv2Bias, kVectors };

// One worker's gradient of a matrix, a sum of products.
template <class S>
class MatrixSum {
  using A = Compute<S>;

 public:
  // Without `own` memory it is in `out`, which takes one product, or a sum of them if it has the computing type.
  MatrixSum(S* out, int64_t count, bool own) : out_(out), count_(count), own_(own ? count : 0), in_place_(!own) {}

  void add(Matrix<S> a, const Factor<S>& b) {
    if (in_place_ && !added_) {
      b.multiply(a, out_);
    } else {
      b.accumulate(a, sum(), added_);
    }
    added_ = true;
  }

  // Completes the sum, which is zero if nothing was added.
  void finish() {
    if (added_) return;
    if (in_place_) std::fill_n(out_, count_, S{});
    if (!in_place_) std::fill_n(sum(), count_, A(0));
  }

  // Stores the sum of this and the others, all of them complete.
  void store_total(const std::vector<const A*>& others) {
    if (!in_place_ || !others.empty()) add_up<S>(sum(), others, count_, out_);
  }

  A* sum() { return in_place_ ? reinterpret_cast<A*>(out_) : own_.data(); }

 private:
  S* out_;
  int64_t count_;
  Scratch<A> own_;
  bool in_place_, added_ = false;
};

// One worker's gradients of the parameters, and the memory for its chunks.
template <class S>
struct BackwardWorker {
  using A = Compute<S>;

  std::array<MatrixSum<S>, 2> matrices;  // of pwconv1 and pwconv2
  WeightGradSum<S> taps;
  std::array<std::vector<A>, kVectors> vectors;
  Scratch<S> v, du, t, hidden;  // the last if it is computed again
  int64_t slabs;

  BackwardWorker(const Block<S>& block, int64_t rows, bool again, const std::array<S*, 2>& out, bool own)
      : matrices{MatrixSum<S>{out[0], block.hidden * block.channels, own},
                 MatrixSum<S>{out[1], block.hidden * block.channels, own}},
        taps(block.halo, block.channels),
        v(rows * block.channels),
        du(rows * block.channels),
        t(rows * block.hidden),
        hidden(again ? rows * block.hidden : 0),
        slabs(block.work.count() == 1 ? thread_count() : 1) {
    for (int i : {kDwconvBias, kNormWeight, kNormBias, kPwconv2Bias}) vectors[i].resize(block.channels);
    for (int i : {kPwconv1Bias, kGamma, kBeta}) vectors[i].resize(block.hidden);
  }
};

// The matrices as backward reads them.
template <class S>
struct BackwardFactors {
  Factor<S> w2, w1;
  std::optional<Factor<S>> w1_again;  // if the hidden layer is computed again
};

template <class S>
void backward_chunk(const Block<S>& block, const Chunk& chunk, const BackwardFactors<S>& factors,
                    const std::vector<Compute<S>>& adjoint_taps, const Kept<S>& kept, S* x_grad,
                    BackwardWorker<S>& worker) {
  using A = Compute<S>;
  const Kernels<S>& k = kernels<S>();
  const int64_t C = block.channels, H = block.hidden, sites = block.halo.sites, parts = chunk.parts.size();
  S *v = worker.v.data(), *du = worker.du.data(), *t = worker.t.data();
  const S* hidden = kept.hidden != nullptr ? kept.hidden + chunk.begin * H : worker.hidden.data();

  std::vector<GrnResponse<A>> response;
  for (int64_t n = chunk.first_group; n < chunk.last_group; ++n)
    response.emplace_back(kept.energy + n * H, block.gamma, H, block.grn_eps);
  BlockSums<A> scale_sums(parts, H), beta_sums(parts, H), bias2_sums(parts, C);
  const auto normalise = [&](const Piece& piece) {
    const int64_t row = piece.begin - chunk.begin;
    k.normalise(kept.u + piece.begin * C, kept.moments + 2 * piece.begin, block.norm_weight, block.norm_bias,
                piece.rows(), C, v + row * C);
  };
  const auto expand = [&](const auto& span) {
    const int64_t row = span.begin - chunk.begin, rows = span.rows();
    if (factors.w1_again) factors.w1_again->multiply({v + row * C, rows, C}, worker.hidden.data() + row * H);
    factors.w2.multiply({kept.grad + span.begin * C, rows, C}, t + row * H);
  };
  const auto sum = [&](const Piece& piece) {
    block.for_parts(chunk, piece, [&](int64_t i, RowBlock part) {
      const int64_t at = (part.begin - chunk.begin) * H;
      const A* d = block.row_scale_at(part.begin);
      k.gelu_grn_sums(hidden + at, block.pwconv1_bias, t + at, d, part.rows(), H, scale_sums.at(i), beta_sums.at(i));
      k.column_sum(kept.grad + part.begin * C, d, part.rows(), C, bias2_sums.at(i));
    });
  };
  block.for_pieces(chunk, chunk.all(), normalise, expand, sum);
  beta_sums.add_to(worker.vectors[kBeta].data());
  bias2_sums.add_to(worker.vectors[kPwconv2Bias].data());
  std::vector<std::vector<A>> p(chunk.groups());
  for_groups(chunk.parts, [&](int64_t group, int64_t first, int64_t last) {
    std::vector<A> scale_grad(H, A(0));
    scale_sums.add_to(scale_grad.data(), first, last);
    const int64_t n = group - chunk.first_group;
    p[n] = response[n].backward(scale_grad.data(), block.gamma, worker.vectors[kGamma].data());
  });

  BlockSums<A> bias1_sums(parts, H), weight_sums(parts, C), norm_bias_sums(parts, C), bias_sums(parts, C);
  const auto contract = [&](const auto& span) {
    const int64_t row = span.begin - chunk.begin;
    factors.w1.multiply({t + row * H, span.rows(), H}, du + row * C);
  };
  const auto unnormalise = [&](const Piece& piece) {
    block.for_parts(chunk, piece, [&](int64_t i, RowBlock part) {
      S* at = du + (part.begin - chunk.begin) * C;
      k.layer_norm_backward(at, kept.u + part.begin * C, kept.moments + 2 * part.begin, block.norm_weight, part.rows(),
                            C, at, weight_sums.at(i), norm_bias_sums.at(i));
      k.column_sum(at, nullptr, part.rows(), C, bias_sums.at(i));
    });
  };
  for (const Run& run : chunk.runs) {
    Factor<S> right_v(run.rows(), C), right_scaled(run.rows(), H);
    const auto activate = [&](const Piece& piece) {
      const Scratch<S> scaled(piece.rows() * H);
      block.for_parts(chunk, piece, [&](int64_t i, RowBlock part) {
        const int64_t at = (part.begin - chunk.begin) * H, n = part.group - chunk.first_group;
        k.gelu_grn_backward(hidden + at, block.pwconv1_bias, t + at, response[n].scale.data(), block.beta, p[n].data(),
                            block.row_scale_at(part.begin), part.rows(), H,
                            scaled.data() + (part.begin - piece.begin) * H, bias1_sums.at(i));
      });
      right_scaled.put(piece.begin - run.begin, scaled.data(), piece.rows());
      right_v.put(piece.begin - run.begin, v + (piece.begin - chunk.begin) * C, piece.rows());
    };
    block.for_pieces(chunk, run, activate, contract, unnormalise);
    const Matrix<S> a_grad{t + (run.begin - chunk.begin) * H, run.rows(), H};
    const Matrix<S> y_grad{kept.grad + run.begin * C, run.rows(), C};
    worker.matrices[0].add(a_grad.t(), right_v);
    worker.matrices[1].add(y_grad.t(), right_scaled);
  }
  bias1_sums.add_to(worker.vectors[kPwconv1Bias].data());
  weight_sums.add_to(worker.vectors[kNormWeight].data());
  norm_bias_sums.add_to(worker.vectors[kNormBias].data());
  bias_sums.add_to(worker.vectors[kDwconvBias].data());

  const int64_t first_tile = chunk.begin / sites;
  const Depthwise<S> adjoint{block.halo,          block.table, C,         du,     first_tile,
                             adjoint_taps.data(), nullptr,     kept.grad, x_grad, 0};
  block.for_pieces(chunk, chunk.all(), [&](const Piece& piece) {
    block.for_tiles(piece, [&](int64_t first, int64_t last) { k.depthwise(adjoint, first, last); });
  });
  worker.taps.add({block.halo, block.table, C, block.x, du, first_tile}, first_tile, chunk.end / sites, worker.slabs);
}

// The outputs of backward, in the order of the block's parameters.
template <class S>
struct Grads {
  S *x, *dwconv_weight;
  std::array<S*, 2> matrices;  // of pwconv1 and pwconv2
  std::array<Compute<S>*, kVectors> vectors;
};

template <class S>
void backward(const Block<S>& block, const Tensor& dwconv_weight, const Kept<S>& kept, const Grads<S>& out) {
  using A = Compute<S>;
  const std::vector<A> adjoint_taps = taps_first<S>(dwconv_weight, true);
  const int64_t workers = block.work.count();
  const bool many_rows = !block.work.whole;
  BackwardFactors<S> factors{{block.w2, many_rows}, {block.w1, many_rows}, {}};
  if (kept.hidden == nullptr) factors.w1_again.emplace(block.w1.t(), many_rows);
  const std::vector<Chunk>& chunks = block.work.workers[0];
  const bool one_product = workers == 1 && chunks.size() <= 1 && (chunks.empty() || chunks[0].runs.size() == 1);
  std::vector<BackwardWorker<S>> states;
  states.reserve(workers);
  for (int64_t i = 0; i < workers; ++i) {
    const bool own = i > 0 || !(std::is_same_v<S, A> || one_product);
    states.emplace_back(block, longest(block.work.workers[i]), kept.hidden == nullptr, out.matrices, own);
  }
  block.for_workers([&](int64_t i) {
    for (const Chunk& chunk : block.work.workers[i])
      backward_chunk(block, chunk, factors, adjoint_taps, kept, out.x, states[i]);
    for (MatrixSum<S>& sum : states[i].matrices) sum.finish();
  });

  for (int64_t m = 0; m < 2; ++m) {
    std::vector<const A*> others;
    for (int64_t i = 1; i < workers; ++i) others.push_back(states[i].matrices[m].sum());
    states[0].matrices[m].store_total(others);
  }
  for (int64_t i = 0; i < workers; ++i) {
    if (i > 0) states[0].taps.add(states[i].taps);
    for (int j = 0; j < kVectors; ++j) {
      const std::vector<A>& from = states[i].vectors[j];
      for (size_t c = 0; c < from.size(); ++c) out.vectors[j][c] = (i > 0 ? out.vectors[j][c] : A(0)) + from[c];
    }
  }
  states[0].taps.store(out.dwconv_weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> convnextv2_block(
    const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& pwconv1_weight, const Tensor& pwconv1_bias, const Tensor& grn_gamma,
    const Tensor& grn_beta, const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
    const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& splits, Sizes tile, double eps,
    double grn_eps, bool keep_hidden) {
  Tensor y, u, moments, energy, hidden;
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const Block<S> block(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, pwconv1_weight, pwconv1_bias, grn_gamma,
                         grn_beta, pwconv2_weight, pwconv2_bias, row_scale, table, splits, tile, eps, grn_eps, 0);
    y = fresh_like(x);  // Outputs are allocated once their sizes are checked.
    u = fresh_like(x);
    moments = empty({block.rows, 2}, compute_dtype(x));
    energy = empty({block.groups, block.hidden}, compute_dtype(x));
    hidden = empty({keep_hidden ? block.rows : 0, block.hidden}, x.scalar_type());
    forward<S>(block, dwconv_weight,
               {data<S>(y), data<S>(u), data<A>(moments), data<A>(energy), keep_hidden ? data<S>(hidden) : nullptr});
  });
  return {y, u, moments, energy, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
convnextv2_block_backward(const Tensor& grad, const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias,
                          const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& pwconv1_weight,
                          const Tensor& pwconv1_bias, const Tensor& grn_gamma, const Tensor& grn_beta,
                          const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
                          const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& splits, Sizes tile,
                          double eps, double grn_eps, const Tensor& u, const Tensor& moments, const Tensor& energy,
                          const Tensor& hidden) {
  Tensor x_grad, dwconv_weight_grad, w1_grad, w2_grad;
  std::array<Tensor, kVectors> vectors;
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const Block<S> block(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, pwconv1_weight, pwconv1_bias, grn_gamma,
                         grn_beta, pwconv2_weight, pwconv2_bias, row_scale, table, splits, tile, eps, grn_eps,
                         2 * pwconv1_weight.numel() * int64_t{sizeof(A)});
    check_dense(grad, "grad", x.numel(), x.scalar_type());
    check_dense(u, "u", x.numel(), x.scalar_type());
    check_dense(moments, "moments", 2 * block.rows, compute_dtype(x));
    check_dense(energy, "energy", block.groups * block.hidden, compute_dtype(x));
    const bool kept = block.rows == 0 || hidden.numel() > 0;
    check_dense(hidden, "hidden", kept ? block.rows * block.hidden : 0, x.scalar_type());
    x_grad = fresh_like(x);  // Outputs are allocated once their sizes are checked.
    dwconv_weight_grad = fresh_like(dwconv_weight);
    w1_grad = fresh_like(pwconv1_weight);
    w2_grad = fresh_like(pwconv2_weight);
    vectors = {fresh_like(dwconv_bias), fresh_like(norm_weight), fresh_like(norm_bias),   fresh_like(pwconv1_bias),
               fresh_like(grn_gamma),   fresh_like(grn_beta),    fresh_like(pwconv2_bias)};
    Grads<S> grads{data<S>(x_grad), data<S>(dwconv_weight_grad), {data<S>(w1_grad), data<S>(w2_grad)}, {}};
    for (size_t i = 0; i < vectors.size(); ++i) grads.vectors[i] = data<A>(vectors[i]);
    backward<S>(block, dwconv_weight,
                {data<S>(grad), data<S>(u), data<A>(moments), data<A>(energy), kept ? data<S>(hidden) : nullptr},
                grads);
  });
  return {x_grad,     dwconv_weight_grad, vectors[0], vectors[1], vectors[2], w1_grad,
          vectors[3], vectors[4],         vectors[5], w2_grad,    vectors[6]};
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("convnextv2_block", TORCH_BOX(&convnextv2_block));
  m.impl("convnextv2_block_backward", TORCH_BOX(&convnextv2_block_backward));
}

}  // namespace
}  // namespace sparsecnx
