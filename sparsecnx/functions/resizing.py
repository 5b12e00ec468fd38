"""Interpolation, and pixels to channels and back."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparsecnx.functions.table import answers, channels_first, like, packed, refuse
from sparsecnx.functions.windows import another, per_axis, refined
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.nested_order import children_are_consecutive
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.tensor import SparseTensor


def children(fine: Layout, factor: tuple[int, ...]) -> Tensor:
    """Return the rows of `fine` under each row of the layout that is coarser by `factor`, int64, raster order."""
    return fine.kernel_map(factor, factor, (0,) * len(factor), (1,) * len(factor)).long()


def _image(x: SparseTensor, name: str) -> SparseTensor:
    """Return x with its channels first; refuse signals and volumes, of which torch takes another axis for channels."""
    x = channels_first(x, name)
    if x.layout.ndim != 2:
        refuse(name, f"it goes along 2 axes, the space of x is {x.layout.shape}", "convolve with kernel = stride")
    return x


@answers("pixel_shuffle", meaning="channels to the sites under each visible site", limits="images")
def pixel_shuffle(x: SparseTensor, upscale_factor: int) -> SparseTensor:
    x = _image(x, "pixel_shuffle")
    factor = (upscale_factor,) * x.layout.ndim
    each = upscale_factor**x.layout.ndim
    fine = x.layout.refine(factor)
    rows, channels = x.features.shape
    if channels % each:
        raise ValueError(f"pixel_shuffle: x is {tuple(x.shape)}: its channels must be a multiple of {each}")
    values = x.features.reshape(rows, channels // each, each).transpose(1, 2).reshape(rows * each, channels // each)
    blank = values.new_zeros(values.shape)
    return packed(blank.index_copy(0, children(fine, factor).flatten(), values), fine)


@answers(
    "pixel_unshuffle",
    meaning="the sites under each coarser site to channels",
    limits="images; the factor divides the tile",
)
def pixel_unshuffle(x: SparseTensor, downscale_factor: int) -> SparseTensor:
    x = _image(x, "pixel_unshuffle")
    factor = (downscale_factor,) * x.layout.ndim
    coarse = x.layout.coarsen(downscale_factor)
    under = children(x.layout, factor)
    values = x.features.index_select(0, under.flatten()).reshape(*under.shape, x.features.shape[1])
    return packed(values.transpose(1, 2).flatten(1), coarse)


@answers(
    "interpolate",
    "upsample",
    meaning="of the zero-filled input, masked after; nearest by whole factors repeats rows, other modes compute the "
    "whole image",
    limits="sizes at which a tile has whole sites",
)
def interpolate(
    input: SparseTensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    x = channels_first(input, "interpolate")
    layout, ndim = x.layout, x.layout.ndim
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate: size is {size} and scale_factor {scale_factor}: expected one of them")
    if size is not None:
        sizes = per_axis(size, ndim)
    else:
        scales = (scale_factor,) * ndim if isinstance(scale_factor, (int, float)) else tuple(scale_factor)
        if len(scales) != ndim:
            raise ValueError(
                f"interpolate: scale_factor is {scale_factor}: expected one, or one for each of {ndim} axes"
            )
        sizes = tuple(math.floor(extent * scale) for extent, scale in zip(layout.shape, scales, strict=True))
    if sizes == layout.shape:
        return like(x, x.features.clone())
    upward = all(out % extent == 0 for out, extent in zip(sizes, layout.shape, strict=True))
    if not upward:
        return _by_the_image(x, sizes, mode, align_corners, antialias)
    factor = tuple(out // extent for out, extent in zip(sizes, layout.shape, strict=True))
    if mode not in ("nearest", "nearest-exact"):
        return _by_the_image(x, sizes, mode, align_corners, antialias)
    fine = refined(layout, factor)
    each, channels = math.prod(factor), x.features.shape[1]
    repeated = x.features[:, None].expand(-1, each, -1).reshape(fine.rows, channels)
    if children_are_consecutive(fine.tile, factor):
        return packed(repeated, fine)
    return packed(repeated.new_zeros(repeated.shape).index_copy(0, children(fine, factor).flatten(), repeated), fine)


def _by_the_image(
    x: SparseTensor, sizes: tuple[int, ...], mode: str, align_corners: bool | None, antialias: bool
) -> Any:
    """Interpolate the zero-filled image, and keep the sites of visible tiles."""
    layout = x.layout
    dense = F.interpolate(x.dense(), sizes, mode=mode, align_corners=align_corners, antialias=antialias)
    if any(out < cells or out % cells for out, cells in zip(sizes, layout.tiles.grid, strict=True)):
        if layout.tiles.below_tile == "dense":
            return dense
        tiles = [out / cells for out, cells in zip(sizes, layout.tiles.grid, strict=True)]
        raise ValueError(
            f"interpolate: {layout.shape} sites would become {sizes}, with {tiles} sites to a tile: expected whole "
            f"ones, sizes that are multiples of the grid, {layout.tiles.grid}; or make x with below_tile='dense'"
        )
    target = another(_resized, layout, sizes)
    return packed(gather_rows(dense, target), target)


def _resized(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """Return the layout of that many sites; the stride, the pixels of the input to a site, is at least 1."""
    tile = tuple(size // cells for size, cells in zip(shape, layout.tiles.grid, strict=True))
    sides = zip(layout.stride, layout.tile, tile, strict=True)
    return Layout(layout.tiles, tile, tuple(max(step * before // side, 1) for step, before, side in sides))
