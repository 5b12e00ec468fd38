// Visible tiles of a mask and their neighbours, without a word to the host.
//
// The mask is cut into chunks of cells of one image. One kernel counts the visible cells of each chunk; another adds up
// the counts of the chunks before its own, which is where its visible cells go, and one block more of it finds where the
// images begin. A warp looks at 32 cells at a time: the ballot of their bits is both their count and their order.
#include <algorithm>

#include "launch.cuh"
#include "layout.h"
#include "types.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kLooks = 16;  // that a warp takes at 32 cells each: its loads are on their way together
constexpr int kChunk = kThreads * kLooks;
constexpr int kTilesPerBlock = 32;  // of the table of neighbours

// A chunk: cells [first, first + size) of all, and of them those of a warp.
struct Chunk {
  int64_t first;
  int size;

  __device__ Chunk(int64_t chunk, int64_t cells, int chunks_per_image) {
    const int64_t image = chunk / chunks_per_image, begin = (chunk - image * chunks_per_image) * kChunk;
    first = image * cells + begin;
    size = static_cast<int>(min(cells - begin, static_cast<int64_t>(kChunk)));
  }
};

// Visible cells of this warp's share of a chunk: bit l of looks[i] is its cell i * 32 + l. Returns how many.
__device__ int look(const uint8_t* mask, const Chunk& chunk, unsigned (&looks)[kLooks]) {
  const int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * 32 * kLooks;
  bool visible[kLooks];
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    const int cell = begin + i * 32 + lane;
    visible[i] = cell < chunk.size && mask[chunk.first + cell] == 0;
  }
  int count = 0;
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    looks[i] = __ballot_sync(kAll, visible[i]);
    count += __popc(looks[i]);
  }
  return count;
}

__device__ int warp_sum(int value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// Sum over the threads of the block, and over those of the warps before this one. Every thread of a warp gives its part.
struct BlockSum {
  int all, before;
};
__device__ BlockSum block_sum(int warp_value, int* shared) {
  __syncthreads();  // whoever read `shared` before is done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = warp_value;
  __syncthreads();
  BlockSum sum{0, 0};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / 32) sum.before += shared[warp];
    sum.all += shared[warp];
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) count_kernel(TileIndex job, int chunks_per_image) {
  unsigned looks[kLooks];
  const int visible = look(job.mask, Chunk(blockIdx.x, job.cells, chunks_per_image), looks);
  const BlockSum sum = block_sum(visible, shared_memory<int>());
  if (threadIdx.x == 0) job.chunk_visible[blockIdx.x] = sum.all;
}

// Where the images begin, and whether the mask keeps what it is said to keep.
__device__ void split(const TileIndex& job, int chunks_per_image) {
  int* shared = shared_memory<int>();
  const int lane = threadIdx.x % 32;
  int64_t total = 0;  // of the images so far
  int wrong = 0;
  for (int64_t first = 0; first < job.images; first += kThreads) {
    const int64_t image = first + threadIdx.x;
    int kept = 0;
    if (image < job.images) {
      for (int chunk = 0; chunk < chunks_per_image; ++chunk)
        kept += job.chunk_visible[image * chunks_per_image + chunk];
      wrong |= job.visible >= 0 && kept != job.visible;
    }
    int through = kept;  // of the images of this warp up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_sync(kAll, through, max(lane - step, 0));
      if (lane >= step) through += before;
    }
    const BlockSum sum = block_sum(__shfl_sync(kAll, through, 31), shared);
    if (image < job.images) job.splits[image] = min(total + sum.before + through - kept, job.count);
    total += sum.all;
  }
  wrong |= total != job.count;
  const BlockSum sum = block_sum(__popc(__ballot_sync(kAll, wrong)), shared);
  if (threadIdx.x == 0) job.splits[job.images] = sum.all == 0 ? job.count : -1;
  for (int64_t place = total + threadIdx.x; place < job.count; place += kThreads) job.index[place] = 0;
}

__global__ void __launch_bounds__(kThreads) place_kernel(TileIndex job, int chunks_per_image) {
  if (blockIdx.x == gridDim.x - 1) {
    split(job, chunks_per_image);
    return;
  }
  int* shared = shared_memory<int>();
  const int lane = threadIdx.x % 32;
  const Chunk chunk(blockIdx.x, job.cells, chunks_per_image);
  unsigned looks[kLooks];
  const int visible = look(job.mask, chunk, looks);
  // Of all chunks before. Over all blocks that is half the square of the number of chunks, one or more for each image:
  // 128 KiB for 256 images of up to 4096 cells, 2 MiB for 1024, out of L2. For tens of thousands of chunks, a scan of
  // the counts in between would read less.
  int before = 0;
  for (int64_t i = threadIdx.x; i < blockIdx.x; i += kThreads) before += job.chunk_visible[i];
  before = block_sum(warp_sum(before), shared).all;
  int place = before + block_sum(visible, shared).before;

  const unsigned lower = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < kLooks; ++i) {
    const int cell = threadIdx.x / 32 * 32 * kLooks + i * 32 + lane;
    const int mine = place + __popc(looks[i] & lower);
    const bool kept = (looks[i] >> lane & 1) != 0 && mine < job.count;
    if (cell < chunk.size) job.slots[chunk.first + cell] = kept ? mine : -1;
    if (kept) job.index[mine] = chunk.first + cell;
    place += __popc(looks[i]);
  }
}

__global__ void __launch_bounds__(kThreads) neighbour_table_kernel(NeighbourTable job, int width) {
  // Of each tile of the block: its cell, and its coordinates.
  int* cells = shared_memory<int>();
  int* places = cells + kTilesPerBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock;
  const int tiles = static_cast<int>(min(job.count - first, static_cast<int64_t>(kTilesPerBlock)));
  if (static_cast<int>(threadIdx.x) < tiles) {
    int rest = static_cast<int>(job.index[first + threadIdx.x]);
    cells[threadIdx.x] = rest;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      places[axis * kTilesPerBlock + threadIdx.x] = rest % job.grid[axis];
      rest /= job.grid[axis];
    }
  }
  __syncthreads();
  for (int entry = threadIdx.x; entry < tiles * width; entry += kThreads) {
    const int tile = entry / width;
    int rest = entry - tile * width;
    int64_t cell = cells[tile];
    int64_t stride = 1;
    bool inside = true;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int side = 2 * job.radius[axis] + 1, above = rest / side;
      const int step = rest - above * side - job.radius[axis], there = places[axis * kTilesPerBlock + tile] + step;
      inside &= there >= 0 && there < job.grid[axis];
      cell += step * stride;
      stride *= job.grid[axis];
      rest = above;
    }
    job.table[first * width + entry] = inside ? job.slots[cell] : -1;
  }
}

int chunks_per_image(int64_t cells) { return static_cast<int>(blocks_of(cells, kChunk)); }

}  // namespace

int64_t tile_index_chunks(int64_t images, int64_t cells) { return images * chunks_per_image(cells); }

void launch_tile_index(const TileIndex& job, cudaStream_t stream) {
  const auto chunks = static_cast<unsigned>(tile_index_chunks(job.images, job.cells));
  const int per_image = chunks_per_image(job.cells);
  constexpr size_t kShared = kWarps * sizeof(int);
  launch("tile_index (count)", count_kernel, dim3(chunks), dim3(kThreads), kShared, stream, job, per_image);
  launch("tile_index (place)", place_kernel, dim3(chunks + 1), dim3(kThreads), kShared, stream, job, per_image);
}

void launch_neighbour_table(const NeighbourTable& job, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(blocks_of(job.count, kTilesPerBlock));
  constexpr size_t kShared = 4 * kTilesPerBlock * sizeof(int);
  launch("neighbour_table", neighbour_table_kernel, dim3(blocks), dim3(kThreads), kShared, stream, job, job.width());
}

}  // namespace sparsecnx::cuda
