"""Global Response Normalization on rows, image by image, in plain torch (arXiv 2301.00808, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.tensor import SparseTensor


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, segments: Tensor, eps: float) -> Tensor:
    """Features `(rows, C)`; `segments (S + 1,)` splits the rows into the groups normalised together."""
    values = x.features.to(gamma.dtype)
    group = torch.bucketize(torch.arange(values.shape[0], device=x.device), segments[1:], right=True)
    energy = values.new_zeros(segments.shape[0] - 1, values.shape[1]).index_add(0, group, values.square())
    # torch.norm's subgradient at a channel that is zero everywhere is 0; sqrt alone would give nan.
    silent = energy == 0
    norm = torch.where(silent, 1.0, energy).sqrt() * ~silent
    response = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return (gamma * (values * response[group]) + beta + values).to(x.dtype)
