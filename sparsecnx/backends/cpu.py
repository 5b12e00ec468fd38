"""Say whether the compiled CPU kernels, `torch.ops.sparsecnx.*`, can run on an input."""

from __future__ import annotations

from typing import Any

from sparsecnx.backends import compiled
from sparsecnx.backends.dispatch import Rows
from sparsecnx.common.dtypes import FLOATING


def refusal(x: Rows) -> str | None:
    """Return why the compiled kernels cannot run on `x`; None where they can."""
    if not compiled.loaded:
        return compiled.why_not
    if x.device.type != "cpu":
        return f"compiled kernels run on the CPU, x is on {x.device}"
    if x.dtype not in FLOATING:
        return f"x is {x.dtype}"
    return None


def refusal_2d(x: Any) -> str | None:
    """Return the refusal of kernels for SparseTensors of two spatial dimensions with square tiles."""
    if x.layout.ndim != 2:
        return f"compiled kernel is two-dimensional, x has {x.layout.ndim} spatial dimensions"
    if x.layout.side is None:
        return f"compiled kernel takes square tiles, x has tiles of {x.layout.tile} sites"
    return refusal(x)
