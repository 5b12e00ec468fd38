"""Bases of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.enums import RegionType
from sparsecnx.compat.minkowski.errors import require, require_type
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.manager import CoordinateMapKey, KernelMap
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor, as_coordinates

Target = Tensor | CoordinateMapKey | SparseTensor | None  # the argument `coordinates` of layers

VARIANTS: dict[str, type] = {}  # the classes that `variants` has made; all of them are public


class MinkowskiModuleBase(nn.Module):
    """Base of all layers."""


def variants(base: type, table: Mapping[str, Mapping[str, Any]]) -> dict[str, type]:
    """Make subclasses of `base` from a table of their names and attributes. They belong to the module of `base`."""
    common = {"__doc__": base.__doc__, "__module__": base.__module__}
    made = {name: type(name, (base,), {**common, **attributes}) for name, attributes in table.items()}
    VARIANTS.update(made)
    return made


def on_features(input: SparseTensor, compute: Callable[[Tensor], Tensor]) -> SparseTensor:
    """Return a tensor on the same sites with the features that `compute` makes of those of `input`."""
    require_type(input, SparseTensor, "input", "a SparseTensor")
    return input._with(compute(input.F))


class KernelLayer(MinkowskiModuleBase):
    """Base of the layers with a kernel: convolutions, and pooling over windows."""

    is_transpose = False
    in_channels: int | None = None  # any number
    out_channels: int | None = None

    def __init__(
        self,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        kernel_generator: KernelGenerator | None = None,
        dimension: int | None = None,
    ) -> None:
        super().__init__()
        require_type(dimension, int, "dimension", "the number of spatial axes")
        assert dimension is not None
        if kernel_generator is None:
            kernel_generator = KernelGenerator(kernel_size, stride, dilation, dimension=dimension)
        require_type(kernel_generator, KernelGenerator, "kernel_generator", "a KernelGenerator")
        axes = kernel_generator.dimension
        require(axes == dimension, f"dimension is {dimension}: kernel_generator has {axes} axes")
        self.kernel_generator = kernel_generator
        self.dimension = dimension

    def _check(self, input: SparseTensor) -> None:
        require_type(input, SparseTensor, "input", "a SparseTensor")
        axes, channels = input.D, input.F.shape[1]
        require(self.dimension == axes, f"input has {axes} spatial axes: the layer has dimension={self.dimension}")
        fits = self.in_channels in (None, channels)
        require(fits, f"input has {channels} channels: the layer takes {self.in_channels}")

    def _output_key(self, input: SparseTensor, coordinates: Target) -> CoordinateMapKey:
        """Return the key of the sites in `coordinates`, or else of those that follow from the stride.

        Raises:
            ArgumentError, ArgumentTypeError: `coordinates` has another type, or another manager.
        """
        manager, key, kernel = input.coordinate_manager, input.coordinate_map_key, self.kernel_generator
        if coordinates is None:
            return manager.finer(key, kernel) if self.is_transpose else manager.stride(key, kernel.kernel_stride)
        if isinstance(coordinates, SparseTensor):
            require(coordinates.coordinate_manager is manager, OTHER_MANAGER)
            return coordinates.coordinate_map_key
        if isinstance(coordinates, CoordinateMapKey):
            return coordinates
        expected = "a tensor (rows, 1 + D), a SparseTensor or a CoordinateMapKey"
        coordinates = as_coordinates(coordinates, expected, input.D)
        here, there = input.device, coordinates.device
        require(here == there, f"coordinates is on {there}: the input is on {here}")
        steps = zip(input.tensor_stride, kernel.kernel_stride, strict=True)
        stride = [max(1, step // factor) if self.is_transpose else step * factor for step, factor in steps]
        return manager.insert_target(key, coordinates, stride)

    def __repr__(self) -> str:
        kernel = self.kernel_generator
        channels = "" if self.in_channels is None else f"in={self.in_channels}, out={self.out_channels}, "
        shape = "" if kernel.region_type == RegionType.HYPER_CUBE else f", region_type={kernel.region_type.name}"
        return (
            f"{type(self).__name__}({channels}kernel_size={kernel.kernel_size}, "
            f"stride={kernel.kernel_stride}, dilation={kernel.kernel_dilation}{shape})"
        )


def tables(input: SparseTensor, table: KernelMap) -> tuple[Tensor, Tensor | None]:
    """Return a kernel map as the operators take it: the table, and the inverse if a gradient needs it."""
    needed = torch.is_grad_enabled() and input.requires_grad
    return table.table, table.inverse if needed else None
