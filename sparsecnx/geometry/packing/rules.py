"""Which kernels can move which values."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import compiled, cuda, triton_launch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 8  # bytes of a value that the CUDA kernels move


def takes_triton(values: Tensor) -> bool:
    """Whether the Triton kernels can run on that tensor."""
    return triton_launch.available and values.dtype in TRITON_DTYPES and triton_launch.refusal(values.device) is None


def takes_cuda(values: Tensor) -> bool:
    """Whether the CUDA kernels can run on that tensor, of which the second axis are channels."""
    fits = values.dtype.itemsize <= LARGEST and values.shape[1] > 0
    return compiled.loaded and fits and cuda.refusal(values.device) is None
