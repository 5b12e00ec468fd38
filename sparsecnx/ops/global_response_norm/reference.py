"""Global Response Normalization on rows, group by group, in plain torch (arXiv 2301.00808, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.tensor import SparseTensor


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str, eps: float) -> Tensor:
    """Return features `(rows, C)`; `gamma`, `beta` of C elements."""
    gamma, beta, values = gamma.flatten(), beta.flatten(), x.features.to(gamma.dtype)
    group, groups = row_groups(x.layout, scope), group_splits(x.layout, scope).shape[0] - 1
    energy = values.new_zeros(groups, values.shape[1]).index_add(0, group, values.square())
    # torch.norm's subgradient at a channel that is zero everywhere is 0; sqrt alone would give nan.
    silent = energy == 0
    norm = torch.where(silent, 1.0, energy).sqrt() * ~silent
    response = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return (gamma * (values * response[group]) + beta + values).to(x.dtype)
