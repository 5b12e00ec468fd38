"""Batch normalization over the visible sites of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.tensor import SparseTensor


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """Normalise as `torch.nn.SyncBatchNorm`; a SparseTensor over the visible sites of all processes, on CPUs too.

    Processes may have other numbers of visible sites, or none. Gradients of weight and bias are those of the process,
    as torch leaves them. Child modules, such as the activation of timm's BatchNormAct2d, follow in their order.
    """

    def forward(self, input: SparseTensor | Tensor) -> SparseTensor | Tensor:  # type: ignore[override]
        """Take a dense tensor or a SparseTensor; return the same shape."""
        if isinstance(input, SparseTensor) and self.training and dist.is_available() and dist.is_initialized():
            out: Any = input.with_features(self._synchronised(input.features))
        else:
            out = super().forward(input)  # type: ignore[arg-type]
        for child in self.children():
            out = child(out)
        return out

    def _synchronised(self, rows: Tensor) -> Tensor:
        """Normalise rows `(rows, C)` by the moments of all processes, and move the running statistics."""
        wide = statistics_dtype(rows.dtype)
        parameters = (None if value is None else value.to(wide) for value in (self.weight, self.bias))
        group = self.process_group or dist.group.WORLD
        out, mean, variance, total = _Synchronised.apply(rows, *parameters, self.eps, group)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None and self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            weight = momentum * (total > 0).to(mean.dtype)  # Without any site they stay.
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight.to(self.running_mean.dtype))
            unbiased = variance * (total / (total - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight.to(self.running_var.dtype))
        return out

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any | None = None) -> torch.nn.Module:
        """Replace every batch normalization in a network by this class, with the same parameters and statistics.

        Args:
            module: the network; returned, unless it is a batch normalization itself.
            process_group: the processes that normalise together, by default all.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            converted = cls(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
                process_group or getattr(module, "process_group", None),
            )  # fmt: skip
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
                setattr(converted, name, getattr(module, name))
        for name, child in module.named_children():
            setattr(converted, name, cls.convert_sync_batchnorm(child, process_group))
        return converted


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
