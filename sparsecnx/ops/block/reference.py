"""The ConvNeXt V2 block as the sequence of its operators' references (arXiv 2301.00808, figure 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.ops.depthwise_convolution import reference
from sparsecnx.ops.drop_path.reference import scale_images
from sparsecnx.ops.global_response_norm.reference import grn
from sparsecnx.ops.layer_normalization.reference import layer_norm
from sparsecnx.tensor import SparseTensor


def convnextv2_block(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    segments: Tensor,
    eps: float,
    recompute: bool | None,
    depthwise_conv: Callable[[SparseTensor, Tensor, Tensor | None], Tensor] = reference.depthwise_conv,
) -> Tensor:
    """Features `(rows, C)` of the block; nothing is recomputed here, whatever `recompute` says."""
    u = x.with_features(depthwise_conv(x, p.dwconv_weight, p.dwconv_bias))
    v = layer_norm(u, p.norm_weight, p.norm_bias, eps)
    h = F.gelu(F.linear(v, p.pwconv1_weight, p.pwconv1_bias.to(v.dtype)))
    normalised = grn(x.with_features(h), p.grn_gamma, p.grn_beta, segments, eps)
    branch = F.linear(normalised, p.pwconv2_weight, p.pwconv2_bias.to(h.dtype))
    if survival is not None:
        branch = scale_images(x.with_features(branch), survival)
    return x.features + branch
