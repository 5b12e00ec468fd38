"""Tables of geometry that are built on first use and kept with the geometry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsecnx.backends.transforms import transforms_active


class Owner(Protocol):
    """A geometry that keeps tables.

    Attributes:
        tables: the tables by key and stream.
        captured: whether the geometry itself was computed by a CUDA graph.
    """

    @property
    def tables(self) -> dict[Any, Tensor]: ...
    @property
    def captured(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...


def cached_table(owner: Owner, key: Any, build: Callable[[], Tensor]) -> Tensor:
    """Return the table of that key, which `build` makes on first use.

    A kept table serves later calls in any mode. Tables are ordinary tensors also under inference mode. The tables of
    fake tensors are not kept. Each stream of a GPU has its own. A table that a CUDA graph computes is kept only by a
    geometry that the graph computes too.
    """
    key = key, current_stream(owner.device)
    if key in owner.tables:
        return owner.tables[key]
    with ordinary_tensors():
        table = build()
    leaves = torch.compiler.is_compiling() and transforms_active()  # torch.compile lets no tensor leave a transform.
    if type(table) is Tensor and owner.captured == capturing() and not leaves:
        owner.tables[key] = table
    return table


def ordinary_tensors() -> AbstractContextManager[Any]:
    """Return a context in which tensors serve later calls in any mode, also where inference mode is on outside."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def capturing() -> bool:
    """Return whether what is launched now becomes part of a CUDA graph."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Return the stream in which a device works now; 0 where there is only one."""
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.current_stream(device).cuda_stream
