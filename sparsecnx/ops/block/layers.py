"""The ConvNeXt V2 block as the sequence of its layers (arXiv 2301.00808, figure 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.ops import depthwise_convolution, drop_path, global_response_norm, layer_normalization
from sparsecnx.ops.block.parameters import BlockParameters
from sparsecnx.tensor import SparseTensor

Layer = Callable[..., Tensor]


def reference(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    recompute: bool | None,
) -> Tensor:
    """Return features `(rows, C)` of the block, from the dense reference of each layer. Nothing is recomputed."""
    return _in_sequence(
        x,
        p,
        survival,
        scope,
        eps,
        grn_eps,
        depthwise_convolution.reference.depthwise_conv,
        layer_normalization.reference.layer_norm,
        global_response_norm.reference.grn,
        drop_path.reference.scale_images,
    )


def by_operators(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    recompute: bool | None,
) -> Tensor:
    """Return features `(rows, C)` of the block, each layer on the backend in force. Nothing is recomputed."""
    return _in_sequence(
        x,
        p,
        survival,
        scope,
        eps,
        grn_eps,
        depthwise_convolution.operator,
        layer_normalization.operator,
        global_response_norm.operator,
        drop_path.operator,
    )


def _in_sequence(
    x: SparseTensor,
    p: BlockParameters,
    survival: Tensor | None,
    scope: str,
    eps: float,
    grn_eps: float,
    depthwise_conv: Layer,
    layer_norm: Layer,
    grn: Layer,
    scale_images: Layer,
) -> Tensor:
    u = x.with_features(depthwise_conv(x, p.dwconv_weight, p.dwconv_bias))
    v = layer_norm(u, p.norm_weight, p.norm_bias, eps)
    h = F.gelu(F.linear(v, p.pwconv1_weight, p.pwconv1_bias.flatten().to(v.dtype)))
    normalised = grn(x.with_features(h), p.grn_gamma, p.grn_beta, scope, grn_eps)
    branch = F.linear(normalised, p.pwconv2_weight, p.pwconv2_bias.flatten().to(h.dtype))
    if survival is not None:
        branch = scale_images(x.with_features(branch), survival)
    return x.features + branch
