"""Global Response Normalization by Triton kernels.

Sums over the rows of a group go through *staircase* partial sums. Rows are cut into blocks; block b writes, for
every group g with rows in it, one partial row at slot `b + g` of a float32 buffer `(blocks + groups, C)`. Along the
rows b and g only grow, so no two pairs share a slot, nothing is zeroed first and nothing is added atomically. The
slots of a group are consecutive and are added in that order: the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import rounded
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.tensor import SparseTensor

BLOCK_ROWS = 64  # a float32 partial row for 64 rows of x: 1/32 of the bytes of x in 16 bits
BLOCK_CHANNELS = 64  # 128 bytes of a row in 16 bits; 32 values of a block for each thread of 4 warps
FINALISER_VALUES = 4096  # partial sums that a finaliser of one group holds at a time
FINALISER_SLOTS = 64  # slots per group, on average, above which they are summed by many programs first
ONE_SLOT_EACH = 2**31 - 1  # as block_rows: all rows in one block, so that the slot of group g is g


@triton.jit
def energy_kernel(
    x_ptr,  # (rows, C)
    row_group_ptr,  # int32 (rows,)
    partial_ptr,  # float32 (blocks + groups, C), out: staircase sums of x^2
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    channels = C // ALIGN * ALIGN
    row_block = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = row_block * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    x = tl.load(x_ptr + row0.to(tl.int64) * channels + (r[:, None] * channels + c[None, :]), inside, 0.0)
    x = x.to(tl.float32)
    square = x * x
    row_group = tl.load(row_group_ptr + row0 + r, known, -1)
    first = tl.load(row_group_ptr + row0)
    last = tl.load(row_group_ptr + tl.minimum(row0 + BLOCK_ROWS, rows) - 1)
    for group in range(first, last + 1):
        partial = tl.sum(tl.where((row_group == group)[:, None], square, 0.0), axis=0)
        tl.store(partial_ptr + (row_block + group).to(tl.int64) * channels + c, partial, c < channels)


@triton.jit
def gradient_sums_kernel(
    grad_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    row_group_ptr,  # int32 (rows,)
    partial_ptr,  # float32 (blocks + groups, C), out: staircase sums of grad * x
    bias_partial_ptr,  # float32 (blocks, C), out: sums of grad over each block
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    row_block = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = row_block * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    grad = tl.load(grad_ptr + base + offset, inside, 0.0).to(tl.float32)
    x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
    tl.store(bias_partial_ptr + row_block.to(tl.int64) * channels + c, tl.sum(grad, axis=0), c < channels)
    product = grad * x
    row_group = tl.load(row_group_ptr + row0 + r, known, -1)
    first = tl.load(row_group_ptr + row0)
    last = tl.load(row_group_ptr + tl.minimum(row0 + BLOCK_ROWS, rows) - 1)
    for group in range(first, last + 1):
        partial = tl.sum(tl.where((row_group == group)[:, None], product, 0.0), axis=0)
        tl.store(partial_ptr + (row_block + group).to(tl.int64) * channels + c, partial, c < channels)


@triton.jit
def apply_kernel(
    x_ptr,  # (rows, C)
    scale_ptr,  # float32 (groups, C)
    beta_ptr,  # float32 (C,)
    row_group_ptr,  # int32 (rows,)
    out_ptr,  # (rows, C), out: x * scale + beta
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = tl.program_id(0) // tl.cdiv(channels, BLOCK_C) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    group = tl.load(row_group_ptr + row0 + r, known, 0).to(tl.int64)
    x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + group[:, None] * channels + c[None, :], inside, 0.0)
    beta = tl.load(beta_ptr + c, c < channels, 0.0)
    out = x * scale + beta[None, :]
    tl.store(out_ptr + base + offset, rounded(out, out_ptr.dtype.element_ty), inside)


@triton.jit
def apply_backward_kernel(
    grad_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    scale_ptr,  # float32 (groups, C)
    grad_energy_ptr,  # float32 (groups, C)
    row_group_ptr,  # int32 (rows,)
    grad_x_ptr,  # (rows, C), out: grad * scale + 2 * x * grad_energy
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = tl.program_id(0) // tl.cdiv(channels, BLOCK_C) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    group = tl.load(row_group_ptr + row0 + r, known, 0).to(tl.int64)
    grad = tl.load(grad_ptr + base + offset, inside, 0.0).to(tl.float32)
    x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + group[:, None] * channels + c[None, :], inside, 0.0)
    grad_energy = tl.load(grad_energy_ptr + group[:, None] * channels + c[None, :], inside, 0.0)
    grad_x = grad * scale + 2.0 * x * grad_energy
    tl.store(grad_x_ptr + base + offset, rounded(grad_x, grad_x_ptr.dtype.element_ty), inside)


@triton.jit
def sum_slots(
    partial_ptr,  # float32 (blocks + groups, channels)
    splits_ptr,  # int64 (groups + 1,): rows of each group
    group,
    part,  # this program's share of the slots
    parts,  # in how many shares they are cut
    c,  # (BLOCK_C,) channels
    channels,
    block_rows,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over part of the slots of a group, `(BLOCK_C,)`; 0 for a group without rows."""
    begin = tl.load(splits_ptr + group).to(tl.int32)  # rows are numbered in 32 bits: divisions in 64 are slow
    end = tl.load(splits_ptr + group + 1).to(tl.int32)
    first = begin // block_rows
    slots = tl.where(end > begin, (end - 1) // block_rows - first + 1, 0)
    share = tl.cdiv(slots, parts)
    base = (first + group).to(tl.int64) * channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    for slot0 in range(part * share, tl.minimum((part + 1) * share, slots), SLOTS):
        slot = slot0 + tl.arange(0, SLOTS)
        taken = (slot < tl.minimum((part + 1) * share, slots))[:, None] & (c < channels)[None, :]
        at = slot.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.sum(tl.load(partial_ptr + base + at, taken, 0.0), axis=0)
    return total


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # float32 (blocks + groups, C)
    splits_ptr,  # int64 (groups + 1,)
    out_ptr,  # float32 (groups, PARTS, C), out
    C,
    block_rows,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    channels = C // ALIGN * ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    share = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    total = sum_slots(
        partial_ptr, splits_ptr, share // PARTS, share % PARTS, PARTS, c, channels, block_rows, SLOTS, BLOCK_C
    )
    tl.store(out_ptr + share.to(tl.int64) * channels + c, total, c < channels)


@triton.jit
def response_kernel(
    partial_ptr,  # float32 (blocks + groups, C): staircase sums of x^2
    splits_ptr,  # int64 (groups + 1,)
    gamma_ptr,  # float32 (C,)
    energy_ptr,  # float32 (groups, C), out: q
    scale_ptr,  # float32 (groups, C), out: 1 + gamma N
    C,
    block_rows,
    eps,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """G = sqrt(q), N = G / (mean_c G + eps). One program per group."""
    channels = C // ALIGN * ALIGN
    group = tl.program_id(0)
    base = group.to(tl.int64) * channels
    total = 0.0
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        energy = sum_slots(partial_ptr, splits_ptr, group, 0, 1, c, channels, block_rows, SLOTS, BLOCK_C)
        total += tl.sum(tl.sqrt(energy), axis=0)
        tl.store(energy_ptr + base + c, energy, c < channels)
    inverse = 1.0 / (total / channels + eps)
    tl.debug_barrier()  # the energies are read back, by other threads perhaps
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        norm = tl.sqrt(tl.load(energy_ptr + base + c, c < channels, 0.0))
        gamma = tl.load(gamma_ptr + c, c < channels, 0.0)
        response = tl.where(norm == 0.0, 0.0, norm * inverse)
        tl.store(scale_ptr + base + c, 1.0 + gamma * response, c < channels)


@triton.jit
def response_backward_kernel(
    partial_ptr,  # float32 (blocks + groups, C): staircase sums of ds, the gradient of the scale
    splits_ptr,  # int64 (groups + 1,)
    energy_ptr,  # float32 (groups, C): q
    gamma_ptr,  # float32 (C,)
    grad_scale_ptr,  # float32 (groups, C), out: ds
    grad_gamma_ptr,  # float32 (groups, C), out: ds N, each group's part of the gradient of gamma
    grad_energy_ptr,  # float32 (groups, C), out: dq
    scale_ptr,  # float32 (groups, C), out: 1 + gamma N, as in forward
    C,
    block_rows,
    eps,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dN = ds gamma, dG = dN / (M + eps) - sum_c(dN G) / (C (M + eps)^2) with M = mean_c G, dq = dG / (2 G), all 0
    where G = 0: at a channel that is zero everywhere, and in a group without rows. One program per group."""
    channels = C // ALIGN * ALIGN
    group = tl.program_id(0)
    base = group.to(tl.int64) * channels
    total = 0.0
    dot = 0.0
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        grad_scale = sum_slots(partial_ptr, splits_ptr, group, 0, 1, c, channels, block_rows, SLOTS, BLOCK_C)
        norm = tl.sqrt(tl.load(energy_ptr + base + c, c < channels, 0.0))
        gamma = tl.load(gamma_ptr + c, c < channels, 0.0)
        total += tl.sum(norm, axis=0)
        dot += tl.sum(tl.where(norm == 0.0, 0.0, grad_scale * gamma * norm), axis=0)
        tl.store(grad_scale_ptr + base + c, grad_scale, c < channels)
    inverse = 1.0 / (total / channels + eps)
    through_mean = dot / channels * inverse * inverse
    tl.debug_barrier()  # ds is read back, by other threads perhaps
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        grad_scale = tl.load(grad_scale_ptr + base + c, c < channels, 0.0)
        norm = tl.sqrt(tl.load(energy_ptr + base + c, c < channels, 0.0))
        gamma = tl.load(gamma_ptr + c, c < channels, 0.0)
        silent = norm == 0.0
        grad_norm = grad_scale * gamma * inverse - through_mean
        grad_energy = grad_norm / (2.0 * tl.where(silent, 1.0, norm))
        tl.store(grad_gamma_ptr + base + c, tl.where(silent, 0.0, grad_scale * norm * inverse), c < channels)
        tl.store(grad_energy_ptr + base + c, tl.where(silent, 0.0, grad_energy), c < channels)
        tl.store(scale_ptr + base + c, 1.0 + gamma * tl.where(silent, 0.0, norm * inverse), c < channels)


def partial_sums(rows: int, groups: int, channels: int, block_rows: int, like: Tensor) -> Tensor:
    """Uninitialised buffer of staircase sums, float32 `(blocks + groups, C)`, on the device of `like`."""
    shape = triton_launch.blocks(rows, block_rows) + groups, channels
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def sum_partials(partial: Tensor, splits: Tensor, block_rows: int) -> Tensor:
    """Second stage of a staircase sum.

    Args:
        partial: float32 `(blocks + groups, C)`.
        splits: int64 `(groups + 1,)`, rows of each group.
        block_rows: rows of a block of the first stage.

    Returns:
        float32 `(groups, C)`, 0 for groups without rows.
    """
    groups, channels = splits.shape[0] - 1, partial.shape[1]
    parts = min(64, triton.next_power_of_2(triton_launch.blocks(_slots(partial, groups), 128)))
    out = partial.new_empty(groups, parts, channels)
    block_c = min(32, triton.next_power_of_2(channels))
    triton_launch.launch(
        sum_partials_kernel,
        (groups * parts * triton_launch.blocks(channels, block_c),),
        partial,
        splits,
        out,
        channels,
        block_rows,
        PARTS=parts,
        SLOTS=64,
        BLOCK_C=block_c,
        ALIGN=math.gcd(channels, 16),
    )
    return out.view(groups, channels) if parts == 1 else out.sum(1)


def response(partial: Tensor, splits: Tensor, block_rows: int, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics of GRN from staircase sums of squares.

    Args:
        partial: float32 `(blocks + groups, C)`.
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
    partial, block_rows = _few_slots(partial, splits, block_rows)
    options = _finaliser(_slots(partial, groups), channels)
    triton_launch.launch(
        response_kernel, (groups,), partial, splits, gamma, energy, scale, channels, block_rows, eps, **options
    )
    return energy, scale


def response_backward(
    partial: Tensor, splits: Tensor, block_rows: int, energy: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `response` from staircase sums of the gradient of the scale, ds.

    Args:
        partial: float32 `(blocks + groups, C)`; other arguments as `response`.
        energy: float32 `(groups, C)`, as `response` returned it.

    Returns:
        grad_gamma: float32 `(C,)`, sum over the groups of ds N.
        grad_energy: float32 `(groups, C)`, 0 where the energy is 0.
        scale: float32 `(groups, C)`, as `response` returned it.
    """
    groups, channels = energy.shape
    grad_scale, grad_gamma, grad_energy, scale = (torch.empty_like(energy) for _ in range(4))
    partial, block_rows = _few_slots(partial, splits, block_rows)
    options = _finaliser(_slots(partial, groups), channels)
    triton_launch.launch(
        response_backward_kernel,
        (groups,),
        partial,
        splits,
        energy,
        gamma,
        grad_scale,
        grad_gamma,
        grad_energy,
        scale,
        channels,
        block_rows,
        eps,
        **options,
    )
    return grad_gamma.sum(0), grad_energy, scale


def _slots(partial: Tensor, groups: int) -> int:
    """Slots per group, on average and at least one."""
    return triton_launch.blocks(partial.shape[0], max(groups, 1))


def _few_slots(partial: Tensor, splits: Tensor, block_rows: int) -> tuple[Tensor, int]:
    """The same sums in no more slots than one program per group adds quickly, and their `block_rows`."""
    if _slots(partial, splits.shape[0] - 1) <= FINALISER_SLOTS:
        return partial, block_rows
    return sum_partials(partial, splits, block_rows), ONE_SLOT_EACH


def _finaliser(slots: int, channels: int) -> dict[str, int]:
    """Options of the kernels with one program per group."""
    block_c = min(triton.next_power_of_2(channels), FINALISER_VALUES)
    at_once = min(triton.next_power_of_2(slots), FINALISER_VALUES // block_c)
    warps = max(1, at_once * block_c // 512)
    # Without a bound ptxas spills a register to get along with a few less than it needs.
    return {
        "SLOTS": at_once,
        "BLOCK_C": block_c,
        "ALIGN": math.gcd(channels, 16),
        "num_warps": warps,
        "maxnreg": 128,
    }


def _row_blocks(rows: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the kernels that walk `(rows, C)` in blocks."""
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    grid = (triton_launch.blocks(rows, BLOCK_ROWS) * triton_launch.blocks(channels, block_c),)
    return grid, {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_C": block_c, "ALIGN": math.gcd(channels, 16), "num_warps": 4}


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str, eps: float) -> Tensor:
    """Return features `(rows, C)`; `gamma`, `beta` `(C,)`."""
    groups, splits = row_groups(x.layout, scope), group_splits(x.layout, scope)
    out, _ = grn_forward(x.features.contiguous(), gamma, beta, groups, splits, eps)
    return out


@torch.library.custom_op("sparsecnx_triton::grn", mutates_args=())
def grn_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, row_group: Tensor, splits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return features `(rows, C)`, and the energy of every group and channel, `(groups, C)`."""
    (rows, channels), groups = x.shape, splits.shape[0] - 1
    grid, options = _row_blocks(rows, channels)
    partial = partial_sums(rows, groups, channels, BLOCK_ROWS, x)
    triton_launch.launch(energy_kernel, grid, x, row_group, partial, rows, channels, **options)
    energy, scale = response(partial, splits, BLOCK_ROWS, gamma, eps)
    out = torch.empty_like(x)
    triton_launch.launch(apply_kernel, grid, x, scale, beta, row_group, out, rows, channels, **options)
    return out, energy


@grn_forward.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor, row_group: Tensor, splits: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), gamma.new_empty(splits.shape[0] - 1, x.shape[1])


@torch.library.custom_op("sparsecnx_triton::grn_backward", mutates_args=())
def grn_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    row_group: Tensor,
    splits: Tensor,
    energy: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta."""
    (rows, channels), groups = x.shape, splits.shape[0] - 1
    grid, options = _row_blocks(rows, channels)
    partial = partial_sums(rows, groups, channels, BLOCK_ROWS, x)
    bias_partial = partial_sums(rows, 0, channels, BLOCK_ROWS, x)
    triton_launch.launch(
        gradient_sums_kernel, grid, grad, x, row_group, partial, bias_partial, rows, channels, **options
    )
    grad_gamma, grad_energy, scale = response_backward(partial, splits, BLOCK_ROWS, energy, gamma, eps)
    grad_x = torch.empty_like(x)
    triton_launch.launch(
        apply_backward_kernel, grid, grad, x, scale, grad_energy, row_group, grad_x, rows, channels, **options
    )
    return grad_x, grad_gamma, bias_partial.sum(0)


@grn_backward.register_fake
def _(grad: Tensor, x: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, _, row_group, splits, eps = inputs
    _, energy = output
    ctx.mark_non_differentiable(energy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, row_group, splits, energy)
    ctx.eps = eps


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grads = grn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return *grads, None, None, None


grn_forward.register_autograd(_backward, setup_context=_setup_context)
