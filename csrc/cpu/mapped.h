// What operators on kernel maps share.
#pragma once

#include "kernel_map.h"
#include "tiles.h"

namespace sparsecnx {

// Checks the `map` of an operator, called `name`, for x of `rows_in` rows: a kernel map (rows_out, taps), of which the
// range of the entries is not checked, or with a window the index of visible tiles. Then `grid` is (batch, *grid), and
// `window` (inverse, *tile, *kernel, *stride, *padding, *dilation). The inverse leads from the rows that are read to those
// that read them.
std::unique_ptr<const KernelMap> make_map(const Tensor& map, const Sizes& grid, const Sizes& window, int64_t rows_in,
                                          const char* name = "kernel_map");

// Returns the window of the map the other way.
Sizes inverted(Sizes window);

// Returns how many entries of a map are not -1.
int64_t count_reads(const int32_t* map, int64_t count);

// Raises and says how an inverse map (rows_in, taps) differs from that of a given map. The entries of both are in range.
void contradict(const KernelMap& map, const int32_t* inverse);

}  // namespace sparsecnx
