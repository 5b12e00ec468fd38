"""MinkowskiOps: between dense and sparse tensors, and between sparse tensors on the same sites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.compat.minkowski.convolution import MinkowskiModuleBase
from sparsecnx.compat.minkowski.errors import insist, insist_type
from sparsecnx.compat.minkowski.layers import MinkowskiLinear
from sparsecnx.compat.minkowski.manager import CoordinateManager
from sparsecnx.compat.minkowski.tensor import OTHER_MANAGER, SparseTensor
from sparsecnx.geometry.coordinates import CoordinateMap, for_any_mode, tiles_of_mask
from sparsecnx.geometry.packing import gather_rows


def to_sparse(
    x: Tensor,
    format: str | None = None,
    coordinates: Any = None,
    device: torch.device | str | None = None,
) -> SparseTensor:
    """The sites of a dense tensor where any channel is not 0. Sites that form tiles, as those under a mask of patches
    do, are recognised: the rows are then in the order of the tiles, otherwise in raster order.

    Args:
        x: `(B, C, *spatial)`, or as `format` says.
        format: of the axes, `B` first, one `C`, and an `X` for each spatial one: `"BXXC"`.
        coordinates: ignored, as by MinkowskiEngine.
        device: where the tensor is made; that of `x` by default.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
    """
    insist_type(x, Tensor, "x", "a dense tensor (B, C, *spatial)")
    insist(x.ndim > 2, f"x is {tuple(x.shape)}: expected (B, C, *spatial)")
    if format is None:
        format = "BC" + "X" * (x.ndim - 2)
    well_formed = format[0] == "B" and sorted(format) == sorted("BC" + "X" * (x.ndim - 2))
    insist(well_formed, f"format is {format!r}: expected B first, one C and {x.ndim - 2} X for x {tuple(x.shape)}")
    x = x.movedim(format.index("C"), 1)
    if device is not None:
        x = x.to(device)
    return _with_sites(x, (x.detach() != 0).any(dim=1))


def to_sparse_all(dense_tensor: Tensor, coordinates: Tensor | None = None) -> SparseTensor:
    """All sites of a dense tensor `(B, C, *spatial)`, or with `coordinates`, as of `dense_coordinates`, its values in
    raster order at those."""
    insist_type(dense_tensor, Tensor, "dense_tensor", "a dense tensor (B, C, *spatial)")
    insist(dense_tensor.ndim > 2, f"dense_tensor is {tuple(dense_tensor.shape)}: expected (B, C, *spatial)")
    if coordinates is not None:
        features = dense_tensor.movedim(1, -1).reshape(-1, dense_tensor.shape[1])
        return SparseTensor(features, coordinates, device=dense_tensor.device)
    everywhere = torch.ones_like(dense_tensor[:, 0], dtype=torch.bool)
    return _with_sites(dense_tensor, everywhere)


def _with_sites(x: Tensor, active: Tensor) -> SparseTensor:
    """The active sites, bool `(B, *spatial)`, of `x (B, C, *spatial)`."""
    manager = CoordinateManager(x.ndim - 2)
    stride = (1,) * manager.D
    with for_any_mode():
        layout = tiles_of_mask(active)
        sites = None if layout is not None else active.nonzero()
        known = CoordinateMap(stride, None if sites is None else sites.to(torch.int32), layout)
    if layout is not None:
        features = gather_rows(x, layout)
    else:
        assert sites is not None
        features = x.movedim(1, -1)[sites.unbind(dim=1)]
    return SparseTensor(features, coordinate_map_key=manager.insert(known), coordinate_manager=manager)


def dense_coordinates(shape: Sequence[int]) -> Tensor:
    """int32 `(B * sites, 1 + D)`: the coordinates of all sites of a dense tensor of that shape, in raster order."""
    insist(len(shape) > 2, f"shape is {tuple(shape)}: expected (B, C, *spatial)")
    axes = [torch.arange(size, dtype=torch.int32) for size in (shape[0], *shape[2:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def _on_features(tensors: tuple[Any, ...], combine: Callable[[list[Tensor]], Tensor]) -> SparseTensor:
    """Sparse tensors on the same sites, given one by one or in a list, combined."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    insist(len(tensors) > 1, f"{len(tensors)} tensors are given: expected at least two")
    for number, tensor in enumerate(tensors):
        insist_type(tensor, SparseTensor, f"argument {number}", "a SparseTensor")
        insist(tensor.coordinate_manager is tensors[0].coordinate_manager, OTHER_MANAGER)
        insist(
            tensor.coordinate_map_key == tensors[0].coordinate_map_key,
            f"argument {number} is on {tensor.coordinate_map_key}: expected the sites of the first, "
            f"{tensors[0].coordinate_map_key} (MinkowskiUnion adds tensors on different sites)",
        )
    combined: SparseTensor = tensors[0]._with(combine([tensor.F for tensor in tensors]))
    return combined


def cat(*sparse_tensors: Any) -> SparseTensor:
    """Features of tensors on the same sites, side by side."""
    return _on_features(sparse_tensors, lambda features: torch.cat(features, dim=-1))


def sum(*sparse_tensors: Any) -> SparseTensor:
    """Sum of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).sum(dim=0))


def mean(*sparse_tensors: Any) -> SparseTensor:
    """Mean of tensors on the same sites."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).mean(dim=0))


def var(*sparse_tensors: Any) -> SparseTensor:
    """Variance of tensors on the same sites, divided by their number."""
    return _on_features(sparse_tensors, lambda features: torch.stack(features).var(dim=0, correction=0))


_sum = sum  # MinkowskiOps' own name


class MinkowskiToSparseTensor(MinkowskiModuleBase):
    """Dense `(B, C, *spatial)` to a SparseTensor: sites that are not 0, or with `remove_zeros=False` all; with
    `coordinates` (as of `dense_coordinates`) all, in that order."""

    def __init__(self, remove_zeros: bool = True, coordinates: Tensor | None = None) -> None:
        super().__init__()
        self.remove_zeros = remove_zeros
        self.coordinates = coordinates

    def forward(self, input: Tensor) -> SparseTensor:
        if self.remove_zeros and self.coordinates is None:
            return to_sparse(input)
        return to_sparse_all(input, self.coordinates)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiToDenseTensor(MinkowskiModuleBase):
    """A SparseTensor to dense, of the given shape `(B, C, *spatial)`, see `SparseTensor.dense`."""

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input: SparseTensor) -> Tensor:
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        return input.dense(self.shape)[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiToFeature(MinkowskiModuleBase):
    """The features of a SparseTensor, `(rows, C)`."""

    def forward(self, x: SparseTensor) -> Tensor:
        insist_type(x, SparseTensor, "x", "a SparseTensor")
        return x.F


class _Stack(nn.Sequential):
    """Several modules on one input, their outputs combined."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.combine([module(x) for module in self])

    def combine(self, outputs: list[SparseTensor]) -> SparseTensor:
        raise NotImplementedError


class MinkowskiStackCat(_Stack):
    def combine(self, outputs: list[SparseTensor]) -> SparseTensor:
        return cat(outputs)


class MinkowskiStackSum(_Stack):
    def combine(self, outputs: list[SparseTensor]) -> SparseTensor:
        return sum(outputs)


class MinkowskiStackMean(_Stack):
    def combine(self, outputs: list[SparseTensor]) -> SparseTensor:
        return mean(outputs)


class MinkowskiStackVar(_Stack):
    def combine(self, outputs: list[SparseTensor]) -> SparseTensor:
        return var(outputs)


class MinkowskiPruning(MinkowskiModuleBase):
    """The sites that a mask keeps."""

    def forward(self, input: SparseTensor, mask: Tensor) -> SparseTensor:
        """Features `(rows, C)` and bool `(rows,)`, True = kept, to the features of the kept rows, in their order."""
        insist_type(input, SparseTensor, "input", "a SparseTensor")
        insist_type(mask, Tensor, "mask", "a bool tensor (rows,)")
        if mask.dtype == torch.uint8:  # torch's bool of old
            mask = mask.bool()
        insist(
            mask.dtype == torch.bool and tuple(mask.shape) == (len(input),),
            f"mask is {mask.dtype} {tuple(mask.shape)}: expected torch.bool ({len(input)},)",
        )
        insist(mask.device == input.device, f"mask is on {mask.device}: the input is on {input.device}")
        manager, known = input.coordinate_manager, input._map
        pruned = CoordinateMap.from_coordinates(known.coordinates[mask], known.stride)
        key = manager.insert_from(input.coordinate_map_key, pruned)
        return SparseTensor(input.F[mask], coordinate_map_key=key, coordinate_manager=manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiUnion(nn.Module):
    """The sum of tensors on the sites of any of them; where a tensor has no site it counts as 0."""

    def forward(self, *inputs: SparseTensor) -> SparseTensor:
        """Features `(rows_i, C)` to `(rows, C)`."""
        insist(len(inputs) > 1, f"{len(inputs)} tensors are given: expected at least two")
        for number, tensor in enumerate(inputs):
            insist_type(tensor, SparseTensor, f"argument {number}", "a SparseTensor")
            insist(tensor.coordinate_manager is inputs[0].coordinate_manager, OTHER_MANAGER)
            channels = tensor.F.shape[1], inputs[0].F.shape[1]
            insist(channels[0] == channels[1], f"argument {number} has {channels[0]} channels: expected {channels[1]}")
        manager = inputs[0].coordinate_manager
        key, places = manager.union([tensor.coordinate_map_key for tensor in inputs])
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs))
        features = inputs[0].F.new_zeros(manager.size(key), inputs[0].F.shape[1], dtype=dtype)
        for tensor, rows in zip(inputs, places, strict=True):
            features = features.index_add(0, rows, tensor.F.to(dtype))
        return SparseTensor(features, coordinate_map_key=key, coordinate_manager=manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


__all__ = [
    "MinkowskiLinear",
    "MinkowskiPruning",
    "MinkowskiStackCat",
    "MinkowskiStackMean",
    "MinkowskiStackSum",
    "MinkowskiStackVar",
    "MinkowskiToDenseTensor",
    "MinkowskiToFeature",
    "MinkowskiToSparseTensor",
    "MinkowskiUnion",
    "_sum",
    "cat",
    "dense_coordinates",
    "mean",
    "sum",
    "to_sparse",
    "to_sparse_all",
    "var",
]
