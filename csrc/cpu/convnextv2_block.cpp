// sparsecnx::convnextv2_block: the fused ConvNeXt V2 block and its gradient.
//
//   u = dwconv(x) + b      v = LN(u)      a = v W1'      h = gelu(a + b1)
//   energy[n] = sum over rows of segment n of h^2,  s[n] = 1 + gamma N(energy[n])
//   y = x + d (h s[n] W2' + (W2 beta + b2))                              d: stochastic depth of the row's image
//
// Rows go through all of it in chunks of whole segments, sized so that a chunk's hidden layer (rows, H) stays in
// a shared cache between the GEMMs and the elementwise passes around them. Kept for the gradient: x, u, the
// moments of u, the energies, and a unless it is to be computed again.
//
// Gradient, with g = dL/dy, per chunk:
//   t = g W2                                   scale_grad[n] = sum d t h        beta_grad += d t
//   W2_grad += g' (d (h s + beta))             p[n], gamma_grad from scale_grad (grn.h)
//   da = gelu'(a + b1) (d t s + h p)           b1_grad += da                    W1_grad += da' v
//   dv = da W1                                 du = LN'(dv)                     dx = g + dwconv'(du)
#include <algorithm>

#include "depthwise_conv.h"
#include "grn.h"
#include "op.h"
#include "ops.h"

namespace sparsecnx {
namespace {

// Hidden values of a chunk. 2^20 floats are 4 MiB; a backward chunk holds three such matrices.
constexpr int64_t kChunkValues = int64_t{1} << 20;

struct Chunk {
  int64_t first_segment, last_segment, begin, end;  // segments and rows
};

std::vector<Chunk> split_chunks(const int64_t* splits, int64_t segments, int64_t hidden) {
  const int64_t rows = std::max<int64_t>(1, kChunkValues / std::max<int64_t>(hidden, 1));
  std::vector<Chunk> chunks;
  for (int64_t first = 0; first < segments;) {
    int64_t last = first + 1;
    while (last < segments && splits[last + 1] - splits[first] <= rows) ++last;
    if (splits[last] > splits[first]) chunks.push_back({first, last, splits[first], splits[last]});
    first = last;
  }
  return chunks;
}

int64_t longest(const std::vector<Chunk>& chunks) {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) rows = std::max(rows, chunk.end - chunk.begin);
  return rows;
}

// Uninitialised memory: torch's allocator keeps it aligned and, unlike std::vector, does not clear it.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count) : tensor_(empty({count}, kDtype<S>)) {}
  S* data() const { return sparsecnx::data<S>(tensor_); }

 private:
  Tensor tensor_;
};

// The arguments that forward and backward share, checked.
template <class S>
struct Block {
  using A = Compute<S>;

  int64_t rows, channels, hidden, segments, tile, tiles;
  double eps;
  Halo halo;
  const S* x;
  const A *norm_weight, *norm_bias, *pwconv1_bias, *gamma, *beta, *row_scale;
  Matrix<S> w1, w2;  // (hidden, channels), (channels, hidden)
  const int32_t* table;
  const int64_t* splits;
  std::vector<Chunk> chunks;

  Block(const Tensor& x_, const Tensor& dwconv_weight, const Tensor& norm_weight_, const Tensor& norm_bias_,
        const Tensor& pwconv1_weight, const Tensor& pwconv1_bias_, const Tensor& gamma_, const Tensor& beta_,
        const Tensor& pwconv2_weight, const std::optional<Tensor>& row_scale_, const Tensor& table_,
        const Tensor& segments_, int64_t tile_, double eps_)
      : rows(feature_shape(x_, "x")[0]),
        channels(feature_shape(x_, "x")[1]),
        hidden(pwconv1_weight.size(0)),
        segments(segments_.numel() - 1),
        tile(tile_),
        eps(eps_),
        halo(tile_, check_kernel(dwconv_weight, channels)[0], check_kernel(dwconv_weight, channels)[1]),
        x(data<S>(x_)),
        norm_weight(parameter<A>(norm_weight_, "norm_weight", channels, x_)),
        norm_bias(parameter<A>(norm_bias_, "norm_bias", channels, x_)),
        pwconv1_bias(parameter<A>(pwconv1_bias_, "pwconv1_bias", hidden, x_)),
        gamma(parameter<A>(gamma_, "grn_gamma", hidden, x_)),
        beta(parameter<A>(beta_, "grn_beta", hidden, x_)),
        row_scale(row_scale_ ? parameter<A>(*row_scale_, "row_scale", rows, x_) : nullptr),
        w1{data<S>(pwconv1_weight), hidden, channels},
        w2{data<S>(pwconv2_weight), channels, hidden},
        table(data<int32_t>(table_)),
        splits(check_splits(segments_, "segments", rows)),
        chunks(split_chunks(splits, segments, hidden)) {
    tiles = check_table(table_, halo, rows);
    check_dtype(dwconv_weight, "dwconv_weight", x_.scalar_type());
    check_dtype(pwconv1_weight, "pwconv1_weight", x_.scalar_type());
    check_dtype(pwconv2_weight, "pwconv2_weight", x_.scalar_type());
    check_dense(pwconv1_weight, "pwconv1_weight", hidden * channels);
    check_dense(pwconv2_weight, "pwconv2_weight", hidden * channels);
    for (int64_t n = 0; n <= segments; ++n)
      STD_TORCH_CHECK(splits[n] % (tile * tile) == 0, "sparsecnx: segments must be whole tiles of ", tile * tile,
                      " rows");
  }

  const A* row_scale_at(int64_t row) const { return row_scale == nullptr ? nullptr : row_scale + row; }

  // f(first tile, last tile) over the tiles of a chunk, in parallel, few enough tiles for their rows to stay in L1.
  template <class F>
  void for_tiles(const Chunk& chunk, const F& f) const {
    const int64_t sites = tile * tile, step = tiles_per_call(tile);
    const int64_t first = chunk.begin / sites, last = chunk.end / sites;
    parallel_for(0, (last - first + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(first + i * step, std::min(first + (i + 1) * step, last));
    });
  }
};

template <class S>
void forward(const Block<S>& block, const Tensor& dwconv_weight, const Tensor& dwconv_bias, const Tensor& pwconv2_bias,
             S* y, S* u, Compute<S>* moments, Compute<S>* energy, S* kept_hidden) {
  using A = Compute<S>;
  const Kernels<S>& k = kernels<S>();
  const int64_t C = block.channels, H = block.hidden, sites = block.tile * block.tile;
  const std::vector<A> taps = taps_first<S>(dwconv_weight, false);
  const Depthwise<S> conv{block.halo, block.table, C, block.x, 0, taps.data(), data<A>(dwconv_bias), nullptr, u, 0};
  const int64_t longest_chunk = longest(block.chunks);
  const Scratch<S> v(longest_chunk * C), h(longest_chunk * H);

  // beta passes through the second GEMM once, as part of its bias.
  std::vector<A> shift(C);
  for (int64_t c = 0; c < C; ++c) {
    double sum = data<A>(pwconv2_bias)[c];
    shift[c] = static_cast<A>(sum);
  }
  if (std::any_of(block.beta, block.beta + H, [](A value) { return value != 0; })) {
    std::vector<A> row(H);
    for (int64_t c = 0; c < C; ++c) {
      k.widen(block.w2.at + c * H, H, row.data());
      A sum = 0;
      for (int64_t j = 0; j < H; ++j) sum += row[j] * block.beta[j];
      shift[c] += sum;
    }
  }

  std::fill_n(energy, block.segments * H, A(0));
  for (const Chunk& chunk : block.chunks) {
    const int64_t rows = chunk.end - chunk.begin;
    S* hidden = kept_hidden != nullptr ? kept_hidden + chunk.begin * H : h.data();
    block.for_tiles(chunk, [&](int64_t first, int64_t last) {
      k.depthwise(conv, first, last);
      const int64_t row = first * sites, count = (last - first) * sites;
      k.moments(u + row * C, count, C, static_cast<A>(block.eps), moments + 2 * row);
      k.normalise(u + row * C, moments + 2 * row, block.norm_weight, block.norm_bias, count, C,
                  v.data() + (row - chunk.begin) * C);
    });
    gemm<S>(hidden, {v.data(), rows, C}, block.w1.t());

    const std::vector<RowBlock> blocks = split_rows(block.splits, chunk.first_segment, chunk.last_segment, H);
    BlockSums<A> sums(blocks.size(), H);
    for_blocks(blocks, [&](int64_t i) {
      const int64_t at = (blocks[i].begin - chunk.begin) * H;
      k.gelu_energy(hidden + at, block.pwconv1_bias, blocks[i].end - blocks[i].begin, H, h.data() + at, sums.at(i));
    });
    std::vector<std::vector<A>> scale(chunk.last_segment - chunk.first_segment);
    for_segments(blocks, [&](int64_t segment, int64_t first, int64_t last) {
      sums.add_to(energy + segment * H, first, last);
      scale[segment - chunk.first_segment] = GrnResponse<A>(energy + segment * H, block.gamma, H, block.eps).scale;
    });
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock b = blocks[i];
      S* at = h.data() + (b.begin - chunk.begin) * H;
      k.affine(at, scale[b.segment - chunk.first_segment].data(), nullptr, block.row_scale_at(b.begin),
               b.end - b.begin, H, at);
      k.add_shift(block.x + b.begin * C, shift.data(), block.row_scale_at(b.begin), b.end - b.begin, C,
                  y + b.begin * C);
    });
    gemm_add<S>(y + chunk.begin * C, {h.data(), rows, H}, block.w2.t());
  }
}

// Sums of the gradients of per-channel parameters, in the computing type.
template <class A>
struct VectorGrads {
  A *dwconv_bias, *norm_weight, *norm_bias, *pwconv1_bias, *gamma, *beta, *pwconv2_bias;
};

template <class S>
void backward(const Block<S>& block, const Tensor& dwconv_weight, const S* g, const S* u, const Compute<S>* moments,
              const Compute<S>* energy, const S* kept_hidden, S* x_grad, S* dwconv_weight_grad, S* w1_grad, S* w2_grad,
              const VectorGrads<Compute<S>>& grads) {
  using A = Compute<S>;
  const Kernels<S>& k = kernels<S>();
  const int64_t C = block.channels, H = block.hidden;
  const std::vector<A> adjoint_taps = taps_first<S>(dwconv_weight, true);
  const int64_t longest_chunk = longest(block.chunks);
  const Scratch<S> v(longest_chunk * C), du(longest_chunk * C), t(longest_chunk * H), scaled(longest_chunk * H);
  const Scratch<S> recomputed(kept_hidden == nullptr ? longest_chunk * H : 0);
  GemmSum<S> dw1(H, C), dw2(C, H);
  WeightGradSum<S> dtaps(block.halo, C);

  for (const Chunk& chunk : block.chunks) {
    const int64_t rows = chunk.end - chunk.begin, first_tile = chunk.begin / (block.tile * block.tile);
    const std::vector<RowBlock> blocks = split_rows(block.splits, chunk.first_segment, chunk.last_segment, H);
    const Matrix<S> g_rows{const_cast<S*>(g) + chunk.begin * C, rows, C};
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock b = blocks[i];
      k.normalise(u + b.begin * C, moments + 2 * b.begin, block.norm_weight, block.norm_bias, b.end - b.begin, C,
                  v.data() + (b.begin - chunk.begin) * C);
    });
    const S* hidden = kept_hidden != nullptr ? kept_hidden + chunk.begin * H : recomputed.data();
    if (kept_hidden == nullptr) gemm<S>(recomputed.data(), {v.data(), rows, C}, block.w1.t());
    gemm<S>(t.data(), g_rows, block.w2);

    const int64_t segments = chunk.last_segment - chunk.first_segment;
    std::vector<std::vector<A>> scale(segments), p(segments);
    {
      BlockSums<A> scale_sums(blocks.size(), H), beta_sums(blocks.size(), H), bias_sums(blocks.size(), C);
      for (int64_t n = 0; n < segments; ++n)
        scale[n] = GrnResponse<A>(energy + (chunk.first_segment + n) * H, block.gamma, H, block.eps).scale;
      for_blocks(blocks, [&](int64_t i) {
        const RowBlock b = blocks[i];
        const int64_t at = (b.begin - chunk.begin) * H, count = b.end - b.begin;
        k.gelu_grn_sums(hidden + at, block.pwconv1_bias, t.data() + at, scale[b.segment - chunk.first_segment].data(),
                        block.beta, block.row_scale_at(b.begin), count, H, scaled.data() + at, scale_sums.at(i),
                        beta_sums.at(i));
        k.column_sum(g + b.begin * C, block.row_scale_at(b.begin), count, C, bias_sums.at(i));
      });
      beta_sums.add_to(grads.beta);
      bias_sums.add_to(grads.pwconv2_bias);
      for_segments(blocks, [&](int64_t segment, int64_t first, int64_t last) {
        std::vector<A> scale_grad(H, A(0));
        scale_sums.add_to(scale_grad.data(), first, last);
        const GrnResponse<A> response(energy + segment * H, block.gamma, H, block.eps);
        p[segment - chunk.first_segment] = response.backward(scale_grad.data(), block.gamma, grads.gamma);
      });
    }
    dw2.add(g_rows.t(), {scaled.data(), rows, H});

    BlockSums<A> bias1_sums(blocks.size(), H);
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock b = blocks[i];
      const int64_t at = (b.begin - chunk.begin) * H, n = b.segment - chunk.first_segment;
      k.gelu_grn_backward(hidden + at, block.pwconv1_bias, t.data() + at, scale[n].data(), p[n].data(),
                          block.row_scale_at(b.begin), b.end - b.begin, H, bias1_sums.at(i));
    });
    bias1_sums.add_to(grads.pwconv1_bias);
    const Matrix<S> da{t.data(), rows, H};
    dw1.add(da.t(), {v.data(), rows, C});
    gemm<S>(du.data(), da, block.w1);

    BlockSums<A> weight_sums(blocks.size(), C), norm_bias_sums(blocks.size(), C), dw_bias_sums(blocks.size(), C);
    for_blocks(blocks, [&](int64_t i) {
      const RowBlock b = blocks[i];
      S* at = du.data() + (b.begin - chunk.begin) * C;
      k.layer_norm_backward(at, u + b.begin * C, moments + 2 * b.begin, block.norm_weight, b.end - b.begin, C, at,
                            weight_sums.at(i), norm_bias_sums.at(i));
      k.column_sum(at, nullptr, b.end - b.begin, C, dw_bias_sums.at(i));
    });
    weight_sums.add_to(grads.norm_weight);
    norm_bias_sums.add_to(grads.norm_bias);
    dw_bias_sums.add_to(grads.dwconv_bias);

    const Depthwise<S> adjoint{block.halo,          block.table, C, du.data(), first_tile,
                               adjoint_taps.data(), nullptr,     g, x_grad,    0};
    block.for_tiles(chunk, [&](int64_t first, int64_t last) { k.depthwise(adjoint, first, last); });
    dtaps.add({block.halo, block.table, C, block.x, du.data(), first_tile}, first_tile,
              chunk.end / (block.tile * block.tile));
  }
  dtaps.store(dwconv_weight_grad);
  dw1.store(w1_grad);
  dw2.store(w2_grad);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> convnextv2_block(
    const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& pwconv1_weight, const Tensor& pwconv1_bias, const Tensor& grn_gamma,
    const Tensor& grn_beta, const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
    const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& segments, int64_t tile, double eps,
    bool keep_hidden) {
  const int64_t rows = x.size(0), hidden_channels = pwconv1_weight.size(0);
  Tensor y = torch::stable::empty_like(x), u = torch::stable::empty_like(x);
  Tensor moments = empty({rows, 2}, compute_dtype(x));
  Tensor energy = empty({segments.numel() - 1, hidden_channels}, compute_dtype(x));
  Tensor hidden = empty({keep_hidden ? rows : 0, hidden_channels}, x.scalar_type());
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const Block<S> block(x, dwconv_weight, norm_weight, norm_bias, pwconv1_weight, pwconv1_bias, grn_gamma, grn_beta,
                         pwconv2_weight, row_scale, table, segments, tile, eps);
    parameter<A>(dwconv_bias, "dwconv_bias", block.channels, x);
    parameter<A>(pwconv2_bias, "pwconv2_bias", block.channels, x);
    forward<S>(block, dwconv_weight, dwconv_bias, pwconv2_bias, data<S>(y), data<S>(u), data<A>(moments),
               data<A>(energy), keep_hidden ? data<S>(hidden) : nullptr);
  });
  return {y, u, moments, energy, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
convnextv2_block_backward(const Tensor& grad, const Tensor& x, const Tensor& dwconv_weight, const Tensor& dwconv_bias,
                          const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& pwconv1_weight,
                          const Tensor& pwconv1_bias, const Tensor& grn_gamma, const Tensor& grn_beta,
                          const Tensor& pwconv2_weight, const Tensor& pwconv2_bias,
                          const std::optional<Tensor>& row_scale, const Tensor& table, const Tensor& segments,
                          int64_t tile, double eps, const Tensor& u, const Tensor& moments, const Tensor& energy,
                          const Tensor& hidden) {
  using torch::stable::empty_like;
  Tensor x_grad = empty_like(x), dwconv_weight_grad = empty_like(dwconv_weight);
  Tensor w1_grad = empty_like(pwconv1_weight), w2_grad = empty_like(pwconv2_weight);
  std::array<Tensor, 7> vectors{empty_like(dwconv_bias), empty_like(norm_weight), empty_like(norm_bias),
                                empty_like(pwconv1_bias), empty_like(grn_gamma), empty_like(grn_beta),
                                empty_like(pwconv2_bias)};
  for (Tensor& vector : vectors) torch::stable::zero_(vector);
  check_dense(grad, "grad", x.numel());
  check_dtype(grad, "grad", x.scalar_type());
  check_dense(u, "u", x.numel());
  check_dense(moments, "moments", 2 * x.size(0));
  check_dense(energy, "energy", (segments.numel() - 1) * pwconv1_weight.size(0));
  const bool kept = x.size(0) == 0 || hidden.size(0) > 0;
  check_dense(hidden, "hidden", kept ? x.size(0) * pwconv1_weight.size(0) : 0);
  for_dtype(x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    const Block<S> block(x, dwconv_weight, norm_weight, norm_bias, pwconv1_weight, pwconv1_bias, grn_gamma, grn_beta,
                         pwconv2_weight, row_scale, table, segments, tile, eps);
    const VectorGrads<A> grads{data<A>(vectors[0]), data<A>(vectors[1]), data<A>(vectors[2]), data<A>(vectors[3]),
                               data<A>(vectors[4]), data<A>(vectors[5]), data<A>(vectors[6])};
    backward<S>(block, dwconv_weight, data<S>(grad), data<S>(u), data<A>(moments), data<A>(energy),
                kept ? data<S>(hidden) : nullptr, data<S>(x_grad), data<S>(dwconv_weight_grad), data<S>(w1_grad),
                data<S>(w2_grad), grads);
  });
  return {x_grad,     dwconv_weight_grad, vectors[0], vectors[1], vectors[2], w1_grad,
          vectors[3], vectors[4],         vectors[5], w2_grad,    vectors[6]};
}

}  // namespace sparsecnx
