"""Pooling over windows and over whole images, and layers that bring the features of an image back to its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecnx import ops
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.compat.minkowski.base import KernelLayer, MinkowskiModuleBase, tables
from sparsecnx.compat.minkowski.enums import BroadcastMode, PoolingMode
from sparsecnx.compat.minkowski.errors import not_offered, require, require_type
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.manager import Origin
from sparsecnx.compat.minkowski.rows import spread, sum_by_number
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor, Target


class _Pooling(KernelLayer):
    """Pooling over the active sites under a kernel; a mean counts these only.

    A kernel as large as its stride begins at the output's site. Any other kernel lies as that of a convolution.

    Args:
        kernel_size, stride, dilation: one number, or one for each axis.
        kernel_generator: the geometry, instead of these three.
        dimension: number of spatial axes.

    Raises:
        NotOffered: a custom region.
    """

    MODE: PoolingMode

    def __init__(
        self,
        kernel_size: Any = -1,
        stride: Any = 1,
        dilation: Any = 1,
        kernel_generator: KernelGenerator | None = None,
        dimension: int | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, dilation, kernel_generator, dimension)
        self.pooling_mode = self.MODE

    def forward(self, input: SparseTensor, coordinates: Target = None) -> SparseTensor:
        """Pool features `(rows, C)` to `(rows_out, C)`.

        Args:
            coordinates: the sites to compute, as a tensor `(rows_out, 1 + D)`, or those of another tensor of the same
                manager; by default those that follow from the stride.
        """
        self._check(input)
        kernel, key = self.kernel_generator, self._output_key(input, coordinates)
        table = input.coordinate_manager.table(input.coordinate_map_key, key, kernel, kernel.is_partition)
        kernel_map, inverse = tables(input, table)
        return self._output(input, ops.mapped_pool(input.F, kernel_map, self.MODE.reduction, inverse), key)


class MinkowskiSumPooling(_Pooling):
    __doc__ = _Pooling.__doc__
    MODE = PoolingMode.LOCAL_SUM_POOLING


class MinkowskiAvgPooling(_Pooling):
    __doc__ = _Pooling.__doc__
    MODE = PoolingMode.LOCAL_AVG_POOLING


class MinkowskiMaxPooling(_Pooling):
    __doc__ = _Pooling.__doc__
    MODE = PoolingMode.LOCAL_MAX_POOLING


class MinkowskiGlobalPooling(MinkowskiModuleBase):
    """Pooling over all sites of each image, to `(images, C)` at the origin.

    Args:
        mode: a global PoolingMode: sum, mean or maximum.
    """

    MODE = PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX

    def __init__(self, mode: PoolingMode | None = None) -> None:
        super().__init__()
        mode = self.MODE if mode is None else mode
        require_type(mode, PoolingMode, "mode", "a global PoolingMode")
        require(mode.name.startswith("GLOBAL"), f"mode is {mode.name}: expected a global PoolingMode")
        self.pooling_mode = mode

    def forward(self, input: SparseTensor, coordinates: Any = None) -> SparseTensor:
        """Pool features `(rows, C)` to `(images, C)`, for the images that have sites.

        Raises:
            NotOffered: `coordinates` is given.
        """
        require_type(input, SparseTensor, "input", "a SparseTensor")
        if coordinates is not None:
            raise not_offered("global pooling onto given coordinates", "global pooling without `coordinates`")
        manager = input.coordinate_manager
        origin = manager.at_origin(input.coordinate_map_key)
        if self.pooling_mode.reduction == "max":
            pooled = _maximum(input, origin)
        else:
            pooled = sum_by_number(input.F, origin.rows, len(origin.counts))
            if self.pooling_mode.reduction == "avg":
                pooled = pooled / origin.counts[:, None]
            pooled = pooled.to(input.dtype)
        return SparseTensor(pooled, coordinate_map_key=manager.origin(), coordinate_manager=manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.pooling_mode.name})"


class MinkowskiGlobalSumPooling(MinkowskiGlobalPooling):
    """Sum over all sites of each image."""

    MODE = PoolingMode.GLOBAL_SUM_POOLING_PYTORCH_INDEX


class MinkowskiGlobalAvgPooling(MinkowskiGlobalPooling):
    """Mean over all sites of each image."""


class MinkowskiGlobalMaxPooling(MinkowskiGlobalPooling):
    """Maximum over all sites of each image."""

    MODE = PoolingMode.GLOBAL_MAX_POOLING_PYTORCH_INDEX


class _Broadcast(MinkowskiModuleBase):
    combine: Callable[[Tensor, Tensor], Tensor]  # of the features of sites and those of their images

    def forward(self, input: SparseTensor, input_glob: SparseTensor) -> SparseTensor:
        """Combine features `(rows, C)` with those of the images, `(images, C)` from a global pooling."""
        require_type(input, SparseTensor, "input", "a SparseTensor")
        require_type(input_glob, SparseTensor, "input_glob", "a SparseTensor from a global pooling")
        require(input_glob.coordinate_manager is input.coordinate_manager, OTHER_MANAGER)
        origin = input.coordinate_manager.at_origin(input.coordinate_map_key)
        require(
            input_glob.coordinate_map_key == input.coordinate_manager.origin(),
            f"input_glob is on {input_glob.coordinate_map_key}: expected the sites of a global pooling",
        )
        return input._with(self.combine(input.F, spread(input_glob.F, origin.rows)))


class MinkowskiBroadcastAddition(_Broadcast):
    """Adds the features of the image to those of every site."""

    operation_type = BroadcastMode.ELEMENTWISE_ADDITON
    combine = staticmethod(torch.add)


class MinkowskiBroadcastMultiplication(_Broadcast):
    """Multiplies the features of every site by those of the image."""

    operation_type = BroadcastMode.ELEMENTWISE_MULTIPLICATION
    combine = staticmethod(torch.mul)


class MinkowskiBroadcast(_Broadcast):
    """Gives every site the features of its image."""

    combine = staticmethod(lambda features, of_image: of_image)


class MinkowskiBroadcastConcatenation(_Broadcast):
    """Appends the features of the image to those of every site."""

    combine = staticmethod(lambda features, of_image: torch.cat([features, of_image], dim=1))


def normalise_by_image(x: SparseTensor, eps: float) -> Tensor:
    """Return the features with mean 0 and variance 1 in each image and channel; `eps` is added to the variance."""
    origin = x.coordinate_manager.at_origin(x.coordinate_map_key)
    rows, count = origin.rows, origin.counts[:, None]
    features = x.F.to(statistics_dtype(x.dtype))
    centred = features - spread(sum_by_number(features, rows, len(count)) / count, rows)
    variance = sum_by_number(centred.square(), rows, len(count)) / count
    return (centred * spread((variance + eps).rsqrt(), rows)).to(x.dtype)


def _maximum(x: SparseTensor, origin: Origin) -> Tensor:
    """Return the maxima `(images, C)`, 0 for an image that has lost all its sites.

    The gradient goes to one site, even if several have the maximum.
    """
    nothing = x.F.new_zeros(1, x.F.shape[1])
    maxima = [x.F[rows].max(dim=0, keepdim=True).values if len(rows) else nothing for rows in origin.by_image]
    return torch.cat(maxima) if maxima else nothing[:0]
