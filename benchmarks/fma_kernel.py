"""As many float32 multiply-adds as a GPU can do: what its arithmetic outside matrix products is measured against."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a program: independent chains, enough to keep every pipeline full
UNROLL = 32


@triton.jit
def multiply_add_kernel(
    out_ptr,  # float32 (programs * BLOCK,), out
    iterations,
    BLOCK: tl.constexpr,  # noqa: N803
    UNROLL: tl.constexpr,  # noqa: N803
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = place.to(tl.float32)
    factor = 1.0 - value * 1e-9
    for _ in range(iterations):
        for _ in tl.static_range(UNROLL):
            value = value * factor + 0.5
    tl.store(out_ptr + place, value)


def run(out: Tensor, programs: int, iterations: int) -> None:
    """`iterations * UNROLL` multiply-adds on each of `programs * BLOCK` values."""
    multiply_add_kernel[(programs,)](out, iterations, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=4)


def flops(programs: int, iterations: int) -> int:
    """Floating point operations of `run`."""
    return 2 * programs * BLOCK * iterations * UNROLL
