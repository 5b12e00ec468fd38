"""The check of a tensor's memory for what is plain torch, and what a process does with freed memory.

csrc/storage.h has the check of the compiled operators.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor


def check_memory(**tensors: Tensor | None) -> None:
    """Raise RuntimeError unless the storage of every tensor that is given holds its elements.

    Where one was freed or cut, as `x.untyped_storage().resize_(0)` does, torch's own functions end the process.
    """
    for name, x in tensors.items():
        if x is None or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
            continue  # These have no memory of their own yet.
        try:
            bytes_there = x.untyped_storage().nbytes()
        except NotImplementedError:
            continue  # torch.func wraps tensors. What it wraps reaches the operators.
        if x.is_contiguous():
            count = x.numel()
        else:
            count = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        if bytes_there < (x.storage_offset() + count) * x.itemsize and x.numel() and not x._is_zerotensor():
            raise RuntimeError(
                f"{name} has {x.numel()} elements, but its storage holds {bytes_there} bytes: it was freed or never"
                f" allocated; call the operator, and its gradient, while {name} has its memory"
            )


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: gradients that are dropped at every step are given back, and fault in again.

    It holds for the process, so that commands ask for it and the library does not. Elsewhere than on glibc it does
    nothing.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)  # the most that it takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
