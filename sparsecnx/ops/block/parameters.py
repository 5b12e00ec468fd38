"""The parameters of a ConvNeXt V2 block, by the names its published state dict uses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class BlockParameters(NamedTuple):
    """Parameters of one block with C channels, in the order the block applies them.

    A bias that is None stands for zeros, a `norm_weight` that is None for ones. Operators of backends get tensors.

    Attributes:
        dwconv_weight: `(C, 1, *kernel)`.
        dwconv_bias, norm_weight, norm_bias, pwconv2_bias: `(C,)` or None.
        pwconv1_weight: `(4C, C)`.
        pwconv1_bias: `(4C,)` or None.
        grn_gamma, grn_beta: `(4C,)` or `(1, 1, 1, 4C)`.
        pwconv2_weight: `(C, 4C)`.
    """

    dwconv_weight: Tensor
    dwconv_bias: Any
    norm_weight: Any
    norm_bias: Any
    pwconv1_weight: Tensor
    pwconv1_bias: Any
    grn_gamma: Tensor
    grn_beta: Tensor
    pwconv2_weight: Tensor
    pwconv2_bias: Any


# The shapes as `sparsecnx.backends.registration.register` takes them.
SIZES = {
    "x": "rows C",
    "dwconv_weight": "C 1 ...",
    **dict.fromkeys(("dwconv_bias", "norm_weight", "norm_bias", "pwconv2_bias"), "C"),
    "pwconv1_weight": "hidden C",
    **dict.fromkeys(("pwconv1_bias", "grn_gamma", "grn_beta"), "hidden"),
    "pwconv2_weight": "C hidden",
}
