"""What MinkowskiEngine can take, and how it is given our geometry and kernels.

Conventions of MinkowskiEngine 0.5.4: along an axis of odd size k a kernel is centred, along one of even size it covers
the offsets 0 to k - 1. Of the K taps the first spatial axis varies fastest. Coordinates are multiples of the tensor
stride.
"""

from __future__ import annotations

import importlib
import math
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.backends import minkowski
from sparsecnx.geometry.layout import Layout, TileSet
from sparsecnx.tensor import SparseTensor

DTYPES = (torch.float32, torch.float64)
NOT_TRACEABLE = "MinkowskiEngine cannot be traced"

not_traced = torch.compiler.disable(reason=NOT_TRACEABLE)


@not_traced
def refusal(x: SparseTensor) -> str | None:
    """Why MinkowskiEngine cannot run on `x`; None where it can."""
    if x.dtype not in DTYPES:
        return f"MinkowskiEngine takes float32 and float64, x is {x.dtype}"
    return minkowski.refusal(x.device)


class _Maps:
    """The coordinate manager of a `TileSet`, which keeps coordinates and kernel maps for all layers of a network."""

    def __init__(self, tiles: TileSet) -> None:
        library = minkowski.library()
        kind = library.CoordinateMapType
        self.manager = library.CoordinateManager(
            D=tiles.ndim, coordinate_map_type=kind.CUDA if tiles.device.type == "cuda" else kind.CPU
        )
        self._keys: dict[tuple[int, int], Any] = {}

    def key(self, layout: Layout) -> Any:
        """Of the coordinates of a layout, in the order of its rows."""
        geometry = layout.tile, layout.stride
        if geometry not in self._keys:
            key, _ = self.manager.insert_and_map(layout.coordinates(), tensor_stride=[layout.stride] * layout.ndim)
            self._keys[geometry] = key
        return self._keys[geometry]


class _Kept(threading.local):
    """Of every thread its own: a coordinate manager adds to its maps without the interpreter's lock."""

    def __init__(self) -> None:
        self.maps: WeakKeyDictionary[TileSet, _Maps] = WeakKeyDictionary()


_kept = _Kept()


def maps(tiles: TileSet) -> _Maps:
    """Coordinates and kernel maps of these tiles, built on a thread's first use and kept as long as they live."""
    found = _kept.maps.get(tiles)
    if found is None:
        found = _kept.maps[tiles] = _Maps(tiles)
    return found


class _Once(torch.autograd.Function):
    """The same tensors, whose gradients have none of their own."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return features.view_as(features), kernel.view_as(kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grads
        # create_graph=True. What the compiled part returned looks like a constant here.
        graph = torch.empty(0, requires_grad=True)
        found: tuple[Tensor | None, ...] = _Gradients.apply(graph, *grads)
        return found


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "MinkowskiEngine has no gradients of the gradients of its convolutions: take another backend for them"
        )


def differentiable_once(features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """For a function in the library's compiled part: gradients of gradients raise, where it would leave them out."""
    found: tuple[Tensor, Tensor] = _Once.apply(features, kernel)
    return found


def convolution_mode() -> Any:
    """How a convolution multiplies: as the library chooses. It gives this name in its compiled part alone."""
    return importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT


def centred(weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A kernel `(*, *, *kernel)` that covers the offsets -p to k - 1 - p of each axis, with as many zeros around as it
    takes to be one of MinkowskiEngine's."""
    around: list[int] = []
    for size, before in zip(weight.shape[:1:-1], padding[::-1], strict=True):
        after = size - 1 - before
        if before == 0:
            around += [0, size % 2 if size > 1 else 0]  # an even kernel begins at its own site
        else:
            reach = max(before, after)
            around += [reach - before, reach - after]
    return F.pad(weight, around)


def taps(weight: Tensor) -> Tensor:
    """`(C_out, C_in, *kernel)` in MinkowskiEngine's order, `(K, C_in, C_out)`."""
    spatial = range(weight.ndim - 1, 1, -1)
    ordered = weight.permute(*spatial, 1, 0)
    return ordered.reshape(math.prod(weight.shape[2:]), *ordered.shape[-2:])
