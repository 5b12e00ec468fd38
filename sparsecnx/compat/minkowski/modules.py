"""MinkowskiEngine.modules: residual blocks, with MinkowskiEngine's names of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from sparsecnx.compat.minkowski.convolution import MinkowskiConvolution
from sparsecnx.compat.minkowski.layers import MinkowskiBatchNorm, MinkowskiLinear, MinkowskiReLU, MinkowskiSigmoid
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
    """Convolutions `conv1`, `conv2`, ..., each with its `norm1`, `norm2`, ..., beside the input.

    Args:
        inplanes, planes: channels of the input, and of the block; the output has `planes * expansion`.
        stride, dilation: of the block's 3x3 convolution, the first of two or the second of three.
        downsample: what brings the input to the output's sites and channels; by default nothing.
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
        self.relu = MinkowskiReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features `(rows, inplanes)` to `(rows_out, planes * expansion)`."""
        out = x
        for number in range(1, len(self.KERNELS) + 1):
            out = getattr(self, f"norm{number}")(getattr(self, f"conv{number}")(out))
            if number < len(self.KERNELS):
                out = self.relu(out)
        out = self.recalibrate(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    def recalibrate(self, x: SparseTensor) -> SparseTensor:
        """What is done before the sum."""
        return x


class BasicBlock(_Residual):
    """Two 3x3 convolutions (arXiv 1512.03385)."""

    KERNELS = (3, 3)


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions (arXiv 1512.03385)."""

    expansion = 4
    KERNELS = (1, 3, 1)


class SELayer(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): channels weighed by what the whole image says."""

    def __init__(self, channel: int, reduction: int = 16, D: int = -1) -> None:  # noqa: N803 - MinkowskiEngine's name
        super().__init__()
        self.fc = nn.Sequential(
            MinkowskiLinear(channel, channel // reduction),
            MinkowskiReLU(inplace=True),
            MinkowskiLinear(channel // reduction, channel),
            MinkowskiSigmoid(),
        )
        self.pooling = MinkowskiGlobalPooling()
        self.broadcast_mul = MinkowskiBroadcastMultiplication()

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features `(rows, C)` to `(rows, C)`."""
        weighed: SparseTensor = self.broadcast_mul(x, self.fc(self.pooling(x)))
        return weighed


class SEBasicBlock(BasicBlock):
    """BasicBlock with squeeze-and-excitation. The number of axes is `D`, as in MinkowskiEngine's."""

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

    def recalibrate(self, x: SparseTensor) -> SparseTensor:
        weighed: SparseTensor = self.se(x)
        return weighed


class SEBottleneck(Bottleneck):
    """Bottleneck with squeeze-and-excitation. The number of axes is `D`, as in MinkowskiEngine's."""

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

    def recalibrate(self, x: SparseTensor) -> SparseTensor:
        weighed: SparseTensor = self.se(x)
        return weighed
