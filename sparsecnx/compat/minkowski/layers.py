"""Layers on the features of each site (linear, nonlinear, dropout, normalisation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.base import MinkowskiModuleBase, on_features, variants
from sparsecnx.compat.minkowski.errors import require_type
from sparsecnx.compat.minkowski.tensor import SparseTensor


class _TorchLayer(nn.Module):
    """A layer of torch, `MODULE`, as the attribute `NAME`, on the features of a SparseTensor."""

    MODULE: type[nn.Module]
    NAME = "module"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.add_module(self.NAME, self.MODULE(*args, **kwargs))

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Compute features `(rows, C_out)` from `(rows, C_in)`."""
        return on_features(input, getattr(self, self.NAME))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({getattr(self, self.NAME).extra_repr()})"


class MinkowskiNonlinearityBase(_TorchLayer, MinkowskiModuleBase):
    """A layer of torch, `MODULE`, on the features of a SparseTensor, with the arguments of torch."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


_OF_TORCH = """
    ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU CELU GELU Sigmoid
    SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold Softmin Softmax LogSoftmax Dropout AlphaDropout
"""
NONLINEARITIES = variants(
    MinkowskiNonlinearityBase,
    {
        f"Minkowski{name}": {
            "MODULE": getattr(nn, name),
            "__doc__": f"`torch.nn.{name}` on the features of a SparseTensor.",
        }
        for name in _OF_TORCH.split()
    },
)
globals().update(NONLINEARITIES)


class MinkowskiAdaptiveLogSoftmaxWithLoss(_TorchLayer, MinkowskiModuleBase):
    """`torch.nn.AdaptiveLogSoftmaxWithLoss` on the features of a SparseTensor.

    That of MinkowskiEngine takes no target, so that it cannot be called.
    """

    MODULE = nn.AdaptiveLogSoftmaxWithLoss
    module: nn.Module

    def forward(self, input: SparseTensor, target: Tensor) -> Any:  # type: ignore[override]
        """Return torch's named tuple of output and loss for features `(rows, C)` and classes `(rows,)`."""
        require_type(input, SparseTensor, "input", "a SparseTensor")
        return self.module(input.F, target)


class MinkowskiSinusoidal(MinkowskiModuleBase):
    """`sin(x @ kernel + bias) * coef`, with `kernel (C_in, C_out)`, `bias` and `coef (1, C_out)`."""

    def __init__(self, in_channel: int, out_channel: int) -> None:
        super().__init__()
        self.in_channel = in_channel
        self.out_channel = out_channel
        self.kernel = nn.Parameter(torch.rand(in_channel, out_channel))
        self.bias = nn.Parameter(torch.rand(1, out_channel))
        self.coef = nn.Parameter(torch.rand(1, out_channel))

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Compute features `(rows, C_out)` from `(rows, C_in)`."""
        return on_features(input, lambda rows: torch.sin(rows.mm(self.kernel) + self.bias) * self.coef)


class MinkowskiLinear(_TorchLayer):
    """`torch.nn.Linear`, as `linear`, on the features of a SparseTensor, with the arguments of torch."""

    MODULE, NAME = nn.Linear, "linear"


class MinkowskiBatchNorm(_TorchLayer):
    """`torch.nn.BatchNorm1d`, as `bn`, over all sites of the batch, with the arguments of torch."""

    MODULE: type[nn.Module] = nn.BatchNorm1d
    NAME = "bn"
    bn: nn.Module


class MinkowskiSyncBatchNorm(MinkowskiBatchNorm):
    """`torch.nn.SyncBatchNorm`, as `bn`: batch normalisation over the batches of all processes."""

    MODULE = nn.SyncBatchNorm

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every MinkowskiBatchNorm in a module by one of these with the same state, and return the module."""
        if isinstance(module, MinkowskiBatchNorm):
            converted = cls.__new__(cls)
            nn.Module.__init__(converted)
            converted.bn = nn.SyncBatchNorm.convert_sync_batchnorm(module.bn, process_group)
            return converted.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module


class MinkowskiLayerNorm(_TorchLayer):
    """`torch.nn.LayerNorm`, as `ln`, over the channels of every site, as ConvNeXt code for MinkowskiEngine has it."""

    MODULE, NAME = nn.LayerNorm, "ln"

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__(normalized_shape, eps=eps)
