"""Convolution of the visible sites with any kernel, stride, dilation and groups, and its transpose."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import minkowski as minkowski_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.geometry.window_rows import WindowRows
from sparsecnx.ops.checks import as_statistics, autocast, check_device, check_same_dtype, check_sparse, check_vector
from sparsecnx.ops.convolution import cpu, minkowski, products, reference
from sparsecnx.ops.convolution.window import Window, make_window
from sparsecnx.ops.depthwise_convolution import depthwise_conv
from sparsecnx.ops.mapped import depthwise_operator
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "conv",
    cpu=Implementation(cpu.conv, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.convolution.triton_conv", "conv"),
    minkowski=Implementation(minkowski.conv, minkowski_backend.refusal),
    reference=Implementation(reference.conv),
)
transposed_operator = Operator(
    "conv_transpose",
    cpu=Implementation(cpu.conv_transpose, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.convolution.triton_conv", "conv_transpose"),
    reference=Implementation(reference.conv_transpose),
)
# Every backend takes torch's own matrix product, which also serves where no kernel of ours can run.
patchify_operator = Operator(
    "patchify",
    cpu=Implementation(products.conv, cpu_backend.refusal),
    triton=Implementation(products.conv, triton_launch.refusal),
    torch=Implementation(products.conv),
    minkowski=Implementation(minkowski.conv, minkowski_backend.refusal),
    reference=Implementation(reference.conv),
)
unpatchify_operator = Operator(
    "unpatchify",
    cpu=Implementation(products.conv_transpose, cpu_backend.refusal),
    triton=Implementation(products.conv_transpose, triton_launch.refusal),
    torch=Implementation(products.conv_transpose),
    reference=Implementation(reference.conv_transpose),
)


def conv(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | None = None,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> SparseTensor:
    """Convolve the visible sites; the output has the same visible tiles (arXiv 1711.10275, section 3):

        out[site] = bias + sum over taps with a visible site of
                    weight[:, :, tap] @ x[site * stride - padding + tap * dilation]

    The result is that of zeroing the masked sites of a dense tensor, a dense convolution to `H / stride` sites (zeros
    beyond the border), and keeping the sites of visible tiles. `stride`, `padding` and `dilation` are a number for all
    axes or one for each.

    Args:
        x: features `(rows, C_in)`.
        weight: `(C_out, C_in / groups, *kernel)`, torch's layout, of the dtype of `x`.
        bias: `(C_out,)`, added at active sites alone, or None.
        stride: sites between outputs; divides the tile.
        padding: zeros before the first site. By default 0 for kernel = stride, `k // 2` for odd kernels and
            `(k - stride) // 2` for even ones, as networks use them; with dilation k is `dilation * (k - 1) + 1`.
        dilation: sites between taps.
        groups: groups of channels that are convolved apart; with as many as channels the convolution is depthwise.

    Returns:
        The layout of `x` coarsened by `stride`, features `(rows_out, C_out)`.

    Raises:
        TypeError: `x` is not a SparseTensor, or dtypes differ outside autocast.
        ValueError: a shape, `stride`, `padding`, `dilation` or `groups` does not fit, or devices differ.
    """
    check_sparse(x)
    channels, ndim = x.features.shape[1], x.layout.ndim
    _check_groups(groups, channels, "C_in")
    if weight.ndim != 2 + ndim or weight.shape[1] * groups != channels:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected (C_out, {channels // groups}{', k' * ndim})")
    _check_groups(groups, weight.shape[0], "C_out")
    layout = x.layout.coarsen(stride)
    window = make_window(weight.shape[2:], stride, padding, dilation)
    if 1 < groups == channels:
        return _depthwise(x, weight, bias, window)
    x, weight = _checked(x, weight, bias, weight.shape[0])
    runs = patchify_operator if products.applies(x.layout, window) else operator
    return x.with_features(runs(x, weight, bias, window, groups), layout)


def conv_transpose(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> SparseTensor:
    """Convolve backwards, as `torch.nn.functional.conv_transpose2d`, to `H * stride` sites of the same visible tiles:

        out[site * stride - padding + tap * dilation] += x[site] @ weight[:, :, tap]

    The result is that of zeroing the masked sites of a dense tensor, a dense transposed convolution with the
    `output_padding` that gives `H * stride` sites, and keeping the sites of visible tiles.

    Args:
        x: features `(rows, C_in)`.
        weight: `(C_in, C_out / groups, *kernel)`, torch's layout, of the dtype of `x`.
        bias: `(C_out,)`, added at active sites alone, or None.
        stride, padding, dilation, groups: those of the convolution that this one transposes.

    Returns:
        The layout of `x` refined by `stride`, features `(rows_out, C_out)`.

    Raises:
        TypeError, ValueError: as `conv`.
    """
    check_sparse(x)
    channels, ndim = x.features.shape[1], x.layout.ndim
    _check_groups(groups, channels, "C_in")
    if weight.ndim != 2 + ndim or weight.shape[0] != channels:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected ({channels}, C_out / groups{', k' * ndim})")
    layout = x.layout.refine(stride)
    window = make_window(weight.shape[2:], stride, padding, dilation)
    x, weight = _checked(x, weight, bias, weight.shape[1] * groups)
    is_product = window.partitions and products.applies(layout, window)
    runs = unpatchify_operator if is_product else transposed_operator
    return x.with_features(runs(x, weight, bias, window, groups), layout)


def _depthwise(x: SparseTensor, weight: Tensor, bias: Tensor | None, window: Window) -> SparseTensor:
    """Convolve every channel with its own `C_out / C_in` kernels, `weight (C_out, 1, *kernel)`."""
    copies = weight.shape[0] // x.features.shape[1]
    if copies > 1:
        x = x.with_features(x.features.repeat_interleave(copies, 1))
    if window.centred:
        return depthwise_conv(x, weight, bias)
    x, weight = _checked(x, weight, bias, weight.shape[0])
    if bias is not None:
        bias = as_statistics(bias.reshape(-1), x)
    rows = WindowRows(x.features, x.layout, window)
    return x.with_features(depthwise_operator(rows, weight.flatten(1).t(), bias), x.layout.coarsen(window.stride))


def _checked(x: SparseTensor, weight: Tensor, bias: Tensor | None, out: int) -> tuple[SparseTensor, Tensor]:
    """Check what all convolutions check, and return rows and weight in the dtype of autocast."""
    if out < 1:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected at least one channel of the output")
    check_device(weight, "weight", x)
    if bias is not None:
        check_vector(bias, "bias", out, x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    return x, weight


def _check_groups(groups: int, channels: int, name: str) -> None:
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}: it must divide {name}, {channels} channels")
