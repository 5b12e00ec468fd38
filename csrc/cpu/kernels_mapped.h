// Depthwise convolution on a kernel map, forward and weight gradient.
//
// Both are sums of products of a factor and a row of x, which the map names. Forward, a sum is an output row and its
// factors are the rows of the weight. In the gradient, a sum is a tap and its factors are the rows of the output's
// gradient. Four sums that read nearly the same rows are taken together: a factor, once loaded, serves all four. If one
// of them reads nothing, it reads a row of zeros, so that no branch depends on the map. Factors for which none of them
// reads anything are left out. If the four have too little in common (single sites of a random mask), each is summed
// alone.
//
// Rows are taken in blocks of 64, and a few registers of channels at a time, so that the weight, the list of reads and
// most of the rows that are read stay in L1.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sparsecnx::SPARSECNX_ISA {

constexpr int kTogether = 4;    // sums that share their factors
constexpr int64_t kBlock = 64;  // rows

// Registers of channels that are taken at a time: as many as fit with four sums of each.
#if defined(SPARSECNX_AVX512)
constexpr int kMostRegisters = 4;
#else
constexpr int kMostRegisters = 2;
#endif

// Returns whether all entries are -1 or rows below `rows`.
inline bool all_rows(const int32_t* map, int64_t count, int64_t rows) {
  constexpr int64_t kInts = SPARSECNX_BYTES / sizeof(int32_t);
  Ints low = Ints{} - 1, high = Ints{} - 1;
  int64_t i = 0;
  for (; i + kInts <= count; i += kInts) {
    Ints entries;
    std::memcpy(&entries, map + i, sizeof(entries));
    low = entries < low ? entries : low;
    high = entries > high ? entries : high;
  }
  bool good = true;
  for (int64_t lane = 0; lane < kInts; ++lane) good &= low[lane] == -1 && high[lane] < rows;
  for (; i < count; ++i) good &= map[i] >= -1 && map[i] < rows;
  return good;
}

// The tap and the row of every entry of a block of a map, so that one loop goes over all of them.
struct Entries {
  std::vector<int32_t> tap, row;

  Entries(int64_t rows, int64_t taps) {
    for (int64_t i = 0; i < rows * taps; ++i) {
      tap.push_back(static_cast<int32_t>(i % taps));
      row.push_back(static_cast<int32_t>(i / taps));
    }
  }
};

// Returns whether the inverse map has the first `count` reads of a block, which starts at output row `first`. Entries
// are in range. Index holds every position in the inverse map: compilers gather by 32 bits twice as fast.
template <class Index>
inline bool all_inverse(const int32_t* map, const int32_t* inverse, const Entries& entries, int64_t first,
                        int64_t count, int64_t taps) {
  const int32_t *tap = entries.tap.data(), *row = entries.row.data(), base = static_cast<int32_t>(first);
  const Index width = static_cast<Index>(taps);
  int32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    // Without a branch, which a sparse map makes hard to predict: an entry of -1 reads row 0, and nothing comes of it.
    const Index at = static_cast<Index>(map[i] < 0 ? 0 : map[i]) * width + tap[i];
    wrong |= (inverse[at] ^ (row[i] + base)) & ~(map[i] >> 31);
  }
  return wrong == 0;
}

// Returns whether the reads of rows [first, last) of a map, at most kBlock, are in the inverse map, if there is one.
inline bool agrees(const KernelMap& map, const int32_t* rows, const int32_t* inverse, const Entries& entries,
                   int64_t first, int64_t last) {
  if (inverse == nullptr || map.rows_in == 0) return true;
  const auto all = map.rows_in * map.taps <= INT32_MAX ? all_inverse<int32_t> : all_inverse<int64_t>;
  return all(rows, inverse, entries, first, (last - first) * map.taps, map.taps);
}

// Lists which rows of x some sums read, and with which factors.
class Reads {
 public:
  // The reads of sums [first, first + sums), factor by factor.
  struct Run {
    int64_t first;
    int sums;              // 1 or kTogether
    const int32_t* entry;  // (count, 1 + sums): number of the factor, for each sum the complement ~row
    int64_t count;
  };

  // Makes room for `sums` sums of `factors` factors.
  Reads(int64_t sums, int64_t factors) : entries_(2 * sums * factors) { runs_.reserve(sums); }

  void clear() {
    runs_.clear();
    end_ = entries_.data();
  }

  // Adds sums [first, first + sums). Sum i reads row map[i * sum_step + f * factor_step] with factor f, or none for -1.
  void add(const int32_t* map, int64_t first, int64_t sums, int64_t sum_step, int64_t factors, int64_t factor_step) {
    int64_t i = 0;
    for (; i + kTogether <= sums; i += kTogether) {
      if (!add_together(map + i * sum_step, first + i, sum_step, factors, factor_step)) {
        for (int64_t one = i; one < i + kTogether; ++one)
          add_alone(map + one * sum_step, first + one, factors, factor_step);
      }
    }
    for (; i < sums; ++i) add_alone(map + i * sum_step, first + i, factors, factor_step);
  }

  const std::vector<Run>& runs() const { return runs_; }

 private:
  // Together, a factor costs five loads: its own and one for each sum. Alone, every read costs two.
  bool add_together(const int32_t* map, int64_t first, int64_t sum_step, int64_t factors, int64_t factor_step) {
    int32_t* entry = end_;
    int64_t reads = 0;
    for (int64_t f = 0; f < factors; ++f, map += factor_step) {
      int32_t none = -1;
      entry[0] = static_cast<int32_t>(f);
      for (int i = 0; i < kTogether; ++i) {
        const int32_t row = map[i * sum_step];
        entry[1 + i] = ~row;
        none &= row;
        reads += row >= 0;
      }
      entry += none < 0 ? 0 : 1 + kTogether;
    }
    const int64_t count = (entry - end_) / (1 + kTogether);
    if (5 * count > 2 * reads) return false;
    runs_.push_back({first, kTogether, end_, count});
    end_ = entry;
    return true;
  }

  void add_alone(const int32_t* map, int64_t first, int64_t factors, int64_t factor_step) {
    int32_t* entry = end_;
    for (int64_t f = 0; f < factors; ++f, map += factor_step) {
      entry[0] = static_cast<int32_t>(f);
      entry[1] = ~*map;
      entry += *map < 0 ? 0 : 2;
    }
    runs_.push_back({first, 1, end_, (entry - end_) / 2});
    end_ = entry;
  }

  std::vector<int32_t> entries_;
  int32_t* end_ = nullptr;
  std::vector<Run> runs_;
};

// Channels [at, at + REGISTERS * lanes) if WHOLE, otherwise the first `n` of one register.
template <class S, int REGISTERS, bool WHOLE>
struct Channels {
  static constexpr int kRegisters = REGISTERS;
  int64_t at, n;

  template <class T>
  Vec<Compute<S>> get(const T* row, int j) const {
    return WHOLE ? load(row + at + j * kLanes<S>) : load(row + at, n);
  }
  template <class T>
  void put(T* row, int j, Vec<Compute<S>> value) const {
    WHOLE ? store(row + at + j * kLanes<S>, value) : store(row + at, value, n);
  }
};

// Calls f(Channels) for all channels, the widest blocks first.
template <class S, class F>
inline void for_channel_blocks(int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<S>;
  int64_t c = 0;
  for (; c + kMostRegisters * W <= channels; c += kMostRegisters * W) f(Channels<S, kMostRegisters, true>{c, W});
  if constexpr (kMostRegisters > 2) {
    for (; c + 2 * W <= channels; c += 2 * W) f(Channels<S, 2, true>{c, W});
  }
  for (; c + W <= channels; c += W) f(Channels<S, 1, true>{c, W});
  if (c < channels) f(Channels<S, 1, false>{c, channels - c});
}

// Starts every sum with start(j), adds factor * row of x for all reads of a run, and passes it to finish(sum, j, value).
// Factor f is factors[f * registers ...].
template <class S, int SUMS, class C, class Start, class Finish>
inline void run_sums(const Reads::Run& run, const Vec<Compute<S>>* factors, const S* x, int64_t channels,
                     const S* zeros, const C& block, const Start& start, const Finish& finish) {
  constexpr int R = C::kRegisters;
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(S));
  const uintptr_t nothing = reinterpret_cast<uintptr_t>(zeros);
  const uintptr_t before = reinterpret_cast<uintptr_t>(x) - bytes - nothing;  // from there to the row before x
  Vec<Compute<S>> sums[SUMS][R];
#pragma GCC unroll 4
  for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) sums[i][j] = start(j);
  }
  const int32_t* entry = run.entry;
  for (int64_t k = 0; k < run.count; ++k, entry += 1 + SUMS) {
    const Vec<Compute<S>>* const at_factor = factors + static_cast<int64_t>(entry[0]) * R;
    Vec<Compute<S>> factor[R];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) factor[j] = at_factor[j];
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) {
      // This is arithmetic because the compiler makes a branch of a condition, and the map is random. The complement of
      // a row is negative, so that the shift gives all ones. The complement of -1 is 0 and selects the row of zeros.
      const int64_t complement = entry[1 + i];
      const uintptr_t distance = (before - static_cast<uintptr_t>(complement * bytes)) & (complement >> 63);
      const S* at = reinterpret_cast<const S*>(nothing + distance);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) sums[i][j] += factor[j] * block.get(at, j);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) finish(run.first + i, j, sums[i][j]);
  }
}

template <class S, class C, class Start, class Finish>
inline void all_sums(const Reads& reads, const Vec<Compute<S>>* factors, const S* x, int64_t channels, const S* zeros,
                     const C& block, const Start& start, const Finish& finish) {
  for (const Reads::Run& run : reads.runs()) {
    if (run.sums == kTogether) {
      run_sums<S, kTogether>(run, factors, x, channels, zeros, block, start, finish);
    } else {
      run_sums<S, 1>(run, factors, x, channels, zeros, block, start, finish);
    }
  }
}

// A weight (taps, channels) by blocks of channels, so that each block reads it from one place.
template <class S>
class BlockedWeight {
 public:
  BlockedWeight(const Compute<S>* weight, int64_t taps, int64_t channels)
      : taps_(taps), blocked_(taps * ((channels + kLanes<S> - 1) / kLanes<S>)) {
    for_channel_blocks<S>(channels, [&](auto block) {
      Vec<Compute<S>>* at = blocked_.data() + block.at / kLanes<S> * taps;
      for (int64_t k = 0; k < taps; ++k) {
        for (int j = 0; j < block.kRegisters; ++j) *at++ = block.get(weight + k * channels, j);
      }
    });
  }

  template <class C>
  const Vec<Compute<S>>* of(const C& block) const {
    return blocked_.data() + block.at / kLanes<S> * taps_;
  }

 private:
  int64_t taps_;
  Registers<Compute<S>> blocked_;
};

// weight_grad (taps, channels) += sums over `rows` rows of the gradient, which start at grad(i), of the products in
// `reads`, for a block of channels. `loaded` has room for that block of the gradient.
template <class S, class C, class Grad>
inline void add_weight_grad(const Reads& reads, const Grad& grad, int64_t rows, const S* x, int64_t channels,
                            const S* zeros, const C& block, Vec<Compute<S>>* loaded, Compute<S>* weight_grad) {
  using A = Compute<S>;
  Vec<A>* at = loaded;
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < block.kRegisters; ++j) *at++ = block.get(grad(r), j);
  }
  const auto start = [&](int) { return Vec<A>{}; };
  const auto finish = [&](int64_t k, int j, Vec<A> sum) {
    A* total = weight_grad + k * channels;
    block.put(total, j, block.get(total, j) + sum);
  };
  all_sums<S>(reads, loaded, x, channels, zeros, block, start, finish);
}

template <class S>
bool mapped_depthwise(const MappedDepthwise<S>& job, int64_t begin, int64_t end) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.map.taps;
  const std::vector<S> zeros(channels);
  std::vector<int32_t> room;
  const BlockedWeight<S> weight(job.weight, taps, channels);
  Reads reads(std::min(kBlock, end - begin), taps);
  const Entries entries(job.inverse != nullptr ? std::min(kBlock, end - begin) : 0, taps);
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t rows = std::min(kBlock, end - row);
    const int32_t* map = job.map.rows(row, row + rows, room);
    if (!agrees(job.map, map, job.inverse, entries, row, row + rows)) return false;
    reads.clear();
    reads.add(map, row, rows, taps, taps, 1);
    for_channel_blocks<S>(channels, [&](auto block) {
      const auto start = [&](int j) { return job.bias != nullptr ? block.get(job.bias, j) : Vec<A>{}; };
      const auto finish = [&](int64_t o, int j, Vec<A> sum) { block.put(job.out + o * channels, j, sum); };
      all_sums<S>(reads, weight.of(block), job.x, channels, zeros.data(), block, start, finish);
    });
  }
  return true;
}

template <class S>
void mapped_depthwise_weight_grad(const MappedDepthwiseWeightGrad<S>& job, int64_t begin, int64_t end,
                                  Compute<S>* weight_grad) {
  using A = Compute<S>;
  const int64_t channels = job.channels, taps = job.map.taps;
  const std::vector<S> zeros(channels);
  std::vector<int32_t> room;
  Registers<A> grad(kBlock * kMostRegisters);
  Reads reads(taps, std::min(kBlock, end - begin));
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t rows = std::min(kBlock, end - row);
    reads.clear();
    reads.add(job.map.rows(row, row + rows, room), 0, taps, 1, rows, taps);
    const auto grad_row = [&](int64_t r) { return job.grad + (row + r) * channels; };
    for_channel_blocks<S>(channels, [&](auto block) {
      add_weight_grad<S>(reads, grad_row, rows, job.x, channels, zeros.data(), block, grad.data(), weight_grad);
    });
  }
}

}  // namespace sparsecnx::SPARSECNX_ISA
