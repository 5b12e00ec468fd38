// sparsecnx::conv on a kernel map (rows_out, taps), and its gradients. The inner loops are in kernels_conv.h, those of
// groups of a few channels in kernels_conv_narrow.h.
//
// A chunk of output rows stays in cache while the taps are applied to it one after another. Where a row has few input
// channels, as in the stem of a network, their products would be too short: the rows under all taps are gathered into
// columns, and these are one tap of many channels.
//
// Weights are (groups, taps, channels in, channels out) of any strides, so that the gradient of x is the same operator
// on the inverse map, with the last two axes exchanged.
#include <cstring>

#include "mapped.h"

namespace sparsecnx {
namespace {

constexpr int64_t kChunkValues = 1 << 18;   // of the input and output rows of a chunk
constexpr int64_t kMostChunk = 1024;        // rows
constexpr int64_t kPackedValues = 1 << 18;  // of a panel of the weight: it stays in L2, or nearly
constexpr int64_t kMostDepth = 256;         // input channels of it, for which output rows are read and written once
constexpr int64_t kWeightGradRows = 128;    // of a chunk of the gradient of the weight: a panel of them stays in L1
constexpr int64_t kGradValues = 160 << 10;  // of so few rows that all of them stay in L2
constexpr int64_t kNarrowRows = 256;        // of a chunk where groups are narrow
constexpr int64_t kListedPairs = 1 << 21;   // 16 MB
constexpr int64_t kThin = 8;                // input channels up to which columns are gathered
constexpr int64_t kColumnValues = 1 << 15;  // of a chunk of columns
constexpr int64_t kMostColumns = 512;       // rows of it

struct Shape {
  std::unique_ptr<const KernelMap> map;
  int64_t rows_out, taps, groups, in, out;  // in and out: channels of a group
};

Shape check_shape(const Tensor& x, const char* name, const Tensor& kernel_map, const Sizes& grid, const Sizes& window,
                  std::array<int64_t, 4> weight) {
  const auto [rows, channels] = feature_shape(x, name);
  const auto [groups, taps, in, out] = weight;
  STD_TORCH_CHECK(groups >= 1 && in >= 1 && out >= 1 && groups <= kMostChannels && in * groups == channels &&
                      out <= kMostChannels && out * groups <= kMostChannels,
                  "sparsecnx: weight is (", groups, ", ", taps, ", ", in, ", ", out,
                  "), expected (groups, K, C_in / groups, C_out / groups) with C_in = ", channels);
  STD_TORCH_CHECK(1 <= taps && taps <= kMostTaps, "sparsecnx: weight has ", taps, " taps, expected 1 to ", kMostTaps);
  check_product({groups, taps, in + 64, out + 64}, "weight");
  auto map = make_map(kernel_map, grid, window, rows);
  STD_TORCH_CHECK(map->taps == taps, "sparsecnx: kernel_map must be (rows_out, ", taps, ")");
  const int64_t rows_out = map->rows_out;
  return {std::move(map), rows_out, taps, groups, in, out};
}

// The strides of a weight (groups, taps, channels in, channels out).
struct Strides {
  int64_t group, tap, in, out;
};

// Raises unless weight has 4 dimensions and as much memory as elements, in any order.
Strides check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4,
                  "sparsecnx: weight must be a CPU tensor (groups, K, C_in / groups, C_out / groups)");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "sparsecnx: weight is ",
                  torch::headeronly::toString(weight.scalar_type()), ", expected ",
                  torch::headeronly::toString(x.scalar_type()));
  __int128 extent = 1;
  for (int64_t axis = 0; axis < 4; ++axis) extent += static_cast<__int128>(weight.size(axis) - 1) * weight.stride(axis);
  STD_TORCH_CHECK(weight.numel() > 0 && extent >= weight.numel(), "sparsecnx: weight has ", weight.numel(),
                  " elements, expected at least one, and memory of its own for each");
  check_storage(weight, "weight");
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

std::array<int64_t, 4> sizes(const Tensor& weight) {
  return {weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
}

// The output channels of a group, divided into panels of nearly the same size, each of whole registers but the last.
struct Panels {
  int64_t lanes, registers, count;

  template <class S>
  static Panels of(int64_t channels) {
    const int64_t lanes = kernels<S>().lanes, most = kernels<S>().panel / lanes;
    const int64_t registers = (channels + lanes - 1) / lanes;
    return {lanes, registers, (registers + most - 1) / most};
  }
  int64_t begin(int64_t panel) const { return registers * panel / count * lanes; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t padded() const { return registers * lanes; }  // channels
  int64_t widest() const { return (registers + count - 1) / count * lanes; }
};

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(half x) { return half_to_float(x.bits); }
inline float wide(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Packs a panel of a weight for some input channels: (taps, channels in, channels of the panel), with zeros at the end. It is
// read in the order of memory, or nearly.
template <class S>
void pack(const S* from, const Strides& strides, int64_t taps, int64_t in, int64_t channels, int64_t lanes,
          Compute<S>* to) {
  const Kernels<S>& k = kernels<S>();
  const int64_t width = (channels + lanes - 1) / lanes * lanes;
  const bool whole = strides.out == 1 && channels == width;
  for (int64_t c = 0; c < channels; c += whole ? width : lanes) {
    const S* first = from + c * strides.out;
    const int64_t rows = std::min(lanes, channels - c);
    if (strides.tap == 1 && taps > 1) {
      for (int64_t i = 0; i < in; ++i)
        k.columns_to_lanes(first + i * strides.in, strides.out, rows, taps, to + i * width + c, in * width);
      continue;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const S* at = first + tap * strides.tap;
      auto* row = to + tap * in * width + c;
      if (strides.in == 1 && !whole) {
        k.columns_to_lanes(at, strides.out, rows, in, row, width);
        continue;
      }
      for (int64_t i = 0; i < in; ++i, at += strides.in, row += width) {
        if (whole) {
          k.widen(at, width, row);
        } else {
          for (int64_t r = 0; r < lanes; ++r) row[r] = r < rows ? wide(at[r * strides.out]) : Compute<S>(0);
        }
      }
    }
  }
}

// The pairs of rows under each tap, for chunks of output rows. Rows of out ascend. The pairs of a few chunks are listed at
// a time, so that they stay in cache and take little memory, whatever the size of the map.
class Rulebook {
 public:
  Rulebook(const Shape& shape, int64_t rows)
      : shape_(shape),
        chunks_((shape.rows_out + rows - 1) / rows),
        most_(std::min(std::max<int64_t>(kListedPairs / (rows * shape.taps), 2 * thread_count()), chunks_)),
        from_(most_ * rows * shape.taps),
        to_(most_ * rows * shape.taps),
        count_(most_ * shape.taps) {}

  // Lists the pairs of some chunks after others, and calls f(first chunk, last chunk) for them. Raises if an entry of the
  // map is neither -1 nor a row of x.
  template <class F>
  void for_listed(const F& f) {
    for (listed_ = 0; listed_ < chunks_; listed_ += most_) {
      const int64_t last = std::min(listed_ + most_, chunks_);
      parallel_for(listed_, last, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> room;
        for (int64_t chunk = begin; chunk < end; ++chunk) list(chunk, room);
      });
      shape_.map->check();
      f(listed_, last);
    }
  }

  bool lists_all() const { return most_ == chunks_; }
  int64_t chunks() const { return chunks_; }
  int64_t first(int64_t chunk) const { return shape_.rows_out * chunk / chunks_; }
  int64_t count(int64_t chunk, int64_t tap) const { return count_[(chunk - listed_) * shape_.taps + tap]; }
  const int32_t* from(int64_t chunk, int64_t tap) const { return from_.data() + at(chunk, tap); }
  const int32_t* to(int64_t chunk, int64_t tap) const { return to_.data() + at(chunk, tap); }

 private:
  int64_t at(int64_t chunk, int64_t tap) const {
    return (first(chunk) - first(listed_)) * shape_.taps + tap * (first(chunk + 1) - first(chunk));
  }

  // Lists the pairs of a chunk, without a branch on the map.
  void list(int64_t chunk, std::vector<int32_t>& room) {
    const int32_t* map = shape_.map->rows(first(chunk), first(chunk + 1), room);
    for (int64_t tap = 0; tap < shape_.taps; ++tap) {
      int32_t *from = from_.data() + at(chunk, tap), *to = to_.data() + at(chunk, tap);
      const int32_t* read = map + tap;
      int64_t count = 0;
      for (int64_t row = first(chunk); row < first(chunk + 1); ++row, read += shape_.taps) {
        from[count] = *read;
        to[count] = static_cast<int32_t>(row);
        count += *read >= 0;
      }
      count_[(chunk - listed_) * shape_.taps + tap] = count;
    }
  }

  const Shape& shape_;
  int64_t chunks_, most_, listed_ = 0;  // most_: chunks whose pairs are listed at a time, from listed_ on
  Scratch<int32_t> from_, to_;
  std::vector<int64_t> count_;
};

// The features in the computing type: those of 16 bits are widened once.
template <class S>
class Wide {
  using A = Compute<S>;

 public:
  explicit Wide(const Tensor& x) : copy_(std::is_same_v<S, A> ? 0 : x.numel()) {
    if constexpr (std::is_same_v<S, A>) {
      at_ = data<A>(x);
    } else {
      at_ = copy_.data();
      parallel_for(0, x.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
        kernels<S>().widen(data<S>(x) + begin, end - begin, copy_.data() + begin);
      });
    }
  }
  const A* data_at() const { return at_; }

 private:
  Scratch<A> copy_;
  const A* at_;
};

// Asks for the rows of a chunk before they are needed: they are read in an order that no hardware foresees, and L3 is
// far. The rows under the middle tap are nearly all of them.
template <class S>
void prefetch(const S* rows, int64_t channels, const int32_t* which, int64_t step, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = which == nullptr ? i : which[i * step];
    if (row < 0) continue;
    for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(rows + row * channels + c, 0, 2);
  }
}

bool is_narrow_conv(const Shape& shape, bool (*is_narrow)(int64_t)) {
  return shape.groups > 1 && shape.in == shape.out && is_narrow(shape.in);
}

// (taps, channels in, channels) of a narrow convolution.
template <class S>
std::vector<Compute<S>> narrow_weight(const Shape& shape, const S* weight, const Strides& strides) {
  std::vector<Compute<S>> out(shape.taps * shape.in * shape.groups * shape.out);
  auto* at = out.data();
  for (int64_t k = 0; k < shape.taps; ++k) {
    for (int64_t i = 0; i < shape.in; ++i) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        for (int64_t o = 0; o < shape.out; ++o)
          *at++ = wide(weight[g * strides.group + k * strides.tap + i * strides.in + o * strides.out]);
      }
    }
  }
  return out;
}

template <class S>
void run_narrow(const Shape& shape, const Tensor& x, const S* weight, const Strides& strides, const Compute<S>* bias,
                S* out) {
  const std::vector<Compute<S>> taps = narrow_weight(shape, weight, strides);
  const NarrowConv<S> job{shape.taps, shape.in, shape.groups * shape.in, data<S>(x), taps.data(), bias, out};
  parallel_for(0, shape.rows_out, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> room;
    for (int64_t first = begin; first < end; first += kNarrowRows) {
      const int64_t last = std::min(first + kNarrowRows, end);
      const int32_t* map = shape.map->rows(first, last, room);
      prefetch(job.x, job.channels, map + shape.taps / 2, shape.taps, last - first);
      kernels<S>().conv_narrow(job, map, first, last);
    }
  });
  shape.map->check();
}

// Starts output rows with the bias, or with zeros.
template <class A>
void start_rows(A* out, int64_t step, int64_t rows, int64_t channels, const A* bias) {
  for (int64_t r = 0; r < rows; ++r, out += step) {
    bias != nullptr ? std::copy_n(bias, channels, out) : std::fill_n(out, channels, A(0));
  }
}

// A task packs a panel of the weight for itself, slice by slice of the input channels, and uses it for a chunk at once:
// of a weight with few rows, packing and reading it again from memory would take as long as the products.
template <class S, class A>
void run_pairs(const Shape& shape, const A* x, const Panels& panels, const S* weight, const Strides& strides,
               const A* bias, A* out) {
  const int64_t in_step = shape.groups * shape.in, out_step = shape.groups * shape.out;
  const int64_t per_chunk = shape.groups * panels.count, threads = thread_count();
  const int64_t rows = std::min(kChunkValues / (in_step + out_step), shape.rows_out * per_chunk / threads);
  Rulebook rules(shape, std::clamp<int64_t>(rows, 64, kMostChunk));
  const int64_t most = std::clamp<int64_t>(kPackedValues / (shape.taps * panels.widest()), 16, kMostDepth);
  const int64_t slices = (shape.in + most - 1) / most;
  const auto run_task = [&](int64_t task, bool fetch, A* packed) {
    const int64_t chunk = task / per_chunk, group = task % per_chunk / panels.count, panel = task % panels.count;
    const int64_t first = panels.begin(panel), width = panels.width(panel);
    const int64_t channels = std::min(width, shape.out - first), channel = group * shape.out + first;
    if (fetch || task % per_chunk == 0)
      prefetch(x, in_step, rules.from(chunk, shape.taps / 2), 1, rules.count(chunk, shape.taps / 2));
    start_rows(out + rules.first(chunk) * out_step + channel, out_step, rules.first(chunk + 1) - rules.first(chunk),
               channels, bias == nullptr ? nullptr : bias + channel);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t from = shape.in * slice / slices, depth = shape.in * (slice + 1) / slices - from;
      pack(weight + group * strides.group + first * strides.out + from * strides.in, strides, shape.taps, depth,
           channels, panels.lanes, packed);
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        kernels<A>().conv_pairs({rules.from(chunk, tap), rules.to(chunk, tap), rules.count(chunk, tap),
                                 x + group * shape.in + from, in_step, out + channel, out_step, channels},
                                packed + tap * depth * width, depth);
      }
    }
  };
  rules.for_listed([&](int64_t first_chunk, int64_t last_chunk) {
    parallel_for(first_chunk * per_chunk, last_chunk * per_chunk, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> packed(shape.taps * std::min(shape.in, most) * panels.widest());
      for (int64_t task = begin; task < end; ++task) run_task(task, task == begin, packed.data());
    });
  });
}

// Gathers the rows under all taps, and calls f(first row, rows, columns), chunk by chunk for rows [begin, end).
template <class A, class F>
void for_columns(const Shape& shape, const A* x, int64_t begin, int64_t end, const F& f) {
  const int64_t width = shape.taps * shape.in, step = std::clamp<int64_t>(kColumnValues / width, 16, kMostColumns);
  std::vector<A> columns(std::min(step, end - begin) * width);
  std::vector<int32_t> room;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first);
    kernels<A>().gather_columns(x, shape.map->rows(first, first + rows, room), rows * shape.taps, shape.in,
                                columns.data());
    f(first, rows, columns.data());
  }
}

std::vector<int32_t> ascending(int64_t count) {
  std::vector<int32_t> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(i);
  return out;
}

template <class S, class A>
void run_columns(const Shape& shape, const A* x, const Panels& panels, const S* weight, const Strides& strides,
                 const A* bias, A* out) {
  const int64_t depth = shape.taps * shape.in;
  const Scratch<A> packed(depth * panels.padded());
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t channel = panels.begin(panel);
    pack(weight + channel * strides.out, strides, shape.taps, shape.in,
         std::min(panels.width(panel), shape.out - channel), panels.lanes, packed.data() + channel * depth);
  }
  const std::vector<int32_t> rows_of = ascending(kMostColumns);
  parallel_for(0, shape.rows_out, 64, [&](int64_t begin, int64_t end) {
    for_columns(shape, x, begin, end, [&](int64_t first, int64_t rows, A* columns) {
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t channel = panels.begin(panel);
        const int64_t channels = std::min(panels.width(panel), shape.out - channel);
        A* at = out + first * shape.out + channel;
        start_rows(at, shape.out, rows, channels, bias == nullptr ? nullptr : bias + channel);
        kernels<A>().conv_pairs({rows_of.data(), rows_of.data(), rows, columns, depth, at, shape.out, channels},
                                packed.data() + channel * depth, depth);
      }
    });
  });
  shape.map->check();
}

Tensor run(const Shape& shape, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
           Strides strides) {
  const int64_t channels = shape.groups * shape.out;
  Tensor out = empty({shape.rows_out, channels}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    const A* offset = bias ? parameter<A>(*bias, "bias", channels, x) : nullptr;
    if (is_narrow_conv(shape, kernels<S>().is_narrow))
      return run_narrow<S>(shape, x, data<S>(weight), strides, offset, data<S>(out));
    const Panels panels = Panels::of<A>(shape.out);
    const Wide<S> wide(x);
    const auto compute = [&](A* to) {
      const auto how = shape.groups == 1 && shape.in <= kThin ? run_columns<S, A> : run_pairs<S, A>;
      how(shape, wide.data_at(), panels, data<S>(weight), strides, offset, to);
    };
    if constexpr (std::is_same_v<S, A>) {
      compute(data<A>(out));
    } else {
      const Scratch<A> sums(out.numel());
      compute(sums.data());
      parallel_for(0, out.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
        kernels<S>().narrow(sums.data() + begin, end - begin, data<S>(out) + begin);
      });
    }
  });
  return out;
}

Tensor conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& kernel_map,
            Sizes grid, Sizes window) {
  const Strides strides = check_weight(weight, x);
  return run(check_shape(x, "x", kernel_map, grid, window, sizes(weight)), x, weight, bias, strides);
}

// Stores sums of a panel, packed as the weight, for `in` input channels.
template <class S>
void unpack(const Compute<S>* sums, int64_t taps, int64_t in, int64_t channels, int64_t lanes, S* to,
            const Strides& strides) {
  const int64_t width = (channels + lanes - 1) / lanes * lanes;
  const bool taps_last = strides.tap == 1;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t rows = std::min(lanes, channels - c);
    for (int64_t i = 0; i < (taps_last ? in : taps); ++i) {
      kernels<S>().lanes_to_columns(sums + i * (taps_last ? width : in * width) + c, taps_last ? in * width : width,
                                    rows, taps_last ? taps : in,
                                    to + c * strides.out + i * (taps_last ? strides.in : strides.tap), strides.out);
    }
  }
}

// Divides the input channels of every panel into tasks. A thread goes over the chunks for its own tasks, and no sum is shared.
// Few rows stay in cache, and each task then takes all of them before the next, so that its sums stay there too.
template <class S, class A>
void sum_pairs(const Shape& shape, const A* x, const A* grad, const Panels& panels, S* out, const Strides& strides) {
  constexpr int64_t kSlice = 48;  // input channels of a task: whole cache lines of the gradient
  const int64_t in_step = shape.groups * shape.in, out_step = shape.groups * shape.out;
  Rulebook rules(shape, kWeightGradRows);
  const int64_t slices = (shape.in + kSlice - 1) / kSlice, tasks = shape.groups * panels.count * slices;
  const int64_t each = shape.taps * kSlice * panels.widest();
  const bool once = rules.lists_all() && shape.rows_out * (in_step + out_step) <= kGradValues;
  const int64_t together = once ? std::max<int64_t>(rules.chunks(), 1) : 1;
  const Scratch<A> kept(once ? 0 : tasks * each);
  const auto run_task = [&](int64_t task, int64_t first_chunk, int64_t last_chunk, A* sums) {
    const int64_t group = task / slices / panels.count, panel = task / slices % panels.count;
    const int64_t from = task % slices * kSlice, depth = std::min(kSlice, shape.in - from);
    const int64_t first = panels.begin(panel), width = panels.width(panel);
    const int64_t channels = std::min(width, shape.out - first), channel = group * shape.out + first;
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        kernels<A>().conv_pairs_weight_grad(
            {rules.from(chunk, tap), rules.to(chunk, tap), rules.count(chunk, tap), x + group * shape.in + from,
             in_step, const_cast<A*>(grad) + channel, out_step, channels},
            0, depth, chunk == 0, sums + tap * depth * width);
      }
    }
    if (last_chunk == rules.chunks())
      unpack(sums, shape.taps, depth, channels, panels.lanes, out + channel * strides.out + from * strides.in, strides);
  };
  rules.for_listed([&](int64_t first_chunk, int64_t last_chunk) {
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> own(once ? each : 0);
      for (int64_t chunk = first_chunk; chunk < last_chunk; chunk += together) {
        const int64_t last = std::min(chunk + together, last_chunk);
        for (int64_t i = chunk; i < last; ++i)
          prefetch(x, in_step, rules.from(i, shape.taps / 2), 1, rules.count(i, shape.taps / 2));
        prefetch<A>(grad + rules.first(chunk) * out_step, out_step, nullptr, 0, rules.first(last) - rules.first(chunk));
        for (int64_t task = begin; task < end; ++task)
          run_task(task, chunk, last, once ? own.data() : kept.data() + task * each);
      }
    });
  });
}

// One thread sums each slab of rows, and slabs are added up in order.
template <class S, class A>
void sum_columns(const Shape& shape, const A* x, const A* grad, const Panels& panels, S* out, const Strides& strides) {
  const int64_t depth = shape.taps * shape.in;
  const int64_t slabs = std::clamp<int64_t>(shape.rows_out / 256, 1, thread_count());
  const std::vector<int32_t> rows_of = ascending(kMostColumns);
  BlockSums<A> partial(slabs, panels.padded() * depth);
  parallel_for(0, slabs, 1, [&](int64_t first_slab, int64_t last_slab) {
    for (int64_t slab = first_slab; slab < last_slab; ++slab) {
      const int64_t begin = shape.rows_out * slab / slabs, end = shape.rows_out * (slab + 1) / slabs;
      for_columns(shape, x, begin, end, [&](int64_t first, int64_t rows, A* columns) {
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t channel = panels.begin(panel);
          kernels<A>().conv_pairs_weight_grad(
              {rows_of.data(), rows_of.data(), rows, columns, depth, const_cast<A*>(grad) + first * shape.out + channel,
               shape.out, std::min(panels.width(panel), shape.out - channel)},
              0, depth, false, partial.at(slab) + channel * depth);
        }
      });
    }
  });
  shape.map->check();
  const Scratch<A> sums(panels.padded() * depth);
  partial.store(sums.data());
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t channel = panels.begin(panel);
    unpack(sums.data() + channel * depth, shape.taps, shape.in, std::min(panels.width(panel), shape.out - channel),
           panels.lanes, out + channel * depth, strides);
  }
}

template <class S>
void sum_narrow(const Shape& shape, const Tensor& x, const Tensor& grad, S* out, const Strides& strides) {
  using A = Compute<S>;
  const int64_t channels = shape.groups * shape.in, width = shape.in, lanes = kernels<S>().lanes;
  Rulebook rules(shape, kNarrowRows);
  const NarrowConv<S> job{shape.taps, width, channels, data<S>(x), nullptr, nullptr, data<S>(grad)};
  std::vector<A> sums(shape.taps * width * channels);
  // One thread sums each tap and slice of channels.
  const int64_t slice = 2 * lanes, slices = (channels + slice - 1) / slice;
  rules.for_listed([&](int64_t first_chunk, int64_t last_chunk) {
    parallel_for(0, shape.taps * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        prefetch(job.x, channels, rules.from(chunk, shape.taps / 2), 1, rules.count(chunk, shape.taps / 2));
        prefetch<S>(job.out + rules.first(chunk) * channels, channels, nullptr, 0,
                    rules.first(chunk + 1) - rules.first(chunk));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t tap = task % shape.taps, from = task / shape.taps * slice;
          kernels<S>().conv_narrow_weight_grad(job, rules.from(chunk, tap), rules.to(chunk, tap),
                                               rules.count(chunk, tap), from, std::min(from + slice, channels),
                                               sums.data() + tap * width * channels);
        }
      }
    });
  });
  std::vector<A> ordered(sums.size());
  const A* at = sums.data();
  for (int64_t k = 0; k < shape.taps; ++k) {
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < channels; ++c) ordered[c * strides.out + j * strides.in + k * strides.tap] = *at++;
    }
  }
  kernels<S>().narrow(ordered.data(), ordered.size(), out);
}

// Returns the gradient of the weight as (groups, channels out, channels in, taps), torch's layout. If the weight's input
// channels follow each other in memory, as in torch.channels_last, so do the gradient's: autograd would copy another layout.
Tensor conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& kernel_map, Sizes grid,
                        Sizes window) {
  const bool channels_last = check_weight(weight, x).in == 1;
  const Shape shape = check_shape(x, "x", kernel_map, grid, window, sizes(weight));
  check_matrix(grad, "grad", shape.rows_out, shape.groups * shape.out, x.scalar_type());
  const auto [groups, taps, in, channels] = sizes(weight);
  const Strides strides{channels * in * taps, channels_last ? in : 1, channels_last ? 1 : taps, in * taps};
  Tensor out = channels_last ? torch::stable::transpose(empty({groups, channels, taps, in}, x.scalar_type()), 2, 3)
                             : empty({groups, channels, in, taps}, x.scalar_type());
  for_dtype(x, [&]<class S, class A>(Types<S, A>) {
    if (is_narrow_conv(shape, kernels<S>().is_narrow)) return sum_narrow<S>(shape, x, grad, data<S>(out), strides);
    const Panels panels = Panels::of<A>(shape.out);
    if (shape.rows_out == 0) std::fill_n(data<S>(out), out.numel(), S{});
    const Wide<S> wide(x), wide_grad(grad);
    const auto how = shape.groups == 1 && shape.in <= kThin ? sum_columns<S, A> : sum_pairs<S, A>;
    how(shape, wide.data_at(), wide_grad.data_at(), panels, data<S>(out), strides);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnx, CPU, m) {
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

}  // namespace
}  // namespace sparsecnx
