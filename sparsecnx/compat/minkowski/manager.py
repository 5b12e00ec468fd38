"""The coordinate manager: the maps of a batch by key, and the kernel maps between them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsecnx.compat.minkowski.enums import RegionType, SparseTensorOperationMode
from sparsecnx.compat.minkowski.errors import ArgumentError, not_offered, require, require_type, with_missing_members
from sparsecnx.compat.minkowski.kernel import KernelGenerator, convert_to_int_list
from sparsecnx.geometry.coordinates import CoordinateMap, unique
from sparsecnx.geometry.kernel_map import invert_kernel_map
from sparsecnx.geometry.tables import ordinary_tensors

Name = tuple[tuple[int, ...], str]  # tensor stride and string of a key


@with_missing_members
class CoordinateMapKey:
    """The name of a map: its tensor stride, and a string that distinguishes maps of one stride.

    As in MinkowskiEngine, it is made from `(tensor_stride, string)`, or unset from the number of coordinates, `1 + D`.
    """

    def __init__(self, stride_or_size: Any, string_id: str | None = None) -> None:
        unset = isinstance(stride_or_size, int)
        self._size = stride_or_size if unset else 1 + len(stride_or_size)
        self._name: Name | None = None if unset else (tuple(int(step) for step in stride_or_size), string_id or "")

    def is_key_set(self) -> bool:
        return self._name is not None

    def get_key(self) -> tuple[list[int], str]:
        """Return tensor stride and string.

        Raises:
            ArgumentError: the key is not set.
        """
        stride, string = self.name
        return list(stride), string

    def get_tensor_stride(self) -> list[int]:
        return list(self.name[0])

    def get_coordinate_size(self) -> int:
        return self._size

    @property
    def name(self) -> Name:
        """Return tensor stride and string, hashable."""
        if self._name is None:
            raise ArgumentError("coordinate_map_key is not set: it names no map yet")
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoordinateMapKey) and self._name is not None and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __repr__(self) -> str:
        return f"coordinate map key:{self._name if self._name is not None else 'not set'}"


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The rows that a kernel reads.

    Attributes:
        table: int32 `(rows_out, K)`, -1 for no site.
        rows: number of rows of the input.
    """

    table: Tensor
    rows: int

    @cached_property
    def inverse(self) -> Tensor:
        """Return int32 `(rows, K)`: the row of the output that reads each row of the input through each tap."""
        with ordinary_tensors():
            return invert_kernel_map(self.table, self.rows)


@with_missing_members
class CoordinateManager:
    """The maps of tensors that are computed from one another.

    Tensors of different managers cannot be combined. A map is made once, and a kernel map once for each pair of maps
    and kernel, for any number of layers.
    """

    def __init__(self, D: int = 0, *_: Any, **__: Any) -> None:  # noqa: N803 - MinkowskiEngine's name
        """
        Args:
            D: number of spatial axes. Other arguments of MinkowskiEngine (threads, allocator, algorithm) are ignored.

        Raises:
            ArgumentError: `D` is not positive.
        """
        require_type(D, int, "D", "the number of spatial axes")
        require(D >= 1, f"D is {D}: expected the number of spatial axes, at least 1")
        self.D = D
        self._maps: dict[Name, CoordinateMap] = {}
        self._tables: dict[Hashable, KernelMap] = {}
        self._unions: dict[Hashable, tuple[CoordinateMapKey, list[Tensor]]] = {}
        self._origins: dict[Name, tuple[Tensor, Tensor]] = {}
        self._given: list[Name] = []  # maps that no stride made from others
        self._roots: dict[str, str] = {}  # string of a map of `insert_from` to the string of its first source

    def map(self, key: CoordinateMapKey) -> CoordinateMap:
        """Return the map of a key.

        Raises:
            ArgumentError: this manager has no such map.
        """
        found = self._maps.get(key.name)
        if found is None:
            raise ArgumentError(f"coordinate_map_key is {key}: this coordinate manager has no such map")
        return found

    def insert(self, new: CoordinateMap, string_id: str = "") -> CoordinateMapKey:
        """Keep a map by its stride and the string, or by a new string if that name is taken."""
        string, number = string_id, len(self._maps)
        while (new.stride, string) in self._maps:
            string, number = f"{string_id}-{number}", number + 1
        self._maps[new.stride, string] = new
        self._given.append((new.stride, string))
        return CoordinateMapKey(new.stride, string)

    def insert_from(self, source: CoordinateMapKey, new: CoordinateMap) -> CoordinateMapKey:
        """Keep a map of other sites that was made from the map `source`.

        It gets a new string, so that it is not taken for a strided map of `source`. Transposed layers go back to the
        map from which `source` came.
        """
        key = self.insert(new, f"-{len(self._maps)}")
        self._roots[key.name[1]] = self._roots.get(source.name[1], source.name[1])
        return key

    def insert_and_map(
        self, coordinates: Tensor, tensor_stride: Any = 1, string_id: str = ""
    ) -> tuple[CoordinateMapKey, tuple[Tensor, Tensor]]:
        """Keep a map of the distinct rows of int32 `(n, 1 + D)`, in the order in which they first appear.

        Returns:
            The key, and `(unique_map, inverse_map)`, int64: the first row of each site, and the site of each row.
        """
        check_coordinates(coordinates, self.D)
        stride = convert_to_int_list(tensor_stride, self.D, "tensor_stride")
        first, site = distinct(coordinates)
        return self.insert(self._new_map(coordinates, first, stride), string_id), (first, site)

    def insert_target(self, source: CoordinateMapKey, coordinates: Tensor, stride: list[int]) -> CoordinateMapKey:
        """Keep a map of the sites, int32 `(n, 1 + D)`, that a layer shall compute from `source`.

        Raises:
            ArgumentError: they are not distinct.
        """
        first, site = distinct(coordinates)
        require(first.shape[0] == site.shape[0], "coordinates has equal rows: expected distinct sites")
        return self.insert_from(source, self._new_map(coordinates, first, stride))

    def _new_map(self, coordinates: Tensor, first: Tensor, stride: list[int]) -> CoordinateMap:
        """Return a map of the rows `first` of the coordinates. It is a copy: changes of the argument move no sites."""
        require(min(stride) >= 1, f"tensor_stride is {stride}: expected at least 1 along each axis")
        new = CoordinateMap.from_coordinates(coordinates[first], stride)
        require(new.rows == 0 or new.bounds[0][0] >= 0, "coordinates has image numbers below 0: expected 0, 1, ...")
        between = (new.coordinates[:, 1:] % new.coordinates.new_tensor(stride)).any()
        require(not between, f"coordinates has sites between multiples of the tensor stride, {stride}")
        return new

    def stride(self, coordinate_map_key: CoordinateMapKey, stride: Any, string_id: str = "") -> CoordinateMapKey:
        """Return the key of the map that a convolution with this stride gives; it is made on first use."""
        factors = convert_to_int_list(stride, self.D, "stride")
        old_stride, old_string = coordinate_map_key.name
        name = (tuple(a * b for a, b in zip(old_stride, factors, strict=True)), string_id or old_string)
        if name not in self._maps:
            self._maps[name] = self.map(coordinate_map_key).strided(factors)
        return CoordinateMapKey(*name)

    def finer(self, key: CoordinateMapKey, kernel: KernelGenerator) -> CoordinateMapKey:
        """Return the key of the map that a transposed convolution gives.

        It is the map from which that of `key` was made by this stride, or else all sites under the kernel.

        Raises:
            ArgumentError: the stride of the kernel does not divide that of the map.
        """
        coarse = key.name[0]
        require(
            not any(a % b for a, b in zip(coarse, kernel.kernel_stride, strict=True)),
            f"stride is {kernel.kernel_stride}: in a transposed layer it must divide the tensor stride, {list(coarse)}",
        )
        fine = tuple(a // b for a, b in zip(coarse, kernel.kernel_stride, strict=True))
        string = key.name[1]
        for known in (self._roots.get(string, string), string):
            if (fine, known) in self._maps:
                return CoordinateMapKey(fine, known)
        source = self.map(key)
        if kernel.covers and source.layout is not None and source.order is None:
            made = source.refined(kernel.kernel_stride[0])
        else:
            made = source.spread(kernel.offsets(fine), fine)
        self._maps[fine, string] = made
        return CoordinateMapKey(fine, string)

    def origin(self) -> CoordinateMapKey:
        """Return the key of the map that global pooling gives: one site for each image, stride 0."""
        name = ((0,) * self.D, "")
        if name not in self._maps:
            with ordinary_tensors():
                images = torch.cat([self._maps[given].images.index for given in self._given]).unique()
                coordinates = torch.nn.functional.pad(images.to(torch.int32)[:, None], (0, self.D))
            self._maps[name] = CoordinateMap(name[0], coordinates)
        return CoordinateMapKey(*name)

    def at_origin(self, key: CoordinateMapKey) -> tuple[Tensor, Tensor]:
        """Return the images of the sites of a map, for global pooling.

        Returns:
            int64 `(rows,)`, the row of each site's image at the origin, and int64 `(images,)`, the sites of each image.

        Raises:
            ArgumentError: an image came to this manager after the origin.
        """
        if key.name not in self._origins:
            with ordinary_tensors():
                images, origin = self.map(key).images, self.map(self.origin())
                place = origin.find(torch.nn.functional.pad(images.index[:, None], (0, self.D))).long()
                require(
                    bool((place >= 0).all()),
                    "this tensor has images that were not there at the first global pooling: expected tensors of one "
                    "batch in a coordinate manager",
                )
                counts = images.counts.new_zeros(origin.rows).index_copy(0, place, images.counts)
                self._origins[key.name] = place[images.number], counts
        return self._origins[key.name]

    def origin_map(self, key: CoordinateMapKey) -> tuple[Tensor, list[Tensor]]:
        """Return the images with sites, int64, and the rows of every image up to the last of them."""
        images = self.map(key).images
        return images.index, [rows.clone() for rows in images.rows_by_number]

    def union(self, keys: list[CoordinateMapKey]) -> tuple[CoordinateMapKey, list[Tensor]]:
        """Keep the sites of several maps of one stride as a new map.

        Returns:
            The key, and for each of the maps int64 `(rows,)`: the places of its rows in the union.

        Raises:
            ArgumentError: strides differ.
        """
        strides = sorted({key.name[0] for key in keys})
        require(len(strides) == 1, f"tensors have strides {[list(stride) for stride in strides]}: a union needs one")
        names = tuple(key.name for key in keys)
        if names not in self._unions:
            with ordinary_tensors():
                maps = [self.map(key) for key in keys]
                sites = unique(torch.cat([known.coordinates for known in maps]))
                new = CoordinateMap.from_coordinates(sites, maps[0].stride)
                places = [new.find(known.coordinates).long() for known in maps]
            self._unions[names] = self.insert_from(keys[0], new), places
        return self._unions[names]

    def table(
        self, in_key: CoordinateMapKey, out_key: CoordinateMapKey, kernel: KernelGenerator, is_pool: bool = False
    ) -> KernelMap:
        """Return the rows of `in_key` that the kernel reads for each row of `out_key`."""
        partition = is_pool and kernel.kernel_size == kernel.kernel_stride
        name = (in_key.name, out_key.name, kernel.key, partition)
        if name not in self._tables:
            source = self.map(in_key)
            offsets = kernel.offsets(in_key.name[0], partition)
            with ordinary_tensors():
                self._tables[name] = KernelMap(source.kernel_map(self.map(out_key), offsets), source.rows)
        return self._tables[name]

    def kernel_map(
        self,
        in_key: CoordinateMapKey,
        out_key: CoordinateMapKey,
        stride: Any = 1,
        kernel_size: Any = 3,
        dilation: Any = 1,
        region_type: RegionType = RegionType.HYPER_CUBE,
        region_offset: Tensor | None = None,
        is_transpose: bool = False,
        is_pool: bool = False,
    ) -> dict[int, Tensor]:
        """Return int32 `(2, pairs)`, input rows and output rows, for every tap that reads any row."""
        if region_offset is not None and region_offset.numel():
            raise not_offered("kernel_map with region_offset", "kernel_size and region_type")
        kernel = KernelGenerator(kernel_size, stride, dilation, region_type=region_type, dimension=self.D)
        keys = (out_key, in_key) if is_transpose else (in_key, out_key)
        found = self.table(*keys, kernel, is_pool)
        pairs = {}
        for tap, rows in enumerate((found.inverse if is_transpose else found.table).unbind(dim=1)):
            (out,) = (rows >= 0).nonzero(as_tuple=True)
            if out.shape[0]:
                pairs[tap] = torch.stack([rows[out], out.to(torch.int32)])
        return pairs

    def size(self, coordinate_map_key: CoordinateMapKey) -> int:
        """Return the number of sites."""
        return self.map(coordinate_map_key).rows

    def get_coordinates(self, coords_key_or_tensor_strides: Any) -> Tensor:
        """Return a copy of the coordinates, int32 `(rows, 1 + D)`."""
        key = coords_key_or_tensor_strides
        if not isinstance(key, CoordinateMapKey):
            stride = tuple(convert_to_int_list(key, self.D, "tensor_stride"))
            name = next((name for name in self._maps if name[0] == stride), None)
            if name is None:
                raise ArgumentError(
                    f"tensor_stride is {list(stride)}: this coordinate manager has no map of this stride"
                )
            key = CoordinateMapKey(*name)
        return self.map(key).coordinates.clone()

    def number_of_unique_batch_indices(self) -> int:
        return self.size(self.origin())

    def exists(self, key: CoordinateMapKey) -> bool:
        """Return whether there is a map of that key."""
        return key.is_key_set() and key.name in self._maps

    def __repr__(self) -> str:
        maps = "".join(f"\n  {list(stride)} {string!r}: {m.rows} sites" for (stride, string), m in self._maps.items())
        return f"CoordinateManager(D={self.D}){maps}"


def check_coordinates(coordinates: Tensor, dimension: int | None = None) -> None:
    """Raise unless the coordinates are int32 `(n, 1 + dimension)`."""
    require_type(coordinates, Tensor, "coordinates", "an int32 tensor (rows, 1 + D)")
    shape, columns = tuple(coordinates.shape), "1 + D" if dimension is None else 1 + dimension
    fits = len(shape) == 2 and (shape[1] >= 2 if dimension is None else shape[1] == columns)
    require(fits, f"coordinates is {shape}: expected (rows, {columns}), the image number first")
    require(coordinates.dtype == torch.int32, f"coordinates is {coordinates.dtype}: expected torch.int32")


def distinct(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64: the first row of each distinct site, ascending, and for every row the place of its site there."""
    count = coordinates.shape[0]
    rows = torch.arange(count, device=coordinates.device)
    if not count:
        return rows, rows
    sites, number = torch.unique(coordinates, dim=0, return_inverse=True)
    first = rows.new_full((sites.shape[0],), count).scatter_reduce(0, number, rows, "amin")
    order = first.argsort()
    return first[order], order.argsort()[number]


_mode = SparseTensorOperationMode.SEPARATE_COORDINATE_MANAGER
_global: CoordinateManager | None = None


def set_sparse_tensor_operation_mode(operation_mode: SparseTensorOperationMode) -> None:
    """Choose whether tensors made from coordinates share a manager, until `clear_global_coordinate_manager`."""
    global _mode
    require_type(operation_mode, SparseTensorOperationMode, "operation_mode", "a SparseTensorOperationMode")
    _mode = operation_mode


def sparse_tensor_operation_mode() -> SparseTensorOperationMode:
    return _mode


def global_coordinate_manager() -> CoordinateManager | None:
    """Return the shared manager; None before the first tensor, and if tensors share none."""
    return _global


def set_global_coordinate_manager(coordinate_manager: CoordinateManager | None) -> None:
    global _global
    _global = coordinate_manager


def clear_global_coordinate_manager() -> None:
    """Forget the shared manager. Training that shares one calls this after every step."""
    set_global_coordinate_manager(None)


def new_manager(dimension: int) -> CoordinateManager:
    """Return a manager for a tensor made from coordinates: a new one, or the shared one.

    Raises:
        ArgumentError: the shared one has another number of axes.
    """
    if _mode == SparseTensorOperationMode.SEPARATE_COORDINATE_MANAGER:
        return CoordinateManager(dimension)
    shared = CoordinateManager(dimension) if _global is None else _global
    set_global_coordinate_manager(shared)
    require(dimension == shared.D, f"coordinates has {dimension} spatial axes: the shared manager has {shared.D}")
    return shared


def set_gpu_allocator(backend: Any) -> None:
    """Do nothing: torch always allocates the memory."""


set_memory_manager_backend = set_gpu_allocator
