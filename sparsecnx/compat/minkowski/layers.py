"""Layers on the features of each site (linear, nonlinear, dropout, batch normalisation), and instance normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.base import MinkowskiModuleBase, on_features
from sparsecnx.compat.minkowski.errors import require_type
from sparsecnx.compat.minkowski.pooling import normalise_by_image
from sparsecnx.compat.minkowski.tensor import SparseTensor


class MinkowskiNonlinearityBase(MinkowskiModuleBase):
    """A layer of torch, `MODULE`, on the features of a SparseTensor, with the arguments of torch."""

    MODULE: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.module = self.MODULE(*args, **kwargs)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Compute features `(rows, C)` from `(rows, C)`."""
        return on_features(input, self.module)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _layer(module: type[nn.Module]) -> type[MinkowskiNonlinearityBase]:
    """Make the class `MinkowskiX` of `torch.nn.X`."""
    doc = f"`torch.nn.{module.__name__}` on the features of a SparseTensor."
    members = {"MODULE": module, "__doc__": doc, "__module__": __name__}
    return type(f"Minkowski{module.__name__}", (MinkowskiNonlinearityBase,), members)


MinkowskiELU = _layer(nn.ELU)
MinkowskiHardshrink = _layer(nn.Hardshrink)
MinkowskiHardsigmoid = _layer(nn.Hardsigmoid)
MinkowskiHardtanh = _layer(nn.Hardtanh)
MinkowskiHardswish = _layer(nn.Hardswish)
MinkowskiLeakyReLU = _layer(nn.LeakyReLU)
MinkowskiLogSigmoid = _layer(nn.LogSigmoid)
MinkowskiPReLU = _layer(nn.PReLU)
MinkowskiReLU = _layer(nn.ReLU)
MinkowskiReLU6 = _layer(nn.ReLU6)
MinkowskiRReLU = _layer(nn.RReLU)
MinkowskiSELU = _layer(nn.SELU)
MinkowskiCELU = _layer(nn.CELU)
MinkowskiGELU = _layer(nn.GELU)
MinkowskiSigmoid = _layer(nn.Sigmoid)
MinkowskiSiLU = _layer(nn.SiLU)
MinkowskiSoftplus = _layer(nn.Softplus)
MinkowskiSoftshrink = _layer(nn.Softshrink)
MinkowskiSoftsign = _layer(nn.Softsign)
MinkowskiTanh = _layer(nn.Tanh)
MinkowskiTanhshrink = _layer(nn.Tanhshrink)
MinkowskiThreshold = _layer(nn.Threshold)
MinkowskiSoftmin = _layer(nn.Softmin)
MinkowskiSoftmax = _layer(nn.Softmax)
MinkowskiLogSoftmax = _layer(nn.LogSoftmax)
MinkowskiDropout = _layer(nn.Dropout)
MinkowskiAlphaDropout = _layer(nn.AlphaDropout)


class MinkowskiAdaptiveLogSoftmaxWithLoss(MinkowskiModuleBase):
    """`torch.nn.AdaptiveLogSoftmaxWithLoss` on the features of a SparseTensor.

    That of MinkowskiEngine takes no target, so that it cannot be called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.module = nn.AdaptiveLogSoftmaxWithLoss(*args, **kwargs)

    def forward(self, input: SparseTensor, target: Tensor) -> Any:
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


class MinkowskiLinear(nn.Module):
    """`torch.nn.Linear`, as `linear`, on the features of a SparseTensor."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Compute features `(rows, C_out)` from `(rows, C_in)`."""
        return on_features(input, self.linear)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.linear.extra_repr()})"


class MinkowskiBatchNorm(nn.Module):
    """`torch.nn.BatchNorm1d`, as `bn`, over all sites of the batch, with the arguments of torch."""

    MODULE: type[nn.Module] = nn.BatchNorm1d

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.bn = self.MODULE(num_features, *args, **kwargs)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Normalise features `(rows, C)`."""
        return on_features(input, self.bn)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bn.extra_repr()})"


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


class MinkowskiLayerNorm(nn.Module):
    """`torch.nn.LayerNorm`, as `ln`, over the channels of every site, as ConvNeXt code for MinkowskiEngine has it."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(normalized_shape, eps=eps)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Normalise features `(rows, C)`."""
        return on_features(input, self.ln)


class MinkowskiInstanceNorm(MinkowskiModuleBase):
    """Normalisation over the sites of each image, with `weight` and `bias (1, C)`; `EPS` is added to the variance."""

    EPS = 1e-8

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(1, num_features))
        self.bias = nn.Parameter(torch.zeros(1, num_features))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Normalise features `(rows, C)`."""
        return on_features(input, lambda _: normalise_by_image(input, self.EPS) * self.weight + self.bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nchannels={self.num_features})"


class MinkowskiStableInstanceNorm(MinkowskiInstanceNorm):
    """Instance normalisation with a larger `EPS`."""

    EPS = 1e-6
