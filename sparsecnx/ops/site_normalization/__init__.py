"""Batch, group and instance normalization: statistics over the visible sites, of the batch or of each image.

Batch normalization alone is torch's own function, on the rows. The others, and that with an activation, are one
formula. The rows are in segments: one, or one for each image. The channels are in groups: single channels, or several
that are next to each other. Each segment and group has a mean and a biased variance over its rows and channels, and
each channel a weight and a bias:

    out = activation((x - mean) / sqrt(variance + eps) * weight + bias)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import FLOATING, statistics_dtype
from sparsecnx.common.memory import check_memory
from sparsecnx.ops.checks import check_sparse, checked_vector
from sparsecnx.ops.global_response_norm.groups import group_splits
from sparsecnx.ops.site_normalization import cpu, reference
from sparsecnx.ops.site_normalization.activations import ACTIVATIONS, check_activation
from sparsecnx.tensor import SparseTensor, packed


def _operator(name: str, detail: str = "") -> Operator:
    triton = triton_launch.implementation("sparsecnx.ops.site_normalization.triton_kernels", "site_norm")
    return Operator(
        name,
        cpu=Implementation(cpu.site_norm, cpu_backend.refusal, lambda _: detail),
        triton=replace(triton, detail=lambda _: detail),
        reference=Implementation(reference.site_norm, detail=lambda _: detail),
    )


batch_norm_operator = _operator("batch_norm", "in training, with an activation; otherwise torch.batch_norm runs")
group_norm_operator = _operator("group_norm")
instance_norm_operator = _operator("instance_norm")


def batch_norm(
    x: SparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    slope: float = 0.01,
) -> SparseTensor:
    """Normalise each channel over the visible sites of the batch (arXiv 1502.03167), as `F.batch_norm` does over all.

    Args:
        x: features `(rows, C)`.
        running_mean, running_var: `(C,)`, or None in training. In training they move towards the mean and the unbiased
            variance of the batch by `momentum`, in place, unless nothing is visible. In evaluation they normalise.
        weight, bias: `(C,)`, or None for 1 and 0.
        training: whether the statistics are those of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        activation: applied to the result: "none", "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu" (exact).
        slope: of "leaky_relu" below 0.

    Returns:
        The layout of `x` with features `(rows, C)` in the dtype of `x`, also under autocast.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: a shape does not fit, devices differ, `activation` is unknown, only one site is visible in training,
            or running statistics are missing in evaluation.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    weight, bias, mean, variance = _checked(x, activation, vectors)
    if training and x.layout.rows == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got x {tuple(x.shape)} with one visible site: "
            "use larger batches, or eval()"
        )
    if not training and (mean is None or variance is None):
        raise ValueError("running_mean or running_var is None: expected both in evaluation (training=False)")
    if training and activation != "none":
        channels = x.features.shape[1]
        out, mean, variance = batch_norm_operator(x, weight, bias, "batch", channels, eps, activation, slope)
        if x.layout.rows:
            _move(running_mean, mean, momentum)
            _move(running_var, variance * (x.layout.rows / (x.layout.rows - 1)), momentum)
        return packed(out, x.layout)
    cudnn = torch.backends.cudnn.enabled
    out = torch.batch_norm(x.features, weight, bias, mean, variance, training, momentum, eps, cudnn)
    if training:
        for running, moved in ((running_mean, mean), (running_var, variance)):
            if running is not None and moved is not None and running is not moved:  # It is of another dtype.
                running.copy_(moved.view_as(running))
    return packed(ACTIVATIONS[activation](out, slope), x.layout)


def group_norm(
    x: SparseTensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    slope: float = 0.01,
) -> SparseTensor:
    """Normalise each group of channels over the visible sites of each image (arXiv 1803.08494), as `F.group_norm`.

    Args:
        x: features `(rows, C)`.
        groups: how many; C / groups channels that are next to each other share their statistics.
        weight, bias, eps, activation, slope: as in `batch_norm`.

    Returns:
        The layout of `x` with features `(rows, C)` in the dtype of `x`, also under autocast.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `groups` does not divide C, a shape does not fit, devices differ, or `activation` is unknown.
    """
    weight, bias = _checked(x, activation, {"weight": weight, "bias": bias})
    channels = x.features.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}: expected a divisor of the channels, {channels}")
    out, _, _ = group_norm_operator(x, weight, bias, "sample", groups, eps, activation, slope)
    return packed(out, x.layout)


def instance_norm(
    x: SparseTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    slope: float = 0.01,
) -> SparseTensor:
    """Normalise each channel over the visible sites of each image (arXiv 1607.08022), as `F.instance_norm`.

    Args:
        x: features `(rows, C)`.
        running_mean, running_var: `(C,)` or None. With `use_input_stats` they move by `momentum`, in place, towards the
            mean over the images of their means and unbiased variances; images with one visible site, or none, have no
            part in that. Without it they normalise.
        use_input_stats: whether the statistics are those of the images.
        weight, bias, momentum, eps, activation, slope: as in `batch_norm`.

    Returns:
        The layout of `x` with features `(rows, C)` in the dtype of `x`, also under autocast.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: a shape does not fit, devices differ, `activation` is unknown, every image has a single visible site
            with `use_input_stats`, or running statistics are missing without.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    weight, bias, *_ = _checked(x, activation, vectors)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean or running_var is None: expected both where use_input_stats is False")
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps, activation, slope)
    if x.layout.rows_per_image == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got x {tuple(x.shape)} with one visible site in "
            "every image"
        )
    channels = x.features.shape[1]
    out, mean, variance = instance_norm_operator(x, weight, bias, "sample", channels, eps, activation, slope)
    if running_mean is not None or running_var is not None:
        sizes = group_splits(x.layout, "sample").diff()[:, None]
        counted = sizes > 1
        images = counted.sum()
        weight_of_these = momentum * (images > 0).to(mean.dtype)
        unbiased = variance * sizes / (sizes - 1).clamp(min=1)
        _move(running_mean, (mean * counted).sum(0) / images.clamp(min=1), weight_of_these)
        _move(running_var, (unbiased * counted).sum(0) / images.clamp(min=1), weight_of_these)
    return packed(out, x.layout)


def _checked(x: SparseTensor, activation: str, vectors: dict[str, Tensor | None]) -> Iterable[Tensor | None]:
    """Check what all normalizations take, and return the vectors, contiguous in the dtype of the statistics of x.

    The checks of one vector after another take 13 of 28 us that a BatchNorm costs more than torch's
    (benchmarks/overhead.py): where all are as they must be, their memory alone is checked.
    """
    check_activation(activation)
    if isinstance(x, SparseTensor) and x.features.dtype in FLOATING and _fit(x.features, vectors.values()):
        check_memory(x=x.features, **vectors)
        return vectors.values()
    check_sparse(x)
    channels = x.features.shape[1]
    return [None if v is None else checked_vector(v, name, channels, x).flatten() for name, v in vectors.items()]


def _fit(features: Tensor, vectors: Iterable[Tensor | None]) -> bool:
    dtype, shape, device = statistics_dtype(features.dtype), features.shape[1:], features.device
    for value in vectors:
        if value is not None:
            if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape:
                return False
            if value.device != device or not value.is_contiguous():
                return False
    return True


def _move(running: Tensor | None, value: Tensor, momentum: float | Tensor) -> None:
    """Move a running statistic towards that of the batch, in place."""
    if running is not None:
        momentum = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        running.lerp_(value.to(running.dtype).view_as(running), momentum)
