"""Pooling over windows and over whole images, and what brings an image's features back to its sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecnx import ops
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.compat.minkowski.convolution import MinkowskiModuleBase
from sparsecnx.compat.minkowski.enums import BroadcastMode, PoolingMode
from sparsecnx.compat.minkowski.errors import insist, insist_type, not_offered
from sparsecnx.compat.minkowski.kernel import KernelGenerator
from sparsecnx.compat.minkowski.manager import CoordinateMapKey, Origin
from sparsecnx.compat.minkowski.rows import spread, totals
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor, output_key


class _Pooling(MinkowskiModuleBase):
    """Pooling over the sites under a kernel; sites that are not there do not count, also not in a mean.

    A kernel as large as its stride takes the sites from the output's on; any other lies as a convolution's does.

    Args:
        kernel_size, stride, dilation: a number, or one for each axis.
        kernel_generator: the geometry, instead of the three numbers.
        dimension: number of spatial axes.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
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
        super().__init__()
        insist_type(dimension, int, "dimension", "the number of spatial axes")
        assert dimension is not None
        if kernel_generator is None:
            kernel_generator = KernelGenerator(kernel_size, stride, dilation, dimension=dimension)
        insist_type(kernel_generator, KernelGenerator, "kernel_generator", "a KernelGenerator")
        insist(
            kernel_generator.dimension == dimension,
            f"dimension is {dimension}: kernel_generator has {kernel_generator.dimension} axes",
        )
        self.kernel_generator = kernel_generator
        self.pooling_mode = self.MODE
        self.dimension = dimension
        self.is_transpose = False

    def forward(
        self, input: SparseTensor, coordinates: Tensor | CoordinateMapKey | SparseTensor | None = None
    ) -> SparseTensor:
        """Features `(rows, C)` to `(rows_out, C)`.

        Args:
            coordinates: the sites to compute, a tensor `(rows_out, 1 + D)`, or those of another tensor of the same
                manager; by default those that follow from the stride.
        """
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        insist(self.dimension == input.D, f"input has {input.D} spatial axes: the layer has dimension={self.dimension}")
        manager, kernel = input.coordinate_manager, self.kernel_generator
        stride = [a * b for a, b in zip(input.tensor_stride, kernel.kernel_stride, strict=True)]
        key = output_key(input, coordinates, stride)
        if key is None:
            key = manager.stride(input.coordinate_map_key, kernel.kernel_stride)
        table = manager.table(input.coordinate_map_key, key, kernel, kernel.partitions)
        back = table.inverse if torch.is_grad_enabled() and input.requires_grad else None
        pooled = ops.mapped_pool(input.F, table.table, self.MODE.reduction, back)
        return SparseTensor(pooled, coordinate_map_key=key, coordinate_manager=manager)

    def __repr__(self) -> str:
        kernel = self.kernel_generator
        return (
            f"{type(self).__name__}(kernel_size={kernel.kernel_size}, stride={kernel.kernel_stride}, "
            f"dilation={kernel.kernel_dilation})"
        )


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

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX) -> None:
        super().__init__()
        insist_type(mode, PoolingMode, "mode", "a global PoolingMode")
        insist(mode.name.startswith("GLOBAL"), f"mode is {mode.name}: expected a global PoolingMode")
        self.pooling_mode = mode

    def forward(self, input: SparseTensor, coordinates: Any = None) -> SparseTensor:
        """Features `(rows, C)` to `(images, C)`, of the images that have sites.

        Raises:
            NotOffered: with `coordinates`.
        """
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        if coordinates is not None:
            raise not_offered("global pooling onto given coordinates", "global pooling without `coordinates`")
        manager = input.coordinate_manager
        origin = manager.at_origin(input.coordinate_map_key)
        if self.pooling_mode.reduction == "max":
            pooled = _maximum(input, origin)
        else:
            pooled = totals(input.F, origin.rows, len(origin.counts))
            if self.pooling_mode.reduction == "avg":
                pooled = pooled / origin.counts[:, None]
            pooled = pooled.to(input.dtype)
        return SparseTensor(pooled, coordinate_map_key=manager.origin(), coordinate_manager=manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.pooling_mode.name})"


class MinkowskiGlobalSumPooling(MinkowskiGlobalPooling):
    """The sum over all sites of each image."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_SUM_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


class MinkowskiGlobalAvgPooling(MinkowskiGlobalPooling):
    """The mean over all sites of each image."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


class MinkowskiGlobalMaxPooling(MinkowskiGlobalPooling):
    """The maximum over all sites of each image."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_MAX_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


class _Broadcast(MinkowskiModuleBase):
    def forward(self, input: SparseTensor, input_glob: SparseTensor) -> SparseTensor:
        """Features `(rows, C)` and those of the images, `(images, C)` from a global pooling, to `(rows, C')`."""
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        insist_type(input_glob, SparseTensor, "input_glob", "a SparseTensor from a global pooling")
        insist(input_glob.coordinate_manager is input.coordinate_manager, OTHER_MANAGER)
        origin = input.coordinate_manager.at_origin(input.coordinate_map_key)
        insist(
            input_glob.coordinate_map_key == input.coordinate_manager.origin(),
            f"input_glob is on {input_glob.coordinate_map_key}: expected the sites of a global pooling",
        )
        return input._with(self.combine(input.F, spread(input_glob.F, origin.rows)))

    def combine(self, features: Tensor, of_image: Tensor) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__


class MinkowskiBroadcastAddition(_Broadcast):
    """To every site's features those of its image added."""

    operation_type = BroadcastMode.ELEMENTWISE_ADDITON

    def combine(self, features: Tensor, of_image: Tensor) -> Tensor:
        return features + of_image


class MinkowskiBroadcastMultiplication(_Broadcast):
    """Every site's features times those of its image."""

    operation_type = BroadcastMode.ELEMENTWISE_MULTIPLICATION

    def combine(self, features: Tensor, of_image: Tensor) -> Tensor:
        return features * of_image


class MinkowskiBroadcast(_Broadcast):
    """At every site the features of its image."""

    def combine(self, features: Tensor, of_image: Tensor) -> Tensor:
        return of_image


class MinkowskiBroadcastConcatenation(_Broadcast):
    """Behind every site's features those of its image."""

    def combine(self, features: Tensor, of_image: Tensor) -> Tensor:
        return torch.cat([features, of_image], dim=1)


def normalised_by_image(x: SparseTensor, eps: float) -> Tensor:
    """Features `(rows, C)` of zero mean and, but for `eps` in the variance, unit variance in each image and channel."""
    origin = x.coordinate_manager.at_origin(x.coordinate_map_key)
    rows, count = origin.rows, origin.counts[:, None]
    features = x.F.to(statistics_dtype(x.dtype))
    centred = features - spread(totals(features, rows, len(count)) / count, rows)
    variance = totals(centred.square(), rows, len(count)) / count
    return (centred * spread((variance + eps).rsqrt(), rows)).to(x.dtype)


def _maximum(x: SparseTensor, origin: Origin) -> Tensor:
    """Maxima by image, `(images, C)`; the gradient goes to one site, also where several have it. 0 for an image that
    has lost all its sites."""
    nothing = x.F.new_zeros(1, x.F.shape[1])
    maxima = [x.F[rows].max(dim=0, keepdim=True).values if len(rows) else nothing for rows in origin.by_image]
    return torch.cat(maxima) if maxima else nothing[:0]
