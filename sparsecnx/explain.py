"""`sparsecnx doctor --explain`: which implementation of each operator runs here, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sparsecnx.backends.dispatch import Choice
from sparsecnx.geometry.layout import Layout, TileSet
from sparsecnx.models import SIZES
from sparsecnx.ops.block import operator as convnextv2_block
from sparsecnx.ops.convolution import operator as conv
from sparsecnx.ops.depthwise_convolution import operator as depthwise_conv
from sparsecnx.ops.drop_path import operator as stochastic_depth
from sparsecnx.ops.global_response_norm import operator as grn
from sparsecnx.ops.layer_normalization import operator as layer_norm
from sparsecnx.tensor import SparseTensor

# All that run on tiles, as the models do; none of those on explicit kernel maps.
OPERATORS = (convnextv2_block, layer_norm, conv, depthwise_conv, grn, stochastic_depth)
PATCHIFY = "4x4/4 and 2x2/2 kernels are one matrix product instead"
TILES = (8, 4, 2, 1)  # sites per side of a patch of 32 pixels, in the four stages
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEADER = ("operator", "C", "tile", "runs on", "why")


def report(device: torch.device, dtype: torch.dtype, model: str) -> str:
    """The choices of every operator at the four stages of a model, and below them what was not taken and why.

    Args:
        model: one of `sparsecnx.models.SIZES`.
    """
    inputs = stages(device, dtype, model)
    found = [(x, operator.explain(x)) for operator in OPERATORS for x in inputs]
    table = [HEADER, *(_line(x, choice) for x, choice in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    where = f"{inputs[0].device} in {str(dtype).removeprefix('torch.')}"
    lines = [f"What runs on {where}, in the four stages of ConvNeXt V2 {model.capitalize()}", ""]
    for operator, channels, tile, backend, why in table:
        left, right = f"{operator:{widths[0]}}  {channels:>{widths[1]}}", f"{tile:>{widths[2]}}  {backend:{widths[3]}}"
        lines.append(f"{left}  {right}  {why}")
    lines += ["", "What does not, and why", ""]
    for (backend, reason), operators in _not_taken(choice for _, choice in found).items():
        lines += [f"{backend}: {reason}", f"    {', '.join(operators)}"]
    return "\n".join(lines)


def stages(device: torch.device, dtype: torch.dtype, model: str) -> list[SparseTensor]:
    """One visible patch of 32 pixels, as the four stages of a model see it."""
    tiles = TileSet.from_mask(torch.zeros(1, 1, 1, dtype=torch.bool, device=device), (1, 1))
    return [
        SparseTensor(torch.zeros(tile**2, channels, dtype=dtype, device=device), Layout(tiles, tile, 32 // tile))
        for channels, tile in zip(SIZES[model].dims, TILES, strict=True)
    ]


def _line(x: SparseTensor, choice: Choice) -> tuple[str, ...]:
    why = [choice.reasons[choice.backend], choice.detail, PATCHIFY if choice.operator == conv.name else ""]
    channels, tile = str(x.features.shape[1]), str(x.layout.tile)
    return choice.operator, channels, tile, choice.backend, "; ".join(filter(None, why))


def _not_taken(choices: Iterable[Choice]) -> dict[tuple[str, str], dict[str, None]]:
    """The operators, in order, that a backend does not run for a reason."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for choice in choices:
        for backend, reason in choice.reasons.items():
            if backend != choice.backend:
                reasons.setdefault((backend, reason), {})[choice.operator] = None
    return reasons
