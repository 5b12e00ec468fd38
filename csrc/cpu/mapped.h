// Explicit kernel maps, as all operators on them take one.
#pragma once

#include "op.h"

namespace sparsecnx {

// The sizes of an operator on an explicit kernel map.
struct Mapped {
  int64_t rows_in, channels, rows_out, taps;
  const int32_t* map;  // (rows_out, taps): row of x, -1 for none
};

// Checks features and a kernel map, but for the range of its entries.
Mapped check_map(const Tensor& x, const Tensor& kernel_map);

// Returns how many entries of a map are not -1.
int64_t count_reads(const int32_t* map, int64_t count);

// Raises and says how an inverse map (rows_in, taps) differs from that of `shape`. The entries of both are in range.
void contradict(const Mapped& shape, const int32_t* inverse);

}  // namespace sparsecnx
