"""Per-image scaling of rows by a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecnx.backends.registration import Saved, register
from sparsecnx.backends.triton_functions import aligned, channel_block, load, row_block, store
from sparsecnx.backends.triton_launch import blocks, launch, row_sizes
from sparsecnx.tensor import SparseTensor

BLOCK_ROWS = 64
BLOCK_CHANNELS = 64


@triton.jit
def scale_rows_kernel(
    x,  # (ROWS, C)
    scale,  # (images,)
    row_image,  # (ROWS,) int32
    out,  # (ROWS, C)
    ROWS,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C
):
    """out = x scale[row_image]."""
    C = aligned(C, ALIGN)
    i_block, o_c = channel_block(C, BLOCK_C)
    i_row, o_r, m_r, o_x, m_x = row_block(i_block, o_c, ROWS, C, BLOCK_R)
    b_image = tl.load(row_image + i_row + o_r, mask=m_r, other=0)
    b_scale = load(scale + b_image, m_r)
    b_x = load(x + i_row * C + o_x, m_x)
    store(out + i_row * C + o_x, b_x * b_scale[:, None], m_x)


def scale_images(x: SparseTensor, scale: Tensor) -> Tensor:
    """Return features `(rows, C)`, those of image `n` times `scale[n]`."""
    return torch.ops.sparsecnx_triton.scale_rows(x.features.contiguous(), scale.contiguous(), x.layout.row_image())


def _scale_rows(x: Tensor, scale: Tensor, row_image: Tensor) -> Tensor:
    """Return x `(rows, C)` with row `r` times `scale[row_image[r]]`."""
    rows, channels = x.shape
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    out = torch.empty_like(x)
    grid = (blocks(rows, BLOCK_ROWS) * blocks(channels, block_c),)
    sizes = row_sizes(rows, channels, BLOCK_ROWS, block_c)
    launch(scale_rows_kernel, grid, x=x, scale=scale, row_image=row_image, out=out, **sizes)
    return out


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": torch.ops.sparsecnx_triton.scale_rows(grad, saved.scale, saved.row_image)}


register(
    "sparsecnx_triton::scale_rows",
    sizes={"x": "rows C"},
    public="stochastic_depth",
    function=_scale_rows,
    fake=lambda x, scale, row_image: torch.empty_like(x),
    saves=("scale", "row_image"),
    backward=_backward,
)
