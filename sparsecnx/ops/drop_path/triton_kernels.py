"""Per-image scaling of rows by a Triton kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.backends.triton_functions import rounded
from sparsecnx.tensor import SparseTensor

BLOCK_ROWS = 64
BLOCK_CHANNELS = 64


@triton.jit
def scale_rows_kernel(
    x_ptr,  # (rows, C)
    scale_ptr,  # (images,)
    row_image_ptr,  # int32 (rows,)
    out_ptr,  # (rows, C), out: x * scale of its image
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    channels = C // ALIGN * ALIGN
    c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = tl.program_id(0) // tl.cdiv(channels, BLOCK_C) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    known = r < rows - row0
    inside = known[:, None] & (c < channels)[None, :]
    base, offset = row0.to(tl.int64) * channels, r[:, None] * channels + c[None, :]
    image = tl.load(row_image_ptr + row0 + r, known, 0)
    scale = tl.load(scale_ptr + image, known, 0.0).to(tl.float32)
    x = tl.load(x_ptr + base + offset, inside, 0.0).to(tl.float32)
    out = x * scale[:, None]
    tl.store(out_ptr + base + offset, rounded(out, out_ptr.dtype.element_ty), inside)


def scale_images(x: SparseTensor, scale: Tensor) -> Tensor:
    """Return features `(rows, C)`, those of image `n` times `scale[n]`."""
    return scale_rows(x.features.contiguous(), scale.contiguous(), x.layout.row_image())


@torch.library.custom_op("sparsecnx_triton::scale_rows", mutates_args=())
def scale_rows(x: Tensor, scale: Tensor, row_image: Tensor) -> Tensor:
    """Row `r` of x `(rows, C)` times `scale[row_image[r]]`."""
    rows, channels = x.shape
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    out = torch.empty_like(x)
    triton_launch.launch(
        scale_rows_kernel,
        (triton_launch.blocks(rows, BLOCK_ROWS) * triton_launch.blocks(channels, block_c),),
        x,
        scale,
        row_image,
        out,
        rows,
        channels,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_C=block_c,
        ALIGN=math.gcd(channels, 16),
    )
    return out


@scale_rows.register_fake
def _(x: Tensor, scale: Tensor, row_image: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scale, row_image = inputs
    ctx.save_for_backward(scale, row_image)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scale_rows(grad.contiguous(), *ctx.saved_tensors), None, None


scale_rows.register_autograd(_backward, setup_context=_setup_context)
