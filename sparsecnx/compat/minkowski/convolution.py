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
from sparsecnx.compat.minkowski.manager import CoordinateMapKey, KernelMap
from sparsecnx.compat.minkowski.rows import permuted
from sparsecnx.compat.minkowski.tensor import SparseTensor, in_layout, output_key
from sparsecnx.geometry.coordinates import CoordinateMap
from sparsecnx.geometry.nested_order import tile_to_rows


class MinkowskiModuleBase(nn.Module):
    """Base of all layers."""


class _Convolution(MinkowskiModuleBase):
    """What the convolutions share: geometry, initialisation, the check of the input.

    Attributes:
        kernel: the weight, in MinkowskiEngine's layout: K taps first, of which the first axis varies fastest.
        bias: `(1, C_out)`, or None.
    """

    is_transpose = False
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
            insist_type(channels, int, name, "a number of channels")
            insist(channels > 0, f"{name} is {channels}: expected at least 1")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_generator = kernel_generator
        self.dimension = dimension
        self.kernel = nn.Parameter(torch.empty(self._kernel_shape()))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.reset_parameters(self.is_transpose)

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

    def _key(self, input: SparseTensor, coordinates: Any) -> CoordinateMapKey:
        """Key of the sites that are asked for, or else of those that follow from the stride."""
        kernel = self.kernel_generator
        stride = [a * b for a, b in zip(input.tensor_stride, kernel.kernel_stride, strict=True)]
        asked = output_key(input, coordinates, stride)
        if asked is not None:
            return asked
        return input.coordinate_manager.stride(input.coordinate_map_key, kernel.kernel_stride)

    def __repr__(self) -> str:
        kernel = self.kernel_generator
        shape = "" if kernel.region_type == RegionType.HYPER_CUBE else f", region_type={kernel.region_type.name}"
        return (
            f"{type(self).__name__}(in={self.in_channels}, out={self.out_channels}, kernel_size={kernel.kernel_size}, "
            f"stride={kernel.kernel_stride}, dilation={kernel.kernel_dilation}{shape})"
        )


class MinkowskiConvolutionBase(_Convolution):
    """What the convolutions with a kernel between all channels share, transposed and not: see MinkowskiConvolution."""

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
                manager; by default those that follow from the stride. Ignored, as by MinkowskiEngine, where kernel
                and stride are 1.
        """
        self._check(input)
        if self.use_mm:
            product = nn.functional.linear(input.F, self.kernel.t(), _flat(self.bias))
            return self._output(input, product, input.coordinate_map_key)
        return self._convolve(input, coordinates)

    def _convolve(self, input: SparseTensor, coordinates: Any) -> SparseTensor:
        raise NotImplementedError


class MinkowskiConvolution(MinkowskiConvolutionBase):
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

    def _convolve(self, input: SparseTensor, coordinates: Any) -> SparseTensor:
        manager, kernel = input.coordinate_manager, self.kernel_generator
        key = self._key(input, coordinates)
        bias = _flat(self.bias)
        if _is_on_tiles(input._map, manager.map(key), kernel):
            padding = tuple(size // 2 if size % 2 else 0 for size in kernel.kernel_size)
            weight = to_torch(self.kernel, kernel.kernel_size)
            convolved = ops.conv(in_layout(input), weight, bias, kernel.kernel_stride[0], padding)
            return self._output(input, _from_layout(convolved.features, manager.map(key)), key)
        table = manager.table(input.coordinate_map_key, key, kernel)
        return self._output(input, ops.mapped_conv(input.F, self.kernel, *_maps(input, table), bias), key)


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

    def _convolve(self, input: SparseTensor, coordinates: Any) -> SparseTensor:
        self._check(input)
        manager, kernel = input.coordinate_manager, self.kernel_generator
        key = self._key(input, coordinates)
        bias = _flat(self.bias)
        centred = kernel.requires_strided_coordinates and all(size % 2 for size in kernel.kernel_size)
        if centred and kernel.dimension == 2 and _is_on_tiles(input._map, manager.map(key), kernel):
            weight = to_torch(self.kernel, kernel.kernel_size)
            convolved = ops.depthwise_conv(in_layout(input), weight, bias)
            return self._output(input, _from_layout(convolved.features, manager.map(key)), key)
        table = manager.table(input.coordinate_map_key, key, kernel)
        found = ops.mapped_depthwise_conv(input.F, self.kernel, *_maps(input, table), bias)
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
        return self._convolve(input, coordinates)


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
        return self._convolve(input, coords)


class MinkowskiConvolutionTranspose(MinkowskiConvolutionBase):
    """Transposed convolution: back to the map that a layer of the same stride came from, or, where there was none, to
    all sites under the kernel. Of a tensor that was pruned on the way, the map is that from before, as in
    MinkowskiEngine. `kernel` is `(K, C_in, C_out)`.

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

    is_transpose = True

    def _convolve(self, input: SparseTensor, coordinates: Any) -> SparseTensor:
        manager, kernel = input.coordinate_manager, self.kernel_generator
        stride = [max(1, a // b) for a, b in zip(input.tensor_stride, kernel.kernel_stride, strict=True)]
        asked = output_key(input, coordinates, stride)
        key = manager.finer(input.coordinate_map_key, kernel) if asked is None else asked
        bias = _flat(self.bias)
        fine, coarse = manager.map(key), input._map
        ordered = fine.order is None and coarse.order is None
        if kernel.covers and ordered and _are_children(fine, coarse, kernel.kernel_stride[0]):
            # The children of a site are consecutive rows: one product gives them all, side by side.
            weight = _nested(self.kernel, kernel.kernel_stride[0], kernel.dimension)
            bias = None if bias is None else bias.repeat(weight.shape[0])
            found = nn.functional.linear(input.F, weight.transpose(1, 2).flatten(0, 1), bias)
            return self._output(input, found.view(-1, self.out_channels), key)
        table = manager.table(key, input.coordinate_map_key, kernel).swapped
        return self._output(input, ops.mapped_conv(input.F, self.kernel, *_maps(input, table), bias), key)


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


def _is_on_tiles(source: CoordinateMap, out: CoordinateMap, kernel: KernelGenerator) -> bool:
    """Whether the operators on tiles convolve from these sites to those: both are the same tiles."""
    stride = kernel.kernel_stride
    plain = kernel.region_type == RegionType.HYPER_CUBE and set(kernel.kernel_dilation) == {1} and len(set(stride)) == 1
    return plain and _are_children(source, out, stride[0])


def _are_children(fine: CoordinateMap, coarse: CoordinateMap, factor: int) -> bool:
    """Whether the rows of the layout of `fine` are those of that of `coarse`, each divided into `factor**ndim`."""
    if fine.layout is None or coarse.layout is None:
        return False
    return fine.layout.tiles is coarse.layout.tiles and fine.layout.tile == coarse.layout.tile * factor


def _from_layout(features: Tensor, known: CoordinateMap) -> Tensor:
    """Rows in the order of the map."""
    if known.order is None:
        return features
    return permuted(features, known.back, known.order)


def _maps(input: SparseTensor, table: KernelMap) -> tuple[Tensor, Tensor | None]:
    """A kernel map, and where a gradient needs it the inverse."""
    needed = torch.is_grad_enabled() and input.requires_grad
    return table.table, table.inverse if needed else None


def _nested(kernel: Tensor, factor: int, axes: int) -> Tensor:
    """Taps `(K, C_in, C_out)` of a kernel as large as its stride in the nested order of a site's children."""
    by_axis = kernel.reshape(*[factor] * axes, *kernel.shape[1:])  # the last axis first
    return tile_to_rows(by_axis.permute(*reversed(range(axes)), axes, axes + 1).flatten(axes)[None], axes).view(
        kernel.shape
    )
