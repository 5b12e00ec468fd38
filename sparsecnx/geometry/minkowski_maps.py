"""MinkowskiEngine's coordinate manager for the tiles of a layout."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from sparsecnx.backends import minkowski
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.tiles import TileSet


class Maps:
    """The coordinate manager of a `TileSet`, which keeps coordinates and kernel maps for all layers of a network."""

    def __init__(self, tiles: TileSet) -> None:
        library = minkowski.library()
        kind = library.CoordinateMapType
        self.manager = library.CoordinateManager(
            D=tiles.ndim, coordinate_map_type=kind.CUDA if tiles.device.type == "cuda" else kind.CPU
        )
        self._keys: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}

    def key(self, layout: Layout) -> Any:
        """Return the key of the coordinates of a layout, in the order of its rows."""
        geometry = layout.tile, layout.stride
        if geometry not in self._keys:
            key, _ = self.manager.insert_and_map(layout.coordinates(), tensor_stride=list(layout.stride))
            self._keys[geometry] = key
        return self._keys[geometry]


class _Kept(threading.local):
    """The managers of one thread: a coordinate manager adds to its maps without the interpreter's lock."""

    def __init__(self) -> None:
        self.maps: WeakKeyDictionary[TileSet, Maps] = WeakKeyDictionary()


_kept = _Kept()


def maps(tiles: TileSet) -> Maps:
    """Return the coordinate manager of these tiles, built on a thread's first use and kept as long as they live."""
    found = _kept.maps.get(tiles)
    if found is None:
        found = _kept.maps[tiles] = Maps(tiles)
    return found
