"""The parameters of a ConvNeXt V2 block, by the names its published state dict uses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockParameters(NamedTuple):
    """Parameters of one block with C channels, in the order the block applies them."""

    dwconv_weight: Tensor  # (C, 1, k, k)
    dwconv_bias: Tensor  # (C,)
    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    pwconv1_weight: Tensor  # (4C, C)
    pwconv1_bias: Tensor  # (4C,)
    grn_gamma: Tensor  # (4C,) or (1, 1, 1, 4C)
    grn_beta: Tensor  # (4C,) or (1, 1, 1, 4C)
    pwconv2_weight: Tensor  # (C, 4C)
    pwconv2_bias: Tensor  # (C,)
