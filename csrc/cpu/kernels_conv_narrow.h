// Grouped convolution on a kernel map with groups of a few channels, forward and weight gradient.
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

// Lane J of every group, spread over the group.
template <int WIDTH, int J, class V, size_t... I>
inline V spread_lane(V value, std::index_sequence<I...>) {
  return __builtin_shufflevector(value, value, (I / WIDTH * WIDTH + J)...);
}

// sum += products of a register of inputs, lane by lane, with WIDTH registers that are STEP apart.
template <class A, int WIDTH, int STEP, int J = 0>
inline void add_lanes(Vec<A> value, const Vec<A>* weight, Vec<A>& sum) {
  sum += spread_lane<WIDTH, J>(value, std::make_index_sequence<kLanes<A>>()) * weight[J * STEP];
  if constexpr (J + 1 < WIDTH) add_lanes<A, WIDTH, STEP, J + 1>(value, weight, sum);
}

// sums[J] += a register of inputs, lane J spread, * grad
template <class A, int WIDTH, int R, int J = 0>
inline void add_outer(Vec<A> value, Vec<A> grad, int r, Vec<A> (&sums)[WIDTH][R]) {
  sums[J][r] += spread_lane<WIDTH, J>(value, std::make_index_sequence<kLanes<A>>()) * grad;
  if constexpr (J + 1 < WIDTH) add_outer<A, WIDTH, R, J + 1>(value, grad, r, sums);
}

// The sums of a run of reads for a block of R registers of channels. weight (taps, WIDTH, R).
template <class S, int WIDTH, int SUMS, class C>
void narrow_sums(const Reads::Run& run, const Vec<Compute<S>>* weight, const NarrowConv<S>& job, const S* zeros,
                 const C& block) {
  using A = Compute<S>;
  constexpr int R = C::kRegisters;
  const int64_t bytes = job.channels * static_cast<int64_t>(sizeof(S));
  const uintptr_t nothing = reinterpret_cast<uintptr_t>(zeros);
  const uintptr_t before = reinterpret_cast<uintptr_t>(job.x) - bytes - nothing;  // from there to the row before x
  Vec<A> sums[SUMS][R];
#pragma GCC unroll 4
  for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[i][r] = job.bias != nullptr ? block.get(job.bias, r) : Vec<A>{};
  }
  const int32_t* entry = run.entry;
  for (int64_t k = 0; k < run.count; ++k, entry += 1 + SUMS) {
    const Vec<A>* const w = weight + static_cast<int64_t>(entry[0]) * (WIDTH * R);
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) {
      // Arithmetic instead of a branch, as in run_sums of kernels_mapped.h.
      const int64_t complement = entry[1 + i];
      const uintptr_t distance = (before - static_cast<uintptr_t>(complement * bytes)) & (complement >> 63);
      const S* at = reinterpret_cast<const S*>(nothing + distance);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) add_lanes<A, WIDTH, R>(block.get(at, r), w + r, sums[i][r]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) block.put(job.out + (run.first + i) * job.channels, r, sums[i][r]);
  }
}

// Calls f(Channels) for pairs of registers of channels [begin, end), then for one, and for a part of one.
template <class S, class F>
inline void for_narrow_blocks(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t W = kLanes<S>;
  int64_t c = begin;
  for (; c + 2 * W <= end; c += 2 * W) f(Channels<S, 2, true>{c, W});
  for (; c + W <= end; c += W) f(Channels<S, 1, true>{c, W});
  if (c < end) f(Channels<S, 1, false>{c, end - c});
}

template <class S, int WIDTH>
void narrow_rows(const NarrowConv<S>& job, const int32_t* map, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t taps = job.taps, channels = job.channels;
  const std::vector<S> zeros(channels);
  Registers<A> weight(taps * WIDTH * 2);
  // So many rows at a time that the list of reads and most of the rows stay in cache for all channels.
  constexpr int64_t kRows = 256;
  Reads reads(std::min(kRows, end - begin), taps);
  for (int64_t first = begin; first < end; first += kRows) {
    reads.clear();
    reads.add(map + (first - begin) * taps, first, std::min(kRows, end - first), taps, taps, 1);
    for_narrow_blocks<S>(0, channels, [&](auto block) {
      constexpr int R = block.kRegisters;
      for (int64_t k = 0; k < taps * WIDTH; ++k) {
        for (int r = 0; r < R; ++r) weight[k * R + r] = block.get(job.weight + k * channels, r);
      }
      for (const Reads::Run& run : reads.runs()) {
        run.sums == kTogether ? narrow_sums<S, WIDTH, kTogether>(run, weight.data(), job, zeros.data(), block)
                              : narrow_sums<S, WIDTH, 1>(run, weight.data(), job, zeros.data(), block);
      }
    });
  }
}

// out (WIDTH, channels) += x[from], spread, * grad[to] over pairs, for a block of channels.
template <class S, int WIDTH, class C>
void narrow_outer(const NarrowConv<S>& job, const int32_t* from, const int32_t* to, int64_t count, const C& block,
                  Compute<S>* out) {
  using A = Compute<S>;
  constexpr int R = C::kRegisters;
  Vec<A> sums[WIDTH][R] = {};
  for (int64_t i = 0; i < count; ++i) {
    const S* row = job.x + from[i] * job.channels;
    const S* grad = job.out + to[i] * job.channels;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) add_outer<A, WIDTH, R>(block.get(row, r), block.get(grad, r), r, sums);
  }
#pragma GCC unroll 8
  for (int j = 0; j < WIDTH; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      A* at = out + j * job.channels;
      block.put(at, r, block.get(at, r) + sums[j][r]);
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
void conv_narrow(const NarrowConv<S>& job, const int32_t* map, int64_t begin, int64_t end) {
  with_width<S>(job.width, [&](auto width) { narrow_rows<S, width>(job, map, begin, end); });
}

template <class S>
void conv_narrow_weight_grad(const NarrowConv<S>& job, const int32_t* from, const int32_t* to, int64_t count,
                             int64_t begin, int64_t end, Compute<S>* sums) {
  with_width<S>(job.width, [&](auto width) {
    for_narrow_blocks<S>(begin, end, [&](auto block) { narrow_outer<S, width>(job, from, to, count, block, sums); });
  });
}

}  // namespace sparsecnx::SPARSECNX_ISA
