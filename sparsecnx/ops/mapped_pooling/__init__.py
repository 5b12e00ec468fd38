"""Pooling on an explicit kernel map."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.ops.checks import check_mapped, statistics_dtype
from sparsecnx.ops.mapped_depthwise_convolution import operator as depthwise_conv
from sparsecnx.ops.mapped_pooling.maximum import maximum

MODES = ("sum", "avg", "max")


def mapped_pool(features: Tensor, kernel_map: Tensor, mode: str, inverse_map: Tensor | None = None) -> Tensor:
    """The sum, mean or maximum of the input rows under each output row, channel by channel.

    Only the taps that have an input count, also in the mean, as in MinkowskiEngine 0.5.4. An output row without any
    is zero. Sum and mean run on the backend of `mapped_depthwise_conv`, the maximum in plain torch.

    Args:
        features: `(rows_in, C)`.
        kernel_map: int32 `(rows_out, K)`: for every output row and tap the input row that is read, -1 where there is
            none. No two output rows may read the same input row through the same tap.
        mode: `"sum"`, `"avg"` or `"max"`. The gradient of a maximum goes to the first tap that has it.
        inverse_map: int32 `(rows_in, K)`, as in `mapped_depthwise_conv`; where None it is computed if a gradient
            needs it.

    Returns:
        `(rows_out, C)`, in the dtype of `features`, also under autocast.

    Raises:
        TypeError: an argument is no tensor, or a map not int32.
        ValueError: `mode` is unknown, a shape does not fit, or devices differ.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: expected {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}")
    x = check_mapped(features, kernel_map, inverse_map)
    if mode == "max":
        return maximum(features, kernel_map, inverse_map)[0]
    if mode == "avg":
        x = x.to(statistics_dtype(features.dtype))  # a sum may be too large for the dtype of its mean
    total: Tensor = depthwise_conv(x, x.features.new_ones(kernel_map.shape[1], features.shape[1]), None)
    if mode == "sum":
        return total
    present = (kernel_map >= 0).sum(1, keepdim=True).clamp(min=1)
    return (total / present).to(features.dtype)
