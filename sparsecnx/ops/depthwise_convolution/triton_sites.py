"""Where the sites lie that a depthwise kernel reads: by the table of neighbouring tiles and nested order.

Columns of sites are numbered `i_p`: along x, then z, then over the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecnx.backends.triton_functions import nested_part, volume


@triton.jit
def column(i_p, TILE: tl.constexpr):
    """Return the tiles of columns of sites, and their places there along z and x."""
    return i_p // (TILE[0] * TILE[2]), i_p // TILE[2] % TILE[0], i_p % TILE[2]


@triton.jit
def site(i_p, i_y, TILE: tl.constexpr):
    """Return the rows of features of the sites of columns at line `i_y` of their tiles, int64."""
    i_tile, i_z, i_x = column(i_p, TILE)
    o_column = nested_part(i_z, 0, TILE) + nested_part(i_x, 2, TILE)
    return i_tile.to(tl.int64) * volume(TILE) + o_column + nested_part(i_y, 1, TILE)


@triton.jit
def site_block(i_p, i_y, m_p, o_c, C, TILE: tl.constexpr):
    """Return the offsets of the features of sites of columns at line `i_y`, and which of them exist."""
    return (site(i_p, i_y, TILE) * C)[:, None] + o_c[None, :], m_p[:, None] & (o_c < C)[None, :]


@triton.jit
def seek_column(
    table,
    i_p,
    i_kz,
    i_kx,
    m_p,
    C,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Find the tiles that contain the columns that columns of sites read through taps `i_kz` and `i_kx`.

    Returns:
        p_table: pointers to the uppermost of these tiles in the table.
        o_column: place of the column in the nested order of its tile.
        o_tiles, m_tiles: with WHOLE, the offsets of these tiles and whether they are visible, see `neighbour`.
    """
    i_tile, i_z, i_x = column(i_p, TILE)
    i_z += i_kz - KERNEL[0] // 2 + TILE[0] * REACH[0]  # counted from the corner of the neighbourhood
    i_x += i_kx - KERNEL[2] // 2 + TILE[2] * REACH[2]
    i_step_z, i_step_x = i_z // TILE[0], i_x // TILE[2]
    o_column = nested_part(i_z - i_step_z * TILE[0], 0, TILE) + nested_part(i_x - i_step_x * TILE[2], 2, TILE)
    p_table = table + i_tile.to(tl.int64) * ((2 * REACH[0] + 1) * (2 * REACH[1] + 1) * (2 * REACH[2] + 1))
    p_table += i_step_z * ((2 * REACH[1] + 1) * (2 * REACH[2] + 1)) + i_step_x
    o_tiles = ()
    m_tiles = ()
    if WHOLE:
        for i_step_y in tl.static_range(2 * REACH[1] + 1):
            o_tile, m_tile = neighbour(p_table, i_step_y, o_column, m_p, C, TILE, REACH)
            o_tiles = o_tiles + (o_tile,)
            m_tiles = m_tiles + (m_tile,)
    return p_table, o_column, o_tiles, m_tiles


@triton.jit
def seek_line(
    p_table,
    o_column,
    o_tiles,
    m_tiles,
    i_line,
    i_y,
    m_p,
    o_c,
    C,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return the offsets of the features at line `i_y + i_line` from the corner of a tile, and which of them exist.

    With WHOLE, where the strip is the whole tile and all taps of a column are held, `i_y` is 0 and `i_line` a constant.
    """
    if WHOLE:
        o_tile = o_tiles[(i_line + TILE[1] * REACH[1]) // TILE[1]]
        m_tile = m_tiles[(i_line + TILE[1] * REACH[1]) // TILE[1]]
        o_line = nested_part((i_line + TILE[1] * REACH[1]) % TILE[1], 1, TILE)
    else:
        i_shifted = i_y + i_line + TILE[1] * REACH[1]
        i_step = i_shifted // TILE[1]
        o_tile, m_tile = neighbour(p_table, i_step, o_column, m_p, C, TILE, REACH)
        o_line = nested_part(i_shifted - i_step * TILE[1], 1, TILE)
    return (o_tile + o_line * C)[:, None] + o_c[None, :], m_tile[:, None] & (o_c < C)[None, :]


@triton.jit
def neighbour(p_table, i_step, o_column, m_p, C, TILE: tl.constexpr, REACH: tl.constexpr):
    """Return the offset of the features of line 0 in a neighbouring tile, int64, and whether the tile is visible."""
    i_tile = tl.load(p_table + i_step * (2 * REACH[2] + 1), mask=m_p, other=-1)
    return (i_tile.to(tl.int64) * volume(TILE) + o_column) * C, i_tile >= 0
