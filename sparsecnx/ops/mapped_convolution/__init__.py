"""Convolution on an explicit kernel map: any pattern of sites, kernel, stride and dilation."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.ops.checks import autocast, check_device, check_mapped, check_same_dtype, check_vector
from sparsecnx.ops.mapped_convolution import cpu, reference
from sparsecnx.ops.native import refusal
from sparsecnx.ops.triton import implementation

operator = Operator(
    "mapped_conv",
    native=Implementation(native.mapped_conv, refusal),
    triton=implementation(__name__, "mapped_conv"),
    reference=Implementation(reference.mapped_conv, always),
)


def mapped_conv(
    features: Tensor,
    weight: Tensor,
    kernel_map: Tensor,
    inverse_map: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolution on an explicit kernel map: `out[o] = sum_k features[kernel_map[o, k]] @ weight[k] + bias`.

    The general path, for sites that are not made of tiles (generalised sparse convolution, arXiv 1904.08755,
    section 3).

    Args:
        features: `(rows_in, C_in)`.
        weight: `(K, C_in, C_out)`, of the dtype of `features`.
        kernel_map: int32 `(rows_out, K)`: for every output row and tap the input row that is read, -1 where there is
            none. No two output rows may read the same input row through the same tap.
        inverse_map: int32 `(rows_in, K)`: for every input row and tap the output row that reads it, -1 where none
            does; where None it is computed if a gradient needs it. Give it where one map serves many calls.
        bias: `(C_out,)`, added to every output row, or None.

    Returns:
        `(rows_out, C_out)`.

    Raises:
        TypeError: an argument is no tensor, a map not int32, or dtypes differ outside autocast.
        ValueError: a shape does not fit, or devices differ.
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
    out: Tensor = operator(x, weight, bias)
    return out
