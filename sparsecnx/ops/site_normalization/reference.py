"""Normalization over the visible sites, in plain torch on rows."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups
from sparsecnx.ops.site_normalization.activations import ACTIVATIONS
from sparsecnx.tensor import SparseTensor


def site_norm(
    x: SparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scope: str,
    groups: int,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features `(rows, C)`, and the mean and the biased variance `(segments, groups)`.

    A segment is an image, or with scope "batch" the batch.
    """
    values = x.features.to(statistics_dtype(x.dtype))
    channels = values.shape[1]
    segment = row_groups(x.layout, scope)
    sizes = group_splits(x.layout, scope).diff()[:, None] * (channels // groups)

    def average(value: Tensor) -> Tensor:
        sums = value.new_zeros(sizes.shape[0], channels).index_add(0, segment, value)
        return sums.unflatten(1, (groups, -1)).sum(2) / sizes.clamp(min=1)

    def by_row(moment: Tensor) -> Tensor:
        return moment.repeat_interleave(channels // groups, dim=1).index_select(0, segment)

    mean = average(values)
    centred = values - by_row(mean)
    variance = average(centred.square())
    normalised = centred * by_row((variance + eps).rsqrt())
    if weight is not None:
        normalised = normalised * weight
    if bias is not None:
        normalised = normalised + bias
    return ACTIVATIONS[activation](normalised, slope).to(x.dtype), mean.detach(), variance.detach()
