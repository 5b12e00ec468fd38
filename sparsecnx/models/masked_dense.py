"""The masked encoder computed densely: every operator on the whole image, times the mask.

Code without sparse kernels does this (SparK, the paper's JAX code). It costs as much as an image without a mask. The
tests compare the results of the sparse encoder with it, and the benchmarks its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx.models.convnextv2 import ConvNeXtV2Encoder
from sparsecnx.nn import ConvNeXtBlock, ConvNeXtV2Block


def forward_features(encoder: ConvNeXtV2Encoder, images: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the outputs of the four stages, of images `(B, dims[i], H / s, W / s)`, zero at masked sites.

    Args:
        encoder: the model whose weights are used.
        images: `(B, C, *spatial)`; the channels-last memory format is faster.
        mask: bool `(B, *grid)`, True = masked.
    """
    keep = (~mask).to(images.dtype)[:, None]
    x, outputs = images, []
    stage: Any
    stem: Any = next(encoder.downsample_layers[0].children())
    if stem.kernel_size != stem.stride:  # Its windows reach into masked patches.
        x = x * _sites(keep, x)
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
        x = downsample(x)
        active = _sites(keep, x)
        x = x * active
        for block in stage:
            x = masked_block(block, x, active)
        outputs.append(x)
    return outputs


def masked_block(block: ConvNeXtV2Block | ConvNeXtBlock, x: Tensor, active: Tensor) -> Tensor:
    """Run a block on `x (B, C, *spatial)`, which is zero wherever `active (B, 1, *spatial)` is."""
    branch = block.norm(block.dwconv(x).movedim(1, -1))
    h = block.act(block.pwconv1(branch))
    if isinstance(block, ConvNeXtBlock):
        branch = block.gamma * block.pwconv2(h)
    else:
        h = h * active.movedim(1, -1)
        norm = torch.linalg.vector_norm(h, dim=tuple(range(1, h.ndim - 1)), keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + block.grn.eps)
        branch = block.pwconv2(block.grn.gamma * (h * response) + block.grn.beta + h)
    return x + block.drop_path(branch.movedim(-1, 1)) * active


def _sites(keep: Tensor, x: Tensor) -> Tensor:
    """Return `keep (B, 1, *grid)` for every site of `x (B, C, *spatial)`."""
    for axis in range(2, x.ndim):
        keep = keep.repeat_interleave(x.shape[axis] // keep.shape[axis], axis)
    return keep
