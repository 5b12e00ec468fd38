"""Call every public operator with realistic arguments, for tests of the properties that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecnx import SparseTensor, ops
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.drop_path import operator as scale_images

Parameters = dict[str, Tensor]


def conv_parameters(out: int, channels: int, *kernel: int) -> Parameters:
    """Return a weight `(out, channels, *kernel)` that keeps the variance, and a bias, float64."""
    weight = torch.randn(out, channels, *kernel, dtype=torch.float64)
    return {"weight": weight / weight[0].numel() ** 0.5, "bias": torch.randn(out, dtype=torch.float64)}


def in_dimensions(parameters: Parameters, ndim: int, kernel: tuple[int, ...] | None = None) -> Parameters:
    """Return the parameters with kernels, by default of the same side along every axis, in so many dimensions."""

    def weight(value: Tensor) -> Tensor:
        return conv_parameters(*value.shape[:2], *kernel or value.shape[-1:] * ndim)["weight"]

    return {name: weight(value) if value.ndim == 4 else value for name, value in parameters.items()}


def channel_parameters(channels: int, *names: str) -> Parameters:
    return {name: torch.randn(channels, dtype=torch.float64) for name in names}


def block_parameters(channels: int, *kernel: int, hidden: int | None = None) -> Parameters:
    """Return parameters of a ConvNeXt V2 block, none of them zero, float64; by default 4C hidden channels."""
    hidden = hidden or 4 * channels
    conv, first, second = (
        conv_parameters(*shape) for shape in [(channels, 1, *kernel), (hidden, channels), (channels, hidden)]
    )
    values = ops.BlockParameters(
        conv["weight"],
        conv["bias"],
        1 + 0.3 * torch.randn(channels, dtype=torch.float64),
        torch.randn(channels, dtype=torch.float64),
        first["weight"],
        first["bias"],
        *channel_parameters(hidden, "gamma", "beta").values(),
        second["weight"],
        second["bias"],
    )
    return values._asdict()


BLOCK_VECTORS = tuple(
    name for name in ops.BlockParameters._fields if not name.endswith("weight") or name == "norm_weight"
)


def survival(batch: int) -> Tensor:
    """Return scales of stochastic depth: some images dropped, some kept."""
    return torch.tensor([1.25, 0.0, 2.5] * batch)[:batch]


def block(*, survive: bool = False, **options: object) -> Callable[..., SparseTensor]:
    def run(x: SparseTensor, **p: Tensor) -> SparseTensor:
        scale = survival(x.layout.batch).to(x.device) if survive and isinstance(x, SparseTensor) else None
        return ops.convnextv2_block(x, ops.BlockParameters(**p), scale, **options)

    return run


def patchify(stride: int) -> Callable[..., SparseTensor]:
    return lambda x, **p: ops.conv(x, **p, stride=stride)


def half_of_the_images(x: SparseTensor) -> SparseTensor:
    return ops.stochastic_depth(x, 0.5)


def scaled_images(x: SparseTensor) -> SparseTensor:
    """Apply stochastic depth with given scales: drawn ones differ between devices and dtypes."""
    x = ops.stochastic_depth(x, 0.0)
    scale = survival(x.layout.batch).to(x.device, statistics_dtype(x.dtype))
    return x.with_features(scale_images(x, scale))


@dataclass(frozen=True)
class Case:
    """One way to call an operator.

    Attributes:
        operator: its name in `sparsecnx.ops`.
        run: calls it, `run(x, **parameters)`.
        parameters: float64 parameters for C channels.
        statistics: parameters that are float32 at least.
        follows_autocast: whether autocast changes the dtype of the output.
    """

    operator: str
    run: Callable[..., SparseTensor]
    parameters: Callable[[int], Parameters]
    statistics: tuple[str, ...] = ()
    follows_autocast: bool = True


def normalization(operator: str, *first: object, **options: object) -> Case:
    """Return a case of `ops.<operator>(x, *first, weight, bias, **options)`."""

    def run(x: SparseTensor, weight: Tensor, bias: Tensor) -> SparseTensor:
        return getattr(ops, operator)(x, *first, weight, bias, **options)

    parameters = lambda c: channel_parameters(c, "weight", "bias")  # noqa: E731
    return Case(operator, run, parameters, ("weight", "bias"), follows_autocast=False)


def frozen_batch_norm(x: SparseTensor, weight: Tensor, bias: Tensor) -> SparseTensor:
    """Normalise by running statistics, which are the same every time."""
    place = {"device": weight.device, "dtype": weight.dtype}
    mean, variance = torch.linspace(-0.5, 0.5, weight.numel(), **place), torch.linspace(0.5, 2, weight.numel(), **place)
    return ops.batch_norm(x, mean, variance, weight, bias)


CASES = {
    "depthwise_conv-7x7": Case(
        "depthwise_conv", ops.depthwise_conv, lambda c: conv_parameters(c, 1, 7, 7), statistics=("bias",)
    ),
    "conv-1x1": Case("conv", patchify(1), lambda c: conv_parameters(5, c, 1, 1)),
    "conv-2x2-stride2": Case("conv", patchify(2), lambda c: conv_parameters(5, c, 2, 2)),
    "conv-3x3": Case("conv", patchify(1), lambda c: conv_parameters(5, c, 3, 3)),
    "conv-3x3-stride2": Case("conv", patchify(2), lambda c: conv_parameters(5, c, 3, 3)),
    "conv_transpose-4x4-stride2": Case(
        "conv_transpose",
        lambda x, weight, bias: ops.conv_transpose(x, weight, bias, 2, 1),
        lambda c: {**conv_parameters(c, 5, 4, 4), **channel_parameters(5, "bias")},
    ),
    "grn-sample": Case(
        "grn", ops.grn, lambda c: channel_parameters(c, "gamma", "beta"), ("gamma", "beta"), follows_autocast=False
    ),
    "grn-batch": Case(
        "grn",
        lambda x, **p: ops.grn(x, **p, scope="batch"),
        lambda c: channel_parameters(c, "gamma", "beta"),
        ("gamma", "beta"),
        follows_autocast=False,
    ),
    "layer_norm": Case(
        "layer_norm",
        ops.layer_norm,
        lambda c: channel_parameters(c, "weight", "bias"),
        ("weight", "bias"),
        follows_autocast=False,
    ),
    "batch_norm-batch": normalization("batch_norm", None, None, training=True, activation="silu"),
    "batch_norm-frozen": Case(
        "batch_norm",
        frozen_batch_norm,
        lambda c: channel_parameters(c, "weight", "bias"),
        ("weight", "bias"),
        follows_autocast=False,
    ),
    "instance_norm": normalization("instance_norm", None, None, activation="leaky_relu"),
    "group_norm": normalization("group_norm", 1),
    "max_pool-3x3-stride2": Case("max_pool", lambda x: ops.max_pool(x, 3, 2, 1), lambda c: {}, follows_autocast=False),
    "avg_pool-3x3": Case(
        "avg_pool",
        lambda x: ops.avg_pool(x, 3, 1, 1, count_include_pad=False),
        lambda c: {},
        follows_autocast=False,
    ),
    "avg_pool-2x2-stride2": Case("avg_pool", lambda x: ops.avg_pool(x, 2), lambda c: {}, follows_autocast=False),
    "stochastic_depth": Case("stochastic_depth", scaled_images, lambda c: {}, follows_autocast=False),
    "stochastic_depth-drawn": Case("stochastic_depth", half_of_the_images, lambda c: {}, follows_autocast=False),
    "block-recompute": Case(
        "convnextv2_block", block(recompute=True), lambda c: block_parameters(c, 7, 7), BLOCK_VECTORS
    ),
    "block-keep-survival": Case(
        "convnextv2_block", block(recompute=False, survive=True), lambda c: block_parameters(c, 7, 7), BLOCK_VECTORS
    ),
    "block-batch": Case("convnextv2_block", block(scope="batch"), lambda c: block_parameters(c, 3, 3), BLOCK_VECTORS),
}
