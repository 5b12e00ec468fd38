"""Batch, group and instance normalization: statistics over the visible sites, of the batch or of each image.

All are one formula. The rows are in segments: one, or one for each image. The channels are in groups: single channels,
or several that are next to each other. Each segment and group has a mean and a biased variance over its rows and
channels, and each channel a weight and a bias:

    out = activation((x - mean) / sqrt(variance + eps) * weight + bias)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import check_sparse, checked_vector
from sparsecnx.ops.global_response_norm.groups import group_splits
from sparsecnx.ops.site_normalization import cpu, reference
from sparsecnx.ops.site_normalization.activations import check_activation
from sparsecnx.tensor import SparseTensor


def _operator(name: str) -> Operator:
    return Operator(
        name,
        cpu=Implementation(cpu.site_norm, cpu_backend.refusal),
        triton=triton_launch.implementation("sparsecnx.ops.site_normalization.triton_kernels", "site_norm"),
        reference=Implementation(reference.site_norm),
    )


batch_norm_operator = _operator("batch_norm")
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
    plain = _are_plain(batch_norm_operator, x, weight, bias, running_mean, running_var)
    if not plain:
        check_sparse(x)
    check_activation(activation)
    channels = x.features.shape[1]
    if training and x.layout.rows == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got x {tuple(x.shape)} with one visible site: "
            "use larger batches, or eval()"
        )
    parameters = [weight, bias] if plain else _vectors(x, weight=weight, bias=bias)
    running = [running_mean, running_var]
    if not plain:
        running = _vectors(x, running_mean=running_mean, running_var=running_var)
    if not training and (running[0] is None or running[1] is None):
        raise ValueError("running_mean or running_var is None: expected both in evaluation (training=False)")
    moments = [None, None] if training else running
    out, mean, variance = batch_norm_operator(x, *parameters, *moments, "batch", channels, eps, activation, slope)
    if training and x.layout.rows:
        _move(running_mean, mean, momentum)
        _move(running_var, variance * (x.layout.rows / (x.layout.rows - 1)), momentum)
    return x.with_features(out)


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
    plain = _are_plain(group_norm_operator, x, weight, bias)
    if not plain:
        check_sparse(x)
    check_activation(activation)
    channels = x.features.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}: expected a divisor of the channels, {channels}")
    parameters = [weight, bias] if plain else _vectors(x, weight=weight, bias=bias)
    out, _, _ = group_norm_operator(x, *parameters, None, None, "sample", groups, eps, activation, slope)
    return x.with_features(out)


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
    check_sparse(x)
    check_activation(activation)
    channels = x.features.shape[1]
    if use_input_stats and x.layout.rows_per_image == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got x {tuple(x.shape)} with one visible site in "
            "every image"
        )
    parameters = _vectors(x, weight=weight, bias=bias)
    running = _vectors(x, running_mean=running_mean, running_var=running_var)
    options = channels, eps, activation, slope
    if not use_input_stats:
        if running[0] is None or running[1] is None:
            raise ValueError("running_mean or running_var is None: expected both where use_input_stats is False")
        out, _, _ = instance_norm_operator(x, *parameters, *running, "batch", *options)
        return x.with_features(out)
    out, mean, variance = instance_norm_operator(x, *parameters, None, None, "sample", *options)
    if running_mean is not None or running_var is not None:
        sizes = group_splits(x.layout, "sample").diff()[:, None]
        counted = sizes > 1
        images = counted.sum()
        weight_of_these = momentum * (images > 0).to(mean.dtype)
        unbiased = variance * (sizes / (sizes - 1).clamp(min=1))
        _move(running_mean, (mean * counted).sum(0) / images.clamp(min=1), weight_of_these)
        _move(running_var, (unbiased * counted).sum(0) / images.clamp(min=1), weight_of_these)
    return x.with_features(out)


def _are_plain(operator: Operator, x: SparseTensor, *parameters: Tensor | None) -> bool:
    """Return whether the compiled CPU kernel, which checks memory itself, takes these arguments as they are.

    The checks of five arguments take 13 of 28 us that a BatchNorm costs more than torch's (benchmarks/overhead.py).
    """
    if not isinstance(x, SparseTensor) or torch.compiler.is_compiling():
        return False
    features = x.features
    dtype, shape, device = features.dtype, features.shape[1:], features.device
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    for value in parameters:
        if value is not None:
            if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape:
                return False
            if value.device != device or not value.is_contiguous():
                return False
    return operator.choose(x) == "cpu"


def _vectors(x: SparseTensor, **values: Tensor | None) -> list[Tensor | None]:
    """Check parameters of C elements that may be None, and return them in the dtype of the statistics of x."""
    channels = x.features.shape[1]
    return [None if value is None else checked_vector(value, name, channels, x) for name, value in values.items()]


def _move(running: Tensor | None, value: Tensor, momentum: float | Tensor) -> None:
    """Move a running statistic towards that of the batch, in place."""
    if running is not None:
        momentum = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        running.lerp_(value.to(running.dtype).view_as(running), momentum)
