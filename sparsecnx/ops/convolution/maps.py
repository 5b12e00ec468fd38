"""The kernel map of a window on a layout, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.ops.convolution.window import Window


def maps(layout: Layout, window: Window, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the kernel map of a convolution from `layout`, and its inverse if the features may need a gradient."""
    return layout.kernel_map(*window), layout.inverse_map(*window) if _need_gradient(features) else None


def _need_gradient(features: Tensor) -> bool:
    return features.requires_grad and torch.is_grad_enabled()
