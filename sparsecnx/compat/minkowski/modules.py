"""MinkowskiEngine.modules: residual blocks, with the parameter names of MinkowskiEngine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from sparsecnx.compat.minkowski.convolution import MinkowskiConvolution
from sparsecnx.compat.minkowski.layers import NONLINEARITIES, MinkowskiBatchNorm, MinkowskiLinear
from sparsecnx.compat.minkowski.pooling import MinkowskiBroadcastMultiplication, MinkowskiGlobalPooling
from sparsecnx.compat.minkowski.tensor import SparseTensor


class MinkowskiNetwork(nn.Module, ABC):
    """Base of networks; `D` is the number of spatial axes."""

    def __init__(self, D: int) -> None:  # noqa: N803 - MinkowskiEngine's name
        super().__init__()
        self.D = D

    @abstractmethod
    def forward(self, x: Any) -> Any: ...


class _Residual(nn.Module):
    """A branch of convolutions `conv1`, `conv2`, ..., each with `norm1`, `norm2`, ..., added to the input.

    Args:
        inplanes, planes: channels of the input, and of the block; the output has `planes * expansion`.
        stride, dilation: of the 3x3 convolution, the first of two or the second of three.
        downsample: module that brings the input to the sites and channels of the output; None if they are the same.
        bn_momentum: of the batch normalisations.
        dimension: number of spatial axes.
    """

    expansion = 1
    KERNELS: tuple[int, ...]

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        bn_momentum: float = 0.1,
        dimension: int = -1,
    ) -> None:
        super().__init__()
        channels = [inplanes, *([planes] * (len(self.KERNELS) - 1)), planes * self.expansion]
        strided = self.KERNELS.index(3)
        for number, kernel in enumerate(self.KERNELS):
            convolution = MinkowskiConvolution(
                channels[number],
                channels[number + 1],
                kernel_size=kernel,
                stride=stride if number == strided else 1,
                dilation=dilation if kernel > 1 else 1,
                dimension=dimension,
            )
            self.add_module(f"conv{number + 1}", convolution)
            self.add_module(f"norm{number + 1}", MinkowskiBatchNorm(channels[number + 1], momentum=bn_momentum))
        self.relu = NONLINEARITIES["MinkowskiReLU"](inplace=True)
        self.downsample = downsample
        self.se: nn.Module = nn.Identity()  # the blocks with squeeze-and-excitation replace it

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Compute features `(rows_out, planes * expansion)` from `(rows, inplanes)`."""
        out = x
        for number in range(1, len(self.KERNELS) + 1):
            out = getattr(self, f"norm{number}")(getattr(self, f"conv{number}")(out))
            if number < len(self.KERNELS):
                out = self.relu(out)
        out = self.se(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BasicBlock(_Residual):
    """Two 3x3 convolutions (arXiv 1512.03385)."""

    KERNELS = (3, 3)


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions (arXiv 1512.03385)."""

    expansion = 4
    KERNELS = (1, 3, 1)


class SELayer(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): channels are weighted by a function of the whole image."""

    def __init__(self, channel: int, reduction: int = 16, D: int = -1) -> None:  # noqa: N803 - MinkowskiEngine's name
        super().__init__()
        self.fc = nn.Sequential(
            MinkowskiLinear(channel, channel // reduction),
            NONLINEARITIES["MinkowskiReLU"](inplace=True),
            MinkowskiLinear(channel // reduction, channel),
            NONLINEARITIES["MinkowskiSigmoid"](),
        )
        self.pooling = MinkowskiGlobalPooling()
        self.broadcast_mul = MinkowskiBroadcastMultiplication()

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Weight features `(rows, C)`."""
        weighed: SparseTensor = self.broadcast_mul(x, self.fc(self.pooling(x)))
        return weighed


class SEBasicBlock(BasicBlock):
    """BasicBlock with squeeze-and-excitation. `D` is the number of axes, as in MinkowskiEngine."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        reduction: int = 16,
        D: int = -1,  # noqa: N803 - MinkowskiEngine's name
    ) -> None:
        super().__init__(inplanes, planes, stride, dilation, downsample, dimension=D)
        self.se = SELayer(planes * self.expansion, reduction, D)


class SEBottleneck(Bottleneck):
    """Bottleneck with squeeze-and-excitation. `D` is the number of axes, as in MinkowskiEngine."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        D: int = 3,  # noqa: N803 - MinkowskiEngine's name
        reduction: int = 16,
    ) -> None:
        super().__init__(inplanes, planes, stride, dilation, downsample, dimension=D)
        self.se = SELayer(planes * self.expansion, reduction, D)
