"""Global Response Normalization by Triton kernels.

Sums over the rows of a group go through *staircase* partial sums. Rows are cut into blocks; block b writes, for
every group g with rows in it, one partial row at slot `b + g` of a float32 buffer `(blocks + groups, C)`. Along the
rows b and g only grow, so no two pairs share a slot, nothing is zeroed first and nothing is added atomically. The
slots of a group are consecutive and are added in that order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, channel_block, load, row_block, store
from sparsecnx.backends.triton_launch import alignment, blocks, launch, row_sizes
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.tensor import SparseTensor

BLOCK_ROWS = 64  # a float32 partial row for 64 rows of x: 1/32 of the bytes of x in 16 bits
BLOCK_CHANNELS = 64  # 128 bytes of a row in 16 bits; 32 values of a block for each thread of 4 warps
FINALISER_VALUES = 4096  # partial sums that a finaliser of one group holds at a time
FINALISER_SLOTS = 64  # slots per group, on average, above which they are summed by many programs first
ONE_SLOT_EACH = 2**31 - 1  # as block_rows: all rows in one block, so that the slot of group g is g


@triton.jit
def store_group_sums(partial, b_x, row_group, i_block, o_c, ROWS, C, BLOCK_R: tl.constexpr):
    """Store the sums of a block of values over its rows of each group at slots `block + group` of `partial`."""
    i_row = i_block * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    b_group = tl.load(row_group + i_row + o_r, mask=o_r < ROWS - i_row, other=-1)
    for i_group in range(tl.load(row_group + i_row), tl.max(b_group, axis=0) + 1):
        b_sum = tl.sum(tl.where((b_group == i_group)[:, None], b_x, 0.0), axis=0)
        store(partial + (i_block + i_group).to(tl.int64) * C + o_c, b_sum, o_c < C)


@triton.jit
def energy_kernel(
    x,  # (ROWS, C)
    row_group,  # (ROWS,) int32
    partial,  # (row blocks + groups, C) float32
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial = staircase sums of x^2."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    b_x = load(x + i_row * C + o_x, m_x)
    store_group_sums(partial, b_x * b_x, row_group, i_block, o_c, ROWS, C, BLOCK_R)


@triton.jit
def gradient_sums_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    row_group,  # (ROWS,) int32
    partial,  # (row blocks + groups, C) float32
    partial_bias,  # (row blocks, C) float32
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial = staircase sums of grad x, partial_bias = sums of grad over each block of rows."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    b_grad = load(grad + i_row * C + o_x, m_x)
    b_x = load(x + i_row * C + o_x, m_x)
    store(partial_bias + i_block.to(tl.int64) * C + o_c, tl.sum(b_grad, axis=0), o_c < C)
    store_group_sums(partial, b_grad * b_x, row_group, i_block, o_c, ROWS, C, BLOCK_R)


@triton.jit
def apply_kernel(
    x,  # (ROWS, C)
    scale,  # (groups, C) float32: s
    beta,  # (C,) float32
    row_group,  # (ROWS,) int32
    out,  # (ROWS, C)
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = x s + beta."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    b_x = load(x + i_row * C + o_x, m_x)
    b_scale = load(scale + i_group[:, None] * C + o_c[None, :], m_x)
    b_beta = load(beta + o_c, o_c < C)
    store(out + i_row * C + o_x, b_x * b_scale + b_beta[None, :], m_x)


@triton.jit
def apply_backward_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    scale,  # (groups, C) float32: s
    grad_energy,  # (groups, C) float32: dq
    row_group,  # (ROWS,) int32
    grad_x,  # (ROWS, C)
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_x = grad s + 2 x dq."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    b_grad = load(grad + i_row * C + o_x, m_x)
    b_x = load(x + i_row * C + o_x, m_x)
    b_scale = load(scale + i_group[:, None] * C + o_c[None, :], m_x)
    b_grad_energy = load(grad_energy + i_group[:, None] * C + o_c[None, :], m_x)
    store(grad_x + i_row * C + o_x, b_grad * b_scale + 2.0 * b_x * b_grad_energy, m_x)


@triton.jit
def sum_slots(
    partial,  # (row blocks + groups, C) float32
    splits,  # (groups + 1,) int64: rows of each group
    i_group,
    i_part,  # this program's share of the slots
    o_c,  # (BLOCK_C,)
    PARTS,  # in how many shares they are cut
    C,
    block_rows,
    BLOCK_S: tl.constexpr,  # slots at a time
    BLOCK_C: tl.constexpr,
):
    """Return the sum over part of the slots of a group, `(BLOCK_C,)`; 0 for a group without rows."""
    i_begin = tl.load(splits + i_group).to(tl.int32)  # Rows are numbered in 32 bits: divisions in 64 are slow.
    i_end = tl.load(splits + i_group + 1).to(tl.int32)
    i_block = i_begin // block_rows
    slots = tl.where(i_end > i_begin, (i_end - 1) // block_rows - i_block + 1, 0)
    share = tl.cdiv(slots, PARTS)
    i_last = tl.minimum((i_part + 1) * share, slots)
    o_group = (i_block + i_group).to(tl.int64) * C
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    for i_first in range(i_part * share, i_last, BLOCK_S):
        o_s = i_first + tl.arange(0, BLOCK_S)
        o_partial = o_s.to(tl.int64)[:, None] * C + o_c[None, :]
        b_sum += tl.sum(load(partial + o_group + o_partial, (o_s < i_last)[:, None] & (o_c < C)[None, :]), axis=0)
    return b_sum


@triton.jit
def sum_partials_kernel(
    partial,  # (row blocks + groups, C) float32
    splits,  # (groups + 1,) int64: rows of each group
    out,  # (groups, PARTS, C) float32
    C,
    block_rows,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = the sums over PARTS shares of the slots of each group."""
    C = aligned(C, ALIGN)
    i_share, o_c = channel_block(C, BLOCK_C)
    i_group, i_part = i_share // PARTS, i_share % PARTS
    b_sum = sum_slots(partial, splits, i_group, i_part, o_c, PARTS, C, block_rows, BLOCK_S, BLOCK_C)
    store(out + i_share.to(tl.int64) * C + o_c, b_sum, o_c < C)


@triton.jit
def response_kernel(
    partial,  # (row blocks + groups, C) float32: staircase sums of x^2
    splits,  # (groups + 1,) int64: rows of each group
    gamma,  # (C,) float32
    energy,  # (groups, C) float32: q
    scale,  # (groups, C) float32: s
    eps,
    C,
    block_rows,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """q = sum x^2, G = sqrt(q), N = G / (mean_c G + eps), s = 1 + gamma N. One program per group."""
    C = aligned(C, ALIGN)
    i_group = tl.program_id(0)
    o_group = i_group.to(tl.int64) * C
    total = 0.0
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_energy = sum_slots(partial, splits, i_group, 0, o_c, 1, C, block_rows, BLOCK_S, BLOCK_C)
        total += tl.sum(tl.sqrt(b_energy), axis=0)
        store(energy + o_group + o_c, b_energy, o_c < C)
    inverse = 1.0 / (total / C + eps)
    tl.debug_barrier()  # Threads read energies below that other threads have stored.
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_norm = tl.sqrt(load(energy + o_group + o_c, o_c < C))
        b_gamma = load(gamma + o_c, o_c < C)
        b_response = tl.where(b_norm == 0.0, 0.0, b_norm * inverse)
        store(scale + o_group + o_c, 1.0 + b_gamma * b_response, o_c < C)


@triton.jit
def response_backward_kernel(
    partial,  # (row blocks + groups, C) float32: staircase sums of ds, the gradient of the scale
    splits,  # (groups + 1,) int64: rows of each group
    energy,  # (groups, C) float32: q
    gamma,  # (C,) float32
    grad_scale,  # (groups, C) float32: ds
    grad_gamma,  # (groups, C) float32: ds N, each group's part of the gradient of gamma
    grad_energy,  # (groups, C) float32: dq
    scale,  # (groups, C) float32: s, as in forward
    eps,
    C,
    block_rows,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """dN = ds gamma, dG = dN / (M + eps) - sum_c(dN G) / (C (M + eps)^2) with M = mean_c G, dq = dG / (2 G).

    All are 0 where G = 0: at a channel that is zero everywhere, and in a group without rows. One program per group.
    """
    C = aligned(C, ALIGN)
    i_group = tl.program_id(0)
    o_group = i_group.to(tl.int64) * C
    total = 0.0
    along = 0.0
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_grad_scale = sum_slots(partial, splits, i_group, 0, o_c, 1, C, block_rows, BLOCK_S, BLOCK_C)
        b_norm = tl.sqrt(load(energy + o_group + o_c, o_c < C))
        b_gamma = load(gamma + o_c, o_c < C)
        total += tl.sum(b_norm, axis=0)
        along += tl.sum(tl.where(b_norm == 0.0, 0.0, b_grad_scale * b_gamma * b_norm), axis=0)
        store(grad_scale + o_group + o_c, b_grad_scale, o_c < C)
    inverse = 1.0 / (total / C + eps)
    through_mean = along / C * inverse * inverse
    tl.debug_barrier()  # Threads read ds below that other threads have stored.
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_grad_scale = load(grad_scale + o_group + o_c, o_c < C)
        b_norm = tl.sqrt(load(energy + o_group + o_c, o_c < C))
        b_gamma = load(gamma + o_c, o_c < C)
        m_silent = b_norm == 0.0
        b_grad_norm = b_grad_scale * b_gamma * inverse - through_mean
        b_grad_energy = b_grad_norm / (2.0 * tl.where(m_silent, 1.0, b_norm))
        b_response = tl.where(m_silent, 0.0, b_norm * inverse)
        store(grad_gamma + o_group + o_c, tl.where(m_silent, 0.0, b_grad_scale * b_norm * inverse), o_c < C)
        store(grad_energy + o_group + o_c, tl.where(m_silent, 0.0, b_grad_energy), o_c < C)
        store(scale + o_group + o_c, 1.0 + b_gamma * b_response, o_c < C)


def row_blocks(rows: int, channels: int, block_r: int, most: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, the sizes and the options of kernels that walk `(rows, C)` in blocks of `most` channels."""
    block_c = min(most, triton.next_power_of_2(channels))
    options = {**row_sizes(rows, channels, block_r, block_c), "num_warps": 4}
    return (blocks(rows, block_r) * blocks(channels, block_c),), options


def partial_sums(rows: int, groups: int, channels: int, block_rows: int, like: Tensor) -> Tensor:
    """Return an uninitialised buffer of staircase sums, float32 `(row blocks + groups, C)`, on the device of `like`."""
    return torch.empty(blocks(rows, block_rows) + groups, channels, dtype=torch.float32, device=like.device)


def sum_partials(partial: Tensor, splits: Tensor, block_rows: int) -> Tensor:
    """Return the second stage of a staircase sum, float32 `(groups, C)`, 0 for groups without rows.

    Args:
        partial: float32 `(row blocks + groups, C)`.
        splits: int64 `(groups + 1,)`, rows of each group.
        block_rows: rows of a block of the first stage.
    """
    groups, channels = splits.shape[0] - 1, partial.shape[1]
    parts = min(64, triton.next_power_of_2(blocks(_slots(partial, groups), 128)))
    out = partial.new_empty(groups, parts, channels)
    block_c = min(32, triton.next_power_of_2(channels))
    launch(
        sum_partials_kernel,
        (groups * parts * blocks(channels, block_c),),
        partial=partial,
        splits=splits,
        out=out,
        C=channels,
        block_rows=block_rows,
        PARTS=parts,
        BLOCK_S=64,
        BLOCK_C=block_c,
        ALIGN=alignment(channels),
    )
    return out.view(groups, channels) if parts == 1 else out.sum(1)


def response(partial: Tensor, splits: Tensor, block_rows: int, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the statistics of GRN from staircase sums of squares.

    Args:
        partial: float32 `(row blocks + groups, C)`.
        splits: int64 `(groups + 1,)`, rows of each group.
        block_rows: rows of a block of the first stage.
        gamma: float32 `(C,)`.
        eps: added to the mean over channels.

    Returns:
        energy: float32 `(groups, C)`, sums of squares, 0 for groups without rows.
        scale: float32 `(groups, C)`, `1 + gamma * N`.
    """
    groups, channels = splits.shape[0] - 1, partial.shape[1]
    energy, scale = partial.new_empty(groups, channels), partial.new_empty(groups, channels)
    tensors = {"splits": splits, "gamma": gamma, "energy": energy, "scale": scale}
    launch(response_kernel, (groups,), **tensors, eps=eps, **_finaliser(partial, splits, block_rows))
    return energy, scale


def response_backward(
    partial: Tensor, splits: Tensor, block_rows: int, energy: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `response` from staircase sums of the gradient of the scale, ds.

    Args:
        partial: float32 `(row blocks + groups, C)`; other arguments as `response`.
        energy: float32 `(groups, C)`, as `response` returned it.

    Returns:
        grad_gamma: float32 `(C,)`, sum over the groups of ds N.
        grad_energy: float32 `(groups, C)`, 0 where the energy is 0.
        scale: float32 `(groups, C)`, as `response` returned it.
    """
    grad_scale, grad_gamma, grad_energy, scale = (torch.empty_like(energy) for _ in range(4))
    launch(
        response_backward_kernel,
        (energy.shape[0],),
        splits=splits,
        energy=energy,
        gamma=gamma,
        grad_scale=grad_scale,
        grad_gamma=grad_gamma,
        grad_energy=grad_energy,
        scale=scale,
        eps=eps,
        **_finaliser(partial, splits, block_rows),
    )
    return grad_gamma.sum(0), grad_energy, scale


def _slots(partial: Tensor, groups: int) -> int:
    """Return the number of slots per group, on average and at least one."""
    return blocks(partial.shape[0], max(groups, 1))


def _finaliser(partial: Tensor, splits: Tensor, block_rows: int) -> dict[str, Any]:
    """Return the partial sums for a kernel with one program per group, and its sizes and options.

    More slots than such a program adds quickly are summed before.
    """
    groups, channels = splits.shape[0] - 1, partial.shape[1]
    if _slots(partial, groups) > FINALISER_SLOTS:
        partial, block_rows = sum_partials(partial, splits, block_rows), ONE_SLOT_EACH
    block_c = min(triton.next_power_of_2(channels), FINALISER_VALUES)
    block_s = min(triton.next_power_of_2(_slots(partial, groups)), FINALISER_VALUES // block_c)
    return {
        "partial": partial,
        "C": channels,
        "block_rows": block_rows,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "ALIGN": alignment(channels),
        "num_warps": max(1, block_s * block_c // 512),
        "maxnreg": 128,  # Without a bound ptxas aims for fewer registers than the kernel needs and spills one.
    }


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str, eps: float) -> Tensor:
    """Return features `(rows, C)`; `gamma`, `beta` of C elements."""
    groups = row_groups(x.layout, scope), group_splits(x.layout, scope)
    out, _ = torch.ops.sparsecnx_triton.grn(x.features.contiguous(), gamma.flatten(), beta.flatten(), *groups, eps)
    return out


def _grn(
    x: Tensor, gamma: Tensor, beta: Tensor, row_group: Tensor, splits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return features `(rows, C)`, and the energy of every group and channel, `(groups, C)`."""
    grid, options = row_blocks(x.shape[0], x.shape[1], BLOCK_ROWS, BLOCK_CHANNELS)
    partial, out = partial_sums(x.shape[0], splits.shape[0] - 1, x.shape[1], BLOCK_ROWS, x), torch.empty_like(x)
    launch(energy_kernel, grid, x=x, row_group=row_group, partial=partial, **options)
    energy, scale = response(partial, splits, BLOCK_ROWS, gamma, eps)
    launch(apply_kernel, grid, x=x, scale=scale, beta=beta, row_group=row_group, out=out, **options)
    return out, energy


def _grn_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, row_group: Tensor, splits: Tensor, energy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gamma and beta."""
    (rows, channels), groups = x.shape, splits.shape[0] - 1
    grid, options = row_blocks(rows, channels, BLOCK_ROWS, BLOCK_CHANNELS)
    inputs = {"grad": grad, "x": x, "row_group": row_group}
    partial = partial_sums(rows, groups, channels, BLOCK_ROWS, x)
    partial_bias = partial_sums(rows, 0, channels, BLOCK_ROWS, x)
    launch(gradient_sums_kernel, grid, **inputs, partial=partial, partial_bias=partial_bias, **options)
    grad_gamma, grad_energy, scale = response_backward(partial, splits, BLOCK_ROWS, energy, gamma, eps)
    grad_x = torch.empty_like(x)
    launch(apply_backward_kernel, grid, **inputs, scale=scale, grad_energy=grad_energy, grad_x=grad_x, **options)
    return grad_x, grad_gamma, partial_bias.sum(0)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads = torch.ops.sparsecnx_triton.grn_backward(
        grad, saved.x, saved.gamma, saved.row_group, saved.splits, *saved.outputs, saved.eps
    )
    return dict(zip(("x", "gamma", "beta"), grads, strict=True))


register(
    "sparsecnx_triton::grn",
    sizes={"x": "rows C", "gamma": "C", "beta": "C"},
    function=_grn,
    fake=lambda x, gamma, beta, row_group, splits, eps: (
        torch.empty_like(x),
        gamma.new_empty(splits.shape[0] - 1, x.shape[1]),
    ),
    saves=("x", "gamma", "row_group", "splits", "eps"),
    backward=_backward,
)
register(
    "sparsecnx_triton::grn_backward",
    public="grn",
    function=_grn_backward,
    fake=lambda grad, x, gamma, row_group, splits, energy, eps: (
        torch.empty_like(x),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
    ),
)
