"""The check of a tensor's memory for what is plain torch; csrc/storage.h has that of the compiled operators."""

from __future__ import annotations

import torch
from torch import Tensor


def check_memory(**tensors: Tensor) -> None:
    """Raise RuntimeError unless the storage of every tensor holds its elements.

    Where one was freed or cut, as `x.untyped_storage().resize_(0)` does, torch's own functions end the process.
    """
    for name, x in tensors.items():
        if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
            continue  # These have no memory of their own yet.
        try:
            bytes_there = x.untyped_storage().nbytes()
        except NotImplementedError:
            continue  # torch.func wraps tensors. What it wraps reaches the operators.
        needed = (x.storage_offset() + x.numel()) * x.itemsize if x.is_contiguous() else 1
        if x.numel() and bytes_there < needed:
            raise RuntimeError(
                f"{name} has {x.numel()} elements, but its storage holds {bytes_there} bytes: it was freed or never"
                f" allocated; call the operator, and its gradient, while {name} has its memory"
            )
