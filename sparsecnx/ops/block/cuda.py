"""The fused ConvNeXt V2 block with the depthwise steps of CUDA C++. Everything else is that of `triton.py`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from sparsecnx.backends import triton_launch
from sparsecnx.ops.cuda import refusal_2d
from sparsecnx.tensor import SparseTensor

triton: Any = importlib.import_module("sparsecnx.ops.block.triton_kernels") if triton_launch.available else None


def refusal(x: SparseTensor) -> str | None:
    """Why the block cannot run on `x` with CUDA's depthwise steps; None where it can."""
    refused = refusal_2d(x)
    if refused is not None:
        return refused
    refused = triton_launch.refusal(x.device)
    return None if refused is None else f"all but its depthwise steps are Triton's: {refused}"


def convnextv2_block(x: SparseTensor, *arguments: Any) -> Tensor:
    """Features `(rows, C)` of the block; arguments as those of `triton.convnextv2_block`."""
    return triton.convnextv2_block(x, *arguments, depthwise="cuda")


def detail(x: SparseTensor) -> str:
    """How the block runs on `x`, for those who ask."""
    return f"depthwise steps alone, the rest on triton; {triton.detail(x)}"
