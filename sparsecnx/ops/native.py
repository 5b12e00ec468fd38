"""What the compiled CPU kernels can take. Each operator's own `native.py` calls them."""

from __future__ import annotations

from sparsecnx.backends import compiled
from sparsecnx.backends.dispatch import Rows
from sparsecnx.ops.checks import FLOATING
from sparsecnx.tensor import SparseTensor


def refusal(x: Rows) -> str | None:
    """Why the compiled kernels cannot run on `x`; None where they can."""
    if not compiled.loaded:
        return compiled.why_not
    if x.device.type != "cpu":
        return f"compiled kernels run on the CPU, x is on {x.device}"
    if x.dtype not in FLOATING:
        return f"x is {x.dtype}"
    return None


def refusal_2d(x: SparseTensor) -> str | None:
    """As `refusal`, for kernels that are written for two spatial dimensions."""
    if x.layout.ndim != 2:
        return f"compiled kernel is two-dimensional, x has {x.layout.ndim} spatial dimensions"
    return refusal(x)
