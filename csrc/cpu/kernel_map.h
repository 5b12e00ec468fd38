// Kernel maps: for every output row and tap the row of x that is read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace sparsecnx {

class TileMap;

// A kernel map (rows out, taps), whose entries are given, or follow from the visible tiles. Those are never kept: they are
// computed for some rows at a time, where these are read.
class KernelMap {
 public:
  int64_t rows_out, rows_in, taps;

  KernelMap(const int32_t* entries, int64_t rows_out, int64_t rows_in, int64_t taps, const char* name);
  explicit KernelMap(std::unique_ptr<const TileMap> tiles);
  ~KernelMap();

  // Returns the entries of output rows [begin, end): rows of x, -1 for none. They stay there as long as `room` does. Where
  // one that was given is no row, none of these rows reads anything, and `check` will raise.
  const int32_t* rows(int64_t begin, int64_t end, std::vector<int32_t>& room) const;

  // Raises if `rows` met an entry that is neither -1 nor a row of x.
  void check() const;

  // Returns all entries if they are given, otherwise null.
  const int32_t* given() const { return entries_; }

 private:
  const int32_t* entries_ = nullptr;
  const char* name_ = nullptr;
  std::unique_ptr<const TileMap> tiles_;
  mutable std::atomic<bool> good_ = true;
};

}  // namespace sparsecnx
