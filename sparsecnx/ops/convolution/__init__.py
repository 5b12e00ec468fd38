"""Submanifold convolution with any kernel and stride; 1x1 and patchify kernels are one matrix product."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import minkowski as minkowski_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import autocast, check_device, check_same_dtype, check_sparse, check_vector
from sparsecnx.ops.convolution import cpu, minkowski, patchify, reference
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "conv",
    cpu=Implementation(cpu.conv, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.convolution.triton_kernels", "conv"),
    minkowski=Implementation(minkowski.conv, minkowski_backend.refusal),
    reference=Implementation(reference.conv),
)
# Every backend takes torch's own matrix product, which also serves where no kernel of ours can run.
patchify_operator = Operator(
    "patchify",
    cpu=Implementation(patchify.conv, cpu_backend.refusal),
    triton=Implementation(patchify.conv, triton_launch.refusal),
    torch=Implementation(patchify.conv),
    minkowski=Implementation(minkowski.conv, minkowski_backend.refusal),
    reference=Implementation(reference.conv),
)


def conv(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, ...] | None = None,
) -> SparseTensor:
    """Convolve the visible sites; the output has the same visible tiles (arXiv 1711.10275, section 3):

        out[site] = bias + sum over taps with a visible site of weight[:, :, tap] @ x[site * stride - padding + tap]

    The result is that of zeroing the masked sites of a dense tensor, a dense convolution to `H / stride` sites (zeros
    beyond the border), and keeping the sites of visible tiles.

    Args:
        x: features `(rows, C_in)`, tile side T.
        weight: `(C_out, C_in, *kernel)`, torch's layout, of the dtype of `x`.
        bias: `(C_out,)`, added at active sites alone, or None.
        stride: sites per axis between outputs; divides T.
        padding: zeros before the first site of each axis. By default 0 for kernel = stride, `k // 2` for
            odd kernels and `(k - stride) // 2` for even ones, as networks use them.

    Returns:
        The layout of `x` coarsened by `stride`, features `(rows / stride**ndim, C_out)`.

    Raises:
        TypeError: `x` is not a SparseTensor, or dtypes differ outside autocast.
        ValueError: a shape, `stride` or `padding` does not fit, or devices differ.
    """
    check_sparse(x)
    channels, ndim = x.features.shape[1], x.layout.ndim
    if weight.ndim != 2 + ndim or weight.shape[1] != channels:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected (C_out, {channels}{', k' * ndim})")
    kernel = tuple(weight.shape[2:])
    layout = x.layout.coarsen(stride)
    before = _padding(padding, kernel, stride)
    check_device(weight, "weight", x)
    if bias is not None:
        check_vector(bias, "bias", weight.shape[0], x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    runs = patchify_operator if patchify.applies(x, kernel, stride, before) else operator
    return x.with_features(runs(x, weight, bias, stride, before), layout)


def _padding(padding: int | tuple[int, ...] | None, kernel: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """Return the zeros before the first site of each axis; raise ValueError if they do not fit the kernel."""
    if padding is None:
        return tuple(0 if size == stride else size // 2 if size % 2 else max(size - stride, 0) // 2 for size in kernel)
    given = (padding,) * len(kernel) if isinstance(padding, int) else tuple(padding)
    if len(given) != len(kernel) or any(not 0 <= p < k for p, k in zip(given, kernel, strict=True)):
        raise ValueError(f"padding is {padding}: expected 0 to k - 1 for each axis of a kernel {kernel}")
    return given
