"""Global Response Normalization over the visible sites of each image, or of the whole batch."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import check_sparse, checked_vector
from sparsecnx.ops.global_response_norm import cpu, reference
from sparsecnx.ops.global_response_norm.groups import check_scope
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "grn",
    cpu=Implementation(cpu.grn, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.global_response_norm.triton_kernels", "grn"),
    reference=Implementation(reference.grn),
)


def grn(x: SparseTensor, gamma: Tensor, beta: Tensor, scope: str = "sample", eps: float = 1e-6) -> SparseTensor:
    """Apply Global Response Normalization (arXiv 2301.00808, section 3.2) to each channel c of a group of rows:

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
    check_scope(scope)
    channels = x.features.shape[1]
    gamma, beta = checked_vector(gamma, "gamma", channels, x), checked_vector(beta, "beta", channels, x)
    return x.with_features(operator(x, gamma, beta, scope, eps))
