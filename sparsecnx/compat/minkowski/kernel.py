"""Size, stride, dilation and shape of a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.compat.minkowski.enums import RegionType
from sparsecnx.compat.minkowski.errors import not_offered, require, require_type, with_missing_members
from sparsecnx.geometry.coordinates import offsets_of


def convert_to_int_list(arg: Any, dimension: int, name: str = "arg") -> list[int]:
    """Return one number, or one for each axis, as a list of `dimension` numbers.

    Raises:
        ArgumentError, ArgumentTypeError: it is something else; the message calls it `name`.
    """
    if isinstance(arg, (Sequence, np.ndarray, Tensor)) and not isinstance(arg, str):
        entries = [entry.item() if isinstance(entry, (Tensor, np.generic)) else entry for entry in arg]
        whole = all(isinstance(e, (int, float)) and math.isfinite(e) and int(e) == e for e in entries)
        require(whole, f"{name} is {entries}: expected whole numbers")
        found = [int(entry) for entry in entries]
        require(len(found) == dimension, f"{name} is {found}: expected {dimension} numbers, one for each axis")
        return found
    require_type(arg, (int, np.integer), name, "a number, or one for each axis")
    return [int(arg)] * dimension


@with_missing_members
class KernelGenerator:
    """The geometry of a kernel.

    Attributes:
        kernel_size, kernel_stride, kernel_dilation: one number for each of `dimension` axes.
        region_type: a cube, or a cross of odd sizes, which has the sites along the axes only.
        kernel_volume: number K of taps.
        requires_strided_coordinates: True if all strides are 1, as in MinkowskiEngine.
    """

    def __init__(
        self,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        is_transpose: bool = False,
        region_type: RegionType = RegionType.HYPER_CUBE,
        region_offsets: Tensor | None = None,
        expand_coordinates: bool = False,
        axis_types: Any = None,
        dimension: int = -1,
    ) -> None:
        """
        Raises:
            ArgumentError, ArgumentTypeError: a size does not fit; the message names it.
            NotOffered: a custom region, mixed axis types, or `expand_coordinates`.
        """
        require_type(dimension, int, "dimension", "the number of spatial axes")
        require(dimension > 0, f"dimension is {dimension}: expected the number of spatial axes, at least 1")
        require_type(region_type, RegionType, "region_type", "a RegionType")
        if region_type == RegionType.CUSTOM or region_offsets is not None or axis_types is not None:
            raise not_offered("KernelGenerator with a custom region", "region_type=RegionType.HYPER_CUBE")
        if expand_coordinates:
            raise not_offered("expand_coordinates=True", "a list of output sites as the argument `coordinates`")
        self.dimension = dimension
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        sizes = {name: convert_to_int_list(value, dimension, name) for name, value in geometry.items()}
        for name, found in sizes.items():
            require(min(found) > 0, f"{name} is {found}: expected at least 1 along each axis")
        self.kernel_size, self.kernel_stride, self.kernel_dilation = sizes.values()
        self.region_type = region_type
        self.region_offsets = torch.IntTensor()
        self.axis_types = None
        self.expand_coordinates = False
        self.requires_strided_coordinates = set(self.kernel_stride) == {1}
        if region_type == RegionType.HYPER_CROSS:
            odd = all(size % 2 for size in self.kernel_size)
            require(odd, f"kernel_size is {self.kernel_size}: a cross needs odd sizes")
            self.kernel_volume = 1 + sum(size - 1 for size in self.kernel_size)
        else:
            self.kernel_volume = math.prod(self.kernel_size)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for kernels that read the same sites."""
        return (self.region_type, *self.kernel_size, *self.kernel_dilation)

    def offsets(self, tensor_stride: Sequence[int], partition: bool = False) -> Tensor:
        """Return int64 `(K, dimension)`: the offsets of the taps from the output's site, on a map of this stride.

        With `partition`, for pooling with a kernel as large as its stride, they start at the output's site.
        """
        if partition:
            if self.region_type != RegionType.HYPER_CUBE:
                raise not_offered("pooling with a cross as large as its stride", "RegionType.HYPER_CUBE")
            centred = offsets_of(self.kernel_size, tensor_stride)
            return centred - centred.amin(dim=0)
        step = [stride * dilation for stride, dilation in zip(tensor_stride, self.kernel_dilation, strict=True)]
        if self.region_type == RegionType.HYPER_CUBE:
            return offsets_of(self.kernel_size, step)
        # The order of MinkowskiEngine: the site itself, then along each axis the sites after it and before it.
        taps = [[0] * self.dimension]
        for axis, size in enumerate(self.kernel_size):
            reach = size // 2
            for place in (*range(1, reach + 1), *range(-reach, 0)):
                taps.append([place * step[axis] if other == axis else 0 for other in range(self.dimension)])
        return torch.tensor(taps, dtype=torch.int64)

    @property
    def plain(self) -> bool:
        """Return True for cubes without dilation and with the same stride along all axes."""
        one_stride = len(set(self.kernel_stride)) == 1 and set(self.kernel_dilation) == {1}
        return self.region_type == RegionType.HYPER_CUBE and one_stride

    @property
    def covers(self) -> bool:
        """Return True for even cubes as large as their stride, whose taps read from one output site up to the next."""
        return self.plain and self.kernel_size == self.kernel_stride and self.kernel_size[0] % 2 == 0

    def __repr__(self) -> str:
        return (
            f"KernelGenerator(kernel_size={self.kernel_size}, kernel_stride={self.kernel_stride}, "
            f"kernel_dilation={self.kernel_dilation}, region_type={self.region_type}, dimension={self.dimension})"
        )
