"""MinkowskiOps: conversion between dense and sparse tensors, and operations on several sparse tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.base import MinkowskiModuleBase, variants
from sparsecnx.compat.minkowski.errors import require, require_type
from sparsecnx.compat.minkowski.layers import MinkowskiLinear as MinkowskiLinear  # part of MinkowskiOps
from sparsecnx.compat.minkowski.manager import CoordinateManager
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor, require_same_sites
from sparsecnx.geometry.coordinates import CoordinateMap, tiles_of_mask
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tables import ordinary_tensors


def to_sparse(
    x: Tensor, format: str | None = None, coordinates: Any = None, device: torch.device | str | None = None
) -> SparseTensor:
    """Return the sites of a dense tensor where any channel is not 0.

    Sites that form tiles, as under a mask of patches, are recognised. The rows are then in the order of the tiles, and
    otherwise in raster order.

    Args:
        x: `(B, C, *spatial)`, or in the order of `format`.
        format: of the axes, `B` first, one `C`, and an `X` for each spatial axis: `"BXXC"`.
        coordinates: ignored, as in MinkowskiEngine.
        device: of the result; by default that of `x`.
    """
    require_type(x, Tensor, "x", "a dense tensor (B, C, *spatial)")
    require(x.ndim > 2, f"x is {tuple(x.shape)}: expected (B, C, *spatial)")
    if format is None:
        format = "BC" + "X" * (x.ndim - 2)
    well_formed = format[0] == "B" and sorted(format) == sorted("BC" + "X" * (x.ndim - 2))
    require(well_formed, f"format is {format!r}: expected B first, one C and {x.ndim - 2} X for x {tuple(x.shape)}")
    x = x.movedim(format.index("C"), 1)
    if device is not None:
        x = x.to(device)
    return _with_sites(x, (x.detach() != 0).any(dim=1))


def to_sparse_all(dense_tensor: Tensor, coordinates: Tensor | None = None) -> SparseTensor:
    """Return all sites of a dense tensor `(B, C, *spatial)`.

    With `coordinates`, such as `dense_coordinates` returns, the values in raster order are put at these.
    """
    require_type(dense_tensor, Tensor, "dense_tensor", "a dense tensor (B, C, *spatial)")
    require(dense_tensor.ndim > 2, f"dense_tensor is {tuple(dense_tensor.shape)}: expected (B, C, *spatial)")
    if coordinates is not None:
        features = dense_tensor.movedim(1, -1).reshape(-1, dense_tensor.shape[1])
        return SparseTensor(features, coordinates, device=dense_tensor.device)
    everywhere = torch.ones_like(dense_tensor[:, 0], dtype=torch.bool)
    return _with_sites(dense_tensor, everywhere)


def _with_sites(x: Tensor, active: Tensor) -> SparseTensor:
    """Return the active sites, bool `(B, *spatial)`, of `x (B, C, *spatial)`."""
    manager = CoordinateManager(x.ndim - 2)
    with ordinary_tensors():
        layout = tiles_of_mask(active)
        sites = active.nonzero().to(torch.int32) if layout is None else None
        key = manager.insert(CoordinateMap((1,) * manager.D, sites, layout))
    features = x.movedim(1, -1)[active] if layout is None else gather_rows(x, layout)
    return SparseTensor(features, coordinate_map_key=key, coordinate_manager=manager)


def dense_coordinates(shape: Sequence[int]) -> Tensor:
    """Return the coordinates of all sites of a dense tensor in raster order, int32 `(B * sites, 1 + D)`."""
    require(len(shape) > 2, f"shape is {tuple(shape)}: expected (B, C, *spatial)")
    axes = [torch.arange(size, dtype=torch.int32) for size in (shape[0], *shape[2:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def _on_features(tensors: tuple[Any, ...], combine: Callable[[list[Tensor]], Tensor]) -> SparseTensor:
    """Combine tensors on the same sites, given one by one or in a list."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    require(len(tensors) > 1, f"{len(tensors)} tensors are given: expected at least two")
    require_type(tensors[0], SparseTensor, "argument 0", "a SparseTensor")
    for number, tensor in enumerate(tensors):
        require_same_sites(tensors[0], tensor, f"argument {number}")
    combined: SparseTensor = tensors[0]._with(combine([tensor.F for tensor in tensors]))
    return combined


def cat(*sparse_tensors: Any) -> SparseTensor:
    """Concatenate the features of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.cat(features, dim=-1))


def sum(*sparse_tensors: Any) -> SparseTensor:
    """Return the sum of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).sum(dim=0))


def mean(*sparse_tensors: Any) -> SparseTensor:
    """Return the mean of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).mean(dim=0))


def var(*sparse_tensors: Any) -> SparseTensor:
    """Return the biased variance of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).var(dim=0, correction=0))


_sum = sum  # a name in MinkowskiOps


class MinkowskiToSparseTensor(MinkowskiModuleBase):
    """Dense `(B, C, *spatial)` to a SparseTensor, by `to_sparse`, or by `to_sparse_all` with `remove_zeros=False`."""

    def __init__(self, remove_zeros: bool = True, coordinates: Tensor | None = None) -> None:
        super().__init__()
        self.remove_zeros = remove_zeros
        self.coordinates = coordinates

    def forward(self, input: Tensor) -> SparseTensor:
        if self.remove_zeros and self.coordinates is None:
            return to_sparse(input)
        return to_sparse_all(input, self.coordinates)


class MinkowskiToDenseTensor(MinkowskiModuleBase):
    """A SparseTensor to a dense tensor of the shape `(B, C, *spatial)`, see `SparseTensor.dense`."""

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input: SparseTensor) -> Tensor:
        require_type(input, SparseTensor, "input", "a SparseTensor")
        return input.dense(self.shape)[0]


class MinkowskiToFeature(MinkowskiModuleBase):
    """A SparseTensor to its features, `(rows, C)`."""

    def forward(self, x: SparseTensor) -> Tensor:
        require_type(x, SparseTensor, "x", "a SparseTensor")
        return x.F


class _Stack(nn.Sequential):
    """Several modules on one input, with their outputs combined."""

    combine: Callable[..., SparseTensor]

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.combine([module(x) for module in self])


_STACKS = {f"MinkowskiStack{kind.__name__.title()}": {"combine": staticmethod(kind)} for kind in (cat, sum, mean, var)}
globals().update(variants(_Stack, _STACKS))


class MinkowskiPruning(MinkowskiModuleBase):
    """Removal of sites."""

    def forward(self, input: SparseTensor, mask: Tensor) -> SparseTensor:
        """Keep the rows of features `(rows, C)` where `mask`, bool `(rows,)`, is True, in their order."""
        require_type(input, SparseTensor, "input", "a SparseTensor")
        require_type(mask, Tensor, "mask", "a bool tensor (rows,)")
        if mask.dtype == torch.uint8:  # bool before torch 1.2
            mask = mask.bool()
        shape, rows = tuple(mask.shape), len(input)
        fits = mask.dtype == torch.bool and shape == (rows,)
        require(fits, f"mask is {mask.dtype} {shape}: expected torch.bool ({rows},)")
        require(mask.device == input.device, f"mask is on {mask.device}: the input is on {input.device}")
        manager, known = input.coordinate_manager, input._map
        pruned = CoordinateMap.from_coordinates(known.coordinates[mask], known.stride)
        key = manager.insert_from(input.coordinate_map_key, pruned)
        return input._with(input.F[mask], key)


class MinkowskiUnion(nn.Module):
    """Sum of tensors on the sites of any of them; a tensor without a site counts as 0 there."""

    def forward(self, *inputs: SparseTensor) -> SparseTensor:
        """Add features `(rows_i, C)` to `(rows, C)`."""
        require(len(inputs) > 1, f"{len(inputs)} tensors are given: expected at least two")
        for number, tensor in enumerate(inputs):
            require_type(tensor, SparseTensor, f"argument {number}", "a SparseTensor")
            require(tensor.coordinate_manager is inputs[0].coordinate_manager, OTHER_MANAGER)
            channels = tensor.F.shape[1], inputs[0].F.shape[1]
            require(channels[0] == channels[1], f"argument {number} has {channels[0]} channels: expected {channels[1]}")
        manager = inputs[0].coordinate_manager
        key, places = manager.union([tensor.coordinate_map_key for tensor in inputs])
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs))
        features = inputs[0].F.new_zeros(manager.size(key), inputs[0].F.shape[1], dtype=dtype)
        for tensor, rows in zip(inputs, places, strict=True):
            features = features.index_add(0, rows, tensor.F.to(dtype))
        return inputs[0]._with(features, key)
