"""Submanifold depthwise convolution in Triton.

All sizes are (z, y, x): two dimensions are three with one slice, and the axis of one dimension is y.

A program takes BLOCK_P columns of sites, which follow one another over successive tiles, STRIP sites high and BLOCK_C
channels deep, and keeps a float32 accumulator for each of the STRIP rows of sites in registers. A row of input sites is
loaded once for each tap along z and x and serves every output row that it reaches: 98 loads for the 392 products of a
column under a 7x7 kernel at tile side 8. `triton_sites.py` says where an input site lies.

Weight gradients: a program goes over a range of sites once for each column of taps, and leaves partial sums over it;
those are added up in a second stage, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, load, rounded, store, volume, zero_blocks
from sparsecnx.backends.triton_launch import alignment, blocks, launch, processors
from sparsecnx.common.memory import check_memory
from sparsecnx.ops import flops
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table, reach
from sparsecnx.ops.depthwise_convolution.triton_sites import seek_column, seek_line, site, site_block
from sparsecnx.tensor import SparseTensor

LONGEST_STRIP = 8  # output rows, and with them accumulators, of a program
SITES_IN_L1 = 1024  # of a range of the weight gradient; 128 KiB of x and its gradient at 32 channels in 16 bits
SITES_PER_TAP = 8  # of a range, at least: its partial sums then hold an eighth of its values
LARGEST_KERNEL = 63  # sites; the table of neighbours of a single site then has 63 * 63 entries
MOST_TAPS = 7  # rows of the kernel that are held in registers at once
WARPS = 4
CHANNEL_BLOCKS = (128, 64, 32)
# The registers that ptxas may use for a thread, by STRIP. Without this number it decides on fewer and spills one.
REGISTERS = {1: 96, 4: 168, 5: 255, 6: 255, 7: 255, 8: 255}
REGISTERS_OF_VOLUMES = {2: 80}  # of the convolution with one slice on tiles of several, in float32
REGISTERS_OF_SLICES = {1: 168, 2: 128, 4: 128}  # of the convolution with several slices, in any dtype
REGISTERS_OF_COLUMNS = {4: 255}  # of the normalised convolution with a single column of taps, as in one dimension


@triton.jit
def depthwise_conv_kernel(
    x,  # (ROWS, C)
    weight,  # (taps, C)
    bias,  # (C,) float32, or None
    residual,  # (ROWS, C), or None
    table,  # (TILES, tiles within REACH) int32: neighbouring tiles, -1 where masked
    out,  # (ROWS, C)
    TILES,
    C,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = conv(x) + bias + residual."""
    C = aligned(C, ALIGN)
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = i_p // (TILE[0] * TILE[2]) < TILES
    i_y = tl.program_id(1) * STRIP
    # fmt: off
    b_sums = convolve_strip(
        x, weight, table, i_p, i_y, m_p, o_c, C,
        TILE, REACH, KERNEL, STRIP, TAPS, BLOCK_P, BLOCK_C,
    )
    # fmt: on
    if bias is not None:
        b_bias = load(bias + o_c, o_c < C)[None, :]
    for s in tl.static_range(STRIP):
        o_out, m_out = site_block(i_p, i_y + s, m_p, o_c, C, TILE)
        b_out = b_sums[s]
        if bias is not None:
            b_out = b_out + b_bias
        if residual is not None:
            b_out = b_out + load(residual + o_out, m_out)
        store(out + o_out, b_out, m_out)


@triton.jit
def depthwise_conv_norm_kernel(
    x,  # (ROWS, C)
    weight,  # (taps, C)
    bias,  # (C,) float32
    table,  # (TILES, tiles within REACH) int32: neighbouring tiles, -1 where masked
    out,  # (ROWS, C)
    rstd,  # (ROWS,) float32
    eps,
    TILES,
    C,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """u = conv(x) + bias, out = (u - mean) rstd, with rstd = 1 / sqrt(variance + eps)."""
    C = aligned(C, ALIGN)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = i_p // (TILE[0] * TILE[2]) < TILES
    i_y = tl.program_id(1) * STRIP
    b_means = ()
    b_squares = ()
    for _ in tl.static_range(STRIP):
        b_means = b_means + (tl.zeros((BLOCK_P,), tl.float32),)
        b_squares = b_squares + (tl.zeros((BLOCK_P,), tl.float32),)

    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        # fmt: off
        b_sums = convolve_strip(
            x, weight, table, i_p, i_y, m_p, o_c, C,
            TILE, REACH, KERNEL, STRIP, TAPS, BLOCK_P, BLOCK_C,
        )
        # fmt: on
        b_bias = load(bias + o_c, o_c < C)[None, :]
        b_new_means = ()
        b_new_squares = ()
        for s in tl.static_range(STRIP):
            o_out, m_out = site_block(i_p, i_y + s, m_p, o_c, C, TILE)
            b_out = rounded(b_sums[s] + b_bias, out.dtype.element_ty)
            tl.store(out + o_out, b_out, mask=m_out)
            # Moments of this block of channels, merged with those before (Chan, Golub, LeVeque 1979).
            b_out = b_out.to(tl.float32)
            count = tl.minimum(BLOCK_C, C - i_c).to(tl.float32)
            b_mean = tl.sum(tl.where((o_c < C)[None, :], b_out, 0.0), axis=1) / count
            b_centred = tl.where((o_c < C)[None, :], b_out - b_mean[:, None], 0.0)
            before = 1.0 * i_c
            share = count / (before + count)
            b_delta = b_mean - b_means[s]
            b_square = tl.sum(b_centred * b_centred, axis=1) + b_delta * b_delta * before * share
            b_new_means = b_new_means + (b_means[s] + b_delta * share,)
            b_new_squares = b_new_squares + (b_squares[s] + b_square,)
        b_means = b_new_means
        b_squares = b_new_squares

    # The rows just written are still in the cache: read them again, now that their moments are known.
    tl.debug_barrier()
    b_rstds = ()
    for s in tl.static_range(STRIP):
        b_rstd = tl.rsqrt(b_squares[s] / C + eps)
        store(rstd + site(i_p, i_y + s, TILE), b_rstd, m_p)
        b_rstds = b_rstds + (b_rstd,)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        for s in tl.static_range(STRIP):
            o_out, m_out = site_block(i_p, i_y + s, m_p, o_c, C, TILE)
            store(out + o_out, (load(out + o_out, m_out) - b_means[s][:, None]) * b_rstds[s][:, None], m_out)


@triton.jit
def depthwise_conv_weight_grad_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    table,  # (TILES, tiles within REACH) int32: neighbouring tiles, -1 where masked
    partial,  # (ranges, taps + 1, C) float32: of the weight, then of the bias
    TILES,
    C,
    positions_per_program,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial[range, tap] = sum over sites p of grad[p] x[p + tap]; partial[range, last] = sum of grad."""
    C = aligned(C, ALIGN)
    WHOLE: tl.constexpr = STRIP == TILE[1] and TAPS == KERNEL[1]
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_begin = tl.program_id(1) * positions_per_program
    i_end = tl.minimum(i_begin + positions_per_program, TILES * TILE[0] * TILE[2])
    p_partial = partial + tl.program_id(1).to(tl.int64) * (volume(KERNEL) + 1) * C + o_c
    i_kz = tl.program_id(2)
    if KERNEL[0] == 1:
        i_kz = 0
    # The range is short enough to stay in L1 while one column of taps after the other goes over it.
    for i_taps in range(0, (KERNEL[1] // TAPS) * KERNEL[2]):
        i_kx = i_taps % KERNEL[2]
        i_ky = (i_taps // KERNEL[2]) * TAPS
        b_sums = zero_blocks(TAPS, BLOCK_P, BLOCK_C)
        b_total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for i_first in range(i_begin, i_end, BLOCK_P):
            i_p = i_first + tl.arange(0, BLOCK_P)
            m_p = i_p < i_end
            p_table, o_column, o_tiles, m_tiles = seek_column(
                table, i_p, i_kz, i_kx, m_p, C, TILE, REACH, KERNEL, WHOLE
            )
            for i_y in range(0, TILE[1], STRIP):
                b_grads = ()
                for s in tl.static_range(STRIP):
                    o_grad, m_grad = site_block(i_p, i_y + s, m_p, o_c, C, TILE)
                    b_grad = load(grad + o_grad, m_grad)
                    b_grads = b_grads + (b_grad,)
                    if i_kz + i_taps == 0:
                        b_total += b_grad
                for i in tl.static_range(STRIP + TAPS - 1):
                    o_x, m_x = seek_line(
                        p_table, o_column, o_tiles, m_tiles, i - KERNEL[1] // 2, i_y + i_ky, m_p, o_c, C,
                        TILE, REACH, WHOLE,
                    )  # fmt: skip
                    b_sums = add_products(b_sums, load(x + o_x, m_x), b_grads, i, TAPS, STRIP)
        for j in tl.static_range(TAPS):
            i_tap = (i_kz * KERNEL[1] + i_ky + j) * KERNEL[2] + i_kx
            store(p_partial + i_tap * C, tl.sum(b_sums[j], axis=0), o_c < C)
        if i_kz + i_taps == 0:
            store(p_partial + volume(KERNEL) * C, tl.sum(b_total, axis=0), o_c < C)


@triton.jit
def convolve_strip(
    x,
    weight,
    table,
    i_p,
    i_y,
    m_p,
    o_c,
    C,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIP: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the convolution at STRIP lines of sites from line `i_y` on, (BLOCK_P, BLOCK_C) for each line."""
    WHOLE: tl.constexpr = STRIP == TILE[1] and TAPS == KERNEL[1]
    GROUPS: tl.constexpr = KERNEL[1] // TAPS
    b_sums = zero_blocks(STRIP, BLOCK_P, BLOCK_C)
    for i_taps in range(0, KERNEL[0] * GROUPS * KERNEL[2]):
        i_kx = i_taps % KERNEL[2]
        i_ky = (i_taps // KERNEL[2]) % GROUPS * TAPS
        i_kz = i_taps // (GROUPS * KERNEL[2])
        b_weights = ()
        for j in tl.static_range(TAPS):
            i_tap = (i_kz * KERNEL[1] + i_ky + j) * KERNEL[2] + i_kx
            # Loaded by every thread in the layout it needs: threads of a column share the address.
            p_weight = tl.broadcast_to((weight + i_tap * C + o_c)[None, :], (BLOCK_P, BLOCK_C))
            b_weights = b_weights + (load(p_weight, (o_c < C)[None, :]),)
        p_table, o_column, o_tiles, m_tiles = seek_column(table, i_p, i_kz, i_kx, m_p, C, TILE, REACH, KERNEL, WHOLE)
        for i in tl.static_range(STRIP + TAPS - 1):
            o_x, m_x = seek_line(
                p_table, o_column, o_tiles, m_tiles, i - KERNEL[1] // 2, i_y + i_ky, m_p, o_c, C,
                TILE, REACH, WHOLE,
            )  # fmt: skip
            b_sums = add_products(b_sums, load(x + o_x, m_x), b_weights, i, STRIP, TAPS)
    return b_sums


@triton.jit
def add_products(b_sums, b_x, b_factors, i, SUMS: tl.constexpr, FACTORS: tl.constexpr):
    """Return the accumulators after line `i` of the input: sums[s] + x factors[i - s], where there is that factor."""
    b_updated = ()
    for s in tl.static_range(SUMS):
        if i - s >= 0 and i - s < FACTORS:
            b_updated = b_updated + (b_sums[s] + b_x * b_factors[i - s],)
        else:
            b_updated = b_updated + (b_sums[s],)
    return b_updated


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    tile: Sequence[int],
    *,
    residual: Tensor | None = None,
    flip: bool = False,
    normalise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve rows of features, and normalise the output on request.

    Args:
        x: `(rows, C)`.
        weight: `(C, 1, *kernel)`.
        bias: float32 `(C,)` or None.
        table: neighbouring tiles of each tile, see `neighbour_table`.
        tile: sites of a tile along each axis.
        residual: `(rows, C)`, added to the output.
        flip: whether to mirror the weight along all axes, as the gradient of x needs it.
        normalise: eps of a LayerNorm without scale and shift over the output, which then needs a bias and takes no
            residual. None leaves the output as it is.

    Returns:
        out: `(rows, C)`.
        rstd: `1 / sqrt(variance + eps)` of the normalisation, float32 `(rows,)`, empty without it.
    """
    rows, channels = x.shape
    out = torch.empty_like(x)
    rstd = x.new_empty(rows if normalise is not None else 0, dtype=torch.float32)
    options = _options(x, tile, weight.shape[2:])
    side = options["TILE"][1]
    high, strips = blocks(rows // side, options["BLOCK_P"]), side // options["STRIP"]
    taps = weight.flatten(1).t()  # (taps, C), channels next to each other
    taps = (taps.flip(0) if flip else taps).contiguous()
    tensors = {"x": x, "weight": taps, "bias": bias, "table": table, "out": out}
    if normalise is None:
        grid = (high, strips, blocks(channels, options["BLOCK_C"]))
        limits = REGISTERS if x.dtype == torch.float32 else {}
        if options["KERNEL"][0] > 1:
            limits = limits | REGISTERS_OF_SLICES
        elif options["TILE"][0] > 1 and x.dtype == torch.float32:
            limits = limits | REGISTERS_OF_VOLUMES
        registers = _registers(options["STRIP"], limits)
        launch(depthwise_conv_kernel, grid, **tensors, residual=residual, **options, **registers)
    else:
        limits = REGISTERS | REGISTERS_OF_COLUMNS if options["KERNEL"][2] == 1 else REGISTERS
        registers = _registers(options["STRIP"], limits)
        launch(depthwise_conv_norm_kernel, (high, strips), **tensors, rstd=rstd, eps=normalise, **options, **registers)
    return out, rstd


def weight_grad(
    grad: Tensor, x: Tensor, table: Tensor, tile: Sequence[int], kernel: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and of the bias from `grad` and `x`, both `(rows, C)`.

    Returns:
        grad_weight: `(C, 1, *kernel)` in the dtype of `x`.
        grad_bias: float32 `(C,)`.
    """
    rows, channels = x.shape
    options = _options(x, tile, kernel)
    taps, slices = math.prod(kernel), options["KERNEL"][0]
    wide, block_p = blocks(channels, options["BLOCK_C"]), options["BLOCK_P"]
    total = rows // options["TILE"][1]  # columns of sites
    # Ranges short enough for L1 and for enough programs, long enough for the partial sums to be few beside the rows.
    ranges = max(blocks(rows, max(SITES_IN_L1, SITES_PER_TAP * taps)), blocks(4 * processors(x.device), wide * slices))
    ranges = max(1, min(ranges, total // (4 * block_p)))
    per_program = blocks(blocks(total, ranges), block_p) * block_p
    ranges = max(1, blocks(total, per_program)) if total else 1
    partial = torch.empty(ranges, taps + 1, channels, dtype=torch.float32, device=x.device)
    launch(
        depthwise_conv_weight_grad_kernel,
        (wide, ranges, slices),
        grad=grad,
        x=x,
        table=table,
        partial=partial,
        positions_per_program=per_program,
        **options,
        **_registers(options["STRIP"], REGISTERS if x.dtype == torch.float32 else {}),
    )
    sums = partial.sum(0)
    return sums[:-1].t().to(x.dtype).contiguous().view(channels, 1, *kernel), sums[-1].clone()


def check_kernel(weight: Tensor, name: str) -> None:
    """Raise ValueError if the weight has more sites a side than LARGEST_KERNEL."""
    if max(weight.shape[2:]) > LARGEST_KERNEL:
        raise ValueError(f"{name} is {tuple(weight.shape)}: Triton kernels go to {LARGEST_KERNEL} sites a side")


def _options(x: Tensor, tile: Sequence[int], kernel: Sequence[int]) -> dict[str, Any]:
    """Return the arguments that all kernels share: sizes, sizes of blocks, and the number of warps."""
    rows, channels = x.shape
    sides, taps = _three(tile), _three(kernel)
    # The widest block that pads the channels least; a thread's part of a row is 16 bytes.
    block_c = min(CHANNEL_BLOCKS, key=lambda size: (blocks(channels, size) * size, -size))
    return {
        "TILES": rows // math.prod(sides),
        "C": channels,
        "TILE": sides,
        "REACH": reach(sides, taps),
        "KERNEL": taps,
        "STRIP": max(size for size in range(1, LONGEST_STRIP + 1) if sides[1] % size == 0),
        "TAPS": max(size for size in range(1, MOST_TAPS + 1) if taps[1] % size == 0),
        "BLOCK_P": WARPS * 32 * 16 // x.element_size() // block_c,
        "BLOCK_C": block_c,
        "ALIGN": alignment(channels),
        "num_warps": WARPS,
    }


def _three(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes along z, y and x."""
    return (1, *sizes, 1) if len(sizes) == 1 else (1,) * (3 - len(sizes)) + tuple(sizes)


def _registers(strip: int, limits: dict[int, int]) -> dict[str, int]:
    """Return the launch option that limits registers, or none where no limit is known."""
    return {"maxnreg": limits[strip]} if strip in limits and torch.version.hip is None else {}


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return features `(rows, C)` of the convolution of `x` with `weight (C, 1, *kernel)`."""
    check_kernel(weight, "weight")
    table = neighbour_table(x.layout, weight.shape[2:])
    bias = None if bias is None else bias.contiguous()
    return torch.ops.sparsecnx_triton.depthwise_conv(x.features.contiguous(), weight, bias, table, x.layout.tile)


def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: Sequence[int]) -> Tensor:
    return convolve(x, weight, bias, table, tile)[0]


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    weight, table, tile = saved.weight, saved.table, saved.tile
    kernel = weight.shape[2:]
    grads: dict[str, Tensor | None] = {}
    if "x" in saved.needs:
        # Active sites neighbour each other symmetrically: the adjoint is the flipped kernel.
        check_memory(weight=weight)
        flipped = weight.flip(*range(2, weight.ndim))
        grads["x"] = torch.ops.sparsecnx_triton.depthwise_conv(grad, flipped, None, table, tile)
    if saved.needs & {"weight", "bias"}:
        grads["weight"], grads["bias"] = torch.ops.sparsecnx_triton.depthwise_conv_weight_grad(
            grad, saved.x, table, tile, kernel
        )
    return grads


register(
    "sparsecnx_triton::depthwise_conv",
    sizes={"x": "rows C", "weight": "C 1 ...", "bias": "C"},
    function=_depthwise_conv,
    fake=lambda x, weight, bias, table, tile: torch.empty_like(x),
    saves=("x", "weight", "table", "tile"),
    backward=_backward,
    flops=flops.depthwise_conv,
)
register(
    "sparsecnx_triton::depthwise_conv_weight_grad",
    public="depthwise_conv",
    flops=flops.depthwise_conv_weight_grad,
    function=weight_grad,
    fake=lambda grad, x, table, tile, kernel: (
        x.new_empty(x.shape[1], 1, *kernel),
        x.new_empty(x.shape[1], dtype=torch.float32),
    ),
)
