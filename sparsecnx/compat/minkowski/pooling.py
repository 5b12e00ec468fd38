"""Pooling over windows and whole images, broadcasts from an image to its sites, and normalisation by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx import ops
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.compat.minkowski.base import KernelLayer, MinkowskiModuleBase, Target, tables, variants
from sparsecnx.compat.minkowski.enums import BroadcastMode, PoolingMode
from sparsecnx.compat.minkowski.errors import not_offered, require, require_type
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor


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

    pooling_mode: PoolingMode

    def forward(self, input: SparseTensor, coordinates: Target = None) -> SparseTensor:
        """Pool features `(rows, C)` to `(rows_out, C)`.

        Args:
            coordinates: the sites to compute, as a tensor `(rows_out, 1 + D)`, or those of another tensor of the same
                manager; by default those that follow from the stride.
        """
        self._check(input)
        kernel, key = self.kernel_generator, self._output_key(input, coordinates)
        table = input.coordinate_manager.table(input.coordinate_map_key, key, kernel, is_pool=True)
        kernel_map, inverse = tables(input, table)
        return input._with(ops.mapped_pool(input.F, kernel_map, _reduction(self.pooling_mode), inverse), key)


_LOCAL = {
    f"Minkowski{name}Pooling": {"pooling_mode": PoolingMode[f"LOCAL_{name.upper()}_POOLING"]}
    for name in ("Sum", "Avg", "Max")
}
globals().update(variants(_Pooling, _LOCAL))


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
        image, counts = manager.at_origin(input.coordinate_map_key)
        reduction = _reduction(self.pooling_mode)
        if reduction == "max":
            pooled = _maximum(input.F, image, counts)
        else:
            pooled = _sum_by_image(input.F, image, len(counts))
            if reduction == "avg":
                pooled = pooled / counts.clamp(min=1)[:, None]
            pooled = pooled.to(input.dtype)
        return input._with(pooled, manager.origin())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.pooling_mode.name})"


_GLOBAL = {
    f"MinkowskiGlobal{name}Pooling": {
        "__doc__": f"{reduction} over all sites of each image.",
        "MODE": PoolingMode[f"GLOBAL_{name.upper()}_POOLING_PYTORCH_INDEX"],
    }
    for name, reduction in (("Sum", "Sum"), ("Avg", "Mean"), ("Max", "Maximum"))
}
globals().update(variants(MinkowskiGlobalPooling, _GLOBAL))


class _Broadcast(MinkowskiModuleBase):
    combine: Callable[[Tensor, Tensor], Tensor]  # of the features of sites and those of their images

    def forward(self, input: SparseTensor, input_glob: SparseTensor) -> SparseTensor:
        """Combine features `(rows, C)` with those of the images, `(images, C)` from a global pooling."""
        require_type(input, SparseTensor, "input", "a SparseTensor")
        require_type(input_glob, SparseTensor, "input_glob", "a SparseTensor from a global pooling")
        require(input_glob.coordinate_manager is input.coordinate_manager, OTHER_MANAGER)
        image, _ = input.coordinate_manager.at_origin(input.coordinate_map_key)
        require(
            input_glob.coordinate_map_key == input.coordinate_manager.origin(),
            f"input_glob is on {input_glob.coordinate_map_key}: expected the sites of a global pooling",
        )
        return input._with(self.combine(input.F, _at_sites(input_glob.F, image)))


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


class MinkowskiInstanceNorm(MinkowskiModuleBase):
    """Normalisation over the sites of each image, with `weight` and `bias (1, C)`; `EPS` is added to the variance."""

    EPS = 1e-8

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(1, num_features))
        self.bias = nn.Parameter(torch.zeros(1, num_features))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Normalise features `(rows, C)`."""
        require_type(input, SparseTensor, "input", "a SparseTensor")
        image, counts = input.coordinate_manager.at_origin(input.coordinate_map_key)
        count = counts.clamp(min=1)[:, None]
        features = input.F.to(statistics_dtype(input.dtype))
        centred = features - _at_sites(_sum_by_image(features, image, len(count)) / count, image)
        variance = _sum_by_image(centred.square(), image, len(count)) / count
        normal = (centred * _at_sites((variance + self.EPS).rsqrt(), image)).to(input.dtype)
        return input._with(normal * self.weight + self.bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nchannels={self.num_features})"


class MinkowskiStableInstanceNorm(MinkowskiInstanceNorm):
    """Instance normalisation with a larger `EPS`."""

    EPS = 1e-6


def _reduction(mode: PoolingMode) -> str:
    """Return `"sum"`, `"avg"` or `"max"`."""
    return mode.name.split("_")[1].lower()


def _at_sites(of_images: Tensor, image: Tensor) -> Tensor:
    """Return the row of the image of each site. The gradient is summed in float32 at least."""
    return of_images.to(statistics_dtype(of_images.dtype)).index_select(0, image).to(of_images.dtype)


def _sum_by_image(features: Tensor, image: Tensor, images: int) -> Tensor:
    """Return `(images, C)`: the sum over the sites of each image, in float32 at least."""
    features = features.to(statistics_dtype(features.dtype))
    return features.new_zeros(images, features.shape[1]).index_add(0, image, features)


def _maximum(features: Tensor, image: Tensor, counts: Tensor) -> Tensor:
    """Return the maxima `(images, C)`, 0 for an image that has lost all its sites.

    The gradient goes to one site, even if several have the maximum.
    """
    nothing = features.new_zeros(1, features.shape[1])
    by_image = features.index_select(0, image.argsort(stable=True)).split(counts.tolist())
    maxima = [rows.max(dim=0, keepdim=True).values if len(rows) else nothing for rows in by_image]
    return torch.cat(maxima) if maxima else nothing[:0]
