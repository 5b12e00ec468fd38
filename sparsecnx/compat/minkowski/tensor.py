"""The SparseTensor of MinkowskiEngine: features, and the key of the map of their sites."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsecnx.compat.minkowski.enums import SparseTensorQuantizationMode
from sparsecnx.compat.minkowski.errors import (
    ArgumentError,
    ArgumentTypeError,
    not_offered,
    require,
    require_type,
    with_missing_members,
)
from sparsecnx.compat.minkowski.manager import CoordinateManager, CoordinateMapKey, check_coordinates, new_manager
from sparsecnx.geometry.coordinates import CoordinateMap
from sparsecnx.geometry.packing import scatter_rows
from sparsecnx.tensor import SparseTensor as TileTensor
from sparsecnx.tensor import refuse_reentrant_checkpoint

OTHER_MANAGER = (
    "tensors have different coordinate managers: make one from the other's coordinate_map_key and coordinate_manager, "
    "or share a manager by set_sparse_tensor_operation_mode"
)
Quantization = SparseTensorQuantizationMode


@with_missing_members
@dataclass(init=False, eq=False, repr=False)
class SparseTensor:
    """Features of active sites, one row for each.

    It is a dataclass and a pytree node, because DDP and FSDP look for tensors inside these.

    A tensor is made from `coordinates`, or from the key and manager of another tensor on the same sites.

    Attributes:
        coordinate_map_key, coordinate_manager: identify the map of the sites.
        unique_index, inverse_mapping: int64, of a tensor made from coordinates: the given row of each site, and the
            site of each given row.
    """

    features: Tensor
    coordinate_map_key: CoordinateMapKey
    coordinate_manager: CoordinateManager

    def __init__(
        self,
        features: Tensor,
        coordinates: Tensor | None = None,
        tensor_stride: Any = 1,
        coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
        quantization_mode: SparseTensorQuantizationMode | None = None,
        allocator_type: Any = None,
        minkowski_algorithm: Any = None,
        requires_grad: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            features: `(rows, C)`.
            coordinates: int32 `(rows, 1 + D)`: the image number, then the position. Rows keep their order.
            tensor_stride: step between neighbouring sites, one number or one for each axis.
            coordinate_map_key, coordinate_manager: of a tensor on the same sites, instead of coordinates.
            quantization_mode: treatment of several rows at one site. By default they are an error, where
                MinkowskiEngine silently keeps one of them (`RANDOM_SUBSAMPLE`).
            allocator_type, minkowski_algorithm: ignored.
            requires_grad: set on the features.
            device: features and coordinates are moved to it.
        """
        require_type(features, Tensor, "features", "a tensor (rows, C)")
        require(features.ndim == 2, f"features is {tuple(features.shape)}: expected (rows, C)")
        if device is not None:
            features = features.to(device)
        if quantization_mode is not None:
            require_type(quantization_mode, Quantization, "quantization_mode", "a SparseTensorQuantizationMode")
        self.quantization_mode = quantization_mode or Quantization.RANDOM_SUBSAMPLE
        if coordinates is not None:
            both = coordinate_map_key is not None
            require(not both, "coordinates and coordinate_map_key are both given: expected one of them")
            coordinates = as_coordinates(coordinates, "an int32 tensor (rows, 1 + D)").to(device or coordinates.device)
            shapes = f"features is {tuple(features.shape)} and coordinates is {tuple(coordinates.shape)}"
            require(features.shape[0] == coordinates.shape[0], f"{shapes}: expected as many rows")
            where = coordinates.device
            require(features.device == where, f"features is on {features.device}: coordinates is on {where}")
            if coordinate_manager is None:
                coordinate_manager = new_manager(coordinates.shape[1] - 1)
            require_type(coordinate_manager, CoordinateManager, "coordinate_manager", "a CoordinateManager")
            coordinate_map_key, (first, site) = coordinate_manager.insert_and_map(coordinates, tensor_stride)
            self.unique_index, self.inverse_mapping = first, site
            if first.shape[0] != site.shape[0]:
                features = _quantize(features, coordinates, first, site, quantization_mode)
        elif coordinate_map_key is None or coordinate_manager is None:
            raise ArgumentError("coordinates is None: expected them, or both coordinate_map_key and coordinate_manager")
        else:
            require_type(coordinate_map_key, CoordinateMapKey, "coordinate_map_key", "a CoordinateMapKey")
            require_type(coordinate_manager, CoordinateManager, "coordinate_manager", "a CoordinateManager")
            known, of = coordinate_manager.map(coordinate_map_key), "the map of coordinate_map_key"
            shape, where = tuple(features.shape), features.device
            require(shape[0] == known.rows, f"features is {shape}: {of} has {known.rows} sites")
            require(where == known.device, f"features is on {where}: {of} is on {known.device}")
        if requires_grad is not None:
            features.requires_grad_(requires_grad)
        self._F = features
        self._C: Tensor | None = None
        self.coordinate_map_key = coordinate_map_key
        self._manager = coordinate_manager  # layers that were written for MinkowskiEngine read this name

    @property
    def F(self) -> Tensor:  # noqa: N802 - MinkowskiEngine's name
        """Return the features `(rows, C)`."""
        return self._F

    features = F  # type: ignore[assignment]

    @property
    def C(self) -> Tensor:  # noqa: N802 - MinkowskiEngine's name
        """Return a copy of the coordinates, int32 `(rows, 1 + D)`: the image number, then the position."""
        if self._C is None:
            self._C = self._map.coordinates.clone()
        return self._C

    coordinates = C

    @property  # type: ignore[no-redef]
    def coordinate_manager(self) -> CoordinateManager:
        return self._manager

    @property
    def coordinate_key(self) -> CoordinateMapKey:
        return self.coordinate_map_key

    @property
    def tensor_stride(self) -> list[int]:
        """Return the step between neighbouring sites along each axis."""
        return self.coordinate_map_key.get_tensor_stride()

    @property
    def D(self) -> int:  # noqa: N802 - MinkowskiEngine's name
        """Return the number of spatial axes."""
        return self.coordinate_manager.D

    dimension = D

    @property
    def _map(self) -> CoordinateMap:
        return self.coordinate_manager.map(self.coordinate_map_key)

    @property
    def shape(self) -> torch.Size:
        return self._F.shape

    def size(self, *axis: int) -> Any:
        return self._F.size(*axis)

    def __len__(self) -> int:
        return len(self._F)

    @property
    def device(self) -> torch.device:
        return self._F.device

    @property
    def dtype(self) -> torch.dtype:
        return self._F.dtype

    def get_device(self) -> int:
        return self._F.get_device()

    @property
    def requires_grad(self) -> bool:
        return self._F.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> None:
        self._F.requires_grad_(requires_grad)

    # Changes in place, as in MinkowskiEngine

    def float(self) -> SparseTensor:
        self._F = self._F.float()
        return self

    def double(self) -> SparseTensor:
        self._F = self._F.double()
        return self

    def detach(self) -> SparseTensor:
        self._F = self._F.detach()
        return self

    @property
    def decomposition_permutations(self) -> list[Tensor]:
        """Return the rows of each image, int64, up to the last image with sites."""
        return [rows.clone() for rows in self._map.images.rows_by_number]

    @property
    def decomposed_coordinates(self) -> list[Tensor]:
        """Return the positions of each image, int32 `(n, D)`, up to the last image with sites."""
        return self._by_image(self._map.coordinates[:, 1:].clone())

    @property
    def decomposed_features(self) -> list[Tensor]:
        """Return the features of each image, `(n, C)`, up to the last image with sites."""
        return self._by_image(self._F)

    @property
    def decomposed_coordinates_and_features(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.decomposed_coordinates, self.decomposed_features

    def _by_image(self, values: Tensor) -> list[Tensor]:
        images = self._map.images
        if images.sizes is not None:  # the rows are sorted by image, so that views suffice
            return list(values.split(images.sizes))
        return [values[rows] for rows in images.rows_by_number]

    def coordinates_at(self, batch_index: int) -> Tensor:
        """Return the positions of one image, int32 `(n, D)`."""
        return self._map.coordinates[self._map.images.rows_by_number[batch_index], 1:]

    def features_at(self, batch_index: int) -> Tensor:
        """Return the features of one image, `(n, C)`."""
        return self._F[self._map.images.rows_by_number[batch_index]]

    def coordinates_and_features_at(self, batch_index: int) -> tuple[Tensor, Tensor]:
        return self.coordinates_at(batch_index), self.features_at(batch_index)

    def dense(
        self, shape: Sequence[int] | None = None, min_coordinate: Tensor | None = None, contract_stride: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features in a dense tensor, 0 at inactive sites.

        Args:
            shape: `(B, C, *spatial)` of the dense tensor; by default it ends at the largest coordinates, so that rows,
                columns and images behind the last active site are missing.
            min_coordinate: int32 `(D,)`: position of its first site, a multiple of the tensor stride; by default 0.
            contract_stride: True puts neighbouring sites side by side, False `tensor_stride` apart.

        Returns:
            The dense tensor, the smallest position int32 `(1, D)` (or `min_coordinate`), and the tensor stride, int32.

        Raises:
            ArgumentError, ArgumentTypeError: an argument does not fit, or a site lies outside.
        """
        stride = torch.tensor(self.tensor_stride, dtype=torch.int32)
        if shape is not None:
            require_type(shape, Sequence, "shape", "a torch.Size (B, C, *spatial)")
            require(len(shape) == self.D + 2, f"shape is {tuple(shape)}: expected (B, C{', n' * self.D})")
            shape = (shape[0], self._F.shape[1], *shape[2:])
        if len(self) == 0:
            if shape is None:
                raise ArgumentError("shape is None: expected (B, C, *spatial) for a tensor without sites")
            return self._F.new_zeros(tuple(shape)), stride.new_zeros(self.D), stride
        low, high = self._map.bounds
        if min_coordinate is None:
            require(
                min(low) >= 0, f"coordinates go down to {list(low[1:])}: expected min_coordinate if some are below 0"
            )
            first, lowest = (0,) * self.D, low[1:]
        else:
            require_type(min_coordinate, Tensor, "min_coordinate", "an int32 tensor (D,)")
            dtype, given = min_coordinate.dtype, tuple(min_coordinate.shape)
            fits = math.prod(given) == self.D and dtype == torch.int32
            require(fits, f"min_coordinate is {dtype} {given}: expected int32 ({self.D},)")
            first = lowest = tuple(min_coordinate.flatten().tolist())
            require(
                not any(place % max(1, by) for place, by in zip(first, self.tensor_stride, strict=True)),
                f"min_coordinate is {list(first)}: expected multiples of the tensor stride, {self.tensor_stride}",
            )
        found = torch.tensor([lowest], dtype=torch.int32, device=self.device)
        step = [max(1, by) for by in self.tensor_stride] if contract_stride else [1] * self.D
        last = [(top - base) // by for top, base, by in zip(high[1:], first, step, strict=True)]
        if shape is None:
            shape = (high[0] + 1, self._F.shape[1], *(place + 1 for place in last))
        inside = high[0] < shape[0] and all(place < size for place, size in zip(last, shape[2:], strict=True))
        require(
            inside and all(base <= bottom for base, bottom in zip(first, low[1:], strict=True)),
            f"shape is {tuple(shape)}: sites of {high[0] + 1} images reach from {list(low[1:])} to {list(high[1:])}",
        )
        if self._map.layout is not None and contract_stride and not any(first):
            rows = in_layout(self).features
            dense = scatter_rows(rows, self._map.layout, rows.new_zeros(rows.shape[1]))
            more = [size - have for size, have in zip(shape, dense.shape, strict=True)]  # or fewer, if negative
            if any(more):
                dense = torch.nn.functional.pad(dense, [entry for size in reversed(more) for entry in (0, size)])
            return dense, found, stride
        sites = self._map.coordinates.long()
        places = (sites[:, 1:] - sites.new_tensor(first)).div(sites.new_tensor(step), rounding_mode="floor")
        dense = self._F.new_zeros(shape[0], *shape[2:], shape[1])
        dense = dense.index_put((sites[:, 0], *places.unbind(dim=1)), self._F)
        return dense.movedim(-1, 1).contiguous(), found, stride

    def features_at_coordinates(self, query_coordinates: Tensor) -> Tensor:
        """Return features `(n, C)` at `query_coordinates (n, 1 + D)`, 0 where there is no site.

        Raises:
            NotOffered: a position is not a whole number; the interpolation of MinkowskiEngine is not offered.
        """
        require_type(query_coordinates, Tensor, "query_coordinates", "a tensor (n, 1 + D)")
        shape = tuple(query_coordinates.shape)
        require(shape[1:] == (1 + self.D,), f"query_coordinates is {shape}: expected (n, {1 + self.D})")
        whole = query_coordinates.long()
        if not torch.equal(whole.to(query_coordinates.dtype), query_coordinates):
            raise not_offered("features_at_coordinates between sites", "whole numbers as query_coordinates")
        if len(self) == 0:
            return self._F.new_zeros(whole.shape[0], self._F.shape[1])
        rows = self._map.find(whole).long()
        return self._F.new_zeros(()).where(rows[:, None] < 0, self._F[rows.clamp(min=0)])

    def _with(self, features: Tensor, key: CoordinateMapKey | None = None) -> SparseTensor:
        """Return a tensor with other features, on the same sites or those of `key`."""
        key = self.coordinate_map_key if key is None else key
        return type(self)(features, coordinate_map_key=key, coordinate_manager=self.coordinate_manager)

    def _combine_in_place(self, other: Any, combine: Callable[[Any, Any], Tensor]) -> SparseTensor:
        require_same_sites(self, other, "other")
        self._F = combine(self._F, other.F)
        return self

    def _combine(self, other: Any, combine: Callable[[Any, Any], Tensor]) -> SparseTensor:
        if isinstance(other, (Tensor, int, float)):
            return self._with(combine(self._F, other))
        require_type(other, SparseTensor, "other", "a SparseTensor, a tensor or a number")
        require(other.coordinate_manager is self.coordinate_manager, OTHER_MANAGER)
        if other.coordinate_map_key == self.coordinate_map_key:
            return self._with(combine(self._F, other.F))
        require(
            other.F.shape[1] == self._F.shape[1],
            f"other has {other.F.shape[1]} channels: expected {self._F.shape[1]} on different sites",
        )
        # The result has the sites of either. A missing row of `self` counts as 0; one of `other` changes nothing.
        key, (mine, others) = self.coordinate_manager.union([self.coordinate_map_key, other.coordinate_map_key])
        dtype = combine(self._F.new_ones(()), other.F.new_ones(())).dtype
        features = self._F.new_zeros(self.coordinate_manager.size(key), self._F.shape[1], dtype=dtype)
        features = features.index_copy(0, mine, self._F.to(dtype))
        features = features.index_copy(0, others, combine(features[others], other.F).to(dtype))
        return self._with(features, key)

    __add__ = partialmethod(_combine, combine=operator.add)
    __sub__ = partialmethod(_combine, combine=operator.sub)
    __mul__ = partialmethod(_combine, combine=operator.mul)
    __truediv__ = partialmethod(_combine, combine=operator.truediv)
    __iadd__ = partialmethod(_combine_in_place, combine=operator.iadd)
    __isub__ = partialmethod(_combine_in_place, combine=operator.isub)
    __imul__ = partialmethod(_combine_in_place, combine=operator.imul)
    __itruediv__ = partialmethod(_combine_in_place, combine=operator.itruediv)

    def __pow__(self, power: Any) -> SparseTensor:
        return self._with(self._F**power)

    def __repr__(self) -> str:
        return (
            f"SparseTensor(features={tuple(self._F.shape)} {self.dtype} on {self.device}, "
            f"tensor_stride={self.tensor_stride}, {self.coordinate_map_key})"
        )


def _flatten(x: SparseTensor) -> tuple[list[Tensor], tuple[CoordinateMapKey, CoordinateManager]]:
    refuse_reentrant_checkpoint()
    return [x.F], (x.coordinate_map_key, x.coordinate_manager)


def _unflatten(leaves: Iterable[Any], sites: tuple[CoordinateMapKey, CoordinateManager]) -> SparseTensor:
    x = object.__new__(SparseTensor)  # The leaf need not fit the sites while torch replaces it.
    (x._F,), (x.coordinate_map_key, x._manager) = leaves, sites
    x._C, x.quantization_mode = None, Quantization.RANDOM_SUBSAMPLE
    return x


pytree.register_pytree_node(
    SparseTensor, _flatten, _unflatten, serialized_type_name="sparsecnx.compat.minkowski.SparseTensor"
)


def require_same_sites(x: SparseTensor, other: Any, name: str) -> None:
    """Raise unless the argument `name` is a SparseTensor on the sites of `x`."""
    require_type(other, SparseTensor, name, "a SparseTensor")
    require(other.coordinate_manager is x.coordinate_manager, OTHER_MANAGER)
    here, there = x.coordinate_map_key, other.coordinate_map_key
    message = f"{name} is on {there}: expected the sites of the first tensor, {here}"
    require(here == there, f"{message} (+ and MinkowskiUnion add tensors on different sites)")


def in_layout(x: SparseTensor) -> TileTensor:
    """Return a tensor on tiles with its rows in the order of its layout, as the operators on tiles take it."""
    known = x._map
    assert known.layout is not None  # the caller has checked that there are tiles
    if known.order is None:
        return TileTensor(x.F, known.layout)
    return TileTensor(x.F.index_select(0, known.order), known.layout)


def as_coordinates(coordinates: Tensor, expected: str, dimension: int | None = None) -> Tensor:
    """Return an argument `coordinates` as int32 `(rows, 1 + D)`.

    Other numbers are rounded down, with a warning as in MinkowskiEngine.

    Raises:
        ArgumentError, ArgumentTypeError: it is not `expected`, has another shape, or int32 does not hold a number.
    """
    require_type(coordinates, Tensor, "coordinates", expected)
    dtype = coordinates.dtype
    if dtype == torch.bool or coordinates.is_complex():
        raise ArgumentTypeError(f"coordinates is {dtype}: expected torch.int32")
    if dtype != torch.int32:
        warnings.warn(
            f"coordinates is {dtype} and is converted: `.int()` does the same without a warning", stacklevel=4
        )
        whole = coordinates.floor() if coordinates.is_floating_point() else coordinates
        limits = torch.iinfo(torch.int32)
        held = bool(((whole >= limits.min) & (whole <= limits.max)).all())  # False for NaN
        require(held, f"coordinates has numbers outside {limits.min} to {limits.max}, or NaN: expected those of int32")
        coordinates = whole.to(torch.int32)
    check_coordinates(coordinates, dimension)
    return coordinates


def _quantize(
    features: Tensor, coordinates: Tensor, first: Tensor, site: Tensor, mode: SparseTensorQuantizationMode | None
) -> Tensor:
    """Return one row for each site."""
    count = first.shape[0]
    if mode == Quantization.RANDOM_SUBSAMPLE:
        return features[first]
    if mode in (Quantization.UNWEIGHTED_SUM, Quantization.UNWEIGHTED_AVERAGE):
        total = features.new_zeros(count, features.shape[1]).index_add(0, site, features)
        if mode == Quantization.UNWEIGHTED_SUM:
            return total
        return total / torch.bincount(site, minlength=count).to(total.dtype)[:, None]
    if mode in (Quantization.MAX_POOL, Quantization.SPLAT_LINEAR_INTERPOLATION):
        raise not_offered(f"quantization_mode={mode}", "SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE")
    seen = torch.ones_like(site, dtype=torch.bool)
    seen[first] = False
    again = coordinates[seen.nonzero()[0, 0]].tolist()
    raise ArgumentError(
        f"coordinates has {site.shape[0] - count} rows at sites that have one already, the first at {again}: expected "
        "distinct sites, or a quantization_mode such as UNWEIGHTED_AVERAGE (MinkowskiEngine silently keeps one row at "
        "each site: RANDOM_SUBSAMPLE)"
    )
