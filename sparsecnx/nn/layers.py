"""Layers on SparseTensors and dense tensors alike."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from sparsecnx import ops
from sparsecnx.ops.global_response_norm.groups import check_scope
from sparsecnx.tensor import SparseTensor


def refuse_backward_hooks(module: torch.nn.Module, x: SparseTensor | Tensor) -> None:
    """Raise RuntimeError where torch would ignore a backward hook of `module`, because `x` is a SparseTensor.

    torch attaches these hooks to the tensors in the place of an argument, and does not look inside one.
    """
    if not isinstance(x, SparseTensor) or not torch.is_grad_enabled():
        return
    own = module._backward_hooks or module._backward_pre_hooks
    if own or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise RuntimeError(
            f"{type(module).__name__} has a backward hook, which torch ignores on a SparseTensor: register a forward "
            "hook that calls register_hook() on the features of the SparseTensor"
        )


class Conv2d(torch.nn.Conv2d):
    """Convolve as `torch.nn.Conv2d`; on a SparseTensor as the submanifold convolution.

    On a SparseTensor `groups` is 1, or equal to the channels with stride 1 and padding `k // 2` (depthwise);
    dilation is 1 and padding zeros.
    """

    @overload
    def forward(self, input: SparseTensor) -> SparseTensor: ...
    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Map dense `(B, C_in, H, W)` to `(B, C_out, H', W')`, or a SparseTensor to one.

        Raises:
            ValueError: the layer has no submanifold counterpart.
        """
        if not isinstance(input, SparseTensor):
            return super().forward(input)
        refuse_backward_hooks(self, input)
        if set(self.dilation) != {1} or self.padding_mode != "zeros" or len(set(self.stride)) > 1:
            raise ValueError(f"{self} on a SparseTensor: expected dilation 1, zero padding, one stride")
        padding = self._leading_padding()
        if self.padding != "same" and any(
            not size - self.stride[0] <= 2 * before <= size - 1
            for size, before in zip(self.kernel_size, padding, strict=True)
        ):
            raise ValueError(f"{self} on a SparseTensor: expected a padding that gives H / stride outputs per axis")
        if self.groups == 1:
            return ops.conv(input, self.weight, self.bias, self.stride[0], padding)
        centred = padding == tuple(size // 2 for size in self.kernel_size)
        if self.groups == self.in_channels == self.out_channels and self.stride[0] == 1 and centred:
            return ops.depthwise_conv(input, self.weight, self.bias)
        raise ValueError(f"{self} on a SparseTensor: expected groups=1, or a centred depthwise kernel")

    def _leading_padding(self) -> tuple[int, ...]:
        if isinstance(self.padding, str):
            same = self.padding == "same"
            return tuple((size - 1) // 2 if same else 0 for size in self.kernel_size)
        return self.padding


class Linear(torch.nn.Linear):
    """Apply `torch.nn.Linear`; on a SparseTensor at every active site."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Map `(..., C_in)` to `(..., C_out)`, or a SparseTensor to one."""
        if isinstance(input, SparseTensor):
            refuse_backward_hooks(self, input)
            return input.with_features(super().forward(input.features))
        return super().forward(input)


class GELU(torch.nn.GELU):
    """Apply `torch.nn.GELU`; on a SparseTensor to its features."""

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Return the same shape."""
        if isinstance(input, SparseTensor):
            refuse_backward_hooks(self, input)
            return input.with_features(super().forward(input.features))
        return super().forward(input)


class LayerNorm(torch.nn.LayerNorm):
    """Apply `torch.nn.LayerNorm` over C channels, the last dimension; on a SparseTensor over those of every site."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Take dense `(..., C)` or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor):
            refuse_backward_hooks(self, input)
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
            refuse_backward_hooks(self, input)
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
            refuse_backward_hooks(self, input)
            return ops.stochastic_depth(input, self.p, self.training)
        if self.p == 0.0 or not self.training:
            return input
        keep = 1.0 - self.p
        shape = (input.shape[0],) + (1,) * (input.ndim - 1)
        return input * input.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p}"
