// Grouped convolution on an explicit kernel map with groups of a few channels, forward and weight gradient.
//
// The lanes of a register are consecutive channels, whole groups of them: WIDTH divides the lanes. Output channel c of
// group g is a sum over the WIDTH inputs of its group. So a register of inputs is multiplied WIDTH times, with lane j of
// every group spread over the group, j = 0 ... WIDTH - 1:
//
//     out[o, c] = sum over taps and j of x[map[o, tap], WIDTH * (c / WIDTH) + j] weight[tap, j, c]
//
// Rows go through the same lists of reads as in the depthwise convolution (kernels_mapped.h).
#pragma once

#include "kernels_conv.h"
#include "kernels_mapped.h"

namespace sparsecnx::SPARSECNX_ISA {

template <int WIDTH, int J, class V, size_t... I>
inline V spread_lane(V value, std::index_sequence<I...>) {
  return __builtin_shufflevector(value, value, (I / WIDTH * WIDTH + J)...);
}

// Calls f(j, value with lane j of every group spread over the group) for all j.
template <class A, int WIDTH, class F>
inline void for_lanes(Vec<A> value, const F& f) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>();
  [&]<int... J>(std::integer_sequence<int, J...>) {
    (f(J, spread_lane<WIDTH, J>(value, lanes)), ...);
  }(std::make_integer_sequence<int, WIDTH>());
}

// The sums of a run of reads for R registers of channels. weight (taps, WIDTH, R).
template <class S, int WIDTH, int SUMS, int R>
void narrow_sums(const Reads::Run& run, const Vec<Compute<S>>* weight, const NarrowConv<S>& job, const S* zeros,
                 int64_t channel, int64_t n) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const auto lanes = [&](int r) { return r + 1 < R ? W : n; };
  Vec<A> sums[SUMS][R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec<A> bias = job.bias != nullptr ? load(job.bias + channel + r * W, lanes(r)) : Vec<A>{};
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) sums[i][r] = bias;
  }
  const int32_t* entry = run.entry;
  for (int64_t k = 0; k < run.count; ++k, entry += 1 + SUMS) {
    const Vec<A>* const w = weight + static_cast<int64_t>(entry[0]) * (WIDTH * R);
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) {
      const int64_t row = ~static_cast<int64_t>(entry[1 + i]);
      const S* at = (row < 0 ? zeros : job.x + row * job.channels) + channel;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        for_lanes<A, WIDTH>(load(at + r * W, lanes(r)),
                            [&](int j, Vec<A> value) { sums[i][r] += value * w[j * R + r]; });
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(job.out + (run.first + i) * job.channels + channel + r * W, sums[i][r], lanes(r));
  }
}

// Calls f(first channel, channels of the last register, number of registers as a constant) for pairs of registers, and
// for one that is left.
template <class S, class F>
void for_register_pairs(int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<S>;
  int64_t c = 0;
  for (; c + W < channels; c += 2 * W) f(c, std::min(W, channels - c - W), std::integral_constant<int, 2>());
  if (c < channels) f(c, channels - c, std::integral_constant<int, 1>());
}

template <class S, int WIDTH>
void narrow_rows(const NarrowConv<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const int64_t taps = job.taps, channels = job.channels;
  const std::vector<S> zeros(channels);
  Registers<A> weight(taps * WIDTH * 2);
  // So many rows at a time that the list of reads and most of the rows stay in cache for all channels.
  constexpr int64_t kRows = 256;
  Reads reads(std::min(kRows, end - begin), taps);
  for (int64_t first = begin; first < end; first += kRows) {
    reads.clear();
    reads.add(job.map + first * taps, first, std::min(kRows, end - first), taps, taps, 1);
    for_register_pairs<S>(channels, [&](int64_t c, int64_t n, auto registers) {
      constexpr int R = registers;
      for (int64_t k = 0; k < taps * WIDTH; ++k) {
        for (int r = 0; r < R; ++r) weight[k * R + r] = load(job.weight + k * channels + c + r * W, r + 1 < R ? W : n);
      }
      for (const Reads::Run& run : reads.runs()) {
        run.sums == kTogether ? narrow_sums<S, WIDTH, kTogether, R>(run, weight.data(), job, zeros.data(), c, n)
                              : narrow_sums<S, WIDTH, 1, R>(run, weight.data(), job, zeros.data(), c, n);
      }
    });
  }
}

// sums (WIDTH, channels) += spread x[from] * grad[to] over pairs, for R registers of channels.
template <class S, int WIDTH, int R>
void narrow_outer(const NarrowConv<S>& job, const int32_t* from, const int32_t* to, int64_t count, int64_t channel,
                  int64_t n, Compute<S>* out) {
  using A = Compute<S>;
  constexpr int64_t W = kLanes<S>;
  const auto lanes = [&](int r) { return r + 1 < R ? W : n; };
  Vec<A> sums[WIDTH][R] = {};
  for (int64_t i = 0; i < count; ++i) {
    const S* row = job.x + from[i] * job.channels + channel;
    const S* grad = job.out + to[i] * job.channels + channel;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> g = load(grad + r * W, lanes(r));
      for_lanes<A, WIDTH>(load(row + r * W, lanes(r)), [&](int j, Vec<A> value) { sums[j][r] += value * g; });
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < WIDTH; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      A* at = out + j * job.channels + channel + r * W;
      store(at, load(at, lanes(r)) + sums[j][r], lanes(r));
    }
  }
}

// Calls f with the width of a group as a constant. Returns whether there is a kernel for it.
template <class S, class F>
bool with_width(int64_t width, const F& f) {
  bool found = false;
  const auto offer = [&](auto constant) {
    if constexpr (kLanes<S> % constant == 0 && kLanes<S> >= constant) {
      if (width == constant) f(constant), found = true;
    }
  };
  offer(std::integral_constant<int, 2>());
  offer(std::integral_constant<int, 4>());
  offer(std::integral_constant<int, 8>());
  return found;
}

template <class S>
bool is_narrow(int64_t width) {
  return with_width<S>(width, [](auto) {});
}

template <class S>
void conv_narrow(const NarrowConv<S>& job, int64_t begin, int64_t end) {
  with_width<S>(job.width, [&](auto width) { narrow_rows<S, width>(job, begin, end); });
}

template <class S>
void conv_narrow_weight_grad(const NarrowConv<S>& job, const int32_t* from, const int32_t* to, int64_t count,
                             int64_t begin, int64_t end, Compute<S>* sums) {
  with_width<S>(job.width, [&](auto width) {
    for_register_pairs<S>(end - begin, [&](int64_t c, int64_t n, auto registers) {
      narrow_outer<S, width, registers>(job, from, to, count, begin + c, n, sums);
    });
  });
}

}  // namespace sparsecnx::SPARSECNX_ISA
