"""The check of a tensor's memory for what is plain torch; csrc/storage.h has that of the compiled operators."""

from __future__ import annotations

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
