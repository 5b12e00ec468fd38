"""The dtypes that operators take."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton and CUDA kernels
MOST_CHANNELS = 2**16  # of a row that the Triton and CUDA kernels take
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and per-channel parameters: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
