"""Device functions that the Triton kernels share. Imported by the `triton.py` rooms alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_bits(value, LEVELS: tl.constexpr):
    """Bit b of a number below 2**LEVELS moved to bit 2b: half of a Morton index."""
    out = value & 0
    for bit in tl.static_range(LEVELS):
        out += ((value >> bit) & 1) << (2 * bit)
    return out


@triton.jit
def nested_line(y, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """The part that row y of a tile has in the nested index of a site, see `sparsecnx.layout`: the index of site
    (y, x) is `nested_line(y) + nested_column(x)`. TILE is `odd * 2**LEVELS`."""
    odd: tl.constexpr = TILE >> LEVELS
    return (y >> LEVELS) * (TILE * TILE // odd) + 2 * spread_bits(y & ((1 << LEVELS) - 1), LEVELS)


@triton.jit
def nested_column(x, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """The part that column x of a tile has in the nested index of a site."""
    odd: tl.constexpr = TILE >> LEVELS
    return (x >> LEVELS) * (TILE * TILE // (odd * odd)) + spread_bits(x & ((1 << LEVELS) - 1), LEVELS)
