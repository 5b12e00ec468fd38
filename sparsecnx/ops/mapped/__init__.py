"""Operators on an explicit kernel map: any pattern of sites, kernel, stride and dilation.

They serve sites that are not made of tiles (generalised sparse convolution, arXiv 1904.08755, section 3).
"""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.checks import autocast, check_device, check_mapped, check_same_dtype, check_vector, checked_vector
from sparsecnx.ops.mapped import cpu, cpu_conv, cpu_pooling, reference

POOL_MODES = ("sum", "avg", "max")

conv_operator = Operator(
    "mapped_conv",
    cpu=Implementation(cpu_conv.mapped_conv, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.mapped.triton_conv", "mapped_conv"),
    reference=Implementation(reference.mapped_conv),
)
depthwise_operator = Operator(
    "mapped_depthwise_conv",
    cpu=Implementation(cpu.mapped_depthwise_conv, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.mapped.triton_kernels", "mapped_depthwise_conv"),
    reference=Implementation(reference.mapped_depthwise_conv),
)
max_operator = Operator(
    "mapped_max_pool",
    cpu=Implementation(cpu_pooling.mapped_max_pool, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.mapped.triton_pooling", "mapped_max_pool"),
    reference=Implementation(reference.mapped_max_pool),
)


def mapped_conv(
    features: Tensor,
    weight: Tensor,
    kernel_map: Tensor,
    inverse_map: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve on an explicit kernel map: `out[o] = sum_k features[kernel_map[o, k]] @ weight[k] + bias`.

    Args:
        features: `(rows_in, C_in)`.
        weight: `(K, C_in, C_out)`, of the dtype of `features`.
        kernel_map: int32 `(rows_out, K)`: for every output row and tap the input row that is read, -1 where there is
            none. No two output rows may read the same input row through the same tap.
        inverse_map: int32 `(rows_in, K)`: for every input row and tap the output row that reads it, -1 where none
            does. Its shape is checked and it is not read: to invert `kernel_map` takes a gradient as long as to
            compare both.
        bias: `(C_out,)`, added to every output row, or None.

    Returns:
        `(rows_out, C_out)`.

    Raises:
        TypeError: an argument is not a tensor, a map not int32, or dtypes differ outside autocast.
        ValueError: a shape does not fit, or devices differ.
        RuntimeError: an entry of `kernel_map` is neither -1 nor a row of `features`, or the storage of a tensor was
            freed. On a GPU nothing waits for the map: there an entry that is no row gives NaN.
    """
    x = check_mapped(features, kernel_map, inverse_map)
    channels, taps = features.shape[1], kernel_map.shape[1]
    if weight.ndim != 3 or weight.shape[:2] != (taps, channels):
        raise ValueError(
            f"weight is {tuple(weight.shape)}: expected (K, C_in, C_out), here ({taps}, {channels}, C_out)"
        )
    check_device(weight, "weight", x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    if bias is not None:
        check_vector(bias, "bias", weight.shape[2], x)
        bias = bias.reshape(weight.shape[2])
    out: Tensor = conv_operator(x, weight, bias)
    return out


def mapped_depthwise_conv(
    features: Tensor,
    weight: Tensor,
    kernel_map: Tensor,
    inverse_map: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve each channel on an explicit kernel map: `out[o] = sum_k weight[k] * features[kernel_map[o, k]] + bias`.

    Sums are float32, float64 for float64.

    Args:
        features: `(rows_in, C)`.
        weight: `(K, C)`, of the dtype of `features`.
        kernel_map: as in `mapped_conv`.
        inverse_map: as in `mapped_conv`. The gradient of `features` gathers through it, without atomics.
        bias: `(C,)`, added to every output row, or None.

    Returns:
        `(rows_out, C)`.

    Raises:
        TypeError, ValueError, RuntimeError: as `mapped_conv`.
    """
    x = check_mapped(features, kernel_map, inverse_map)
    channels, taps = features.shape[1], kernel_map.shape[1]
    if weight.shape != (taps, channels):
        raise ValueError(f"weight is {tuple(weight.shape)}: expected (K, C), here ({taps}, {channels})")
    check_device(weight, "weight", x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    if bias is not None:
        bias = checked_vector(bias, "bias", channels, x)
    out: Tensor = depthwise_operator(x, weight, bias)
    return out


def mapped_pool(features: Tensor, kernel_map: Tensor, mode: str, inverse_map: Tensor | None = None) -> Tensor:
    """Pool the input rows under each output row, channel by channel: their sum, mean or maximum.

    Only the taps that have an input count, also in the mean, as in MinkowskiEngine 0.5.4. An output row without any
    is zero. Sum and mean run on the backend of `mapped_depthwise_conv`.

    Args:
        features: `(rows_in, C)`.
        kernel_map: as in `mapped_conv`.
        mode: `"sum"`, `"avg"` or `"max"`. The gradient of a maximum goes to the first tap that has it.
        inverse_map: as in `mapped_conv`.

    Returns:
        `(rows_out, C)`, in the dtype of `features`, also under autocast.

    Raises:
        TypeError: an argument is not a tensor, or a map not int32.
        ValueError: `mode` is unknown, a shape does not fit, or devices differ.
        RuntimeError: as `mapped_conv`.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"mode is {mode!r}: expected 'sum', 'avg' or 'max'")
    x = check_mapped(features, kernel_map, inverse_map)
    if mode == "max":
        best: Tensor = max_operator(x)
        return best
    if mode == "avg":
        x = x.to(statistics_dtype(features.dtype))  # A sum may be too large for the dtype of its mean.
    total: Tensor = depthwise_operator(x, x.features.new_ones(kernel_map.shape[1], features.shape[1]), None)
    if mode == "sum":
        return total
    present = (kernel_map >= 0).sum(1, keepdim=True).clamp(min=1)
    return (total / present).to(features.dtype)
