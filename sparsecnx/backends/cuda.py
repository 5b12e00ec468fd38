"""Say whether the CUDA C++ kernels, `torch.ops.sparsecnx_cuda.*`, can run on a device and on an input."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from sparsecnx.backends import compiled
from sparsecnx.backends.selection import selected
from sparsecnx.common.dtypes import GPU_DTYPES, MOST_CHANNELS

# Set by the tests once their emulator has registered the operators for tensors on the CPU.
emulated: bool = False


def refusal(x: Any) -> str | None:
    """Return why the CUDA kernels, depthwise convolutions, cannot run on the SparseTensor `x`; None where they can."""
    if x.dtype not in GPU_DTYPES:
        return f"CUDA kernels take float32, bfloat16 and float16, x is {x.dtype}"
    if not 1 <= x.features.shape[1] <= MOST_CHANNELS:
        return f"CUDA kernels take 1 to {MOST_CHANNELS} channels, x has {x.features.shape[1]}"
    # The tests' emulator runs on the CPU, but only when asked for by name.
    if x.device.type == "cpu" and selected() != "cuda":
        return f"CUDA operators run on a GPU, x is on {x.device}"
    return device_refusal(x.device)


def device_refusal(device: torch.device) -> str | None:
    """Return why the GPU operators cannot run on tensors of that device; None where they can."""
    if device.type == "cpu" and emulated:
        return None
    if device.type != "cuda":
        return f"CUDA operators run on a GPU, x is on {device}"
    if not compiled.cuda_loaded:
        return compiled.cuda_why_not
    return _why_unserved(device)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU. torch.compile takes it as a constant: it cannot put it into a graph."""
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _why_unserved(device: torch.device) -> str | None:
    return _unserved(device)


@functools.cache
def _unserved(device: torch.device) -> str | None:
    """Return why a GPU or its driver does not run the compiled operators; None where it does or nothing is recorded."""
    if torch.cuda.device_count() == 0:  # FakeTensors report a CUDA device even without a GPU.
        return "there is no GPU"
    facts = compiled.build_info() or {}
    if facts.get("cuda") is None:
        return None
    driver = driver_version()
    if driver is not None and driver[0] < int(facts["cuda"].partition(".")[0]):
        return f"CUDA operators are built with CUDA {facts['cuda']}, the driver is for CUDA {driver[0]}.{driver[1]}"
    architectures, found = facts["cuda_architectures"] or "", torch.cuda.get_device_capability(device)
    if serves(architectures, found):
        return None
    return f"CUDA operators are built for {architectures}, {device} has compute capability {found[0]}.{found[1]}"


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether a build for `architectures`, written as in TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), runs on a GPU.

    Machine code runs on later GPUs of its major version; for a name with a letter ("9.0a") it runs on that GPU alone.
    PTX runs on all later GPUs.
    """
    for name in architectures.replace(" ", ";").replace(",", ";").split(";"):
        number, _, ptx = name.partition("+")
        if not number:
            continue
        major, minor = (int(part) for part in number.rstrip("abcdefghijklmnopqrstuvwxyz").split("."))
        specific = number[-1].isalpha()
        if capability == (major, minor):
            return True
        if not specific and (capability[0] == major or ptx) and capability > (major, minor):
            return True
    return False


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the NVIDIA driver runs, (major, minor); None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
