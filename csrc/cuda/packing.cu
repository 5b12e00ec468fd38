// Gather and scatter of the rows of visible tiles. All of it waits for memory alone.
//
// Planes are contiguous along sites, rows along channels. A block takes *squares* of sites that are consecutive rows
// (nested order: their side is a power of two), turns them in shared memory, and moves up to 16 bytes at a time on both
// sides: V sites of a line there, values of a row here.
//
// A block of few channels (an image has three) takes many sites and all channels, so that its rows are one piece of
// memory; others take 128 bytes of channels.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "nested.cuh"
#include "packing.h"
#include "types.cuh"

namespace sparsecnx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;          // accesses that a thread starts before it uses the first
constexpr int kBlocks = 4;          // of them on a multiprocessor: 64 registers hold the accesses and their addresses
constexpr int kChannelBytes = 128;  // of the channels of a block
constexpr int kLogSites = 7;        // log2 of its sites
constexpr int kLogSide = 3;         // log2 of the side of its squares, at most
constexpr int kFewBytes = 16;       // a row of no more is one of few channels
constexpr int kLogSitesOfFew = 10;
constexpr int kLogSideOfFew = 5;
constexpr int64_t kAccesses = 1024;  // of 16 bytes in a block that copies rows

// Values that move together.
template <class U, int N>
struct alignas(N * sizeof(U)) Values {
  U at[N];
};

// The same on their way, in whole registers.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint64_t,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

// Offsets of neighbours in a dense tensor.
struct Strides {
  int64_t n, c, y, x;
};

// The squares of which the tiles of all images consist, in the order of their rows.
struct Squares {
  TileSide tile;
  int log_side;
  int cells_x, cells;  // tiles of an image

  Squares(const DenseShape& shape, int most_log_side)
      : tile(shape.tile),
        log_side(std::min(tile.levels, most_log_side)),
        cells_x(static_cast<int>(shape.cells_x())),
        cells(static_cast<int>(shape.cells())) {}
  __host__ __device__ int of_tile() const { return tile.sites() >> 2 * log_side; }

  // Offset in a dense tensor of a square of the cell, these numbered over all images. A plane has fewer than 2^31 sites
  // along each axis, and there are fewer than 2^31 cells: divisions in 64 bits are slow.
  __device__ int64_t offset(const Strides& strides, int cell, int square) const {
    const int site = square << 2 * log_side;
    const int image = cell / cells, place = cell - image * cells;
    const int line = place / cells_x;
    const int64_t y = line * tile.side + site_line(tile, site);
    const int64_t x = (place - line * cells_x) * tile.side + site_column(tile, site);
    return image * strides.n + y * strides.y + x * strides.x;
  }
};

// How the squares and channels are cut into blocks, and how one lies in shared memory.
struct Blocking {
  Squares squares;
  int channels;
  bool few;
  int log_sites;
  int block_channels;  // a power of two, or all of few
  int across;          // blocks side by side along the channels
  int pitch, skip;     // values from site to site in shared memory, and left out after every 32 sites

  explicit Blocking(const DenseShape& shape)
      : squares(shape, is_few(shape) ? kLogSideOfFew : kLogSide),
        channels(static_cast<int>(shape.channels)),
        few(is_few(shape)),
        log_sites(few ? kLogSitesOfFew : kLogSites),
        block_channels(static_cast<int>(few ? shape.channels : kChannelBytes / shape.size)),
        across(static_cast<int>(blocks_of(channels, block_channels))) {
    // An odd number of words of 4 bytes, so that sites one after the other lie in different banks; sites a power of
    // two apart do by the words left out.
    skip = static_cast<int>(std::max<int64_t>(4 / shape.size, 1));
    pitch = static_cast<int>(blocks_of(block_channels, skip) | 1) * skip;
  }
  static bool is_few(const DenseShape& shape) { return shape.channels * shape.size <= kFewBytes; }

  __host__ __device__ int log_squares() const { return log_sites - 2 * squares.log_side; }
  int64_t staging_bytes(int64_t size) const {
    return blocks_of(((int64_t{pitch} << log_sites) + (skip << (log_sites - 5))) * size, 16) * 16;
  }
  __device__ int at(int site) const { return site * pitch + (site >> 5) * skip; }
};

// A square of a block: offsets in the dense tensor and of its first row, -1 where there is none.
struct Place {
  int64_t dense, row;
};

// Part of the work of a block: its first square, in which tile and where in it, its first channel, and how many squares
// and channels it has.
struct Part {
  int64_t first_square;
  int first_tile, within;
  int first_channel, squares, channels;

  __device__ Part(const Blocking& cut, int64_t all_squares) {
    first_square = static_cast<int64_t>(blockIdx.x / cut.across) << cut.log_squares();
    first_tile = static_cast<int>(first_square / cut.squares.of_tile());
    within = static_cast<int>(first_square % cut.squares.of_tile());
    first_channel = static_cast<int>(blockIdx.x % cut.across) * cut.block_channels;
    squares = static_cast<int>(min(all_squares - first_square, int64_t{1} << cut.log_squares()));
    channels = min(cut.block_channels, cut.channels - first_channel);
  }
};

// Calls f(square, y, x, channel, step) for every piece of V sites of a line that a thread takes, from (y, x) of a square
// on, for the channels from `channel` on in steps of `step`. The lanes of a warp follow a line through the squares, then
// take the next line. All divisors are powers of two.
template <int V, class F>
__device__ void for_pieces(const Blocking& cut, const F& f) {
  constexpr int kLog = V == 8 ? 3 : V == 4 ? 2 : V == 2 ? 1 : 0;
  const int log_line = cut.squares.log_side - kLog;  // log2 of the pieces of a line
  const int pieces = 1 << (cut.log_sites - kLog), lanes = min(pieces, kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  for (int piece = thread & (lanes - 1); piece < pieces; piece += lanes) {
    const int x = (piece & ((1 << log_line) - 1)) << kLog;
    const int square = piece >> log_line & ((1 << cut.log_squares()) - 1);
    const int y = piece >> (log_line + cut.log_squares());
    f(square, y, x, thread / lanes, kThreads / lanes);
  }
}

// Where V sites of a line, from (y, x) of a square on, lie in shared memory.
template <int V>
struct Sites {
  int at[V];

  __device__ Sites(const Blocking& cut, int square, int y, int x) {
    const int first = (square << 2 * cut.squares.log_side) + 2 * spread_bits(y) + spread_bits(x);
#pragma unroll
    for (int k = 0; k < V; ++k) at[k] = cut.at(first + spread_bits(k));
  }
};

// The 16 bytes of rows that a thread of a block of more than few channels has: f(k, site, channel) for each of them.
constexpr int kPacks = kChannelBytes / 16;
constexpr int kPacksOfThread = kPacks * (1 << kLogSites) / kThreads;

template <class U, class F>
__device__ void for_packs(const Blocking& cut, const Part& part, const F& f) {
  const int sites = part.squares << 2 * cut.squares.log_side;
  const int channel = static_cast<int>(threadIdx.x) % kPacks * static_cast<int>(16 / sizeof(U));
#pragma unroll
  for (int k = 0; k < kPacksOfThread; ++k) {
    const int site = (static_cast<int>(threadIdx.x) + k * kThreads) / kPacks;
    if (site < sites && channel < part.channels) f(k, site, channel);
  }
}

// Calls f(site, channel) for all values of a block.
template <class F>
__device__ void for_values(const Blocking& cut, const Part& part, const F& f) {
  const int count = (part.squares << 2 * cut.squares.log_side) * cut.block_channels;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int site = i / cut.block_channels, channel = i - site * cut.block_channels;
    if (channel < part.channels) f(site, channel);
  }
}

// 16 bytes of a row to and from shared memory, where rows begin at multiples of 4 bytes only.
template <class U>
__device__ void put_pack(U* shared, uint4 pack) {
  using Part = Values<U, sizeof(U) < 4 ? 4 / sizeof(U) : 1>;
  constexpr int kParts = 16 / sizeof(Part);
  Values<Part, kParts> parts;
  __builtin_memcpy(&parts, &pack, 16);
#pragma unroll
  for (int k = 0; k < kParts; ++k) reinterpret_cast<Part*>(shared)[k] = parts.at[k];
}

template <class U>
__device__ uint4 get_pack(const U* shared) {
  using Part = Values<U, sizeof(U) < 4 ? 4 / sizeof(U) : 1>;
  constexpr int kParts = 16 / sizeof(Part);
  Values<Part, kParts> parts;
#pragma unroll
  for (int k = 0; k < kParts; ++k) parts.at[k] = reinterpret_cast<const Part*>(shared)[k];
  uint4 pack;
  __builtin_memcpy(&pack, &parts, 16);
  return pack;
}

// Rows (tiles * tile^2, C) of a dense tensor of any strides.
template <class U, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(Blocking cut, const U* __restrict__ dense, Strides strides, const int64_t* __restrict__ index,
                  int64_t tiles, bool whole_packs,  // every row begins at a multiple of 16 bytes
                  int64_t staging_bytes, U* __restrict__ rows) {
  U* staging = shared_memory<U>();
  int64_t* offsets = reinterpret_cast<int64_t*>(shared_memory<char>() + staging_bytes);
  const Part part(cut, tiles * cut.squares.of_tile());
  for (int i = static_cast<int>(threadIdx.x); i < part.squares; i += kThreads) {
    const int tile = (part.within + i) / cut.squares.of_tile();
    offsets[i] = cut.squares.offset(strides, static_cast<int>(index[part.first_tile + tile]),
                                    part.within + i - tile * cut.squares.of_tile());
  }
  __syncthreads();
  for_pieces<V>(cut, [&](int square, int y, int x, int channel, int step) {
    if (square >= part.squares) return;
    const Sites<V> sites(cut, square, y, x);
    const U* from = dense + offsets[square] + y * strides.y + x * strides.x + part.first_channel * strides.c;
    for (int c = channel; c < part.channels; c += kUnroll * step) {
      Word<V * sizeof(U)> words[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (c + i * step < part.channels) {
          words[i] = *reinterpret_cast<const Word<V * sizeof(U)>*>(from + (c + i * step) * strides.c);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (c + i * step < part.channels) {
          Values<U, V> values;
          __builtin_memcpy(&values, &words[i], sizeof(values));
#pragma unroll
          for (int k = 0; k < V; ++k) staging[sites.at[k] + c + i * step] = values.at[k];
        }
      }
    }
  });
  __syncthreads();
  constexpr int kValues = 16 / sizeof(U);
  const int64_t first_row = part.first_square << 2 * cut.squares.log_side;
  U* out = rows + first_row * cut.channels + part.first_channel;
  if (cut.few) {
    const int count = (part.squares << 2 * cut.squares.log_side) * cut.channels;
    for (int i = static_cast<int>(threadIdx.x) * kValues; i < count; i += kThreads * kValues) {
      int site = i / cut.channels, c = i - site * cut.channels;
      Values<U, kValues> values;
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        values.at[k] = staging[i + k < count ? cut.at(site) + c : 0];
        if (++c == cut.channels) c = 0, ++site;
      }
      if (i + kValues <= count) {
        *reinterpret_cast<Values<U, kValues>*>(out + i) = values;
      } else {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          if (i + k < count) out[i + k] = values.at[k];
        }
      }
    }
  } else if (whole_packs) {
    for_packs<U>(cut, part, [&](int, int site, int c) {
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(site) * cut.channels + c) =
          get_pack(staging + cut.at(site) + c);
    });
  } else {
    for_values(cut, part, [&](int site, int c) {
      out[static_cast<int64_t>(site) * cut.channels + c] = staging[cut.at(site) + c];
    });
  }
}

// Dense (B, C, H, W), contiguous: the rows at visible tiles, fill elsewhere.
template <class U, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scatter_kernel(Blocking cut, const U* __restrict__ rows, const U* __restrict__ fill, const int* __restrict__ slots,
                   int64_t tiles,  // visible or not
                   Strides strides, bool whole_packs, int64_t staging_bytes, U* __restrict__ dense) {
  U* staging = shared_memory<U>();
  Place* places = reinterpret_cast<Place*>(shared_memory<char>() + staging_bytes);
  const Part part(cut, tiles * cut.squares.of_tile());
  for (int i = static_cast<int>(threadIdx.x); i < part.squares; i += kThreads) {
    const int tile = (part.within + i) / cut.squares.of_tile();
    const int cell = part.first_tile + tile, square = part.within + i - tile * cut.squares.of_tile();
    const int64_t slot = slots[cell];
    places[i].dense = cut.squares.offset(strides, cell, square);
    places[i].row = slot < 0 ? -1 : slot * cut.squares.tile.sites() + (square << 2 * cut.squares.log_side);
  }
  __syncthreads();
  // Of a site of the block the row, or -1.
  const auto row_of = [&](int site) {
    const int64_t row = places[site >> 2 * cut.squares.log_side].row;
    return row < 0 ? row : row + (site & ((1 << 2 * cut.squares.log_side) - 1));
  };
  if (whole_packs) {
    uint4 packs[kPacksOfThread] = {};
    for_packs<U>(cut, part, [&](int k, int site, int c) {
      const int64_t row = row_of(site);
      if (row < 0) return;
      packs[k] = *reinterpret_cast<const uint4*>(rows + row * cut.channels + part.first_channel + c);
    });
    for_packs<U>(cut, part, [&](int k, int site, int c) { put_pack(staging + cut.at(site) + c, packs[k]); });
  } else {
    for_values(cut, part, [&](int site, int c) {
      const int64_t row = row_of(site);
      if (row >= 0) staging[cut.at(site) + c] = rows[row * cut.channels + part.first_channel + c];
    });
  }
  __syncthreads();
  for_pieces<V>(cut, [&](int square, int y, int x, int channel, int step) {
    if (square >= part.squares) return;
    const Sites<V> sites(cut, square, y, x);
    const bool visible = places[square].row >= 0;
    U* out = dense + places[square].dense + y * strides.y + x + part.first_channel * strides.c;
    for (int c = channel; c < part.channels; c += step) {
      Values<U, V> values;
      if (visible) {
#pragma unroll
        for (int k = 0; k < V; ++k) values.at[k] = staging[sites.at[k] + c];
      } else {
        const U blank = fill[part.first_channel + c];
#pragma unroll
        for (int k = 0; k < V; ++k) values.at[k] = blank;
      }
      *reinterpret_cast<Values<U, V>*>(out + c * strides.c) = values;
    }
  });
}

// The gather of channels that are contiguous in the dense tensor too; strides in units of 16 bytes.
__global__ void __launch_bounds__(kThreads)
    copy_kernel(Squares sites, const uint4* __restrict__ dense, Strides strides, const int64_t* __restrict__ index,
                int64_t all_rows, int block_rows,
                int width,  // of a row, in units of 16 bytes
                uint4* __restrict__ rows) {
  int64_t* offsets = shared_memory<int64_t>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_rows;
  const int64_t first_tile = first / sites.of_tile();
  const int within = static_cast<int>(first - first_tile * sites.of_tile());
  const int count = static_cast<int>(min(all_rows - first, static_cast<int64_t>(block_rows)));
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int tile = (within + i) / sites.of_tile();
    offsets[i] = sites.offset(strides, static_cast<int>(index[first_tile + tile]), within + i - tile * sites.of_tile());
  }
  __syncthreads();
  uint4* out = rows + first * width;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += kThreads) {
    const int row = i / width;
    out[i] = dense[offsets[row] + (i - row * width)];
  }
}

// Calls f(Tag<U>()) with an unsigned integer of that size: bits are moved, not numbers.
template <class F>
void for_size(int64_t size, const F& f) {
  switch (size) {
    case 1:
      return f(Tag<uint8_t>());
    case 2:
      return f(Tag<uint16_t>());
    case 4:
      return f(Tag<uint32_t>());
    default:
      return f(Tag<uint64_t>());
  }
}

template <int V>
struct Sized {
  static constexpr int kSize = V;
};

// Calls f(Sized<V>()) with the sites of a piece, `most` or what fits into 16 bytes; 1 where values are of a size that
// features do not have.
template <class U, class F>
void for_piece(int64_t most, const F& f) {
  if constexpr (sizeof(U) == 2) {
    if (most >= 8) return f(Sized<8>());
  }
  if constexpr (sizeof(U) == 2 || sizeof(U) == 4) {
    if (most >= 4) return f(Sized<4>());
    if (most >= 2) return f(Sized<2>());
  }
  f(Sized<1>());
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool all_multiples(std::initializer_list<int64_t> numbers, int64_t divisor) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int64_t number) { return number % divisor == 0; });
}

dim3 grid_of(const Blocking& cut, int64_t tiles) {
  const int64_t down = blocks_of(tiles * cut.squares.of_tile(), int64_t{1} << cut.log_squares());
  return dim3(static_cast<unsigned>(down * cut.across));
}

void launch_copy(const DenseShape& shape, const Gather& v, cudaStream_t stream) {
  const Squares sites(shape, 0);
  const int64_t per_access = 16 / shape.size, width = shape.channels / per_access;
  const int64_t rows = v.tiles * sites.tile.sites();
  const int64_t block_rows = std::clamp<int64_t>(kAccesses / width, 1, kThreads);
  const Strides strides{v.strides[0] / per_access, 0, v.strides[2] / per_access, v.strides[3] / per_access};
  launch("gather_tiles: copy_kernel", copy_kernel, dim3(static_cast<unsigned>(blocks_of(rows, block_rows))),
         dim3(kThreads), block_rows * sizeof(int64_t), stream, sites, static_cast<const uint4*>(v.dense), strides,
         v.index, rows, static_cast<int>(block_rows), static_cast<int>(width), static_cast<uint4*>(v.rows));
}

}  // namespace

void launch_gather_tiles(const DenseShape& shape, const Gather& v, cudaStream_t stream) {
  const auto [n, c, y, x] = v.strides;
  const bool whole_packs = shape.channels * shape.size % 16 == 0;
  if (c == 1 && whole_packs && all_multiples({n, y, x}, 16 / shape.size) && aligned(v.dense, 16)) {
    return launch_copy(shape, v, stream);
  }
  const Blocking cut(shape);
  int64_t piece = x == 1 ? std::min<int64_t>(1 << cut.squares.log_side, 16 / shape.size) : 1;
  while (!all_multiples({n, c, y}, piece) || !aligned(v.dense, piece * shape.size)) piece /= 2;
  const int64_t staging = cut.staging_bytes(shape.size);
  const size_t shared = staging + (sizeof(int64_t) << cut.log_squares());
  for_size(shape.size, [&](auto tag) {
    using U = typename decltype(tag)::type;
    for_piece<U>(piece, [&](auto sized) {
      launch("gather_tiles: gather_kernel", gather_kernel<U, decltype(sized)::kSize>, grid_of(cut, v.tiles),
             dim3(kThreads), shared, stream, cut, static_cast<const U*>(v.dense), Strides{n, c, y, x}, v.index, v.tiles,
             whole_packs, staging, static_cast<U*>(v.rows));
    });
  });
}

void launch_scatter_tiles(const DenseShape& shape, const Scatter& v, cudaStream_t stream) {
  const Blocking cut(shape);
  const int64_t tiles = shape.batch * shape.cells(), plane = shape.height * shape.width;
  const bool whole_packs = !cut.few && shape.channels * shape.size % 16 == 0 && aligned(v.rows, 16);
  const int64_t piece = std::min<int64_t>(1 << cut.squares.log_side, 16 / shape.size);
  const int64_t staging = cut.staging_bytes(shape.size);
  const size_t shared = staging + (sizeof(Place) << cut.log_squares());
  for_size(shape.size, [&](auto tag) {
    using U = typename decltype(tag)::type;
    for_piece<U>(piece, [&](auto sized) {
      launch("scatter_tiles: scatter_kernel", scatter_kernel<U, decltype(sized)::kSize>, grid_of(cut, tiles),
             dim3(kThreads), shared, stream, cut, static_cast<const U*>(v.rows), static_cast<const U*>(v.fill), v.slots,
             tiles, Strides{shape.channels * plane, plane, shape.width, 1}, whole_packs, staging,
             static_cast<U*>(v.dense));
    });
  });
}

}  // namespace sparsecnx::cuda
