"""Convolution of the visible sites by compiled kernels (`csrc/cpu/conv.cpp`)."""

from __future__ import annotations

from functools import partial

from sparsecnx.ops.convolution import by_map
from sparsecnx.ops.mapped.cpu_conv import convolve

conv = partial(by_map.conv, convolve)
conv_transpose = partial(by_map.conv_transpose, convolve)
