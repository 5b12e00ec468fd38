"""Which kernels can move which values."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx import _cuda, _extension, _triton

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 8  # bytes of a value that the CUDA kernels move


def takes_triton(values: Tensor) -> bool:
    """Whether the Triton kernels can run on that tensor."""
    return _triton.available and values.dtype in TRITON_DTYPES and _triton.refusal(values.device) is None


def takes_cuda(values: Tensor) -> bool:
    """Whether the CUDA kernels can run on that tensor, of which the second axis are channels."""
    fits = values.dtype.itemsize <= LARGEST and values.shape[1] > 0
    return _extension.loaded and fits and _cuda.refusal(values.device) is None
