"""Convolution of the visible sites on a GPU, by the Triton kernels of `ops/mapped/triton_conv.py`."""

from __future__ import annotations

from functools import partial

from sparsecnx.ops.convolution import by_map
from sparsecnx.ops.mapped.triton_conv import convolve

conv = partial(by_map.conv, convolve)
conv_transpose = partial(by_map.conv_transpose, convolve)
