"""Device functions that the Triton kernels share. Imported by the `triton.py` rooms alone."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecnx.backends import triton_launch

INTERPRETING = tl.constexpr(triton_launch.interpreting)


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """The same value, known to be a multiple of ALIGN."""
    return value // ALIGN * ALIGN


@triton.jit
def spread_bits(value, LEVELS: tl.constexpr):
    """Bit b of a number below 2**LEVELS moved to bit 2b: half of a Morton index."""
    out = value & 0
    for bit in tl.static_range(LEVELS):
        out += ((value >> bit) & 1) << (2 * bit)
    return out


@triton.jit
def nested_line(y, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """Return the part of row y of a tile in the nested index of a site (`geometry.nested_order`): the index of
    site (y, x) is `nested_line(y) + nested_column(x)`. TILE is `odd * 2**LEVELS`."""
    odd: tl.constexpr = TILE >> LEVELS
    return (y >> LEVELS) * (TILE * TILE // odd) + 2 * spread_bits(y & ((1 << LEVELS) - 1), LEVELS)


@triton.jit
def nested_column(x, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """The part that column x of a tile has in the nested index of a site."""
    odd: tl.constexpr = TILE >> LEVELS
    return (x >> LEVELS) * (TILE * TILE // (odd * odd)) + spread_bits(x & ((1 << LEVELS) - 1), LEVELS)


@triton.jit
def normal_distribution(x):
    """Cumulative distribution of the standard normal at x, and exp(-x**2 / 2). float32.

    erfc as in Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7: rounding of float32.
    """
    exponential = tl.exp2(x * x * -0.72134752044448170368)
    t = 1.0 / (1.0 + 0.23164190189 * tl.abs(x))  # 0.3275911 / sqrt(2)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    upper = 0.5 * exponential * t * (0.254829592 + t * (-0.284496736 + t * series))
    return tl.where(x < 0, upper, 1.0 - upper), exponential


@triton.jit
def gelu(x):
    """x times the cumulative distribution of the standard normal (arXiv 1606.08415), exact form. float32."""
    below, _ = normal_distribution(x)
    return x * below


@triton.jit
def gelu_and_slope(x):
    """`gelu` and its derivative. float32."""
    below, exponential = normal_distribution(x)
    return x * below, below + x * exponential * 0.39894228040143267794


@triton.jit
def grouped_blocks(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Block row and block column of a program of a matrix product: GROUP block rows go through all block columns
    together, so that both operands are read again while they are still cached."""
    group = program // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """`accumulator + left @ right`, accumulated in float32."""
    if INTERPRETING:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(values, TYPE: tl.constexpr):
    """float32 values rounded to the nearest value of a type, ties to even: as everywhere on a GPU."""
    if INTERPRETING and tl.bfloat16 == TYPE:
        # The interpreter cuts the last 16 bits off: round to a value that has none.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(TYPE)
