"""Device functions that the Triton kernels share. "Grammar" in docs/dev/kernels.md says how kernels name things."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecnx.backends import triton_launch

INTERPRETING = tl.constexpr(triton_launch.interpreting)
GROUP = tl.constexpr(8)  # blocks of rows that go through all columns of a product together


@triton.jit
def aligned(SIZE, ALIGN: tl.constexpr):
    """Return the same size, known to be a multiple of ALIGN."""
    return SIZE // ALIGN * ALIGN


@triton.jit
def channel_block(C, BLOCK_C: tl.constexpr):
    """Return the block of rows of this program, and its channels (BLOCK_C,). Programs go along the channels first."""
    o_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // tl.cdiv(C, BLOCK_C), o_c


@triton.jit
def row_block(i_block, o_c, ROWS, C, BLOCK_R: tl.constexpr):
    """Return where the rows of a block, and their channels `o_c`, lie in a matrix (ROWS, C).

    Returns:
        i_row: first row of the block, int64, so that `i_row * C` does not overflow.
        o_r: its rows, counted from there (BLOCK_R,).
        m_r: which of them exist (BLOCK_R,).
        o_x: offsets of its values from `i_row * C` (BLOCK_R, BLOCK_C).
        m_x: which of them exist (BLOCK_R, BLOCK_C).
    """
    i_row = i_block * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < ROWS - i_row
    return i_row.to(tl.int64), o_r, m_r, o_r[:, None] * C + o_c[None, :], m_r[:, None] & (o_c < C)[None, :]


@triton.jit
def product_block(ROWS, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the block of rows of this program, and its columns (BLOCK_N,), of a matrix product (ROWS, N).

    GROUP blocks of rows go through all columns together, so that both operands are read again while still cached.
    """
    wide = tl.cdiv(N, BLOCK_N)
    i_first = tl.program_id(0) // (GROUP * wide) * GROUP
    i_inside = tl.program_id(0) % (GROUP * wide)
    high = tl.minimum(tl.cdiv(ROWS, BLOCK_M) - i_first, GROUP)
    return i_first + i_inside % high, i_inside // high * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def load(pointer, mask):
    """Return values in float32, 0 where the mask is False."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, b_x, mask):
    """Store float32 values, rounded to the dtype of the tensor."""
    tl.store(pointer, rounded(b_x, pointer.dtype.element_ty), mask=mask)


# The sites of a tile lie along three axes, TILE = (z, y, x): tiles of fewer have one site along the others.


@triton.constexpr_function
def volume(sizes):
    """Return the product of three sizes."""
    return sizes[0] * sizes[1] * sizes[2]


@triton.constexpr_function
def levels(side):
    """Return the levels of nested order that halve an axis: it has `odd * 2**levels` sites."""
    return (side & -side).bit_length() - 1


@triton.constexpr_function
def bit_place(level, axis, tile):
    """Return where bit `level` of a position along an axis is in the nested index: finer levels and later axes first.

    Bit `level` of axis 3 would be the first of the next level.
    """
    found = 0
    for other, side in enumerate(tile):
        halvings = (side & -side).bit_length() - 1
        found += min(halvings, level) + (other > axis and halvings > level)
    return found


@triton.constexpr_function
def odd_weight(axis, tile):
    """Return the weight of an axis in the raster order of the odd sides above all levels."""
    found = 1
    for side in tile[axis + 1 :]:
        found *= side // (side & -side)
    return found


@triton.jit
def nested_part(place, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Return what the position along an axis adds to the nested index of a site (`geometry.nested_order`)."""
    LEVELS: tl.constexpr = levels(TILE[AXIS])
    out = place & 0
    if TILE[AXIS] >> LEVELS > 1:
        out += (place >> LEVELS) * odd_weight(AXIS, TILE) << bit_place(31, 3, TILE)
    for level in tl.static_range(LEVELS):
        out += ((place >> level) & 1) << bit_place(level, AXIS, TILE)
    return out


@triton.jit
def place_of_site(site, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Return the position along an axis of the site of a tile with that nested index; undoes `nested_part`."""
    LEVELS: tl.constexpr = levels(TILE[AXIS])
    odd: tl.constexpr = TILE[AXIS] >> LEVELS
    above = site >> bit_place(31, 3, TILE)
    out = (above // odd_weight(AXIS, TILE)) % odd << LEVELS
    for level in tl.static_range(LEVELS):
        out += ((site >> bit_place(level, AXIS, TILE)) & 1) << level
    return out


@triton.jit
def normal_distribution(x):
    """Return the cumulative distribution of the standard normal at x, and exp(-x**2 / 2), in float32.

    erfc is that of Abramowitz and Stegun 7.1.26. Its absolute error, below 1.5e-7, is that of rounding to float32.
    """
    exponential = tl.exp2(x * x * -0.72134752044448170368)
    t = 1.0 / (1.0 + 0.23164190189 * tl.abs(x))  # 0.3275911 / sqrt(2)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    upper = 0.5 * exponential * t * (0.254829592 + t * (-0.284496736 + t * series))
    return tl.where(x < 0, upper, 1.0 - upper), exponential


@triton.jit
def gelu(x):
    """Return x times the cumulative distribution of the standard normal (arXiv 1606.08415, the exact form)."""
    below, _ = normal_distribution(x)
    return x * below


@triton.jit
def gelu_and_slope(x):
    """Return `gelu` and its derivative."""
    below, exponential = normal_distribution(x)
    return x * below, below + x * exponential * 0.39894228040143267794


@triton.jit
def dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """Return `b_sum + b_left @ b_right`, accumulated in float32."""
    if INTERPRETING:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """Return float32 values rounded to the nearest value of a dtype, ties to even: as everywhere on a GPU."""
    if INTERPRETING and tl.bfloat16 == DTYPE:
        # The interpreter cuts the last 16 bits off: round to a value that has none.
        bits = b_x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        b_x = tl.where(b_x == b_x, nearest, b_x)
    return b_x.to(DTYPE)


@triton.jit
def zero_blocks(COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a tuple of COUNT accumulators (BLOCK_R, BLOCK_C)."""
    b_sums = ()
    for _ in tl.static_range(COUNT):
        b_sums = b_sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    return b_sums
