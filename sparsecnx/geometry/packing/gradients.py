"""What the compiled rooms share of the gradients of packing."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_grad(grad: Tensor, masked: Tensor, tile: int) -> Tensor:
    """Gradient of the fill of `scatter_rows`, `(C,)`, from that of its result.

    Over masked sites alone: the sum of all less that of the visible ones would cancel.

    Args:
        grad: `(B, C, H, W)`.
        masked: bool `(B * cells,)`, the tiles that hold the fill.
        tile: sites per side.
    """
    batch, _, height, width = grad.shape
    sites = masked.view(batch, 1, height // tile, width // tile)
    sites = sites.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
    total = torch.where(sites, grad, 0).sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
    return total.to(grad.dtype)
