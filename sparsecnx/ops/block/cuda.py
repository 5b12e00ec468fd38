"""The fused ConvNeXt V2 block with the depthwise steps of CUDA C++. The rest is `triton_block.py`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from sparsecnx.backends import cuda, triton_launch
from sparsecnx.tensor import SparseTensor

triton_block: Any = importlib.import_module("sparsecnx.ops.block.triton_block") if triton_launch.available else None


def refusal(x: SparseTensor) -> str | None:
    """Return why the block cannot run on `x` with CUDA's depthwise steps; None where it can."""
    refused = cuda.refusal(x)
    if refused is not None:
        return refused
    refused = triton_launch.device_refusal(x.device)
    return None if refused is None else f"its other steps are Triton's: {refused}"


def convnextv2_block(x: SparseTensor, *arguments: Any) -> Tensor:
    """Return features `(rows, C)` of the block; arguments as those of `triton_block.convnextv2_block`."""
    return triton_block.convnextv2_block(x, *arguments, depthwise="cuda")


def detail(x: SparseTensor) -> str:
    """Return how the block runs on `x`."""
    return f"depthwise steps alone, the rest on triton; {triton_block.detail(x)}"
