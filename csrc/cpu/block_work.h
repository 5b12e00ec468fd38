// How the rows of the fused block are divided.
//
// They pass through it in chunks of whole groups, since GRN needs the sums over a group before any of its rows can go on. A
// chunk passes in pieces, whose hidden layer (rows, H) stays in cache between the products and the elementwise passes
// around them. If there are groups for every thread and the matrices are small, each thread takes its own groups through
// the whole block without waiting for the others, and has gradients of the matrices of its own. Otherwise the threads
// share the pieces of one chunk after another, and divide the matrices' gradients.
#pragma once

#include "products.h"

namespace sparsecnx {

// Hidden values of a chunk and of a run (2^18 floats are 1 MiB, and a backward chunk holds two or three such matrices), and
// of a piece.
constexpr int64_t kChunkValues = int64_t{1} << 18, kPieceValues = int64_t{1} << 16;
// The bytes that all workers together may hold in addition to the chunks: their sums of the matrices' gradients.
constexpr int64_t kWorkerBytes = int64_t{3} << 20;

// Rows that one thread takes through a few steps, and their parts in each group.
struct Piece {
  int64_t begin, end, first_part, last_part;

  int64_t rows() const { return end - begin; }
};

// Consecutive pieces, whose rows are summed together in the gradients of the matrices.
struct Run {
  int64_t first_piece, last_piece, begin, end;

  int64_t rows() const { return end - begin; }
};

struct Chunk {
  int64_t first_group, last_group, begin, end;  // groups and rows
  std::vector<Run> runs;
  std::vector<Piece> pieces;
  std::vector<RowBlock> parts;

  Run all() const { return {0, static_cast<int64_t>(pieces.size()), begin, end}; }

  int64_t rows() const { return end - begin; }
  int64_t groups() const { return last_group - first_group; }
};

// Describes how the rows of a block are divided.
struct Division {
  const int64_t* splits;  // of the groups
  int64_t sites;          // of a tile: pieces are whole tiles
  int64_t threads;        // that share a chunk
  int64_t chunk_rows;     // of each thread, at most, unless a group has more
  int64_t run_rows;       // of each thread, at most, unless a piece has more
  int64_t piece_rows;     // at most, unless a tile has more

  // Divides groups [first, last) into chunks.
  std::vector<Chunk> chunks(int64_t first, int64_t last) const {
    std::vector<Chunk> chunks;
    while (first < last) {
      int64_t next = first + 1;
      while (next < last && splits[next + 1] - splits[first] <= chunk_rows * threads) ++next;
      if (splits[next] > splits[first])
        chunks.push_back(divided({first, next, splits[first], splits[next], {}, {}, {}}));
      first = next;
    }
    return chunks;
  }

 private:
  Chunk divided(Chunk chunk) const {
    const int64_t tiles = chunk.rows() / sites, each = piece_rows * threads;
    const int64_t pieces = threads * ((chunk.rows() + each - 1) / each);
    int64_t group = chunk.first_group;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = chunk.begin + tiles * i / pieces * sites,
                    end = chunk.begin + tiles * (i + 1) / pieces * sites;
      if (begin == end) continue;
      const int64_t first_part = static_cast<int64_t>(chunk.parts.size());
      for (int64_t row = begin; row < end; row = chunk.parts.back().end) {
        while (splits[group + 1] <= row) ++group;
        chunk.parts.push_back({group, row, std::min(end, splits[group + 1])});
      }
      chunk.pieces.push_back({begin, end, first_part, static_cast<int64_t>(chunk.parts.size())});
    }
    const int64_t count = static_cast<int64_t>(chunk.pieces.size());
    const int64_t runs = (chunk.rows() + run_rows * threads - 1) / (run_rows * threads);
    const int64_t rounds = (count + threads - 1) / threads;  // in which every thread takes a piece
    for (int64_t i = 0; i < std::min(runs, rounds); ++i) {
      const int64_t first = rounds * i / std::min(runs, rounds) * threads;
      const int64_t last = std::min(rounds * (i + 1) / std::min(runs, rounds) * threads, count);
      chunk.runs.push_back({first, last, chunk.pieces[first].begin, chunk.pieces[last - 1].end});
    }
    return chunk;
  }
};

// The chunks of each worker. If there is one worker, the threads share its chunks; otherwise each worker is a thread.
struct Work {
  std::vector<std::vector<Chunk>> workers;
  bool whole = false;  // a product is of a whole run, and the threads share it: few rows, or by torch

  int64_t count() const { return static_cast<int64_t>(workers.size()); }
};

// A worker that is a thread needs `bytes` of memory in addition to its chunks.
template <class S>
Work split_work(const int64_t* splits, int64_t groups, int64_t channels, int64_t hidden, int64_t sites, int64_t bytes) {
  const int64_t threads = thread_count(), rows = splits[groups], width = std::max<int64_t>(hidden, 1);
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkValues / width);
  const int64_t piece_rows = std::clamp<int64_t>(kPieceValues / width, 96, 512);
  std::vector<int64_t> bounds{0};  // groups where a worker begins: nearest to an equal share of the rows
  int64_t largest = 0;
  for (int64_t worker = 1; worker <= threads; ++worker) {
    const int64_t share = rows * worker / threads;
    int64_t at = std::lower_bound(splits + bounds.back(), splits + groups, share) - splits;
    if (at > bounds.back() && share - splits[at - 1] < splits[at] - share) --at;
    if (worker == threads) at = groups;
    largest = std::max(largest, splits[at] - splits[bounds.back()]);
    bounds.push_back(at);
  }
  // With uneven shares threads wait at the end. Sharing every step costs a fifth.
  const bool uneven = 5 * rows < 4 * largest * threads;
  Division division{splits, sites, threads, chunk_rows, chunk_rows, piece_rows};
  if (threads == 1 || uneven || (threads - 1) * bytes > kWorkerBytes) {
    // Few rows are one product. A product by torch costs microseconds beside its work, so that it is as large as can be.
    const bool few = rows <= channels;
    if (few) division.chunk_rows = rows;
    if (few || by_torch<S>()) division.run_rows = rows;
    return {{division.chunks(0, groups)}, few || by_torch<S>()};
  }
  if (by_torch<S>()) division.run_rows = division.piece_rows = rows;
  division.threads = 1;
  Work work;
  for (int64_t worker = 0; worker < threads; ++worker)
    work.workers.push_back(division.chunks(bounds[worker], bounds[worker + 1]));
  return work;
}

inline int64_t longest(const std::vector<Chunk>& chunks) {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) rows = std::max(rows, chunk.rows());
  return rows;
}

}  // namespace sparsecnx
