"""Convolutions. Tiles take the operators of `sparsecnx.ops` on tiles, anything else those on kernel maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx import ops
from sparsecnx.compat.minkowski.enums import ConvolutionMode, RegionType
from sparsecnx.compat.minkowski.errors import insist, insist_type, not_offered
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.manager import CoordinateMapKey
from sparsecnx.compat.minkowski.tensor import SparseTensor, in_layout, output_key
from sparsecnx.coordinates import CoordinateMap
from sparsecnx.layout import tile_sites


class MinkowskiModuleBase(nn.Module):
    """Base of all layers."""


class _Convolution(MinkowskiModuleBase):
    """What the convolutions share: geometry, initialisation, the check of the input.

    Attributes:
        kernel: the weight, in MinkowskiEngine's layout: K taps first, of which the first axis varies fastest.
        bias: `(1, C_out)`, or None.
    """

    kernel: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_generator: KernelGenerator | None,
        dimension: int | None,
        bias: bool,
        **geometry: Any,
    ) -> None:
        super().__init__()
        insist_type(dimension, int, "dimension", "the number of spatial axes")
        assert dimension is not None
        if kernel_generator is None:
            kernel_generator = KernelGenerator(dimension=dimension, **geometry)
        insist_type(kernel_generator, KernelGenerator, "kernel_generator", "a KernelGenerator")
        insist(
            kernel_generator.dimension == dimension,
            f"dimension is {dimension}: kernel_generator has {kernel_generator.dimension} axes",
        )
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            insist(channels > 0, f"{name} is {channels}: expected at least 1")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_generator = kernel_generator
        self.dimension = dimension
        self.kernel = nn.Parameter(torch.empty(self._kernel_shape()))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.reset_parameters()

    def _kernel_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Uniform within 1 / sqrt(K * channels), those of the input, or of the output where transposed."""
        channels = self.out_channels if is_transpose else self.in_channels
        bound = 1 / math.sqrt(channels * self.kernel_generator.kernel_volume)
        for parameter in (self.kernel, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def _check(self, input: SparseTensor) -> None:
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        insist(self.dimension == input.D, f"input has {input.D} spatial axes: the layer has dimension={self.dimension}")
        insist(
            input.F.shape[1] == self.in_channels,
            f"input has {input.F.shape[1]} channels: the layer takes {self.in_channels}",
        )

    def _output(self, input: SparseTensor, features: Tensor, key: CoordinateMapKey) -> SparseTensor:
        return SparseTensor(features, coordinate_map_key=key, coordinate_manager=input.coordinate_manager)

    def _asked(self, input: SparseTensor, coordinates: Any) -> CoordinateMapKey | None:
        """Key of the sites that are asked for, None for those that follow from the stride."""
        stride = zip(input.tensor_stride, self.kernel_generator.kernel_stride, strict=True)
        return output_key(input, coordinates, [a * b for a, b in stride])

    def __repr__(self) -> str:
        kernel = self.kernel_generator
        shape = "" if kernel.region_type == RegionType.HYPER_CUBE else f", region_type={kernel.region_type.name}"
        return (
            f"{type(self).__name__}(in={self.in_channels}, out={self.out_channels}, kernel_size={kernel.kernel_size}, "
            f"stride={kernel.kernel_stride}, dilation={kernel.kernel_dilation}{shape})"
        )


class MinkowskiConvolution(_Convolution):
    """Convolution; the output's sites are the input's, or with a stride the multiples of it that hold any.

    Odd kernels are centred on the output's site, even ones begin at it. `kernel` is `(K, C_in, C_out)`, or
    `(C_in, C_out)` where kernel and stride are 1.

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size, stride, dilation: a number, or one for each axis.
        bias: whether to add one.
        kernel_generator: the geometry, instead of the three numbers.
        expand_coordinates: not offered.
        convolution_mode: ignored.
        dimension: number of spatial axes.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
        NotOffered: `expand_coordinates`, or a custom region.
    """

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
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        super().__init__(in_channels, out_channels, kernel_generator, dimension, bias, **geometry)

    @property
    def use_mm(self) -> bool:
        """Whether the layer is one matrix product: kernel and stride are 1."""
        return self.kernel_generator.kernel_volume == 1 and self.kernel_generator.requires_strided_coordinates

    def _kernel_shape(self) -> tuple[int, ...]:
        taps = () if self.use_mm else (self.kernel_generator.kernel_volume,)
        return (*taps, self.in_channels, self.out_channels)

    def forward(
        self, input: SparseTensor, coordinates: Tensor | CoordinateMapKey | SparseTensor | None = None
    ) -> SparseTensor:
        """Features `(rows, C_in)` to `(rows_out, C_out)`.

        Args:
            coordinates: the sites to compute, a tensor `(rows_out, 1 + D)`, or those of another tensor of the same
                manager; by default those that follow from the stride.
        """
        self._check(input)
        manager, kernel = input.coordinate_manager, self.kernel_generator
        if self.use_mm:
            return self._output(
                input, nn.functional.linear(input.F, self.kernel.t(), _flat(self.bias)), input.coordinate_map_key
            )
        out = self._asked(input, coordinates)
        key = manager.stride(input.coordinate_map_key, kernel.kernel_stride) if out is None else out
        if out is None and _is_on_tiles(input, kernel):
            padding = tuple(size // 2 if size % 2 else 0 for size in kernel.kernel_size)
            weight = to_torch(self.kernel, kernel.kernel_size)
            stride = kernel.kernel_stride[0]
            convolved = ops.conv(in_layout(input), weight, _flat(self.bias), stride, padding)
            return self._output(input, _from_layout(convolved.features, manager.map(key)), key)
        table = manager.table(input.coordinate_map_key, key, kernel)
        back = table.inverse if input.requires_grad else None
        return self._output(input, ops.mapped_conv(input.F, self.kernel, table.table, back, _flat(self.bias)), key)


class _ByChannel(_Convolution):
    """A kernel `(K, C)` of its own for every channel."""

    def __init__(
        self,
        in_channels: int,
        kernel_generator: KernelGenerator | None,
        dimension: int | None,
        bias: bool,
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, in_channels, kernel_generator, dimension, bias, **geometry)

    def _kernel_shape(self) -> tuple[int, ...]:
        return self.kernel_generator.kernel_volume, self.in_channels

    def _convolve(self, input: SparseTensor, out: CoordinateMapKey | None) -> SparseTensor:
        self._check(input)
        manager, kernel = input.coordinate_manager, self.kernel_generator
        key = manager.stride(input.coordinate_map_key, kernel.kernel_stride) if out is None else out
        centred = kernel.requires_strided_coordinates and all(size % 2 for size in kernel.kernel_size)
        if out is None and centred and kernel.dimension == 2 and _is_on_tiles(input, kernel):
            weight = to_torch(self.kernel, kernel.kernel_size)
            convolved = ops.depthwise_conv(in_layout(input), weight, _flat(self.bias))
            return self._output(input, _from_layout(convolved.features, manager.map(key)), key)
        table = manager.table(input.coordinate_map_key, key, kernel)
        back = table.inverse if input.requires_grad else None
        found = ops.mapped_depthwise_conv(input.F, self.kernel, table.table, back, _flat(self.bias))
        return self._output(input, found, key)


class MinkowskiDepthwiseConvolution(_ByChannel):
    """Depthwise convolution, of the fork that the published ConvNeXt V2 code needs. `kernel` is `(K, C)`.

    Args:
        in_channels: C.
        kernel_size, stride, dilation: a number, or one for each axis.
        bias: whether to add one.
        kernel_generator: the geometry, instead of the three numbers.
        convolution_mode, use_cuda_kernel: ignored.
        dimension: number of spatial axes.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
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
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        super().__init__(in_channels, kernel_generator, dimension, bias, **geometry)

    def forward(
        self, input: SparseTensor, coordinates: Tensor | CoordinateMapKey | SparseTensor | None = None
    ) -> SparseTensor:
        """Features `(rows, C)` to `(rows_out, C)`; `coordinates` as of MinkowskiConvolution."""
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        return self._convolve(input, self._asked(input, coordinates))


class MinkowskiChannelwiseConvolution(_ByChannel):
    """Depthwise convolution, as MinkowskiEngine 0.5.4 has it. `kernel` is `(K, C)`.

    Args:
        in_channels: C.
        kernel_size, stride, dilation: a number, or one for each axis.
        bias: whether to add one.
        kernel_generator: the geometry, instead of the three numbers.
        dimension: number of spatial axes.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
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
        dimension: int = -1,
    ) -> None:
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        super().__init__(in_channels, kernel_generator, dimension, bias, **geometry)

    def forward(
        self, input: SparseTensor, coords: Tensor | CoordinateMapKey | SparseTensor | None = None
    ) -> SparseTensor:
        """Features `(rows, C)` to `(rows_out, C)`. MinkowskiEngine ignores `coords`; here it is followed."""
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        return self._convolve(input, self._asked(input, coords))


class MinkowskiConvolutionTranspose(_Convolution):
    """Transposed convolution: back to the map that a layer of the same stride came from, or, where there was none, to
    all sites under the kernel. `kernel` is `(K, C_in, C_out)`.

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size, stride, dilation: a number, or one for each axis.
        bias: whether to add one.
        kernel_generator: the geometry, instead of the three numbers.
        expand_coordinates: not offered.
        convolution_mode: ignored.
        dimension: number of spatial axes.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
        NotOffered: `expand_coordinates`, or a custom region.
    """

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
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        super().__init__(in_channels, out_channels, kernel_generator, dimension, bias, **geometry)
        self.reset_parameters(True)

    @property
    def use_mm(self) -> bool:
        """Whether the layer is one matrix product: kernel and stride are 1."""
        return self.kernel_generator.kernel_volume == 1 and self.kernel_generator.requires_strided_coordinates

    def _kernel_shape(self) -> tuple[int, ...]:
        taps = () if self.use_mm else (self.kernel_generator.kernel_volume,)
        return (*taps, self.in_channels, self.out_channels)

    def forward(
        self, input: SparseTensor, coordinates: Tensor | CoordinateMapKey | SparseTensor | None = None
    ) -> SparseTensor:
        """Features `(rows, C_in)` to `(rows_out, C_out)`; `coordinates` as of MinkowskiConvolution."""
        self._check(input)
        manager, kernel = input.coordinate_manager, self.kernel_generator
        bias = _flat(self.bias)
        if self.use_mm:
            return self._output(input, nn.functional.linear(input.F, self.kernel.t(), bias), input.coordinate_map_key)
        stride = [max(1, a // b) for a, b in zip(input.tensor_stride, kernel.kernel_stride, strict=True)]
        out = output_key(input, coordinates, stride)
        key = manager.finer(input.coordinate_map_key, kernel) if out is None else out
        coarse, fine = input._map, manager.map(key)
        if kernel.covers and _are_children(fine, coarse, kernel.kernel_stride[0]):
            # The children of a site are consecutive rows, in nested order; MinkowskiEngine's taps are in raster order.
            weight = self.kernel.reshape(self.kernel.shape[0], -1)[_nested_taps(kernel)]
            weight = weight.view(-1, self.in_channels, self.out_channels).transpose(0, 1)
            found = (input.F @ weight.reshape(self.in_channels, -1).to(input.dtype)).view(-1, self.out_channels)
            return self._output(input, found if bias is None else found + bias, key)
        table = manager.table(key, input.coordinate_map_key, kernel).swapped
        back = table.inverse if input.requires_grad else None
        return self._output(input, ops.mapped_conv(input.F, self.kernel, table.table, back, bias), key)


def to_torch(kernel: Tensor, size: list[int]) -> Tensor:
    """A kernel `(K, C_in, C_out)` or `(K, C)` in torch's layout, `(C_out, C_in, *size)` or `(C, 1, *size)`."""
    if kernel.ndim == 2:
        kernel = kernel[:, None, :]
    axes = len(size)
    by_axis = kernel.reshape(*reversed(size), *kernel.shape[1:])  # the last axis first: the first varies fastest
    return by_axis.permute(axes + 1, axes, *reversed(range(axes)))


def to_minkowski(weight: Tensor) -> Tensor:
    """A weight `(C_out, C_in, *size)` in MinkowskiEngine's layout, `(K, C_in, C_out)`; undoes `to_torch`."""
    axes = weight.ndim - 2
    taps = weight.permute(*reversed(range(2, 2 + axes)), 1, 0)
    return taps.reshape(-1, *taps.shape[axes:])


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.view(-1)


def _is_on_tiles(x: SparseTensor, kernel: KernelGenerator) -> bool:
    """Whether the operators on tiles can convolve it to the sites that follow from the stride."""
    layout, stride = x._map.layout, kernel.kernel_stride
    plain = kernel.region_type == RegionType.HYPER_CUBE and set(kernel.kernel_dilation) == {1} and len(set(stride)) == 1
    return layout is not None and plain and layout.tile % stride[0] == 0


def _from_layout(features: Tensor, known: CoordinateMap) -> Tensor:
    """Rows in the order of the map."""
    return features if known.back is None else features[known.back]


def _are_children(fine: CoordinateMap, coarse: CoordinateMap, factor: int) -> bool:
    """Whether the rows of `fine` are those of `coarse`, each divided into `factor**ndim`, in nested order."""
    if fine.layout is None or coarse.layout is None or fine.order is not None or coarse.order is not None:
        return False
    same = fine.layout.tiles is coarse.layout.tiles and fine.layout.tile == coarse.layout.tile * factor
    return same and factor & (factor - 1) == 0


def _nested_taps(kernel: KernelGenerator) -> Tensor:
    """int64 `(K,)`: MinkowskiEngine's number of the tap of each child, in nested order."""
    factor = kernel.kernel_stride[0]
    sites = tile_sites(factor, kernel.dimension)
    weights = torch.tensor([factor**axis for axis in range(kernel.dimension)])
    return (sites * weights).sum(dim=1)
