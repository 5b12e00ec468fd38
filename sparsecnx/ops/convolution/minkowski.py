"""Convolution of the visible sites by MinkowskiEngine: a gather, a product and a scatter for each tap."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import minkowski
from sparsecnx.backends.dispatch import BackendError
from sparsecnx.backends.minkowski import centred, convolution_mode, differentiable_once, not_traced, taps
from sparsecnx.geometry.minkowski_maps import maps
from sparsecnx.ops.convolution.window import Window
from sparsecnx.tensor import SparseTensor


@not_traced
def conv(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return features `(rows_out, C_out)` of the convolution with `weight (C_out, C_in, *kernel)`.

    A gradient of a gradient raises NotImplementedError: the library has none.

    Other paddings than those of MinkowskiEngine's kernels cost taps of zeros (`centred`). These give NaN next to values
    that are not finite.

    Raises:
        BackendError: the convolution has groups or dilation.
    """
    if groups > 1 or max(window.dilation) > 1:
        raise BackendError(
            f"conv on MinkowskiEngine has groups=1 and dilation=1, got groups={groups} and dilation={window.dilation}: "
            "leave the choice to use_backend('auto')"
        )
    layout = x.layout
    weight = centred(weight, window.padding)
    kernel = taps(weight)
    if layout.rows == 0:  # The library would read memory that is not its own.
        out = x.features @ kernel.sum(0)
    else:
        library = minkowski.library()
        generator = library.KernelGenerator(tuple(weight.shape[2:]), list(window.stride), dimension=layout.ndim)
        features, kernel = differentiable_once(x.features, kernel.contiguous())
        with torch.cuda.device_of(features):
            geometry = maps(layout.tiles)
            keys = geometry.key(layout), geometry.key(layout.coarsen(window.stride))
            out = library.MinkowskiConvolutionFunction.apply(
                features, kernel, generator, convolution_mode(), *keys, geometry.manager
            )
    return out if bias is None else out + bias.to(out.dtype)
