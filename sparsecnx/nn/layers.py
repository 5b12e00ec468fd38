"""Layers on SparseTensors and dense tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsecnx import ops
from sparsecnx.ops.global_response_norm.groups import check_scope
from sparsecnx.ops.linear import linear
from sparsecnx.tensor import SparseTensor


class Conv2d(torch.nn.Conv2d):
    """Be `torch.nn.Conv2d`, which answers a SparseTensor with the submanifold convolution."""


# The convolution of images by their number of spatial dimensions.
CONVOLUTIONS: dict[int, Any] = {1: torch.nn.Conv1d, 2: Conv2d, 3: torch.nn.Conv3d}


def axis_sizes(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return a positive number for each axis; a single one stands for all of them.

    Raises:
        ValueError: `value`, an argument that errors call `name`, is none of these, or `ndim` is not 1, 2 or 3.
    """
    if ndim not in CONVOLUTIONS:
        raise ValueError(f"ndim is {ndim}: expected 1, 2 or 3")
    sizes = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(sizes) != ndim or not all(isinstance(size, int) and size > 0 for size in sizes):
        numbers = "a positive number" if ndim == 1 else f"a positive number, or one for each of {ndim} axes"
        raise ValueError(f"{name} is {value}: expected {numbers}")
    return sizes


class Linear(torch.nn.Linear):
    """Apply `torch.nn.Linear`; on a SparseTensor to the channels of every visible site, wherever its channels are."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Map `(..., C_in)` to `(..., C_out)`, or a SparseTensor to one."""
        if isinstance(input, SparseTensor):
            return input.with_features(linear(input.features, self.weight, self.bias))
        return super().forward(input)


class GELU(torch.nn.GELU):
    """Be `torch.nn.GELU`, which answers a SparseTensor at its visible sites."""


class LayerNorm(torch.nn.LayerNorm):
    """Apply `torch.nn.LayerNorm` over C channels, the last dimension; on a SparseTensor over those of every site."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Take dense `(..., C)` or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor):
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        return super().forward(input)


class LayerNorm2d(LayerNorm):
    """Apply LayerNorm over the channels of dense images, or of every site of a SparseTensor, of any dimensions."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Take dense `(B, C, *spatial)` or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor):
            return super().forward(input)
        return torch.nn.LayerNorm.forward(self, input.movedim(1, -1)).movedim(-1, 1)


class GRN(torch.nn.Module):
    """Global Response Normalization (arXiv 2301.00808, section 3.2). gamma and beta `(1, 1, 1, C)` start at 0.

    Args:
        num_channels: channels C.
        scope: on a SparseTensor, `"sample"` or `"batch"`, see `ops.grn`.
        eps: added to the mean over channels.
        ndim: spatial dimensions of dense images; gamma and beta have one more, beside the channels.
    """

    ndim = 2  # of a module that was pickled before it had any other

    def __init__(self, num_channels: int, scope: str = "sample", eps: float = 1e-6, ndim: int = 2) -> None:
        super().__init__()
        check_scope(scope)
        self.scope = scope
        self.eps = eps
        self.ndim = ndim
        self.gamma = torch.nn.Parameter(torch.zeros((1,) * (ndim + 1) + (num_channels,)))
        self.beta = torch.nn.Parameter(torch.zeros((1,) * (ndim + 1) + (num_channels,)))

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense channels-last `(B, *spatial, C)`, normalised per image, or a SparseTensor; return its shape."""
        if isinstance(input, SparseTensor):
            return ops.grn(input, self.gamma, self.beta, self.scope, self.eps)
        norm = torch.linalg.vector_norm(input, dim=tuple(range(1, 1 + self.ndim)), keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        return self.gamma * (input * response) + self.beta + input

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[-1]}, scope={self.scope!r}, eps={self.eps}"


class StochasticDepth(torch.nn.Module):
    """Stochastic depth per image (arXiv 1603.09382): drop with probability `p`, else scale by `1 / (1 - p)`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p is {p}: expected 0 <= p < 1, the probability of dropping an image")
        self.p = p

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense `(B, ...)` or a SparseTensor; return the same shape, in evaluation the input."""
        if isinstance(input, SparseTensor):
            return ops.stochastic_depth(input, self.p, self.training)
        if self.p == 0.0 or not self.training:
            return input
        keep = 1.0 - self.p
        shape = (input.shape[0],) + (1,) * (input.ndim - 1)
        return input * input.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p}"
