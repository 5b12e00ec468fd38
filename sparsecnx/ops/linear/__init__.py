"""The product of rows and a matrix: `torch.nn.functional.linear`, by the compiled kernel where it is quicker."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.backends import compiled
from sparsecnx.backends.selection import selected
from sparsecnx.backends.transforms import levels, transforms_active
from sparsecnx.ops.linear import cpu

# The least rows * C * C_out for the compiled operator, whose gradient passes through Python. On one thread of an AMD
# EPYC with AVX-512, with gradients, 64 to 64 channels take 185 us in torch and 218 here for 512 rows, 326 and 334 for
# 1024 rows.
LEAST_PRODUCT = 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` for rows `x (rows, C)`, `weight (C_out, C)` and `bias (C_out,)` or None.

    What is not float32 on a CPU, is small, is to be cast by autocast, or is in a transform of `torch.func`, goes to
    torch's own function, and so does everything under a backend asked for by name that is not "cpu".
    """
    if (
        compiled.loaded
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and x.ndim == weight.ndim == 2
        and selected() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or (_is_large(x, weight) and _is_plain()))
    ):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] * weight.shape[0] * weight.shape[1] >= LEAST_PRODUCT


def _is_plain() -> bool:
    """Return whether neither forward-mode derivatives nor a transform are at work: torch's own product has these."""
    return levels._current_level < 0 and not transforms_active()
