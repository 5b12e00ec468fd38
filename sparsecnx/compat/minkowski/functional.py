"""MinkowskiFunctional: functions of `torch.nn.functional` on the features of SparseTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from sparsecnx.compat.minkowski.errors import require_type
from sparsecnx.compat.minkowski.tensor import SparseTensor

# These return a SparseTensor on the same sites.
FUNCTIONS = (
    *("threshold", "relu", "hardtanh", "hardswish", "relu6", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu"),
    *("glu", "gelu", "logsigmoid", "hardshrink", "tanhshrink", "softsign", "softplus", "softmin", "softmax"),
    *("softshrink", "gumbel_softmax", "log_softmax", "tanh", "sigmoid", "hardsigmoid", "silu"),
    *("batch_norm", "normalize", "linear", "dropout", "alpha_dropout"),
)
# These take a target and return a number.
LOSSES = (
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss", "cross_entropy"),
    *("hinge_embedding_loss", "kl_div", "l1_loss", "mse_loss", "multilabel_margin_loss"),
    *("multilabel_soft_margin_loss", "multi_margin_loss", "nll_loss", "smooth_l1_loss", "soft_margin_loss"),
)


def _function(name: str) -> Callable[..., Any]:
    """Return `torch.nn.functional.name` for SparseTensors."""
    function = getattr(F, name)

    def apply(input: SparseTensor, *args: Any, **kwargs: Any) -> Any:
        require_type(input, SparseTensor, "input", "a SparseTensor")
        result = function(input.F, *args, **kwargs)
        return result if name in LOSSES else input._with(result)

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = f"`torch.nn.functional.{name}` on the features of a SparseTensor."
    return apply


for _name in FUNCTIONS + LOSSES:
    globals()[_name] = _function(_name)

__all__ = [*FUNCTIONS, *LOSSES]
