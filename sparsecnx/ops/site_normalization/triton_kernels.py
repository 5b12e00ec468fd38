"""Batch, group and instance normalization by Triton kernels.

Sums over the rows of a segment go through staircase partial sums, see `global_response_norm.triton_kernels`. Moments do
likewise: a block of rows leaves the mean and the sum of squared deviations of each segment that it contains, which are
merged in a fixed order, so that nothing is lost where the mean is far from 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import (
    aligned,
    channel_block,
    gelu_and_slope,
    load,
    row_block,
    store,
)
from sparsecnx.backends.triton_launch import alignment, blocks, launch
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.ops.global_response_norm.triton_kernels import partial_sums, row_blocks, store_group_sums, sum_partials
from sparsecnx.ops.site_normalization.activations import NUMBERS, PUBLIC
from sparsecnx.tensor import SparseTensor

BLOCK_ROWS = 128  # two float32 partial rows for 128 rows of x: 1/32 of the bytes of x in 16 bits
BLOCK_CHANNELS = 32  # 64 bytes of a row in 16 bits; 32 values of a block for each thread of 4 warps
MOST_SLOTS = 64  # whose moments a program merges at a time

NONE = tl.constexpr(NUMBERS["none"])
RELU = tl.constexpr(NUMBERS["relu"])
RELU6 = tl.constexpr(NUMBERS["relu6"])
LEAKY_RELU = tl.constexpr(NUMBERS["leaky_relu"])
SILU = tl.constexpr(NUMBERS["silu"])
HARDSWISH = tl.constexpr(NUMBERS["hardswish"])


@triton.jit
def activated(b_z, slope, ACTIVATION: tl.constexpr):
    """Return an activation and its derivative at z, as torch defines them. A NaN stays one."""
    if ACTIVATION == NONE:
        b_value = b_z
        b_slope = tl.full(b_z.shape, 1.0, tl.float32)
    elif ACTIVATION == RELU:
        b_value = tl.where(b_z < 0.0, 0.0, b_z)
        b_slope = tl.where(b_z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == RELU6:
        b_value = tl.where(b_z < 0.0, 0.0, tl.where(b_z > 6.0, 6.0, b_z))
        b_slope = tl.where((b_z <= 0.0) | (b_z >= 6.0), 0.0, 1.0)
    elif ACTIVATION == LEAKY_RELU:
        b_slope = tl.where(b_z > 0.0, 1.0, slope)
        b_value = b_z * b_slope
    elif ACTIVATION == SILU:
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
        b_value = b_z * b_sigmoid
        b_slope = b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    elif ACTIVATION == HARDSWISH:
        b_value = tl.where(b_z <= -3.0, 0.0, tl.where(b_z >= 3.0, b_z, b_z * (b_z + 3.0) / 6.0))
        b_slope = tl.where(b_z <= -3.0, 0.0, tl.where(b_z >= 3.0, 1.0, b_z / 3.0 + 0.5))
    else:
        b_value, b_slope = gelu_and_slope(b_z)
    return b_value, b_slope


@triton.jit
def add_bias(b_x, bias, o_c, C):
    """Return x + bias, or x without one."""
    if bias is not None:
        b_x += load(bias + o_c, o_c < C)[None, :]
    return b_x


@triton.jit
def column_moments_kernel(
    x,  # (ROWS, C)
    row_group,  # (ROWS,) int32: segment of each row
    partial_mean,  # (row blocks + segments, C) float32
    partial_square,  # (row blocks + segments, C) float32
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """partial_mean, partial_square = mean of x and sum of (x - mean)^2 over the rows of a block in each segment."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    b_x = load(x + i_row * C + o_x, m_x)
    b_group = tl.load(row_group + i_row + o_r, mask=m_r, other=-1)
    for i_group in range(tl.load(row_group + i_row), tl.max(b_group, axis=0) + 1):
        m_group = b_group == i_group
        # A segment without rows lies between two that have some: 1 for its count keeps its slot finite.
        count = tl.maximum(tl.sum(m_group.to(tl.float32), axis=0), 1.0)
        b_mean = tl.sum(tl.where(m_group[:, None], b_x, 0.0), axis=0) / count
        b_centred = tl.where(m_group[:, None], b_x - b_mean[None, :], 0.0)
        o_partial = (i_block + i_group).to(tl.int64) * C + o_c
        # The rounding error of the mean is that of its square times the count, which the sum of deviations corrects.
        b_mean += tl.sum(b_centred, axis=0) / count
        store(partial_mean + o_partial, b_mean, o_c < C)
        store(partial_square + o_partial, tl.sum(b_centred * b_centred, axis=0), o_c < C)


@triton.jit
def load_slots(
    partial_mean, partial_square, i_begin, i_end, i_group, i_first, o_c, C, block_rows, BLOCK_S: tl.constexpr
):
    """Return the counts of rows (BLOCK_S,), means and squares (BLOCK_S, BLOCK_C) of slots of a segment, 0 beyond."""
    i_block = i_begin // block_rows + i_first + tl.arange(0, BLOCK_S)
    b_first = tl.maximum(i_block * block_rows, i_begin)
    b_count = tl.maximum(tl.minimum((i_block + 1) * block_rows, i_end) - b_first, 0)
    o_partial = (i_block + i_group).to(tl.int64)[:, None] * C + o_c[None, :]
    m_partial = (b_count > 0)[:, None] & (o_c < C)[None, :]
    return (
        b_count.to(tl.float32),
        load(partial_mean + o_partial, m_partial),
        load(partial_square + o_partial, m_partial),
    )


@triton.jit
def merge_moments_kernel(
    partial_mean,  # (row blocks + segments, C) float32
    partial_square,  # (row blocks + segments, C) float32
    splits,  # (segments + 1,) int64: rows of each segment
    mean,  # (segments, C) float32
    variance,  # (segments, C) float32
    C,
    block_rows,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """mean and variance = those over all rows of a segment, 0 without any (Chan, Golub and LeVeque)."""
    C = aligned(C, ALIGN)
    i_group, o_c = channel_block(C, BLOCK_C)
    i_begin = tl.load(splits + i_group).to(tl.int32)
    i_end = tl.load(splits + i_group + 1).to(tl.int32)
    slots = tl.where(i_end > i_begin, (i_end - 1) // block_rows - i_begin // block_rows + 1, 0)
    rows = tl.maximum(i_end - i_begin, 1).to(tl.float32)
    o_first = (i_begin // block_rows + i_group).to(tl.int64) * C + o_c
    b_near = load(partial_mean + o_first, (o_c < C) & (slots > 0))
    b_mean = tl.zeros((BLOCK_C,), tl.float32)
    for i_first in range(0, slots, BLOCK_S):
        b_count, b_part, _ = load_slots(
            partial_mean, partial_square, i_begin, i_end, i_group, i_first, o_c, C, block_rows, BLOCK_S
        )
        b_mean += tl.sum((b_part - b_near[None, :]) * b_count[:, None], axis=0)
    b_mean = b_near + b_mean / rows
    b_square = tl.zeros((BLOCK_C,), tl.float32)
    for i_first in range(0, slots, BLOCK_S):
        b_count, b_part, b_squares = load_slots(
            partial_mean, partial_square, i_begin, i_end, i_group, i_first, o_c, C, block_rows, BLOCK_S
        )
        b_step = b_part - b_mean[None, :]
        b_square += tl.sum(b_squares + b_step * b_step * b_count[:, None], axis=0)
    o_out = i_group.to(tl.int64) * C + o_c
    store(mean + o_out, b_mean, o_c < C)
    store(variance + o_out, b_square / rows, o_c < C)


@triton.jit
def site_norm_kernel(
    x,  # (ROWS, C)
    mean,  # (segments, C) float32
    scale,  # (segments, C) float32
    bias,  # (C,) float32, or None
    row_group,  # (ROWS,) int32: segment of each row
    out,  # (ROWS, C)
    slope,
    ROWS,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = activation(z) with z = (x - mean) scale + bias."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    o_group = i_group[:, None] * C + o_c[None, :]
    b_z = (load(x + i_row * C + o_x, m_x) - load(mean + o_group, m_x)) * load(scale + o_group, m_x)
    b_out, _ = activated(add_bias(b_z, bias, o_c, C), slope, ACTIVATION)
    store(out + i_row * C + o_x, b_out, m_x)


@triton.jit
def site_norm_sums_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    mean,  # (segments, C) float32
    scale,  # (segments, C) float32
    bias,  # (C,) float32, or None
    row_group,  # (ROWS,) int32: segment of each row
    partial_dot,  # (row blocks + segments, C) float32
    partial_total,  # (row blocks + segments, C) float32
    slope,
    ROWS,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """With g = grad activation'(z): staircase sums of g (x - mean) and of g."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    o_group = i_group[:, None] * C + o_c[None, :]
    b_centred = load(x + i_row * C + o_x, m_x) - load(mean + o_group, m_x)
    _, b_slope = activated(add_bias(b_centred * load(scale + o_group, m_x), bias, o_c, C), slope, ACTIVATION)
    b_grad = load(grad + i_row * C + o_x, m_x) * b_slope
    b_dot = b_grad * b_centred
    store_group_sums(partial_dot, b_dot, row_group, i_block, o_c, ROWS, C, BLOCK_R)
    store_group_sums(partial_total, b_grad, row_group, i_block, o_c, ROWS, C, BLOCK_R)


@triton.jit
def site_norm_grad_kernel(
    grad,  # (ROWS, C)
    x,  # (ROWS, C)
    mean,  # (segments, C) float32
    scale,  # (segments, C) float32
    bias,  # (C,) float32, or None
    along,  # (segments, C) float32
    constant,  # (segments, C) float32
    row_group,  # (ROWS,) int32: segment of each row
    grad_x,  # (ROWS, C)
    slope,
    ROWS,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """grad_x = grad activation'(z) scale + (x - mean) along + constant."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    i_group = tl.load(row_group + i_row + o_r, mask=m_r, other=0).to(tl.int64)
    o_group = i_group[:, None] * C + o_c[None, :]
    b_centred = load(x + i_row * C + o_x, m_x) - load(mean + o_group, m_x)
    b_scale = load(scale + o_group, m_x)
    _, b_slope = activated(add_bias(b_centred * b_scale, bias, o_c, C), slope, ACTIVATION)
    b_grad = load(grad + i_row * C + o_x, m_x) * b_slope * b_scale
    b_grad += b_centred * load(along + o_group, m_x) + load(constant + o_group, m_x)
    store(grad_x + i_row * C + o_x, b_grad, m_x)


def moments(x: Tensor, row_group: Tensor, splits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel over the rows of each segment, float32 `(segments, C)`.

    Args:
        x: `(rows, C)`.
        row_group: int32 `(rows,)`, the segment of each row.
        splits: int64 `(segments + 1,)`, the rows of each segment.
    """
    (rows, channels), segments = x.shape, splits.shape[0] - 1
    grid, options = row_blocks(rows, channels, BLOCK_ROWS, BLOCK_CHANNELS)
    partial_mean, partial_square = (partial_sums(rows, segments, channels, BLOCK_ROWS, x) for _ in range(2))
    partial = {"partial_mean": partial_mean, "partial_square": partial_square}
    launch(column_moments_kernel, grid, x=x, row_group=row_group, **partial, **options)
    mean, variance = (partial_mean.new_empty(segments, channels) for _ in range(2))
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    launch(
        merge_moments_kernel,
        (segments * blocks(channels, block_c),),
        **partial,
        splits=splits,
        mean=mean,
        variance=variance,
        C=channels,
        block_rows=BLOCK_ROWS,
        BLOCK_S=min(MOST_SLOTS, triton.next_power_of_2(blocks(rows, BLOCK_ROWS) + 1)),
        BLOCK_C=block_c,
        ALIGN=alignment(channels),
        num_warps=4,
    )
    return mean, variance


def _affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, channels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, scale and 1 / sqrt(variance + eps), `(segments, C)`, from moments `(segments, groups)`."""
    width = channels // mean.shape[1]
    rstd = (variance + eps).rsqrt()
    if width > 1:
        mean, rstd = mean.repeat_interleave(width, 1), rstd.repeat_interleave(width, 1)
    scale = rstd if weight is None else rstd * weight
    return mean.contiguous(), scale.contiguous(), rstd


def _site_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_group: Tensor,
    splits: Tensor,
    groups: int,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features `(rows, C)`, and the mean and the biased variance `(segments, groups)`."""
    channels = x.shape[1]
    mean, variance = moments(x, row_group, splits)
    if groups < channels:
        means, variances = mean.unflatten(1, (groups, -1)), variance.unflatten(1, (groups, -1))
        mean = means.mean(2)
        variance = (variances + (means - mean[..., None]).square()).mean(2)
    by_row, scale, _ = _affine(mean, variance, weight, channels, eps)
    out = torch.empty_like(x)
    grid, options = row_blocks(x.shape[0], x.shape[1], BLOCK_ROWS, BLOCK_CHANNELS)
    tensors = {"x": x, "mean": by_row, "scale": scale, "bias": bias, "row_group": row_group, "out": out}
    launch(site_norm_kernel, grid, **tensors, slope=slope, ACTIVATION=activation, **options)
    return out, mean, variance


def _site_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    row_group: Tensor,
    splits: Tensor,
    groups: int,
    eps: float,
    activation: int,
    slope: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    (rows, channels), segments = x.shape, splits.shape[0] - 1
    mean, scale, rstd = _affine(mean, variance, weight, channels, eps)
    grid, options = row_blocks(rows, channels, BLOCK_ROWS, BLOCK_CHANNELS)
    inputs = {"grad": grad, "x": x, "mean": mean, "scale": scale, "bias": bias, "row_group": row_group}
    numbers = {"slope": slope, "ACTIVATION": activation, **options}
    partial_dot, partial_total = (partial_sums(rows, segments, channels, BLOCK_ROWS, x) for _ in range(2))
    launch(site_norm_sums_kernel, grid, **inputs, partial_dot=partial_dot, partial_total=partial_total, **numbers)
    dot = sum_partials(partial_dot, splits, BLOCK_ROWS) * rstd
    total = sum_partials(partial_total, splits, BLOCK_ROWS)
    grad_x = x.new_empty(rows if needs_x else 0, channels)
    if needs_x:
        width = channels // groups
        size = (splits.diff()[:, None] * width).clamp(min=1)

        def average(value: Tensor) -> Tensor:
            weighted = value if weight is None else value * weight
            return (weighted.unflatten(1, (groups, -1)).sum(2) / size).repeat_interleave(width, 1)

        tensors = {"along": -rstd * rstd * average(dot), "constant": -rstd * average(total), "grad_x": grad_x}
        launch(site_norm_grad_kernel, grid, **inputs, **tensors, **numbers)
    return grad_x, dot.sum(0), total.sum(0)


def site_norm(
    x: SparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scope: str,
    groups: int,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features `(rows, C)`, and the mean and the biased variance `(segments, groups)`."""
    segments = row_groups(x.layout, scope), group_splits(x.layout, scope)
    rows = x.features.contiguous(), weight, bias, *segments
    return torch.ops.sparsecnx_triton.site_norm(*rows, groups, eps, NUMBERS[activation], slope)


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    grads = torch.ops.sparsecnx_triton.site_norm_backward(
        grad, saved.x, saved.weight, saved.bias, *saved.outputs, saved.row_group, saved.splits, saved.groups, saved.eps,
        saved.activation, saved.slope, "x" in saved.needs,
    )  # fmt: skip
    return dict(zip(("x", "weight", "bias"), grads, strict=True))


def _fake(x, weight, bias, row_group, splits, groups, eps, activation, slope):
    found = x.new_empty(splits.shape[0] - 1, groups, dtype=torch.float32)
    return torch.empty_like(x), found, torch.empty_like(found)


def _fake_backward(grad, x, weight, bias, mean, variance, row_group, splits, groups, eps, activation, slope, needs_x):
    vector = x.new_empty(x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]), vector, torch.empty_like(vector)


register(
    "sparsecnx_triton::site_norm",
    sizes={"x": "rows C", "weight": "C", "bias": "C"},
    public=PUBLIC,
    function=_site_norm,
    fake=_fake,
    saves=("x", "weight", "bias", "row_group", "splits", "groups", "eps", "activation", "slope"),
    backward=_backward,
)
register("sparsecnx_triton::site_norm_backward", public=PUBLIC, function=_site_norm_backward, fake=_fake_backward)
