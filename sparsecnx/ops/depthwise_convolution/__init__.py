"""Submanifold depthwise convolution: every output site sees the active sites under its kernel."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import cuda as cuda_backend
from sparsecnx.backends import minkowski as minkowski_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import autocast, check_device, check_same_dtype, check_sparse, checked_vector
from sparsecnx.ops.depthwise_convolution import cpu, cuda, minkowski, reference
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "depthwise_conv",
    cpu=Implementation(cpu.depthwise_conv, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.depthwise_convolution.triton_kernels", "depthwise_conv"),
    cuda=Implementation(cuda.depthwise_conv, cuda_backend.refusal),
    minkowski=Implementation(minkowski.depthwise_conv, minkowski_backend.refusal),
    reference=Implementation(reference.depthwise_conv),
)


def depthwise_conv(x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """Convolve each channel of the visible sites with a centred odd kernel, stride 1 (arXiv 1711.10275, section 3):

        out[site, c] = bias[c] + sum over taps with a visible site of x[site + tap, c] * weight[c, 0, tap]

    The result is that of zeroing the masked sites of a dense tensor, `torch.nn.functional.conv2d(padding=k // 2,
    groups=C)`, and keeping the active sites.

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
        raise ValueError(f"weight is {tuple(weight.shape)}: expected ({channels}, 1{', k' * ndim})")
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight is {tuple(weight.shape)}: kernel sizes must be odd")
    check_device(weight, "weight", x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    if bias is not None:
        bias = checked_vector(bias, "bias", channels, x)
    return x.with_features(operator(x, weight, bias))
