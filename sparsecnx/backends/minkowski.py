"""The MinkowskiEngine library as a backend. Nothing is imported before somebody asks for it.

Conventions of MinkowskiEngine 0.5.4: along an axis of odd size k a kernel is centred, along one of even size it covers
the offsets 0 to k - 1. Of the K taps the first spatial axis varies fastest. Coordinates are multiples of the tensor
stride.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import importlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecnx.backends.dispatch import Rows
from sparsecnx.backends.selection import selected

NAME = "MinkowskiEngine"
STAND_IN = "sparsecnx.compat.minkowski"  # may answer to the same name, see there
NOT_INSTALLED = "not installed"
ANSWERED = f"answered by {STAND_IN} in this process"
BY_NAME = "runs only where it is asked for by name"
DTYPES = (torch.float32, torch.float64)

not_traced = torch.compiler.disable(reason="MinkowskiEngine cannot be traced")

_importing = threading.RLock()


def problem() -> str | None:
    """Return what is wrong with the library, to follow "MinkowskiEngine is"; None where it imports."""
    try:
        found = library()
    except ModuleNotFoundError as error:
        return NOT_INSTALLED if error.name == NAME else f"installed, but does not import: {error}"
    except Exception as error:  # A broken installation may raise anything.
        return f"installed, but does not import: {error}"
    return ANSWERED if found.__name__.startswith(STAND_IN) else None


def refusal(x: Rows) -> str | None:
    """Return why MinkowskiEngine cannot run on `x`; None where it can. It runs only where it is asked for by name."""
    if selected() != "minkowski":
        return BY_NAME
    if x.dtype not in DTYPES:
        return f"MinkowskiEngine takes float32 and float64, x is {x.dtype}"
    return device_refusal(x.device)


@not_traced
def device_refusal(device: torch.device) -> str | None:
    """Return why MinkowskiEngine cannot run on tensors of that device; None where it can."""
    found = problem()
    if found is not None:
        return f"{NAME} is {found}"
    if device.type == "cuda" and not library().is_cuda_available():
        return f"{NAME} is built for the CPU only, x is on {device}"
    if device.type not in ("cpu", "cuda"):
        return f"{NAME} runs on the CPU and on CUDA, x is on {device}"
    return None


def library() -> Any:
    """Import the module `MinkowskiEngine`, or what answers to that name. Threads wait for the one that imports it.

    Raises:
        ImportError, or whatever else a broken installation raises.
    """
    with _importing:
        if NAME in sys.modules:
            return importlib.import_module(NAME)  # This waits for a thread that imports it on its own.
        with _old_collections(), _default_threads(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The MinkowskiEngine was compiled with CPU_ONLY flag")
            return importlib.import_module(NAME)


@contextlib.contextmanager
def _old_collections() -> Iterator[None]:
    """Allow `from collections import Sequence`, which version 0.5.4 writes, as before Python 3.10."""
    missing = [name for name in collections.abc.__all__ if not hasattr(collections, name)]
    for name in missing:
        setattr(collections, name, getattr(collections.abc, name))
    try:
        yield
    finally:
        for name in missing:
            delattr(collections, name)


@contextlib.contextmanager
def _default_threads() -> Iterator[None]:
    """Set OMP_NUM_THREADS as MinkowskiEngine does on more than 16 cores, and unset it afterwards.

    Left alone, the library warns and leaves the variable set for torch in every child of this process.
    """
    if "OMP_NUM_THREADS" in os.environ or (os.cpu_count() or 1) <= 16:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "16"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


class _Once(torch.autograd.Function):
    """Return the same tensors; their gradients have no gradients."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, kernel)
        return features.view_as(features), kernel.view_as(kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grads
        # With create_graph=True the result of the compiled part looks like a constant here. It depends on both inputs.
        found: tuple[Tensor | None, ...] = _Gradients.apply(*ctx.saved_tensors, *grads)
        return found


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _features: Tensor, _kernel: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "MinkowskiEngine has no gradients of the gradients of its convolutions: take another backend for them"
        )


def differentiable_once(features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Make gradients of gradients raise for a function of the library's compiled part, which would leave them out."""
    found: tuple[Tensor, Tensor] = _Once.apply(features, kernel)
    return found


def convolution_mode() -> Any:
    """Return the mode in which the library chooses how a convolution multiplies."""
    return importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT


def centred(weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Pad a kernel with zeros, so that it covers the offsets of one of MinkowskiEngine's kernels.

    Args:
        weight: `(*, *, *kernel)`; along an axis of size k it covers the offsets -p to k - 1 - p.
        padding: p for each axis.
    """
    around: list[int] = []
    for size, before in zip(weight.shape[:1:-1], padding[::-1], strict=True):
        after = size - 1 - before
        if before == 0:
            around += [0, size % 2 if size > 1 else 0]  # An even kernel begins at its own site.
        else:
            reach = max(before, after)
            around += [reach - before, reach - after]
    return F.pad(weight, around)


def taps(weight: Tensor) -> Tensor:
    """Reorder a weight `(C_out, C_in, *kernel)` into MinkowskiEngine's `(K, C_in, C_out)`."""
    spatial = range(weight.ndim - 1, 1, -1)
    ordered = weight.permute(*spatial, 1, 0)
    return ordered.reshape(math.prod(weight.shape[2:]), *ordered.shape[-2:])
