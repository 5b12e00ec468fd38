// The maximum of the rows under a kernel map, its gradient, and their sum.
//
// A row lists its taps that read something, without a branch: a random mask would be mispredicted. Then a few registers of
// channels go through that list at a time.
#pragma once

#include "kernels_mapped.h"

namespace sparsecnx::SPARSECNX_ISA {

// Lanes of integers beside lanes of A, as comparisons give them.
template <class A>
using Tags = std::conditional_t<sizeof(A) == 8, Vec<int64_t>, Vec<int32_t>>;

template <class W, int64_t N>
struct Winners {
  typedef W type __attribute__((vector_size(sizeof(W) * N)));
};

// Stores or loads the first n numbers of taps. Their width changes by a factor of two at a time: compilers make scalar code
// of a conversion by four.
template <class A, class W>
inline void store_winners(W* at, Tags<A> tags, int64_t n) {
  constexpr int64_t N = kLanes<A>;
  typename Winners<W, N>::type narrow;
  if constexpr (sizeof(W) == 1) {
    const auto words = __builtin_convertvector(tags, typename Winners<uint32_t, N>::type);
    const auto halves = __builtin_convertvector(words, typename Winners<uint16_t, N>::type);
    narrow = __builtin_convertvector(halves, typename Winners<W, N>::type);
  } else {
    narrow = __builtin_convertvector(tags, typename Winners<W, N>::type);
  }
  n >= N ? std::memcpy(at, &narrow, sizeof(narrow)) : std::memcpy(at, &narrow, n * sizeof(W));
}

template <class A, class W>
inline Tags<A> load_winners(const W* at, int64_t n) {
  constexpr int64_t N = kLanes<A>;
  typename Winners<W, N>::type narrow{};
  n >= N ? std::memcpy(&narrow, at, sizeof(narrow)) : std::memcpy(&narrow, at, n * sizeof(W));
  if constexpr (sizeof(W) == 1) {
    const auto halves = __builtin_convertvector(narrow, typename Winners<uint16_t, N>::type);
    const auto words = __builtin_convertvector(halves, typename Winners<uint32_t, N>::type);
    return __builtin_convertvector(words, Tags<A>);
  } else {
    return __builtin_convertvector(narrow, Tags<A>);
  }
}

// The taps of one row that read something.
class Present {
 public:
  explicit Present(int64_t taps) : tap_(taps), row_(taps) {}

  void visit(const int32_t* map, int64_t taps) {
    count_ = 0;
    for (int64_t k = 0; k < taps; ++k) {
      tap_[count_] = static_cast<int32_t>(k);
      row_[count_] = map[k];
      count_ += map[k] >= 0;
    }
  }
  int64_t count() const { return count_; }
  int32_t tap(int64_t i) const { return tap_[i]; }
  int64_t row(int64_t i) const { return row_[i]; }

 private:
  std::vector<int32_t> tap_, row_;
  int64_t count_ = 0;
};

template <class S, class W>
void max_rows(const MaxPool<S>& job, const int32_t* map, W* winner, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.map.taps;
  Present present(taps + 1);
  for (int64_t o = begin; o < end; ++o, map += taps) {
    present.visit(map, taps);
    for_channel_blocks<S>(channels, [&](auto block) {
      constexpr int R = block.kRegisters;
      Vec<A> best[R];
      Tags<A> taken[R];
      const bool any = present.count() > 0;
      for (int j = 0; j < R; ++j) {
        best[j] = any ? block.get(job.x + present.row(0) * channels, j) : Vec<A>{};
        taken[j] = splat<Tags<A>>(any ? present.tap(0) : -1);
      }
      for (int64_t i = 1; i < present.count(); ++i) {
        const S* at = job.x + present.row(i) * channels;
        const Tags<A> tap = splat<Tags<A>>(present.tap(i));
        for (int j = 0; j < R; ++j) {
          const Vec<A> value = block.get(at, j);
          const Tags<A> better = (value > best[j]) | (value != value);  // A NaN wins, as in torch's own pooling.
          best[j] = better ? value : best[j];
          taken[j] = better ? tap : taken[j];
        }
      }
      for (int j = 0; j < R; ++j) {
        block.put(job.out + o * channels, j, best[j]);
        store_winners<A>(winner + o * channels + block.at + j * kLanes<A>, taken[j], block.n);
      }
    });
  }
}

template <class S, class W>
void max_gradient(const MaxPoolGrad<S>& job, const int32_t* map, const W* winner, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.map.taps;
  Present present(taps + 1);
  for (int64_t row = begin; row < end; ++row, map += taps) {
    present.visit(map, taps);
    for_channel_blocks<S>(channels, [&](auto block) {
      constexpr int R = block.kRegisters;
      Vec<A> sum[R];
      for (int j = 0; j < R; ++j) sum[j] = Vec<A>{};
      for (int64_t i = 0; i < present.count(); ++i) {
        const int64_t at = present.row(i) * channels;
        const Tags<A> tap = splat<Tags<A>>(present.tap(i));
        for (int j = 0; j < R; ++j) {
          const Tags<A> mine = load_winners<A>(winner + at + block.at + j * kLanes<A>, block.n) == tap;
          sum[j] += mine ? block.get(job.grad + at, j) : Vec<A>{};
        }
      }
      for (int j = 0; j < R; ++j) block.put(job.out + row * channels, j, sum[j]);
    });
  }
}

// Calls f(entries, first row, last row) for blocks of rows of a map, until it returns false. Returns whether it never did.
template <class F>
bool for_blocks_of_rows(const KernelMap& map, int64_t begin, int64_t end, const F& f) {
  std::vector<int32_t> room;
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t last = std::min(row + kBlock, end);
    if (!f(map.rows(row, last, room), row, last)) return false;
  }
  return true;
}

// The sum is its own gradient, on the inverse map.
template <class S>
void sum_pool(const SumPool<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.map.taps;
  Present present(taps + 1);
  for_blocks_of_rows(job.map, begin, end, [&](const int32_t* map, int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o, map += taps) {
      present.visit(map, taps);
      for_channel_blocks<S>(channels, [&](auto block) {
        constexpr int R = block.kRegisters;
        Vec<A> sum[R];
        for (int j = 0; j < R; ++j) sum[j] = Vec<A>{};
        for (int64_t i = 0; i < present.count(); ++i) {
          const S* at = job.x + present.row(i) * channels;
          for (int j = 0; j < R; ++j) sum[j] += block.get(at, j);
        }
        for (int j = 0; j < R; ++j) block.put(job.out + o * channels, j, sum[j] * job.factor);
      });
    }
    return true;
  });
}

template <class S>
void max_pool(const MaxPool<S>& job, int64_t begin, int64_t end) {
  for_blocks_of_rows(job.map, begin, end, [&](const int32_t* map, int64_t first, int64_t last) {
    if (job.map.taps <= kMostShortTaps) {
      max_rows<S>(job, map, static_cast<uint8_t*>(job.winner), first, last);
    } else {
      max_rows<S>(job, map, static_cast<int32_t*>(job.winner), first, last);
    }
    return true;
  });
}

template <class S>
bool max_pool_grad(const MaxPoolGrad<S>& job, int64_t begin, int64_t end) {
  const Entries entries(job.inverse != nullptr ? std::min(kBlock, end - begin) : 0, job.map.taps);
  return for_blocks_of_rows(job.map, begin, end, [&](const int32_t* map, int64_t first, int64_t last) {
    if (!agrees(job.map, map, job.inverse, entries, first, last)) return false;
    if (job.map.taps <= kMostShortTaps) {
      max_gradient<S>(job, map, static_cast<const uint8_t*>(job.winner), first, last);
    } else {
      max_gradient<S>(job, map, static_cast<const int32_t*>(job.winner), first, last);
    }
    return true;
  });
}

}  // namespace sparsecnx::SPARSECNX_ISA
