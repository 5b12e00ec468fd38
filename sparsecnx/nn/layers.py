"""Layers on SparseTensors and dense tensors alike."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx import ops
from sparsecnx.ops.global_response_norm.groups import check_scope
from sparsecnx.tensor import SparseTensor


class Conv2d(torch.nn.Conv2d):
    """Be `torch.nn.Conv2d`, which answers a SparseTensor with the submanifold convolution."""


class Linear(torch.nn.Linear):
    """Apply `torch.nn.Linear`; on a SparseTensor to the channels of every visible site, wherever its channels are."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Map `(..., C_in)` to `(..., C_out)`, or a SparseTensor to one."""
        if isinstance(input, SparseTensor):
            return input.with_features(super().forward(input.features))
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
    """Apply LayerNorm over the channels of dense images `(B, C, H, W)`, or of every site of a SparseTensor."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Take dense `(B, C, H, W)` or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor):
            return super().forward(input)
        return torch.nn.LayerNorm.forward(self, input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(torch.nn.Module):
    """Global Response Normalization (arXiv 2301.00808, section 3.2). gamma and beta `(1, 1, 1, C)` start at 0.

    Args:
        num_channels: channels C.
        scope: on a SparseTensor, `"sample"` or `"batch"`, see `ops.grn`.
        eps: added to the mean over channels.
    """

    def __init__(self, num_channels: int, scope: str = "sample", eps: float = 1e-6) -> None:
        super().__init__()
        check_scope(scope)
        self.scope = scope
        self.eps = eps
        self.gamma = torch.nn.Parameter(torch.zeros(1, 1, 1, num_channels))
        self.beta = torch.nn.Parameter(torch.zeros(1, 1, 1, num_channels))

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense channels-last `(B, H, W, C)`, normalised per image, or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor):
            return ops.grn(input, self.gamma, self.beta, self.scope, self.eps)
        norm = torch.linalg.vector_norm(input, dim=(1, 2), keepdim=True)
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
