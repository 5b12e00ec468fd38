// The end of a depthwise convolution: its rows are stored, or normalised and then stored.
#pragma once

#include "depthwise_squares.cuh"

namespace sparsecnx::cuda {

// The mean of `count` values and the sum of their squared distances from it.
struct Moments {
  float count, mean, squares;

  // Returns the moments of these and the other values together (Chan, Golub, LeVeque 1979).
  __device__ Moments merged(Moments other) const {
    const float total = count + other.count;
    const float share = total > 0.0f ? other.count / total : 0.0f;
    const float distance = other.mean - mean;
    return {total, mean + distance * share, squares + other.squares + distance * distance * count * share};
  }
};

// Gives every lane the merged moments of its group of kWidth neighbouring lanes.
template <int kWidth>
__device__ Moments merged_across(Moments m) {
#pragma unroll
  for (int step = 1; step < kWidth; step *= 2) {
    const Moments other{__shfl_xor_sync(kAll, m.count, step), __shfl_xor_sync(kAll, m.mean, step),
                        __shfl_xor_sync(kAll, m.squares, step)};
    // Both lanes merge in the same order, so that both get the same bits.
    m = threadIdx.x & step ? other.merged(m) : m.merged(other);
  }
  return m;
}

// A lane moves 16 bytes at once where rows allow it (Sixteen), otherwise one value (Single).
template <class T>
struct Sixteen {
  static constexpr int kValues = Pack<T>::kSize;
  static __device__ Pack<T> load(const T* from) { return load_pack(from); }
  static __device__ void store(T* to, const Pack<T>& pack) { store_pack(to, pack); }
};
template <class T>
struct Single {
  static constexpr int kValues = 1;
  static __device__ Pack<T> load(const T* from) {
    Pack<T> pack;
    pack.at[0] = *from;
    return pack;
  }
  static __device__ void store(T* to, const Pack<T>& pack) { *to = pack.at[0]; }
};

// Moves the rows that a warp has computed from shared memory to `out`. place(i) is the place of the slab's values of
// row i in shared memory.
template <class T, int kPer>
struct Finish {
  T* out;         // (rows, C)
  int64_t first;  // row of place 0
  int count;

  // Stores the values.
  template <class F>
  __device__ void store(const Slab<T, kPer>& slab, const T* memory, const F& place) const {
    for_rows(slab, [&](int i, int part, bool known, auto move) {
      using Move = decltype(move);
      if (known) {
        Move::store(out + slab.offset(first + i, part), Move::load(memory + place(i) * slab.kChannels + part));
      }
    });
  }

  // Adds the moments of the slab's values of every row to `moments`. The values are rounded first, as they are for a
  // separate LayerNorm.
  template <class F>
  __device__ void measure(const Slab<T, kPer>& slab, const T* memory, const F& place, Moments* moments) const {
    for_rows(slab, [&](int i, int part, bool known, auto move) {
      using Move = decltype(move);
      Moments m{0.0f, 0.0f, 0.0f};
      if (known) {
        const Pack<T> values = Move::load(memory + place(i) * slab.kChannels + part);
        m.count = Move::kValues;
#pragma unroll
        for (int k = 0; k < Move::kValues; ++k) m.mean += widen(values.at[k]);
        m.mean *= 1.0f / Move::kValues;
#pragma unroll
        for (int k = 0; k < Move::kValues; ++k) {
          m.squares += (widen(values.at[k]) - m.mean) * (widen(values.at[k]) - m.mean);
        }
      }
      m = merged_across<kLanesPerRow<Move>>(m);
      if (slab.lane % kLanesPerRow<Move> == 0 && i < count) moments[i] = moments[i].merged(m);
    });
  }

  // Stores (value - mean) * rstd. The values are in shared memory or, if `memory` is null, the same lane has stored
  // them.
  template <class F>
  __device__ void normalise(const Slab<T, kPer>& slab, const T* memory, const F& place, const float2* scales) const {
    for_rows(slab, [&](int i, int part, bool known, auto move) {
      using Move = decltype(move);
      if (known) {
        T* to = out + slab.offset(first + i, part);
        Pack<T> values = Move::load(memory == nullptr ? to : memory + place(i) * slab.kChannels + part);
        const float2 scale = scales[i];
#pragma unroll
        for (int k = 0; k < Move::kValues; ++k) {
          values.at[k] = narrow<T>((widen(values.at[k]) - scale.x) * scale.y);
        }
        Move::store(to, values);
      }
    });
  }

 private:
  // Calls f(row, its first value, whether the row exists, how to move values) for a whole warp at a time.
  template <class F>
  __device__ void for_rows(const Slab<T, kPer>& slab, const F& f) const {
    slab.packs ? rows_by(slab, f, Sixteen<T>()) : rows_by(slab, f, Single<T>());
  }

  // The number of lanes that share a row.
  template <class Move>
  static constexpr int kLanesPerRow =
      Slab<T, kPer>::kChannels / Move::kValues < kLanes ? Slab<T, kPer>::kChannels / Move::kValues : kLanes;

  template <class F, class Move>
  __device__ void rows_by(const Slab<T, kPer>& slab, const F& f, Move move) const {
    constexpr int kSharing = kLanesPerRow<Move>;
#pragma unroll
    for (int part0 = 0; part0 < slab.kChannels; part0 += kSharing * Move::kValues) {
      const int part = part0 + slab.lane % kSharing * Move::kValues;
#pragma unroll 2
      for (int i0 = 0; i0 < count; i0 += kLanes / kSharing) {
        const int i = i0 + slab.lane / kSharing;
        f(i, part, i < count && slab.first + part < slab.channels, move);
      }
    }
  }
};

// Computes mean and scale of each row from the moments of all warps, (warps, places). All threads of the block take
// part.
inline __device__ void settle(const Moments* moments, int warps, int places, int count, float eps, float2* scales,
                              float* rstd) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    Moments m = moments[i];
    for (int w = 1; w < warps; ++w) m = m.merged(moments[w * places + i]);
    const float scale = rsqrtf(m.squares / m.count + eps);
    scales[i] = float2{m.mean, scale};
    rstd[i] = scale;
  }
}

}  // namespace sparsecnx::cuda
