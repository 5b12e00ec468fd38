// Global Response Normalization: sums over the rows of a group, a few operations on C values, and one pass that applies
// them. All of it waits for memory alone: a thread holds 16 bytes of a row, of four rows at a time.
//
// Sums go through *staircase* partial sums. Rows are cut into blocks; block b writes, for every group g with rows in it,
// one partial row at slot b + g. Along the rows b and g only grow, so no two pairs share a slot, nothing is zeroed
// first and nothing is added atomically. The slots of a group are consecutive and are added in a fixed order: the same
// bits every time.
#include <algorithm>

#include "grn.h"
#include "launch.cuh"
#include "types.cuh"

namespace sparsecnx::cuda {
namespace {

// 16 bytes of four rows a thread: 64 registers hold them and the sums of one tensor, 80 those of two, so that a
// multiprocessor has 64 or 96 KB on their way from memory. One of an H200's 132 takes 36 bytes a nanosecond of its
// 4.8 TB/s: that covers a latency of 1.8 microseconds.
constexpr int kThreads = 256;
constexpr int kBlocksOfOne = 4;  // of such a block on a multiprocessor, where a kernel reads one tensor
constexpr int kBlocksOfTwo = 3;
constexpr int kMostLanes = 64;         // threads side by side along a row: 1024 bytes of it
constexpr int kUnroll = 4;             // rows that a thread loads before it uses the first
constexpr int64_t kManyBlocks = 2048;  // enough for every multiprocessor to work through several
constexpr int kResponseThreads = 512;  // of a block that finishes one group
constexpr int kAddChannels = 16;       // channels and slots side by side in a block that adds slots
constexpr int kAddSlots = 32;
constexpr int64_t kFewSlots = 8;  // of a group: that many are added by the block that finishes it

// N values that move together: 16 bytes, or one value.
template <class T, int N>
struct alignas(N * sizeof(T)) Values {
  T at[N];
};

// The same on their way, in whole registers: in a Values of 16 bits each value would take one of its own.
template <class T, int N>
struct Words {
  using type = uint4;
};
template <class T>
struct Words<T, 1> {
  using type = T;
};

// How rows are cut into blocks. A block takes `lanes` accesses of N values along a row, and below each of them
// `lines` threads, each with every lines-th row.
struct Blocking {
  int rows, channels, groups;
  int width;  // accesses in a row
  int lanes, lines;
  int across;      // blocks side by side
  int block_rows;  // rows of a block

  Blocking(const GrnRows& shape, int values)
      : rows(static_cast<int>(shape.rows)),
        channels(static_cast<int>(shape.channels)),
        groups(static_cast<int>(shape.groups)),
        width(channels / values) {
    lanes = static_cast<int>(blocks_of(width, blocks_of(width, kMostLanes)));
    lines = kThreads / lanes;
    across = static_cast<int>(blocks_of(width, lanes));
    // Long blocks leave fewer partial sums, short ones fill the GPU where rows are few.
    block_rows = 16 * lines;
    if (blocks_of(rows, block_rows) * across < kManyBlocks) block_rows = 8 * lines;
  }
  int64_t down() const { return blocks_of(rows, block_rows); }
  dim3 grid() const { return dim3(static_cast<unsigned>(down() * across)); }
  unsigned threads() const { return static_cast<unsigned>(blocks_of(lanes * lines, 32) * 32); }
};

// What a thread of such a block takes: channels from `channel` on, every lines-th row from `line` on.
struct Part {
  int block, first_row, end_row;
  int lane, line, channel;
  bool taken;

  // `block` is the index among all blocks.
  __device__ Part(const Blocking& cut, int index, int values) : block(index / cut.across) {
    first_row = block * cut.block_rows;
    end_row = min(first_row + min(cut.block_rows, cut.rows - first_row), cut.rows);
    lane = static_cast<int>(threadIdx.x) % cut.lanes;
    line = static_cast<int>(threadIdx.x) / cut.lanes;
    const int access = index % cut.across * cut.lanes + lane;
    channel = access * values;
    taken = line < cut.lines && access < cut.width;
  }
};

// The group in which a row lies: how many end at or before it. All threads of a warp ask for the same row; each looks
// at one of 32 splits, so that a thousand groups take two reads one after the other.
__device__ int group_of(int row, const int64_t* splits, int groups) {
  int low = 0, high = groups;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int probe = low + static_cast<int>(threadIdx.x % 32) * step;
    const bool before = probe < high && splits[probe + 1] <= row;
    const int votes = __popc(__ballot_sync(0xffffffffu, before));
    if (votes == 0) break;
    high = min(low + votes * step, high);
    low += (votes - 1) * step + 1;
  }
  return low;
}

// Calls f(group, begin, end) for every group with rows in the block, in ascending order.
template <class F>
__device__ void for_groups(const Part& part, const int64_t* splits, int groups, const F& f) {
  int begin = part.first_row;
  for (int group = group_of(begin, splits, groups); group < groups && begin < part.end_row; ++group) {
    const int end = static_cast<int>(min(splits[group + 1], static_cast<int64_t>(part.end_row)));
    if (begin < end) f(group, begin, end);
    begin = max(begin, end);
  }
}

// Calls f(k, row) for rows of a thread, kUnroll of them at a time: first load(k, row) of all, then use(k, row).
template <class Load, class Use>
__device__ void for_rows(const Blocking& cut, const Part& part, int begin, int end, const Load& load, const Use& use) {
  if (!part.taken) return;
  for (int left = end - begin - part.line; left > 0; left -= kUnroll * cut.lines) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k * cut.lines < left) load(k, end - left + k * cut.lines);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k * cut.lines < left) use(k, end - left + k * cut.lines);
    }
  }
}

template <class T, int N>
__device__ typename Words<T, N>::type load(const T* values, int64_t channels, int row, int channel) {
  static_assert(N == 1 || N * sizeof(T) == sizeof(uint4));
  return *reinterpret_cast<const typename Words<T, N>::type*>(values + row * channels + channel);
}

template <class T, int N>
__device__ Values<T, N> values_in(const typename Words<T, N>::type& words) {
  Values<T, N> values;
  __builtin_memcpy(&values, &words, sizeof(values));
  return values;
}

template <class T, int N>
__device__ void store(T* values, int64_t channels, int row, int channel, const Values<T, N>& from) {
  *reinterpret_cast<Values<T, N>*>(values + row * channels + channel) = from;
}

template <int N>
__device__ void load_floats(const float* from, float (&to)[N]) {
  constexpr int kWide = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < N; i += kWide) {
    const auto values = *reinterpret_cast<const Values<float, kWide>*>(from + i);
#pragma unroll
    for (int j = 0; j < kWide; ++j) to[i + j] = values.at[j];
  }
}

// Adds the sums of the threads below each other and writes them to out, of C channels.
template <int N>
__device__ void add_lines(const Blocking& cut, const Part& part, const float (&sums)[N], float* shared, float* out) {
  const int values = cut.lanes * N;
  __syncthreads();  // the memory may still be read for the group before
  if (part.taken) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[part.line * values + part.lane * N + i] = sums[i];
  }
  __syncthreads();
  const int first = part.channel - part.lane * N;
  for (int i = static_cast<int>(threadIdx.x); i < min(values, cut.channels - first);
       i += static_cast<int>(blockDim.x)) {
    float total = 0;
    for (int line = 0; line < cut.lines; ++line) total += shared[line * values + i];
    out[first + i] = total;
  }
}

// partial (blocks + groups, C), out: staircase sums of x^2.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfOne)
    square_sums_kernel(Blocking cut, const T* __restrict__ x, const int64_t* __restrict__ splits,
                       float* __restrict__ partial) {
  const Part part(cut, static_cast<int>(blockIdx.x), N);
  float* shared = shared_memory<float>();
  for_groups(part, splits, cut.groups, [&](int group, int begin, int end) {
    float sums[N] = {};
    typename Words<T, N>::type rows[kUnroll];
    for_rows(
        cut, part, begin, end, [&](int k, int row) { rows[k] = load<T, N>(x, cut.channels, row, part.channel); },
        [&](int k, int) {
          const auto values = values_in<T, N>(rows[k]);
#pragma unroll
          for (int i = 0; i < N; ++i) sums[i] = fmaf(widen(values.at[i]), widen(values.at[i]), sums[i]);
        });
    add_lines(cut, part, sums, shared, partial + (static_cast<int64_t>(part.block) + group) * cut.channels);
  });
}

// partial (blocks + groups, 2, C), out: staircase sums of grad * x and of grad.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfTwo)
    gradient_sums_kernel(Blocking cut, const T* __restrict__ grad, const T* __restrict__ x,
                         const int64_t* __restrict__ splits, float* __restrict__ partial) {
  const Part part(cut, static_cast<int>(blockIdx.x), N);
  float* shared = shared_memory<float>();
  for_groups(part, splits, cut.groups, [&](int group, int begin, int end) {
    float products[N] = {}, sums[N] = {};
    typename Words<T, N>::type grads[kUnroll], rows[kUnroll];
    for_rows(
        cut, part, begin, end,
        [&](int k, int row) {
          grads[k] = load<T, N>(grad, cut.channels, row, part.channel);
          rows[k] = load<T, N>(x, cut.channels, row, part.channel);
        },
        [&](int k, int) {
          const auto incoming = values_in<T, N>(grads[k]), values = values_in<T, N>(rows[k]);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float g = widen(incoming.at[i]);
            products[i] = fmaf(g, widen(values.at[i]), products[i]);
            sums[i] += g;
          }
        });
    float* slot = partial + (static_cast<int64_t>(part.block) + group) * 2 * cut.channels;
    add_lines(cut, part, products, shared, slot);
    add_lines(cut, part, sums, shared, slot + cut.channels);
  });
}

// out = x * scale + beta. From the last row to the first: the sums have left the last ones in the cache.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfOne)
    apply_kernel(Blocking cut, const T* __restrict__ x, const int64_t* __restrict__ splits,
                 const float* __restrict__ scale,  // (groups, C)
                 const float* __restrict__ beta,   // (C)
                 T* __restrict__ out) {
  const Part part(cut, static_cast<int>(gridDim.x - 1 - blockIdx.x), N);
  float shift[N] = {};
  if (part.taken) load_floats(beta + part.channel, shift);
  for_groups(part, splits, cut.groups, [&](int group, int begin, int end) {
    float factor[N] = {};
    if (part.taken) load_floats(scale + static_cast<int64_t>(group) * cut.channels + part.channel, factor);
    typename Words<T, N>::type rows[kUnroll];
    for_rows(
        cut, part, begin, end, [&](int k, int row) { rows[k] = load<T, N>(x, cut.channels, row, part.channel); },
        [&](int k, int row) {
          auto values = values_in<T, N>(rows[k]);
#pragma unroll
          for (int i = 0; i < N; ++i) values.at[i] = narrow<T>(fmaf(widen(values.at[i]), factor[i], shift[i]));
          store<T, N>(out, cut.channels, row, part.channel, values);
        });
  });
}

// grad_x = grad * scale + x * pull, backwards as apply_kernel.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksOfTwo)
    apply_backward_kernel(Blocking cut, const T* __restrict__ grad, const T* __restrict__ x,
                          const int64_t* __restrict__ splits,
                          const float* __restrict__ scale,  // (groups, C)
                          const float* __restrict__ pull,   // (groups, C): twice the gradient of the energy
                          T* __restrict__ grad_x) {
  const Part part(cut, static_cast<int>(gridDim.x - 1 - blockIdx.x), N);
  for_groups(part, splits, cut.groups, [&](int group, int begin, int end) {
    const int64_t at = static_cast<int64_t>(group) * cut.channels + part.channel;
    float factor[N] = {}, share[N] = {};
    if (part.taken) load_floats(scale + at, factor);
    if (part.taken) load_floats(pull + at, share);
    typename Words<T, N>::type grads[kUnroll], rows[kUnroll];
    for_rows(
        cut, part, begin, end,
        [&](int k, int row) {
          grads[k] = load<T, N>(grad, cut.channels, row, part.channel);
          rows[k] = load<T, N>(x, cut.channels, row, part.channel);
        },
        [&](int k, int row) {
          const auto incoming = values_in<T, N>(grads[k]);
          auto values = values_in<T, N>(rows[k]);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            values.at[i] = narrow<T>(fmaf(widen(incoming.at[i]), factor[i], widen(values.at[i]) * share[i]));
          }
          store<T, N>(grad_x, cut.channels, row, part.channel, values);
        });
  });
}

// Where the partial sums of each group lie: in the slots of a staircase, or `each` of them one group after the other.
struct Slots {
  const float* sums;      // (slots, C)
  const int64_t* splits;  // of the staircase, else null
  int rows, block_rows;   // of the staircase
  int64_t each;

  static Slots staircase(const float* sums, const GrnRows& shape, const Blocking& cut) {
    return {sums, shape.splits, cut.rows, cut.block_rows, 0};
  }
  static Slots listed(const float* sums, int64_t each) { return {sums, nullptr, 0, 1, each}; }

  // First slot of a group, and how many.
  __device__ void find(int64_t group, int64_t& first, int64_t& count) const {
    if (!splits) {
      first = group * each;
      count = each;
      return;
    }
    const int begin = static_cast<int>(splits[group]), end = static_cast<int>(splits[group + 1]);
    first = begin / block_rows + group;
    count = begin < end ? (end - 1) / block_rows - begin / block_rows + 1 : 0;
  }
};

// out (groups, parts, channels): the slots of each group added in `parts` shares. With `second`, of one group and one
// part, that is where the second half of the channels goes.
__global__ void __launch_bounds__(kAddChannels* kAddSlots)
    add_kernel(Slots slots, int parts, int channels, float* __restrict__ out, float* __restrict__ second) {
  const int across = (channels + kAddChannels - 1) / kAddChannels;
  const int64_t job = blockIdx.x / across;  // group and part
  const int lane = static_cast<int>(threadIdx.x) % kAddChannels, line = static_cast<int>(threadIdx.x) / kAddChannels;
  const int channel = static_cast<int>(blockIdx.x % across) * kAddChannels + lane;
  int64_t first, count;
  slots.find(job / parts, first, count);
  const int64_t share = (count + parts - 1) / parts;
  const int64_t begin = job % parts * share, end = min(begin + share, count);
  float total = 0;
  if (channel < channels) {
    const float* sums = slots.sums + first * channels + channel;
#pragma unroll 8
    for (int64_t slot = begin + line; slot < end; slot += kAddSlots) total += sums[slot * channels];
  }
  float* shared = shared_memory<float>();
  shared[line * kAddChannels + lane] = total;
  __syncthreads();
  if (line == 0 && channel < channels) {
    total = 0;
    for (int i = 0; i < kAddSlots; ++i) total += shared[i * kAddChannels + lane];
    const bool upper = second && channel >= channels / 2;
    *(upper ? second + channel - channels / 2 : out + job * channels + channel) = total;
  }
}

// Sum over the slots of a group at one channel.
__device__ float sum_slots(const float* sums, int64_t count, int64_t stride) {
  float total = 0;
#pragma unroll 4
  for (int64_t slot = 0; slot < count; ++slot) total += sums[slot * stride];
  return total;
}

// Sum over the threads of a block, the same in all of them.
__device__ float sum_of_block(float value, float* shared) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the memory may still be read for the sum before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kResponseThreads / 32; ++warp) total += shared[warp];
  return total;
}

// G = sqrt(q), N = G / (mean_c G + eps), scale = 1 + gamma N. One block per group; a thread comes back to the channels
// that it has written.
__global__ void __launch_bounds__(kResponseThreads)
    response_kernel(Slots slots, int channels, const float* __restrict__ gamma, float eps,
                    float* energy,  // (groups, C), out: q
                    float* __restrict__ scale) {
  const int64_t group = blockIdx.x, base = group * channels;
  int64_t first, count;
  slots.find(group, first, count);
  float total = 0;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kResponseThreads) {
    const float sum = sum_slots(slots.sums + first * channels + c, count, channels);
    energy[base + c] = sum;
    total += sqrtf(sum);
  }
  const float inverse = 1.0f / (sum_of_block(total, shared_memory<float>()) / channels + eps);
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kResponseThreads) {
    const float norm = sqrtf(energy[base + c]);
    scale[base + c] = 1.0f + gamma[c] * (norm == 0.0f ? 0.0f : norm * inverse);
  }
}

// From ds, the sums of grad * x: dN = ds gamma, dG = dN / (M + eps) - sum_c(dN G) / (C (M + eps)^2) with M = mean_c G,
// pull = 2 dq = dG / G, all 0 where G = 0: at a channel that is zero everywhere, and in a group without rows.
__global__ void __launch_bounds__(kResponseThreads) response_backward_kernel(
    Slots slots, int channels, const float* __restrict__ energy, const float* __restrict__ gamma, float eps,
    float* parameters,  // (groups, 2, C), out: each group's part of the gradients of gamma, beta
    float* __restrict__ pull, float* __restrict__ scale) {
  const int64_t group = blockIdx.x, base = group * channels;
  int64_t first, count;
  slots.find(group, first, count);
  float* of_gamma = parameters + 2 * base;
  float* of_beta = of_gamma + channels;
  float total = 0, dot = 0;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kResponseThreads) {
    const float* sums = slots.sums + first * 2 * channels + c;
    const float grad_scale = sum_slots(sums, count, 2 * static_cast<int64_t>(channels));
    of_gamma[c] = grad_scale;  // for the second loop
    of_beta[c] = sum_slots(sums + channels, count, 2 * static_cast<int64_t>(channels));
    const float norm = sqrtf(energy[base + c]);
    total += norm;
    if (norm != 0.0f) dot += grad_scale * gamma[c] * norm;
  }
  float* shared = shared_memory<float>();
  const float inverse = 1.0f / (sum_of_block(total, shared) / channels + eps);
  const float through_mean = sum_of_block(dot, shared) / channels * inverse * inverse;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kResponseThreads) {
    const float norm = sqrtf(energy[base + c]);
    const float grad_scale = of_gamma[c];
    const float response = norm == 0.0f ? 0.0f : norm * inverse;
    scale[base + c] = 1.0f + gamma[c] * response;
    pull[base + c] = norm == 0.0f ? 0.0f : (grad_scale * gamma[c] * inverse - through_mean) / norm;
    of_gamma[c] = norm == 0.0f ? 0.0f : grad_scale * response;
  }
}

// Into how many shares the slots of a group are cut before one block per group finishes them; 0: it adds them all.
int64_t parts_of(const GrnRows& shape, const Blocking& cut, int sums) {
  const int64_t slots = blocks_of(cut.down(), std::max<int64_t>(shape.groups, 1)) + 1;  // of a group, on average
  if (shape.groups == 0 || slots <= kFewSlots) return 0;
  const int64_t jobs = shape.groups * blocks_of(sums * shape.channels, kAddChannels);
  return std::clamp<int64_t>(blocks_of(kManyBlocks / 4, jobs), 1, blocks_of(slots, kAddSlots));
}

// The memory that a launcher works in, in the order in which it is taken.
struct Work {
  int64_t staircase, added, per_group;  // sizes in values
  int64_t parts;

  Work(const GrnRows& shape, const Blocking& cut, int sums) : parts(parts_of(shape, cut, sums)) {
    const int64_t row = sums * shape.channels;
    staircase = (cut.down() + shape.groups) * row;
    added = parts * shape.groups * row;
    per_group = shape.groups * shape.channels;
  }
};

// Adds the slots where there are many; says where the sums of each group are then.
Slots few_slots(const GrnRows& shape, const Blocking& cut, const Work& work, int sums, float* staircase, float* added,
                cudaStream_t stream) {
  const Slots all = Slots::staircase(staircase, shape, cut);
  if (work.parts == 0) return all;
  const int channels = sums * cut.channels;
  const int64_t grid = shape.groups * work.parts * blocks_of(channels, kAddChannels);
  launch("grn: add_kernel", add_kernel, dim3(static_cast<unsigned>(grid)), dim3(kAddChannels * kAddSlots),
         kAddChannels * kAddSlots * sizeof(float), stream, all, static_cast<int>(work.parts), channels, added, nullptr);
  return Slots::listed(added, work.parts);
}

constexpr size_t kResponseShared = kResponseThreads / 32 * sizeof(float);

template <class T, int N>
void forward(const GrnRows& shape, const GrnForward& v, cudaStream_t stream) {
  const Blocking cut(shape, N);
  const Work work(shape, cut, 1);
  float* staircase = v.work;
  float* added = staircase + work.staircase;
  float* scale = added + work.added;
  const T* x = static_cast<const T*>(v.x);
  launch("grn: square_sums_kernel", square_sums_kernel<T, N>, cut.grid(), dim3(cut.threads()),
         cut.lanes * cut.lines * N * sizeof(float), stream, cut, x, shape.splits, staircase);
  const Slots slots = few_slots(shape, cut, work, 1, staircase, added, stream);
  launch("grn: response_kernel", response_kernel, dim3(cut.groups), dim3(kResponseThreads), kResponseShared, stream,
         slots, cut.channels, v.gamma, v.eps, v.energy, scale);
  launch("grn: apply_kernel", apply_kernel<T, N>, cut.grid(), dim3(cut.threads()), 0, stream, cut, x, shape.splits,
         scale, v.beta, static_cast<T*>(v.out));
}

template <class T, int N>
void backward(const GrnRows& shape, const GrnBackward& v, cudaStream_t stream) {
  const Blocking cut(shape, N);
  const Work work(shape, cut, 2);
  float* staircase = v.work;
  float* added = staircase + work.staircase;
  float* scale = added + work.added;
  float* pull = scale + work.per_group;
  float* parameters = pull + work.per_group;
  const T* grad = static_cast<const T*>(v.grad);
  const T* x = static_cast<const T*>(v.x);
  launch("grn: gradient_sums_kernel", gradient_sums_kernel<T, N>, cut.grid(), dim3(cut.threads()),
         cut.lanes * cut.lines * N * sizeof(float), stream, cut, grad, x, shape.splits, staircase);
  const Slots slots = few_slots(shape, cut, work, 2, staircase, added, stream);
  launch("grn: response_backward_kernel", response_backward_kernel, dim3(cut.groups), dim3(kResponseThreads),
         kResponseShared, stream, slots, cut.channels, v.energy, v.gamma, v.eps, parameters, pull, scale);
  launch("grn: apply_backward_kernel", apply_backward_kernel<T, N>, cut.grid(), dim3(cut.threads()), 0, stream, cut,
         grad, x, shape.splits, scale, pull, static_cast<T*>(v.grad_x));
  launch("grn: add_kernel", add_kernel, dim3(static_cast<unsigned>(blocks_of(2 * cut.channels, kAddChannels))),
         dim3(kAddChannels * kAddSlots), kAddChannels * kAddSlots * sizeof(float), stream,
         Slots::listed(parameters, shape.groups), 1, 2 * cut.channels, v.grad_gamma, v.grad_beta);
}

// Values of an access of 16 bytes, or 1 where a row or a pointer lies between such accesses.
int values_of(const GrnRows& shape, std::initializer_list<const void*> pointers) {
  const int64_t size = size_of(shape.dtype);
  const bool fits = shape.channels * size % 16 == 0;
  const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  return fits && aligned ? static_cast<int>(16 / size) : 1;
}

}  // namespace

int64_t grn_work(const GrnRows& shape, int sums) {
  // The accesses are chosen once the pointers are known: enough for both kinds.
  int64_t most = 0;
  for (const int64_t values : {int64_t{1}, 16 / size_of(shape.dtype)}) {
    if (shape.channels % values != 0) continue;
    const Work work(shape, Blocking(shape, static_cast<int>(values)), sums);
    most = std::max(most, work.staircase + work.added + (sums == 1 ? 1 : 4) * work.per_group);
  }
  return most;
}

void launch_grn(const GrnRows& shape, const GrnForward& v, cudaStream_t stream) {
  const int values = values_of(shape, {v.x, v.beta, v.out});
  for_dtype(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    values == 1 ? forward<T, 1>(shape, v, stream) : forward<T, 16 / sizeof(T)>(shape, v, stream);
  });
}

void launch_grn_backward(const GrnRows& shape, const GrnBackward& v, cudaStream_t stream) {
  const int values = values_of(shape, {v.grad, v.x, v.grad_x});
  for_dtype(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    values == 1 ? backward<T, 1>(shape, v, stream) : backward<T, 16 / sizeof(T)>(shape, v, stream);
  });
}

}  // namespace sparsecnx::cuda
