"""Bases of the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.enums import RegionType
from sparsecnx.compat.minkowski.errors import require, require_type
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.manager import CoordinateMapKey, KernelMap
from sparsecnx.compat.minkowski.tensor import SparseTensor, Target, output_key


class MinkowskiModuleBase(nn.Module):
    """Base of all layers."""


def on_features(input: SparseTensor, compute: Callable[[Tensor], Tensor]) -> SparseTensor:
    """Return a tensor on the same sites with the features that `compute` makes of those of `input`."""
    require_type(input, SparseTensor, "input", "a SparseTensor")
    return input._with(compute(input.F))


class KernelLayer(MinkowskiModuleBase):
    """Base of the layers with a kernel.

    Args:
        kernel_size, stride, dilation: one number, or one for each axis.
        kernel_generator: the geometry, instead of these three.
        dimension: number of spatial axes.
    """

    is_transpose = False

    def __init__(
        self,
        kernel_size: Any,
        stride: Any,
        dilation: Any,
        kernel_generator: KernelGenerator | None,
        dimension: int | None,
    ) -> None:
        super().__init__()
        require_type(dimension, int, "dimension", "the number of spatial axes")
        assert dimension is not None
        kernel = kernel_generator
        if kernel is None:
            kernel = KernelGenerator(kernel_size, stride, dilation, dimension=dimension)
        require_type(kernel, KernelGenerator, "kernel_generator", "a KernelGenerator")
        axes = kernel.dimension
        require(axes == dimension, f"dimension is {dimension}: kernel_generator has {axes} axes")
        self.kernel_generator = kernel
        self.dimension = dimension

    def _check(self, input: SparseTensor) -> None:
        require_type(input, SparseTensor, "input", "a SparseTensor")
        require(
            self.dimension == input.D, f"input has {input.D} spatial axes: the layer has dimension={self.dimension}"
        )

    def _output_key(self, input: SparseTensor, coordinates: Target) -> CoordinateMapKey:
        """Return the key of the sites in `coordinates`, or else of those that follow from the stride."""
        kernel = self.kernel_generator
        stride = [a * b for a, b in zip(input.tensor_stride, kernel.kernel_stride, strict=True)]
        asked = output_key(input, coordinates, stride)
        if asked is not None:
            return asked
        return input.coordinate_manager.stride(input.coordinate_map_key, kernel.kernel_stride)

    def _output(self, input: SparseTensor, features: Tensor, key: CoordinateMapKey) -> SparseTensor:
        return SparseTensor(features, coordinate_map_key=key, coordinate_manager=input.coordinate_manager)

    def __repr__(self) -> str:
        kernel = self.kernel_generator
        shape = "" if kernel.region_type == RegionType.HYPER_CUBE else f", region_type={kernel.region_type.name}"
        return (
            f"{type(self).__name__}({self._repr_channels()}kernel_size={kernel.kernel_size}, "
            f"stride={kernel.kernel_stride}, dilation={kernel.kernel_dilation}{shape})"
        )

    def _repr_channels(self) -> str:
        return ""


def tables(input: SparseTensor, table: KernelMap) -> tuple[Tensor, Tensor | None]:
    """Return a kernel map as the operators take it: the table, and the inverse if a gradient needs it."""
    needed = torch.is_grad_enabled() and input.requires_grad
    return table.table, table.inverse if needed else None
