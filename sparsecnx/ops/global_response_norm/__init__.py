"""Global Response Normalization over the visible sites of each image, or of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.backends.dispatch import Implementation, Operator, always
from sparsecnx.choices import Comparison, compare
from sparsecnx.geometry.layout import Layout
from sparsecnx.ops import cuda
from sparsecnx.ops.checks import check_sparse, check_vector, statistics_dtype
from sparsecnx.ops.global_response_norm import cpu, reference
from sparsecnx.ops.minkowski import refusal as minkowski_refusal
from sparsecnx.ops.native import refusal
from sparsecnx.ops.triton import implementation
from sparsecnx.tensor import SparseTensor


def _compare(x: SparseTensor, *_: object) -> Comparison:
    """CUDA beside Triton, forward and backward."""
    return compare(("grn", "grn_backward"), x.device, x.dtype, x.features.shape[1])


operator = Operator(
    "grn",
    native=Implementation(native.grn, refusal),
    triton=implementation(__name__, "grn"),
    cuda=cuda.implementation(__name__, "grn", compare=_compare),
    reference=Implementation(reference.grn, always),
    # MinkowskiEngine has no such layer: code written for it does this in torch, on the rows.
    minkowski=Implementation(reference.grn, minkowski_refusal, by_name=True),
)


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str = "sample", eps: float = 1e-6) -> SparseTensor:
    """Global Response Normalization (arXiv 2301.00808, section 3.2): per channel c of a group of rows

        G_c = sqrt(sum x_c^2),  N_c = G_c / (mean_c G + eps),  out = gamma * (x * N) + beta + x

    Args:
        x: features `(rows, C)`.
        gamma, beta: C values, `(C,)`, `(1, C)` or `(1, 1, 1, C)` as published.
        scope: `"sample"`: a group is the visible sites of one image (the paper); `"batch"`: all rows, as
            the published sparse PyTorch code does, which makes images depend on each other.
        eps: added to the mean over channels.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: `scope` is unknown, a shape does not fit, or devices differ.
    """
    check_sparse(x)
    channels = x.features.shape[1]
    check_vector(gamma, "gamma", channels, x)
    check_vector(beta, "beta", channels, x)
    dtype = statistics_dtype(x.dtype)
    gamma, beta = gamma.reshape(channels).to(dtype), beta.reshape(channels).to(dtype)
    return x.with_features(operator(x, gamma, beta, segments(x.layout, scope), eps))


def segments(layout: Layout, scope: str) -> Tensor:
    """Row splits of the groups that GRN normalises together, int64 `(groups + 1,)`.

    Raises:
        ValueError: `scope` is not `"sample"` or `"batch"`.
    """
    if scope == "sample":
        return layout.row_splits
    if scope == "batch":
        return torch.arange(2, device=layout.device) * layout.rows
    raise ValueError(f"scope is {scope!r}: expected 'sample' or 'batch'")
