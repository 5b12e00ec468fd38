"""Stochastic depth: whole images of a residual branch are dropped, the others scaled up."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.common.dtypes import statistics_dtype
from sparsecnx.ops.checks import check_sparse
from sparsecnx.ops.drop_path import cpu, reference
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "stochastic_depth",
    cpu=Implementation(cpu.scale_images, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.drop_path.triton_kernels", "scale_images"),
    reference=Implementation(reference.scale_images),
)


def stochastic_depth(x: SparseTensor, p: float, training: bool = True) -> SparseTensor:
    """Zero all rows of an image with probability `p`, else scale them by `1 / (1 - p)` (arXiv 1603.09382).

    Args:
        x: features `(rows, C)` of a residual branch.
        p: probability of dropping an image, 0 <= p < 1.
        training: the identity if False.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `p` is outside [0, 1).
    """
    check_sparse(x)
    survival = draw_survival(x, p, training)
    return x if survival is None else x.with_features(operator(x, survival))


def draw_survival(x: SparseTensor, p: float, training: bool) -> Tensor | None:
    """Draw the scale of each image, `(B,)`: 0 with probability `p`, else `1 / (1 - p)`; None for the identity.

    Raises:
        ValueError: `p` is outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}: expected 0 <= p < 1, the probability of dropping an image")
    if p == 0.0 or not training:
        return None
    keep = 1.0 - p
    blank = torch.empty(x.layout.batch, dtype=statistics_dtype(x.dtype), device=x.device)
    return blank.bernoulli_(keep) / keep
