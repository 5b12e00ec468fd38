"""The parameters of a ConvNeXt V2 block, by the names its published state dict uses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class BlockParameters(NamedTuple):
    """Parameters of one block with C channels, in the order the block applies them.

    A bias that is None stands for zeros, a `norm_weight` that is None for ones. Operators of backends get tensors.
    """

    dwconv_weight: Tensor  # (C, 1, k, k)
    dwconv_bias: Any  # (C,) or None
    norm_weight: Any  # (C,) or None
    norm_bias: Any  # (C,) or None
    pwconv1_weight: Tensor  # (4C, C)
    pwconv1_bias: Any  # (4C,) or None
    grn_gamma: Tensor  # (4C,) or (1, 1, 1, 4C)
    grn_beta: Tensor  # (4C,) or (1, 1, 1, 4C)
    pwconv2_weight: Tensor  # (C, 4C)
    pwconv2_bias: Any  # (C,) or None
