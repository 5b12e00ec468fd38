"""Depthwise convolution on an explicit kernel map: any pattern of sites, kernel, stride and dilation."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.ops.checks import (
    autocast,
    check_device,
    check_mapped,
    check_same_dtype,
    check_vector,
    statistics_dtype,
)
from sparsecnx.ops.mapped_depthwise_convolution import cpu, reference
from sparsecnx.ops.native import refusal
from sparsecnx.ops.triton import implementation

operator = Operator(
    "mapped_depthwise_conv",
    native=Implementation(native.mapped_depthwise_conv, refusal),
    triton=implementation(__name__, "mapped_depthwise_conv"),
    reference=Implementation(reference.mapped_depthwise_conv, always),
)


def mapped_depthwise_conv(
    features: Tensor,
    weight: Tensor,
    kernel_map: Tensor,
    inverse_map: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution on an explicit kernel map: `out[o] = sum_k weight[k] * features[kernel_map[o, k]] + bias`.

    The general path, for sites that are not made of tiles (generalised sparse convolution, arXiv 1904.08755,
    section 3, one channel at a time). Sums are float32, float64 for float64.

    Args:
        features: `(rows_in, C)`.
        weight: `(K, C)`, of the dtype of `features`.
        kernel_map: int32 `(rows_out, K)`: for every output row and tap the input row that is read, -1 where there is
            none. No two output rows may read the same input row through the same tap.
        inverse_map: int32 `(rows_in, K)`: for every input row and tap the output row that reads it, -1 where none
            does. The gradient of `features` gathers through it, without atomics; where None it is computed for
            that. Give it where one map serves many calls.
        bias: `(C,)`, added to every output row, or None.

    Returns:
        `(rows_out, C)`.

    Raises:
        TypeError: an argument is no tensor, a map not int32, or dtypes differ outside autocast.
        ValueError: a shape does not fit, or devices differ.
    """
    x = check_mapped(features, kernel_map, inverse_map)
    channels, taps = features.shape[1], kernel_map.shape[1]
    if weight.shape != (taps, channels):
        raise ValueError(f"weight is {tuple(weight.shape)}: expected (K, C), here ({taps}, {channels})")
    check_device(weight, "weight", x)
    x, (weight,) = autocast(x, weight)
    check_same_dtype(x, "weight", weight)
    if bias is not None:
        check_vector(bias, "bias", channels, x)
        bias = bias.reshape(channels).to(statistics_dtype(x.dtype))
    out: Tensor = operator(x, weight, bias)
    return out
