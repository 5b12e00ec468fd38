"""torch.utils.checkpoint inside torch.compile, which asks SparseTensors to answer it; elsewhere it is plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from sparsecnx.tensor import HANDLERS, SparseTensor, packed


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hand the features to torch's checkpoint, which would ask the SparseTensors again."""

    def run(*values: Any) -> Any:
        given = (
            packed(value, arg.layout, arg.channels_last) if isinstance(arg, SparseTensor) else value
            for value, arg in zip(values, args, strict=True)
        )
        return function(*given)

    features = (arg.features if isinstance(arg, SparseTensor) else arg for arg in args)
    return torch_checkpoint(run, *features, **kwargs)


HANDLERS[torch_checkpoint] = checkpoint
