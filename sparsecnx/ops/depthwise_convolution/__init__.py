"""Submanifold depthwise convolution: every output site sees the active sites under its kernel."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.choices import Comparison, compare
from sparsecnx.ops.checks import (
    autocast,
    check_device,
    check_same_dtype,
    check_sparse,
    check_vector,
    statistics_dtype,
)
from sparsecnx.ops.cuda import implementation as cuda_room
from sparsecnx.ops.cuda import refusal_2d as cuda_refusal_2d
from sparsecnx.ops.depthwise_convolution import cpu, minkowski, reference
from sparsecnx.ops.minkowski import refusal as minkowski_refusal
from sparsecnx.ops.native import refusal_2d
from sparsecnx.ops.triton import implementation as triton_room
from sparsecnx.ops.triton import refusal_2d as triton_refusal_2d
from sparsecnx.tensor import SparseTensor


def _compare(x: SparseTensor, weight: Tensor | None = None, _: Tensor | None = None) -> Comparison:
    """CUDA beside Triton, forward and backward; the published models have 7x7 kernels."""
    kernel = (7, 7) if weight is None else tuple(weight.shape[2:])
    steps = ("depthwise_conv", "depthwise_conv", "depthwise_conv_weight_grad")
    return compare(steps, x.device, x.dtype, x.features.shape[1], x.layout.tile, kernel)


operator = Operator(
    "depthwise_conv",
    native=Implementation(native.depthwise_conv, refusal_2d),
    triton=triton_room(__name__, "depthwise_conv", triton_refusal_2d),
    cuda=cuda_room(__name__, "depthwise_conv", cuda_refusal_2d, _compare),
    reference=Implementation(reference.depthwise_conv, always),
    minkowski=Implementation(minkowski.depthwise_conv, minkowski_refusal, by_name=True),
)


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """Submanifold depthwise convolution, stride 1, centred odd kernel.

    Equal to zeroing the masked sites of a dense tensor, `torch.nn.functional.conv2d(padding=k // 2,
    groups=C)`, and keeping the active sites (arXiv 1711.10275, section 3).

    Args:
        x: features `(rows, C)`.
        weight: `(C, 1, *kernel)`, torch's layout, odd sizes, of the dtype of `x`.
        bias: `(C,)`, added at active sites alone, or None.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor, or dtypes differ outside autocast.
        ValueError: a shape does not fit, a kernel size is even, or devices differ.
    """
    check_sparse(x)
    channels, ndim = x.features.shape[1], x.layout.ndim
    if weight.ndim != 2 + ndim or weight.shape[:2] != (channels, 1):
        expected = f"({channels}, 1{', k' * ndim})"
        raise ValueError(f"weight is {tuple(weight.shape)}: expected {expected}")
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight is {tuple(weight.shape)}: kernel sizes must be odd")
    check_device(weight, "weight", x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    if bias is not None:
        check_vector(bias, "bias", channels, x)
        bias = bias.to(statistics_dtype(x.dtype))
    return x.with_features(operator(x, weight, bias))
