"""Layer normalization over channels, in plain torch (arXiv 1607.06450)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.tensor import SparseTensor


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return features `(rows, C)`, statistics in the dtype of `weight`."""
    values = x.features.to(weight.dtype)
    return F.layer_norm(values, values.shape[1:], weight.flatten(), bias.flatten(), eps).to(x.dtype)
