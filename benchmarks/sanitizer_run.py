"""Every CUDA kernel at small shapes, odd ones among them: what compute-sanitizer looks at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitizer_run.py
    compute-sanitizer --tool racecheck python benchmarks/sanitizer_run.py

Tensors must be allocations of their own for memcheck to see where they end, hence the variable. Results are not
compared with anything, which gpu_parity.py does, but a value that is not finite is an error: memory that nobody wrote
may hold one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsecnx import Layout
from sparsecnx.backends import compiled
from sparsecnx.geometry.layout import TileSet
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table
from sparsecnx.ops.global_response_norm import segments as segments_of

GRIDS = ((3, 5), (1, 1), (7, 7))
TILES = (8, 4, 2, 1, 3, 5, 6)
CHANNELS = (40, 96, 1, 7, 130)  # rows of whole 16 bytes and not; more and fewer than a block takes
KERNELS = ((7, 7), (3, 3), (5, 5), (5, 1))  # the last has no kernels of its own
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MOVED = (torch.int8, torch.float64)  # that gather and scatter take too
BATCH = 3


def masks(grid: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    """Counts that differ, with an empty and a full image; and equal counts."""
    drawn = torch.rand(BATCH, *grid, generator=torch.Generator().manual_seed(0)) < 0.5
    drawn[0], drawn[-1] = True, False
    yield drawn.to(device)
    yield torch.zeros(BATCH, *grid, dtype=torch.bool, device=device)


def shapes() -> Iterator[tuple[tuple[int, int], int, int, tuple[int, int], torch.dtype]]:
    """Grid, tile, channels, kernel and dtype: every tile with every number of channels, the others in turn; and every
    kernel in every dtype, for every size of square and rows of whole 16 bytes and not."""
    others = itertools.cycle(itertools.product(GRIDS, KERNELS, DTYPES))
    for (tile, channels), (grid, kernel, dtype) in zip(itertools.product(TILES, CHANNELS), others, strict=False):
        yield grid, tile, channels, kernel, dtype
    for kernel, dtype, tile in itertools.product(KERNELS[:-1], DTYPES, TILES[:4]):
        yield (2, 1), tile, 72, kernel, dtype
    for dtype, channels in itertools.product(DTYPES, (40, 7)):
        yield (2, 1), 3, channels, KERNELS[-1], dtype


def run_shape(
    grid: tuple[int, int], tile: int, channels: int, kernel: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Results of every operator, by its name."""
    cuda = torch.ops.sparsecnx_cuda
    for mask in masks(grid, device):
        layout = Layout.from_mask(mask, (grid[0] * tile, grid[1] * tile))
        x, grad = torch.randn(2, layout.rows, channels, device=device, dtype=dtype)
        weight = torch.randn(channels, 1, *kernel, device=device, dtype=dtype)
        bias, gamma, beta = torch.randn(3, channels, device=device)
        table = neighbour_table(layout, kernel)
        for given in (bias, None):
            yield "depthwise_conv", cuda.depthwise_conv(x, weight, given, table, tile)
        for residual, flip, eps in ((None, False, 1e-6), (grad, True, None), (grad, False, 1e-6)):
            out, rstd = cuda.depthwise_conv_fused(x, weight, bias, residual, table, tile, flip, eps)
            yield from (("depthwise_conv_fused", out), ("depthwise_conv_fused", rstd))
        for found in cuda.depthwise_conv_weight_grad(grad, x, table, tile, *kernel):
            yield "depthwise_conv_weight_grad", found
        for scope in ("sample", "batch"):
            segments = segments_of(layout, scope)
            out, energy = cuda.grn(x, gamma, beta, segments, 1e-6)
            yield from (("grn", out), ("grn", energy))
            for found in cuda.grn_backward(grad, x, gamma, segments, energy, 1e-6):
                yield "grn_backward", found
        yield from run_packing(layout, channels, dtype)


def run_packing(layout: Layout, channels: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Gathered planes in three orders of memory, and scattered rows."""
    cuda, index, slots = torch.ops.sparsecnx_cuda, layout.tiles.index, layout.tiles.slots()

    def draw(*shape: int) -> Tensor:
        return (100 * torch.randn(shape, device=layout.device)).to(dtype)

    dense = draw(layout.batch, channels, *layout.shape)
    for planes in (
        dense,
        dense.to(memory_format=torch.channels_last),
        dense.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        yield "gather_tiles", cuda.gather_tiles(planes, index, slots, layout.tile)
    rows, fill = draw(layout.rows, channels), draw(channels)
    yield "scatter_tiles", cuda.scatter_tiles(rows, fill, index, slots, layout.batch, *layout.shape, layout.tile)


def run_moved(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """What gather and scatter take and no other operator does."""
    for dtype, tile, channels in itertools.product(MOVED, (8, 3), (16, 3)):
        for mask in masks(GRIDS[0], device):
            layout = Layout.from_mask(mask, (GRIDS[0][0] * tile, GRIDS[0][1] * tile))
            yield from run_packing(layout, channels, dtype)


def run_layouts(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Indices and tables in one to three dimensions."""
    cuda = torch.ops.sparsecnx_cuda
    for grid in ((37,), (3, 5), (2, 3, 4), (40, 41)):
        for mask in (torch.rand(BATCH, *grid) < 0.6, torch.zeros(BATCH, *grid, dtype=torch.bool)):
            tiles = TileSet.from_mask(mask.to(device), grid)
            visible = -1 if tiles.visible is None else tiles.visible
            index, splits, slots = cuda.tile_index(mask.to(device).flatten(1), tiles.count, visible)
            yield from (("tile_index", found) for found in (index, splits, slots))
            for radius in (1, 2, 3):
                yield "neighbour_table", cuda.neighbour_table(index, slots, list(grid), radius)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every CUDA kernel at small shapes.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=int, default=10**6, help="shapes to run, by default all")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    if device.type == "cuda" and not compiled.cuda_loaded:
        print(f"no CUDA operators: {compiled.cuda_why_not}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    counts: dict[str, int] = {}
    results = itertools.chain.from_iterable(
        [
            *(run_shape(*shape, device) for shape in itertools.islice(shapes(), options.most)),
            run_moved(device),
            run_layouts(device),
        ]
    )
    for name, found in results:
        counts[name] = counts.get(name, 0) + 1
        if found.is_floating_point() and not found.isfinite().all():
            print(f"{name}: a result of shape {tuple(found.shape)}, {found.dtype}, is not finite", file=sys.stderr)
            return 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print("ran " + ", ".join(f"{name} ({count} results)" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
