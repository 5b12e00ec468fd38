"""torch.nn.SyncBatchNorm on a SparseTensor: statistics over the visible sites of all processes, on CPUs too.

torch's module calls an autograd.Function, which takes tensors alone, so that its forward method asks for SparseTensors
first. Networks converted by torch's or timm's `convert_sync_batchnorm` run as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.functions.as_tensor import SparseImage
from sparsecnx.functions.table import channels_first, like
from sparsecnx.tensor import SparseTensor

_forward = torch.nn.SyncBatchNorm.forward


def forward(self: torch.nn.SyncBatchNorm, input: Any) -> Any:
    """Normalise a SparseTensor by the statistics of all processes, anything else as torch does.

    Processes may have other numbers of visible sites, or none. Gradients of weight and bias are those of the process,
    as torch leaves them.
    """
    if isinstance(input, SparseImage):
        return SparseImage(forward(self, input.sparse))
    if isinstance(input, SparseTensor) and self.training and dist.is_available() and dist.is_initialized():
        x = channels_first(input, "SyncBatchNorm")
        return like(x, _normalise(self, x.features))
    return _forward(self, input)


torch.nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


def _normalise(module: torch.nn.SyncBatchNorm, rows: Tensor) -> Tensor:
    """Normalise rows `(rows, C)` by the moments of all processes, and move the running statistics."""
    if rows.shape[1] != module.num_features:
        raise ValueError(f"SyncBatchNorm: x has {rows.shape[1]} channels: num_features is {module.num_features}")
    wide = statistics_dtype(rows.dtype)
    parameters = (None if value is None else value.to(wide) for value in (module.weight, module.bias))
    group = module.process_group or dist.group.WORLD
    out, mean, variance, total = _Synchronised.apply(rows, *parameters, module.eps, group)
    if module.track_running_stats:
        assert module.num_batches_tracked is not None and module.running_mean is not None
        assert module.running_var is not None
        module.num_batches_tracked.add_(1)
        momentum = 1.0 / module.num_batches_tracked.item() if module.momentum is None else module.momentum
        weight = momentum * (total > 0).to(mean.dtype)  # Without any site they stay.
        module.running_mean.lerp_(mean.to(module.running_mean.dtype), weight.to(module.running_mean.dtype))
        unbiased = variance * (total / (total - 1).clamp(min=1))
        module.running_var.lerp_(unbiased.to(module.running_var.dtype), weight.to(module.running_var.dtype))
    return out


class _Synchronised(torch.autograd.Function):
    """Normalise rows by the moments of all processes, and return the moments and the number of all rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, ...]:
        channels, wide = rows.shape[1], statistics_dtype(rows.dtype)
        values = rows.to(wide)
        local = values.new_zeros(2 * channels + 1)
        if rows.shape[0]:
            local[:channels], local[channels:-1] = reversed(torch.var_mean(values, 0, correction=0))
            local[-1] = rows.shape[0]
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, local, group)
        found = torch.stack(gathered)
        means, variances, counts = found[:, :channels], found[:, channels:-1], found[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total.clamp(min=1)
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total.clamp(min=1)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(rows, weight, mean, rstd, total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, total)
        out = (values - mean) * (rstd if weight is None else rstd * weight)
        return (out if bias is None else out + bias).to(rows.dtype), mean, variance, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, mean, rstd, total = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        normalised = (rows.to(mean.dtype) - mean) * rstd
        sums = torch.stack([grad.sum(0), (grad * normalised).sum(0)])
        everywhere = sums.clone()
        dist.all_reduce(everywhere, group=ctx.group)
        along, across = everywhere / total.clamp(min=1)
        grad_rows = (grad - along - normalised * across) * (rstd if weight is None else rstd * weight)
        return grad_rows.to(rows.dtype), sums[1] if weight is not None else None, sums[0], None, None
