"""Layer normalization of each site over its channels."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.backends import cpu as cpu_backend
from sparsecnx.backends import triton_launch
from sparsecnx.backends.dispatch import Implementation, Operator
from sparsecnx.ops.checks import check_sparse, checked_vector
from sparsecnx.ops.layer_normalization import cpu, reference
from sparsecnx.tensor import SparseTensor

operator = Operator(
    "layer_norm",
    cpu=Implementation(cpu.layer_norm, cpu_backend.refusal),
    triton=triton_launch.implementation("sparsecnx.ops.layer_normalization.triton_kernels", "layer_norm"),
    reference=Implementation(reference.layer_norm),
)


def layer_norm(x: SparseTensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> SparseTensor:
    """Normalise every row to zero mean and unit (biased) variance over C, then scale and shift (arXiv 1607.06450):

        out = (x - mean) / sqrt(variance + eps) * weight + bias

    Args:
        x: features `(rows, C)`.
        weight, bias: `(C,)`.
        eps: added to the variance.

    Returns:
        The layout of `x` with features `(rows, C)`.

    Raises:
        TypeError: `x` is not a SparseTensor.
        ValueError: a shape does not fit or devices differ.
    """
    check_sparse(x)
    channels = x.features.shape[1]
    weight, bias = checked_vector(weight, "weight", channels, x), checked_vector(bias, "bias", channels, x)
    return x.with_features(operator(x, weight, bias, eps))
