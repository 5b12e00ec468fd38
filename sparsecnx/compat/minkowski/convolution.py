"""Convolutions. Tiles take the operators of `sparsecnx.ops` on tiles, other sites those on kernel maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx import ops
from sparsecnx.compat.minkowski.base import KernelLayer, Target, tables
from sparsecnx.compat.minkowski.enums import ConvolutionMode
from sparsecnx.compat.minkowski.errors import not_offered, require, require_type
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.tensor import SparseTensor, in_layout
from sparsecnx.geometry.coordinates import CoordinateMap
from sparsecnx.geometry.nested_order import children_are_consecutive, tile_to_rows
from sparsecnx.ops.linear import linear


class _Convolution(KernelLayer):
    """Base of the convolutions.

    Attributes:
        kernel: the weight in MinkowskiEngine's layout: K taps first, of which the first axis varies fastest.
        bias: `(1, C_out)`, or None.
        use_mm: True if the layer is one matrix product: kernel and stride are 1.
    """

    DEPTHWISE = False
    in_channels: int
    out_channels: int
    kernel: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_channels: int, out_channels: int, bias: bool, *geometry: Any) -> None:
        super().__init__(*geometry)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            require_type(count, int, name, "a number of channels")
            require(count > 0, f"{name} is {count}: expected at least 1")
        self.in_channels = in_channels
        self.out_channels = out_channels
        volume = self.kernel_generator.kernel_volume
        self.use_mm = not self.DEPTHWISE and volume == 1 and self.kernel_generator.requires_strided_coordinates
        taps = [] if self.use_mm else [volume]
        channels = [in_channels] if self.DEPTHWISE else [in_channels, out_channels]
        self.kernel = nn.Parameter(torch.empty(taps + channels))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.reset_parameters(self.is_transpose)

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Draw uniformly within 1 / sqrt(K * channels) of the input, or of the output in a transposed layer."""
        channels = self.out_channels if is_transpose else self.in_channels
        bound = 1 / math.sqrt(channels * self.kernel_generator.kernel_volume)
        for parameter in (self.kernel, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: SparseTensor, coordinates: Target = None) -> SparseTensor:
        """Convolve features `(rows, C_in)` to `(rows_out, C_out)`.

        Args:
            coordinates: the sites to compute, as a tensor `(rows_out, 1 + D)`, or those of another tensor of the same
                manager; by default those that follow from the stride. Ignored, as in MinkowskiEngine, if `use_mm`.
        """
        self._check(input)
        if self.use_mm:
            return input._with(linear(input.F, self.kernel.t(), self._flat_bias()))
        return self._convolve(input, coordinates)

    def _convolve(self, input: SparseTensor, coordinates: Target) -> SparseTensor:
        manager, kernel, bias = input.coordinate_manager, self.kernel_generator, self._flat_bias()
        key = self._output_key(input, coordinates)
        out = manager.map(key)
        centred = kernel.requires_strided_coordinates and all(size % 2 for size in kernel.kernel_size)
        on_tiles = kernel.plain and (not self.DEPTHWISE or (centred and kernel.dimension == 2))  # an operator takes it
        if on_tiles and _are_children(input._map, out, kernel.kernel_stride[0]):
            x, weight = in_layout(input), to_torch(self.kernel, kernel.kernel_size)
            if self.DEPTHWISE:
                rows = ops.depthwise_conv(x, weight, bias).features
            else:
                padding = tuple(size // 2 if size % 2 else 0 for size in kernel.kernel_size)
                rows = ops.conv(x, weight, bias, kernel.kernel_stride[0], padding).features
            return input._with(rows if out.order is None else rows.index_select(0, out.back), key)
        table = manager.table(input.coordinate_map_key, key, kernel)
        if self.DEPTHWISE:
            return input._with(ops.mapped_depthwise_conv(input.F, self.kernel, *tables(input, table), bias), key)
        return input._with(ops.mapped_conv(input.F, self.kernel, table.table, bias=bias), key)

    def _flat_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.view(-1)


class MinkowskiConvolutionBase(_Convolution):
    """Base of the convolutions between all channels, transposed and not, see MinkowskiConvolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        expand_coordinates: bool = False,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int | None = None,
    ) -> None:
        if expand_coordinates:
            raise not_offered("expand_coordinates=True", "a list of output sites as the argument `coordinates`")
        super().__init__(in_channels, out_channels, bias, kernel_size, stride, dilation, kernel_generator, dimension)


class MinkowskiConvolution(MinkowskiConvolutionBase):
    """Convolution. The output has the sites of the input, or with a stride its multiples that have a site behind them.

    Odd kernels are centred on the output's site, even ones begin at it. `kernel` is `(K, C_in, C_out)`, or
    `(C_in, C_out)` if kernel and stride are 1.

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size, stride, dilation: one number, or one for each axis.
        bias: True adds a bias.
        kernel_generator: the geometry, instead of the three sizes.
        expand_coordinates: not offered.
        convolution_mode: ignored.
        dimension: number of spatial axes.

    Raises:
        NotOffered: `expand_coordinates`, or a custom region.
    """


class MinkowskiChannelwiseConvolution(_Convolution):
    """Depthwise convolution of MinkowskiEngine 0.5.4, with `kernel (K, C)`.

    Args:
        in_channels: C.
        kernel_size, ...: as MinkowskiConvolution.

    Raises:
        NotOffered: a custom region.
    """

    DEPTHWISE = True

    def __init__(
        self,
        in_channels: int,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        dimension: int = -1,
    ) -> None:
        super().__init__(in_channels, in_channels, bias, kernel_size, stride, dilation, kernel_generator, dimension)

    def forward(self, input: SparseTensor, coords: Target = None) -> SparseTensor:
        """Convolve features `(rows, C)` to `(rows_out, C)`. MinkowskiEngine ignores `coords`; this layer does not."""
        return super().forward(input, coords)


class MinkowskiDepthwiseConvolution(MinkowskiChannelwiseConvolution):
    """Depthwise convolution of the fork that the published ConvNeXt V2 code needs, with `kernel (K, C)`.

    Args:
        in_channels: C.
        kernel_size, ...: as MinkowskiConvolution.
        convolution_mode, use_cuda_kernel: ignored.

    Raises:
        NotOffered: a custom region.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int = -1,
        use_cuda_kernel: bool = True,
    ) -> None:
        super().__init__(in_channels, kernel_size, stride, dilation, bias, kernel_generator, dimension)

    def forward(self, input: SparseTensor, coordinates: Target = None) -> SparseTensor:
        """Convolve features `(rows, C)` to `(rows_out, C)`; `coordinates` as in MinkowskiConvolution."""
        return super().forward(input, coordinates)


class MinkowskiConvolutionTranspose(MinkowskiConvolutionBase):
    """Transposed convolution, with `kernel (K, C_in, C_out)`; arguments and errors as MinkowskiConvolution.

    The output has the map from which a layer of the same stride made the map of the input, or else all sites under the
    kernel. If the input was pruned on the way, it is the map before the pruning, as in MinkowskiEngine.
    """

    is_transpose = True

    def _convolve(self, input: SparseTensor, coordinates: Target) -> SparseTensor:
        manager, kernel, bias = input.coordinate_manager, self.kernel_generator, self._flat_bias()
        key = self._output_key(input, coordinates)
        fine, coarse = manager.map(key), input._map
        ordered = fine.order is None and coarse.order is None
        if kernel.covers and ordered and _are_children(fine, coarse, kernel.kernel_stride[0]):
            # The children of a site are consecutive rows, so that one product computes them all, side by side.
            by_tap = to_torch(self.kernel, kernel.kernel_size).movedim((0, 1), (-2, -1)).flatten(-2)
            weight = tile_to_rows(by_tap[None]).view(-1, self.in_channels)
            bias = None if bias is None else bias.repeat(kernel.kernel_volume)
            found = linear(input.F, weight, bias)
            return input._with(found.view(-1, self.out_channels), key)
        table = manager.table(key, input.coordinate_map_key, kernel)
        return input._with(ops.mapped_conv(input.F, self.kernel, table.inverse, bias=bias), key)


def to_torch(kernel: Tensor, size: list[int]) -> Tensor:
    """Return a kernel `(K, C_in, C_out)` or `(K, C)` in torch's layout, `(C_out, C_in, *size)` or `(C, 1, *size)`."""
    if kernel.ndim == 2:
        kernel = kernel[:, None, :]
    axes = len(size)
    by_axis = kernel.reshape(*reversed(size), *kernel.shape[1:])  # the last axis first: the first varies fastest
    return by_axis.permute(axes + 1, axes, *reversed(range(axes)))


def to_minkowski(weight: Tensor) -> Tensor:
    """Return a weight `(C_out, C_in, *size)` in MinkowskiEngine's layout, `(K, C_in, C_out)`; undoes `to_torch`."""
    axes = weight.ndim - 2
    taps = weight.permute(*reversed(range(2, 2 + axes)), 1, 0)
    return taps.reshape(-1, *taps.shape[axes:])


def _are_children(fine: CoordinateMap, coarse: CoordinateMap, factor: int) -> bool:
    """Return whether `fine` and `coarse` are the same tiles, each site of `coarse` divided into `factor**ndim`."""
    if fine.layout is None or coarse.layout is None:
        return False
    sides = tuple(side * factor for side in coarse.layout.tile)
    return (
        fine.layout.tiles is coarse.layout.tiles
        and fine.layout.tile == sides
        and children_are_consecutive(sides, (factor,) * len(sides))
    )
