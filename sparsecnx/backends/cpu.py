"""Say whether the compiled CPU kernels, `torch.ops.sparsecnx.*`, can run on an input."""

from __future__ import annotations

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
