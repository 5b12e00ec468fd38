"""Call the compiled CPU operators with arguments that nobody should pass; count crashes, hangs and wrong numbers.

    python tests/fuzz_operators.py --calls 20000 --out benchmarks/results/fuzz-cpu.json

`make sanitize` runs it on a build with sanitizers.

A call is a valid one with arguments changed: dtypes, shapes, strides, devices, freed and cut storages, huge sizes,
values that are not finite or no rows. It must raise a Python exception, or return what plain torch computes in float64.
The first calls free, cut and move to meta every tensor of every operator, and those must raise; and they free each
before its gradient is computed. Calls run in child processes; seed and number give a call again.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import math
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecnx
from sparsecnx import Layout, TileSet
from sparsecnx.backends import compiled
from sparsecnx.common.dtypes import FLOATING, statistics_dtype
from sparsecnx.geometry.kernel_map import invert_kernel_map
from sparsecnx.geometry.nested_order import tile_sites
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table
from sparsecnx.ops.site_normalization.activations import ACTIVATIONS

Arguments = dict[str, Any]

# This is the largest ||found - expected|| / ||expected||, as in tests/cases.py.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SECONDS = 10  # of processor time that a call may take: all sizes are small
WAIT = 120  # seconds after which a call that waits for something has hung
GIGABYTES = 2  # that a child may allocate
KEPT = ("u", "moments", "energy", "hidden")  # made by forward: what a changed one means for backward is not compared
HUGE = (50_000, 2**15, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**62, 2**63 - 1)
INTEGERS = (0, 1, 2, 3, 4, 5, 7, 8, 1023, 1025, -1, -2, -(2**31), -(2**63), *HUGE)
FLOATS = (0.0, -1.0, 1e300, -1e300, 5e-324, float("nan"), float("inf"), -float("inf"))


# --- references in plain torch, from the arguments of the raw operators -----------------------------------------------


def read(x: Tensor, kernel_map: Tensor) -> Tensor:
    """Return the rows under each output row, `(rows_out, K, C)`, 0 where the map has -1."""
    return F.pad(x, (0, 0, 0, 1))[kernel_map.long()]


def site_map(rows: int, table: Tensor, tile: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """Return the kernel map of a depthwise convolution on tiles, `(rows, taps)`."""
    if rows == 0:
        return torch.empty(0, math.prod(kernel), dtype=torch.long)
    sites, count = tile_sites(tuple(tile)), math.prod(tile)
    number = torch.empty(*tile, dtype=torch.long)
    number[sites.unbind(1)] = torch.arange(count)
    reach = [-(-(size // 2) // side) for size, side in zip(kernel, tile, strict=True)]
    table = table.reshape(rows // count, *(2 * steps + 1 for steps in reach)).long()
    steps = torch.cartesian_prod(*(torch.arange(size) - size // 2 for size in kernel)).view(-1, len(tile))
    places, sides = sites[:, None] + steps, torch.tensor(tile)  # (sites, taps, axes)
    neighbour = table[(slice(None), *(places // sides + torch.tensor(reach)).unbind(-1))]
    return torch.where(neighbour < 0, -1, neighbour * count + number[(places % sides).unbind(-1)]).flatten(0, 1)


def row_segments(splits: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(splits) - 1), splits.diff())


def positions(index: Tensor, shape: Sequence[int], tile: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the image and the place along each axis of the rows of the tiles of `index`."""
    grid = [max(1, size // side) for size, side in zip(shape, tile, strict=True)]
    sites, cell = tile_sites(tuple(tile)), index[:, None]
    places = []
    for axis in reversed(range(len(grid))):
        places.insert(0, (cell % grid[axis] * tile[axis] + sites[:, axis]).flatten())
        cell = cell // grid[axis]
    return cell.expand(-1, sites.shape[0]).flatten(), *places


def gather_tiles(dense: Tensor, index: Tensor, tile: Sequence[int]) -> Tensor:
    return dense.movedim(1, -1)[positions(index, dense.shape[2:], tile)]


def scatter_tiles(
    rows: Tensor, fill: Tensor, index: Tensor, batch: int, shape: Sequence[int], tile: Sequence[int]
) -> Tensor:
    dense = fill.reshape(-1, *[1] * len(shape)).repeat(batch, 1, *shape)
    dense.movedim(1, -1)[positions(index, shape, tile)] = rows
    return dense


def rows_at(
    index: Tensor, grid: Sequence[int], tile: Sequence[int], places: Sequence[Tensor], there: Tensor, image: Tensor
) -> Tensor:
    """Return the rows of tiles of `tile` sites at places `(tiles, sites, taps)` along each axis, -1 where none are."""
    sites, cell, raster, order = tile_sites(tuple(tile)), image[:, None, None], 0, 0
    for place, size, side, of_sites in zip(places, grid, tile, sites.unbind(1), strict=True):
        there = there & (place >= 0) & (place < size * side)
        cell, raster, order = cell * size + place // side, raster * side + place % side, order * side + of_sites
    slot = torch.searchsorted(index, cell.contiguous(), right=True) - 1
    there = there & (slot >= 0) & (index[slot.clamp(min=0)] == cell)
    return torch.where(there, slot * len(sites) + order.argsort()[raster], -1).flatten(0, 1).int()


def listed(index: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """Return the kernel map of a window on tiles (csrc/cpu/mapped.h), site by site."""
    axes, grid = len(window) // 5, grid[1:]
    tile, kernel, stride, padding, dilation = (window[i : i + axes] for i in range(1, len(window), axes))
    coarse = [side // step for side, step in zip(tile, stride, strict=True)]
    sides, reached = (tile, coarse) if window[0] else (coarse, tile)
    if index.numel() == 0:
        return torch.empty(0, math.prod(kernel), dtype=torch.int32)
    sites, image = tile_sites(tuple(sides)), index
    taps = torch.cartesian_prod(*map(torch.arange, kernel)).view(-1, len(kernel))
    places, there = [], torch.ones(1, dtype=torch.bool)
    for axis in reversed(range(len(grid))):
        site = (image % grid[axis] * sides[axis])[:, None, None] + sites[:, axis, None]
        tap, image = taps[:, axis] * dilation[axis], image // grid[axis]
        if window[0]:
            there = there & ((site + padding[axis] - tap) % stride[axis] == 0)
            places.insert(0, (site + padding[axis] - tap) // stride[axis])
        else:
            places.insert(0, site * stride[axis] - padding[axis] + tap)
    return rows_at(index, grid, reached, places, there, image)


def on_window(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reference on kernel maps for an operator that also takes the index of tiles and a window."""

    def run(grid: Sequence[int], window: Sequence[int], **a: Any) -> Any:
        if window:
            index = a["kernel_map"]
            a["kernel_map"] = listed(index, grid, window)
            if "inverse_map" in a:
                a["inverse_map"] = listed(index, grid, [1 - window[0], *window[1:]])
        return reference(**a)

    return run


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor) -> Tensor:
    rows = read(x, kernel_map).unflatten(2, (weight.shape[0], weight.shape[2]))
    out = torch.einsum("okgi,gkij->ogj", rows, weight).flatten(1)
    return out if bias is None else out + bias.reshape(-1)


def mapped_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: Tensor, inverse_map: Tensor | None = None
) -> Tensor:
    out = (read(x, kernel_map) * weight).sum(1)
    return out if bias is None else out + bias.reshape(-1)


def mapped_depthwise_conv_weight_grad(grad: Tensor, x: Tensor, kernel_map: Tensor) -> Tensor:
    return (grad[:, None] * read(x, kernel_map)).sum(0)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, tile: Sequence[int]) -> Tensor:
    kernel_map = site_map(x.shape[0], table, tile, weight.shape[2:])
    return mapped_depthwise_conv(x, weight.flatten(1).t(), bias, kernel_map)


def depthwise_conv_weight_grad(
    grad: Tensor, x: Tensor, table: Tensor, tile: Sequence[int], kernel: Sequence[int]
) -> Tensor:
    kernel_map = site_map(x.shape[0], table, tile, kernel)
    total = mapped_depthwise_conv_weight_grad(grad.reshape(x.shape), x, kernel_map)
    return total.t().reshape(-1, 1, *kernel)


def grn(x: Tensor, gamma: Tensor, beta: Tensor, splits: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    group = row_segments(splits)
    energy = x.new_zeros(len(splits) - 1, x.shape[1]).index_add(0, group, x * x)
    norm = torch.where(energy > 0, energy, 1).sqrt() * (energy > 0) + energy * energy.isnan()  # no gradient at 0
    scale = 1 + gamma.reshape(-1) * norm / (norm.mean(1, keepdim=True) + eps)
    return x * scale[group] + beta.reshape(-1), energy


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, variance = x.mean(1), x.var(1, correction=0)
    rstd = 1 / (variance + eps).sqrt()
    out = (x - mean[:, None]) * rstd[:, None] * weight.reshape(-1) + bias.reshape(-1)
    return out, torch.stack([mean, rstd], 1)


def scale_rows(x: Tensor, scale: Tensor, splits: Tensor) -> Tensor:
    return x * scale.reshape(-1)[row_segments(splits), None]


def convnextv2_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    grn_gamma: Tensor,
    grn_beta: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    row_scale: Tensor | None,
    table: Tensor,
    splits: Tensor,
    tile: Sequence[int],
    eps: float,
    grn_eps: float,
    keep_hidden: bool,
) -> tuple[Tensor, ...]:
    u = depthwise_conv(x, dwconv_weight, dwconv_bias, table, tile)
    v, moments = layer_norm(u, norm_weight, norm_bias, eps)
    hidden = v @ pwconv1_weight.t()
    h, energy = grn(F.gelu(hidden + pwconv1_bias.reshape(-1)), grn_gamma, grn_beta, splits, grn_eps)
    out = h @ pwconv2_weight.t() + pwconv2_bias.reshape(-1)
    y = x + (out if row_scale is None else out * row_scale.reshape(-1, 1))
    return y, u, moments, energy, hidden if keep_hidden else hidden[:0]


def gradients(forward: Callable[..., Any], arguments: Arguments, names: list[str]) -> list[Tensor]:
    """Return the gradients of the first output for `arguments["grad"]`."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    given = {name: leaves.get(name, arguments.get(name)) for name in inspect.signature(forward).parameters}
    out = forward(**given)
    out = out[0] if isinstance(out, tuple) else out
    found = torch.autograd.grad(out, list(leaves.values()), arguments["grad"].reshape(out.shape), allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), found, strict=True)]


def conv_weight_grad(**a: Any) -> Tensor:
    (found,) = gradients(conv, a, ["weight"])
    return found.permute(0, 3, 2, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.t()
    return out if bias is None else out + bias.reshape(-1)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


def max_pool(x: Tensor, kernel_map: Tensor, inverse_map: Tensor | None) -> tuple[Tensor, Tensor]:
    present, taps = (kernel_map >= 0)[..., None], kernel_map.shape[1]
    if kernel_map.numel() == 0:
        best = x.new_zeros(kernel_map.shape[0], x.shape[1])
        return best, torch.full_like(best, -1, dtype=torch.int32)
    value = read(x, kernel_map).masked_fill(~present, -torch.inf)
    best = value.amax(1)
    first, last_nan = ((value == best[:, None]) & present).byte().argmax(1), value.isnan().flip(1).byte().argmax(1)
    winner = torch.where(best.isnan(), taps - 1 - last_nan, first)
    return best.where(present.any(1), 0), winner.where(present.any(1), -1).int()


def max_pool_backward(grad: Tensor, winner: Tensor, kernel_map: Tensor, inverse_map: Tensor) -> Tensor:
    rows_in = inverse_map.shape[0]
    taken = (winner[:, None] == torch.arange(kernel_map.shape[1])[:, None]) & (kernel_map >= 0)[..., None]
    spread = torch.where(taken, grad[:, None], 0).flatten(0, 1)
    rows = torch.where(kernel_map < 0, rows_in, kernel_map).flatten().long()
    return grad.new_zeros(rows_in + 1, grad.shape[1]).index_add(0, rows, spread)[:rows_in]


def sum_pool(x: Tensor, kernel_map: Tensor, inverse_map: Tensor | None, factor: float) -> Tensor:
    return read(x, kernel_map).sum(1) * factor


def site_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    splits: Tensor,
    groups: int,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    segment, width = row_segments(splits), x.shape[1] // groups
    sizes = splits.diff().clamp(min=1)[:, None] * width

    def average(value: Tensor) -> Tensor:
        sums = value.new_zeros(len(splits) - 1, x.shape[1]).index_add(0, segment, value)
        return sums.unflatten(1, (groups, width)).sum(2) / sizes

    mean = average(x)
    variance = average((x - mean.repeat_interleave(width, 1)[segment]).square())
    by_row, rstd = (value.repeat_interleave(width, 1)[segment] for value in (mean, 1 / (variance + eps).sqrt()))
    z = (x - by_row) * rstd * (1 if weight is None else weight.reshape(-1)) + (0 if bias is None else bias.reshape(-1))
    return list(ACTIVATIONS.values())[activation](z, slope), mean, variance


def site_norm_backward(**a: Any) -> list[Tensor]:
    zeros = {key: a["x"].new_full((a["x"].shape[1],), value) for key, value in (("weight", 1.0), ("bias", 0.0))}
    given = {key: zeros[key] if a[key] is None else a[key] for key in zeros}
    found = gradients(site_norm, {**a, **given}, ["x", "weight", "bias"])
    return [found[0] if a["needs_x"] else found[0][:0], *found[1:]]


PARAMETERS = list(inspect.signature(convnextv2_block).parameters)[:11]
REFERENCES: dict[str, Callable[..., Any]] = (
    {
        function.__name__: function
        for function in (
            gather_tiles,
            scatter_tiles,
            depthwise_conv,
            depthwise_conv_weight_grad,
            linear,
            linear_weight_grad,
            grn,
            layer_norm,
            scale_rows,
            convnextv2_block,
            site_norm,
            site_norm_backward,
        )
    }
    | {
        function.__name__: on_window(function)
        for function in (
            conv,
            conv_weight_grad,
            mapped_depthwise_conv,
            mapped_depthwise_conv_weight_grad,
            max_pool,
            max_pool_backward,
            sum_pool,
        )
    }
    | {
        "grn_backward": lambda **a: gradients(grn, {**a, "beta": torch.zeros_like(a["gamma"])}, ["x", "gamma", "beta"]),
        "layer_norm_backward": lambda **a: gradients(
            layer_norm, {**a, "bias": torch.zeros_like(a["weight"]), "eps": EPS}, ["x", "weight", "bias"]
        ),
        "depthwise_conv_kept": mapped_depthwise_conv,
        "kernel_map": listed,
        "convnextv2_block_backward": lambda **a: gradients(convnextv2_block, {**a, "keep_hidden": False}, PARAMETERS),
    }
)
EPS = 1e-6


# --- valid calls ------------------------------------------------------------------------------------------------------


def valid(operator: str, rng: random.Random) -> Arguments:
    """Return arguments of a small valid call."""
    dtype, channels, ndim = rng.choice(FLOATING), rng.choice((1, 2, 3, 5, 8, 16, 33)), rng.randint(1, 3)
    kernel, tile, grid = ([rng.choice(some) for _ in range(ndim)] for some in ((1, 3, 5, 7), (1, 2, 3, 4), (1, 2, 3)))
    wide = statistics_dtype(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def vector(size: int = channels) -> Tensor:
        return normal(size, dtype=wide)

    batch = rng.randint(1, 3)
    mask = torch.rand(batch, *grid) < rng.choice((0.0, 0.4, 0.9))
    layout = Layout(TileSet.from_mask(mask, tuple(grid)), tuple(tile))
    index, splits, rows = layout.tiles.index.clone(), layout.row_splits.clone(), layout.rows
    table = neighbour_table(layout, kernel).clone()
    x, grad = normal(rows, channels), normal(rows, channels)
    optional = rng.random() < 0.5
    if operator in ("gather_tiles", "scatter_tiles"):
        ndim = rng.randint(1, 3)
        grid, sides = ([rng.choice(sizes) for _ in range(ndim)] for sizes in ((1, 2, 3), (1, 2, 3, 4, 6)))
        layout = Layout(
            TileSet.from_mask(torch.rand(batch, *grid) < rng.choice((0.0, 0.4, 0.9)), tuple(grid)), tuple(sides)
        )
        index = layout.tiles.index.clone()
        if operator == "gather_tiles":
            return {"dense": normal(batch, channels, *layout.shape), "index": index, "tile": sides}
        if operator == "scatter_tiles":
            sizes = {"batch": batch, "shape": list(layout.shape), "tile": sides}
            return {"rows": normal(layout.rows, channels), "fill": normal(channels), "index": index, **sizes}
    if operator == "depthwise_conv":
        bias = vector() if optional else None
        return {"x": x, "weight": normal(channels, 1, *kernel), "bias": bias, "table": table, "tile": tile}
    if operator == "depthwise_conv_weight_grad":
        return {"grad": grad, "x": x, "table": table, "tile": tile, "kernel": kernel}
    if "pool" in operator or ("conv" in operator and "block" not in operator) or operator == "kernel_map":
        outputs = rng.choice((1, 5, 16))
        no_window = operator == "depthwise_conv_kept"
        on: Arguments = {"grid": [], "window": []}
        if operator == "kernel_map" or (rng.random() < 0.5 and not no_window):
            inverse, sizes = rng.randint(0, 1), [rng.randint(1, 4) for _ in range(ndim)]
            strides = [rng.choice([step for step in range(1, side + 1) if side % step == 0]) for side in tile]
            paddings = [rng.randint(-2, 4) for _ in range(ndim)]
            dilations = [rng.choice((1, 1, 2, 5)) for _ in range(ndim)]
            window = [inverse, *tile, *sizes, *strides, *paddings, *dilations]
            on = {"grid": [batch, *grid], "window": window}
            if operator == "kernel_map":
                return {"index": index, **on}
            kernel_map, taps, coarse = index, math.prod(sizes), rows // math.prod(strides)
            rows, rows_out = (coarse, rows) if inverse else (rows, coarse)
            x = normal(rows, channels)
        else:
            rows_out, taps = rng.randint(0, 9), rng.randint(1, 9)
            kernel_map = torch.stack([torch.randperm(rows + 9)[:rows_out] for _ in range(taps)], 1).int()
            kernel_map[kernel_map >= rows] = -1
        keeps_inverse = not on["window"] and (optional or operator in ("max_pool_backward", "depthwise_conv_kept"))
        maps = {"kernel_map": kernel_map, "inverse_map": invert_kernel_map(kernel_map, rows) if keeps_inverse else None}
        if operator == "sum_pool":
            return {"x": x, **maps, "factor": 0.25, **on}
        if operator == "max_pool":
            return {"x": x, **maps, **on}
        if operator == "max_pool_backward":
            winner = torch.randint(-1, taps, (rows_out, channels)).to(torch.uint8)
            return {"grad": normal(rows_out, channels), "winner": winner, **maps, **on}
        if operator in ("mapped_depthwise_conv", "depthwise_conv_kept"):
            bias = vector() if rng.random() < 0.5 else None
            given = {"x": x, "weight": normal(taps, channels), "bias": bias, **maps}
            return given if no_window else {**given, **on}
        if operator == "mapped_depthwise_conv_weight_grad":
            return {"grad": normal(rows_out, channels), "x": x, "kernel_map": kernel_map, **on}
        groups = rng.choice([size for size in (1, 2, 3, 4, 8) if channels % size == 0])
        width, outputs = channels // groups, rng.choice((channels // groups, outputs))
        # The order of the axes in memory is torch's, MinkowskiEngine's, or that of channels last.
        order = rng.choice(((0, 3, 2, 1), (0, 1, 2, 3), (0, 3, 1, 2)))
        shape = [(groups, taps, width, outputs)[axis] for axis in order]
        weight = normal(*shape).permute([order.index(axis) for axis in range(4)])
        grad = normal(rows_out, groups * outputs)
        if operator == "conv_weight_grad":
            return {"grad": grad, "x": x, "weight": weight, "kernel_map": kernel_map, **on}
        bias = rng.choice((None, vector(groups * outputs)))
        return {"x": x, "weight": weight, "bias": bias, "kernel_map": kernel_map, **on}
    if operator in ("linear", "linear_weight_grad"):
        rows, outputs = rng.choice((rows, rows, 4200)), rng.choice((1, 5, 16, 64))  # the last: by our own product
        x, grad = normal(rows, channels), normal(rows, outputs)
        if operator == "linear_weight_grad":
            return {"grad": grad, "x": x}
        weight = normal(outputs, channels) if optional else normal(channels, outputs).t()
        return {"x": x, "weight": weight, "bias": normal(outputs) if rng.random() < 0.5 else None}
    if operator == "grn":
        return {"x": x, "gamma": vector(), "beta": vector(), "splits": splits, "eps": EPS}
    if operator == "grn_backward":
        gamma, energy = vector(), grn(x.double(), vector(), vector(), splits, EPS)[1].to(wide)
        return {"grad": grad, "x": x, "gamma": gamma, "splits": splits, "energy": energy, "eps": EPS}
    if operator == "layer_norm":
        return {"x": x, "weight": vector(), "bias": vector(), "eps": EPS}
    if operator == "layer_norm_backward":
        moments = layer_norm(x.double(), torch.ones(channels), torch.zeros(channels), EPS)[1].to(wide)
        return {"grad": grad, "x": x, "weight": vector(), "moments": moments}
    if "site_norm" in operator:
        groups = rng.choice([size for size in range(1, channels + 1) if channels % size == 0])
        given = {"weight": vector() if optional else None, "bias": vector() if rng.random() < 0.5 else None}
        rest = {"splits": splits, "groups": groups, "eps": EPS, "activation": rng.randint(0, 6), "slope": 0.1}
        if operator == "site_norm":
            return {"x": x, **given, **rest}
        _, *moments = site_norm(x.double(), None, None, splits, groups, EPS, 0, 0.0)
        kept = dict(zip(("mean", "variance"), (value.to(wide) for value in moments), strict=True))
        return {"grad": grad, "x": x, **given, **kept, **rest, "needs_x": rng.random() < 0.8}
    if operator == "scale_rows":
        return {"x": x, "scale": vector(batch), "splits": splits}
    hidden = rng.choice((1, 4, 32))
    p = [normal(channels, 1, *kernel), vector(), vector(), vector(), normal(hidden, channels), vector(hidden)]
    p += [vector(hidden), vector(hidden), normal(channels, hidden), vector()]
    shared: Arguments = {
        **dict(zip(PARAMETERS, (x, *p), strict=True)),
        "row_scale": vector(rows) if optional else None,
        "table": table,
        "splits": splits,
        "tile": tile,
        "eps": EPS,
        "grn_eps": EPS,
    }
    keep = rng.random() < 0.5
    if operator == "convnextv2_block":
        return {**shared, "keep_hidden": keep}
    kept = torch.ops.sparsecnx.convnextv2_block(**shared, keep_hidden=keep)[1:]
    return {"grad": grad, **shared, **dict(zip(KEPT, kept, strict=True))}


# --- changes ----------------------------------------------------------------------------------------------------------


def freed(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    x.untyped_storage().resize_(0)
    return x


def cut(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    x.untyped_storage().resize_(max(0, x.untyped_storage().nbytes() - x.element_size()))
    return x


def to_meta(x: Tensor, rng: random.Random) -> Tensor:
    return x.to("meta")


def other_dtype(x: Tensor, rng: random.Random) -> Tensor:
    others = (*FLOATING, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)
    return x.to(rng.choice(others))


def fewer(x: Tensor, rng: random.Random) -> Tensor:
    d = rng.randrange(x.ndim)
    return x.narrow(d, 0, x.shape[d] - 1 if rng.random() < 0.7 and x.shape[d] else 0).contiguous()


def more(x: Tensor, rng: random.Random) -> Tensor:
    d = rng.randrange(x.ndim)
    return torch.cat([x, x], d) if rng.random() < 0.3 else torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d)


def other_shape(x: Tensor, rng: random.Random) -> Tensor:
    return rng.choice(
        (x[None], x[..., None], x.flatten(), x.reshape(-1)[:1].squeeze(), x.transpose(0, -1).contiguous())
    )


def other_strides(x: Tensor, rng: random.Random) -> Tensor:
    spread = torch.stack([x, x], -1)[..., 0]
    reverse = x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])
    return rng.choice((spread, reverse, x[:1].expand(x.shape) if x.shape[0] else x))


def shifted(x: Tensor, rng: random.Random) -> Tensor:
    """Return the same values at an address that no vector register is aligned to."""
    return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[min(1, x.numel()) :].view(x.shape)


def huge(x: Tensor, rng: random.Random) -> Tensor:
    """Return a tensor of huge sizes that takes no memory."""
    sizes = [rng.choice((0, *HUGE)) if rng.random() < 0.6 else size for size in x.shape]
    if rng.random() < 0.5:
        sizes[rng.randrange(x.ndim)] = 0
        return torch.empty(sizes, dtype=x.dtype)
    return torch.zeros(1, dtype=x.dtype).expand(sizes)


def other_values(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone()
    if x.numel() == 0:
        return x
    values: Sequence[float] = FLOATS[-3:]
    if not x.is_floating_point():
        values = (-1, -2, 0, 1, x.numel(), int(x.max()) + 1, -(2**31), 2**31 - 1)
        if rng.random() < 0.3:
            return x.flatten()[torch.randperm(x.numel())].view(x.shape)
    for _ in range(rng.randint(1, 3)):
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(values)
    return x


def other_kind(x: Tensor, rng: random.Random) -> Any:
    """Return what is no ordinary tensor, or no tensor."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: x.tolist(),
        lambda: [x],
        lambda: 1.5,
        lambda: x.to_sparse(),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: torch.view_as_real(torch.complex(torch.zeros(x.shape), -x.float()).conj())[..., 1],
        lambda: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
        lambda: torch._lazy_clone(x),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    ]
    return rng.choice(kinds)()


TENSOR_CHANGES: list[tuple[Callable[[Tensor, random.Random], Any], int]] = [
    (freed, 3),
    (cut, 3),
    (to_meta, 2),
    (other_dtype, 3),
    (fewer, 3),
    (more, 3),
    (other_shape, 2),
    (other_strides, 2),
    (shifted, 3),
    (huge, 5),
    (other_values, 5),
    (other_kind, 3),
]
MUST_RAISE = (freed, cut, to_meta)
GRADIENT = "freed before the gradient"


def operators() -> dict[str, Any]:
    found = {name: getattr(torch.ops.sparsecnx, name).default for name in compiled.OPERATORS if name != "cpu_isa"}
    mapped = torch.ops.sparsecnx_mapped
    return found | {"depthwise_conv_kept": mapped.depthwise_conv_kept.default}


def sweep() -> list[tuple[str, str, int]]:
    """Return the calls that come first: each tensor of each operator with each change that must raise."""
    found = []
    for name, operator in operators().items():
        tensors = [argument for argument in operator._schema.arguments if "Tensor" in str(argument.type)]
        for argument in operator._schema.arguments:
            if argument in tensors:
                changes = [i for i, change in enumerate(MUST_RAISE) if change is not to_meta or len(tensors) > 1]
                found += [(name, argument.name, change) for change in changes]
                if not name.endswith(("_backward", "_grad")):
                    found.append((name, argument.name, len(MUST_RAISE)))
    return found


def draw(seed: int, number: int) -> tuple[str, Arguments, dict[str, str]]:
    """Return the operator, the arguments and the changes, by argument, of a call."""
    rng, first = random.Random(f"{seed} {number}"), sweep()
    torch.manual_seed(rng.randrange(2**31))
    if number < len(first):
        name, changed, change = first[number]
        while True:  # until the tensor is there and has elements
            arguments = valid(name, rng)
            if isinstance(arguments[changed], Tensor) and arguments[changed].numel() > 0:
                break
        if change == len(MUST_RAISE):
            return name, arguments, {changed: GRADIENT}
        arguments[changed] = MUST_RAISE[change](arguments[changed], rng)
        return name, arguments, {changed: MUST_RAISE[change].__name__}
    name = rng.choice(list(REFERENCES))
    arguments, changes = valid(name, rng), {}
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2))):
        changed = rng.choice(list(arguments))
        value = arguments[changed]
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.device.type != "cpu" or value.ndim == 0 or changed in changes:
                continue
            (change,) = rng.choices(*zip(*TENSOR_CHANGES, strict=True))
            try:
                arguments[changed] = change(value, rng)
            except (RuntimeError, NotImplementedError, TypeError):
                continue  # torch itself has no such tensor
            changes[changed] = change.__name__
        elif isinstance(value, list) and value:
            value = list(value)
            value[rng.randrange(len(value))] = rng.choice(INTEGERS)
            arguments[changed] = rng.choice((value, value, value[1:], [*value, 1]))
            changes[changed] = repr(arguments[changed])
        elif value is not None and value != []:
            arguments[changed] = (
                rng.choice((not value, None, 7))
                if isinstance(value, bool)
                else rng.choice(FLOATS if isinstance(value, float) else INTEGERS)
            )
            changes[changed] = repr(arguments[changed])
    return name, arguments, changes


def run(seed: int, number: int) -> str:
    """Make a call and return what came of it: "raised", "equal", "not compared", or "wrong: ..."."""
    name, arguments, changes = draw(seed, number)
    rng = random.Random(f"{number}")
    gradient = number >= len(sweep()) and rng.random() < 0.15 and not name.endswith(("_backward", "_grad"))
    (swept,) = changes if number < len(sweep()) else (None,)
    try:
        if swept is not None and changes[swept] == GRADIENT:
            differentiate(name, arguments, swept)
            return "not compared"  # That gradient did not read it.
        found = operators()[name](**arguments)
        if gradient:
            differentiate(name, arguments, rng.choice([None, None, *arguments]))
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        if "INTERNAL ASSERT" in str(error):
            return f"wrong: {message}"
        if swept is not None and swept not in message:
            return f"wrong: the error does not name the argument: {message}"
        return "raised"
    if swept is not None:
        return "wrong: taken"
    found = found if isinstance(found, (tuple, list)) else (found,)
    if any(x.device.type == "meta" for x in found):
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        return "equal" if all(value.device.type == "meta" for value in tensors) else "wrong: meta from a CPU tensor"
    # Not compared: a backward with an eps or a kept tensor of another forward, or a table that is not symmetric; an eps
    # other than 0; the variance of few channels and GRN of one, which may be nothing but rounding.
    backward = name.endswith("_backward")
    other = {key for key, change in changes.items() if key.endswith("eps") and (backward or change != "0.0")}
    other |= changes.keys() & {*KEPT, *(("mean", "variance", "frozen") if backward else ())} | (
        changes.keys() & {"table"} if "block" in name and backward else set()
    )
    # Results of gigabytes take longer to compare than a call may.
    if any(x.numel() > 2**24 for x in found):
        return "not compared"
    few = ("layer_norm" in name or "block" in name) and arguments["x"].shape[1] < 5
    few |= "site_norm" in name and bool((arguments["splits"].diff() * arguments["x"].shape[1] < 9).any())
    few |= "block" in name and arguments["pwconv1_weight"].shape[0] == 1
    if other or few:
        return "not compared"
    if backward and "block" in name and arguments["pwconv2_weight"].shape[1] < 8 and arguments["x"].itemsize < 4:
        # In 16 bits the sums over few hidden channels cancel to rounding: what is compared is the same call in float32.
        arguments = {
            key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in arguments.items()
        }
        forward = {key: arguments[key] for key in inspect.signature(convnextv2_block).parameters if key in arguments}
        kept = operators()["convnextv2_block"](**forward, keep_hidden=arguments["hidden"].numel() > 0)[1:]
        arguments |= dict(zip(KEPT, kept, strict=True))
        found = operators()[name](**arguments)
    return compare(name, found, arguments, changes)


def differentiate(name: str, arguments: Arguments, freed: str | None) -> None:
    """Run the gradient too, after the storage of an argument was freed."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and key not in ("scale", "row_scale")
    }
    if not leaves:
        return
    out = operators()[name](**{**arguments, **leaves})
    given = {**arguments, **leaves}.get(freed or "")
    if type(given) is Tensor and given.device.type == "cpu" and given.layout == torch.strided:
        given.untyped_storage().resize_(0)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def compare(name: str, found: Sequence[Tensor], arguments: Arguments, changes: dict[str, str]) -> str:
    """Compare with the reference in float64."""
    moved = name.endswith(("_tiles", "_map"))  # values of any dtype, bit for bit
    first = next(value.dtype for value in arguments.values() if isinstance(value, Tensor))

    def reference(dtype: torch.dtype) -> Any:
        """Return what plain torch computes in that dtype."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point() and not moved
            return value.to(dtype) if floating else value

        return REFERENCES[name](**{key: cast(value) for key, value in arguments.items()})

    try:
        expected = reference(torch.float64)
    except Exception as error:
        return f"wrong: taken, but the reference says {type(error).__name__}: {error}"
    expected = expected if isinstance(expected, (tuple, list)) else (expected,)
    # A value that is not finite times a weight of a site that is not there is NaN or nothing.
    loose = any(change in ("other_values", *map(repr, FLOATS)) for change in changes.values())
    for position, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.numel() != other.numel():
            return f"wrong: output {position} is {tuple(one.shape)}, expected {tuple(other.shape)}"
        one, other = one.detach().reshape(-1), other.detach().reshape(-1)
        if moved:
            if not torch.equal(one.nan_to_num(0.125), other.nan_to_num(0.125)):
                return f"wrong: output {position} differs"
            continue
        other = other.to(one.dtype).double()
        one, finite = one.double(), other.isfinite()
        if not loose:
            finite |= True
        off = distance(one, other, finite)
        if not off < BOUNDS.get(first, 0.0):
            # A sum that cancels keeps few digits in any arithmetic of that dtype, also in torch's.
            rounded = reference(first)
            rounded = rounded[position] if isinstance(rounded, (tuple, list)) else rounded
            if not off < 8 * distance(rounded.detach().reshape(-1).double(), other, finite):
                return f"wrong: output {position} is off by {off:.3g}"
    return "equal"


def distance(found: Tensor, expected: Tensor, where: Tensor) -> float:
    """Return ||found - expected|| / ||expected|| over some elements."""
    if not where.any():
        return 0.0
    return float((found - expected)[where].norm() / expected[where].norm().clamp(min=1e-30))


# --- processes --------------------------------------------------------------------------------------------------------


def child(seed: int, first: int, end: int, limited: bool) -> None:
    """Make calls [first, end). Print the number of each before it, what came of it after it."""
    torch.set_num_threads(2)
    operators()
    valid("convnextv2_block_backward", random.Random(0))
    if limited:
        (size,) = (
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line
        )
        limit = (size << 10) + (GIGABYTES << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, end):
        print(number, end=" ", flush=True)
        # Nobody handles these signals, so they end the process also inside C++.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        result = run(seed, number)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(result.replace("\n", " "), flush=True)


def fuzz(calls: int, seed: int, limited: bool = True) -> tuple[Counter[str], list[str]]:
    """Return how many calls raised, were equal and so on, and a line for each crash, hang or wrong number."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    first = 0
    with tempfile.TemporaryFile("w+") as errors:
        while first < calls:
            options = [f"--seed={seed}", f"--first={first}", f"--calls={calls}", *([] if limited else ["--unlimited"])]
            command = [sys.executable, "-W", "ignore", __file__, "--child", *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            lines = done.stdout.splitlines()
            for line in lines:
                number, _, result = line.partition(" ")
                first = int(number) + 1
                if not result:
                    result = (
                        "hang"
                        if -done.returncode in (signal.SIGPROF, signal.SIGALRM)
                        else f"crash: exit code {done.returncode}"
                    )
                counts[result.partition(":")[0]] += 1
                if result.startswith(("hang", "crash", "wrong")):
                    faults.append(f"call {number}: {result}: {describe(seed, int(number))}")
            if not lines or (done.returncode and lines[-1].partition(" ")[2]):
                errors.seek(0)
                raise RuntimeError(
                    f"child process failed outside a call, exit code {done.returncode}: {errors.read()[-4000:]}"
                )
    return counts, faults


def describe(seed: int, number: int) -> str:
    name, arguments, changes = draw(seed, number)
    shown = [
        f"{key}={value.dtype}{tuple(value.shape)}".replace("torch.", "")
        if isinstance(value, Tensor)
        else f"{key}={value!r}"
        for key, value in arguments.items()
    ]
    return f"{name}({', '.join(shown)}) with {changes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--unlimited", action="store_true", help="no limit of memory, which sanitizers cannot have")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.seed, options.first, options.calls, not options.unlimited)
    counts, faults = fuzz(options.calls, options.seed, not options.unlimited)
    record = {
        "command": f"python tests/fuzz_operators.py --calls {options.calls} --seed {options.seed}",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {torch.ops.sparsecnx.cpu_isa()}, {os.cpu_count()} CPUs",
        "versions": f"sparsecnx {sparsecnx.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "calls": options.calls,
        "counts": {key: counts[key] for key in ("raised", "equal", "not compared", "crash", "hang", "wrong")},
    }
    print("\n".join([*faults, json.dumps(record, indent=2)]))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
