"""Answer torch's functions on a SparseTensor: each module enters its functions into one table.

Every function equals the one on the dense tensor, zero at masked sites, followed by masking; statistics are over
visible sites alone. docs/functions.md is the table, written by `python -m sparsecnx.functions`.
"""

from sparsecnx.functions import (
    along_channels,
    as_tensor,
    attributes,
    checkpointing,
    convolutions,
    elementwise,
    hooks,
    normalization,
    pooling,
    reductions,
    resizing,
    shapes,
    sync_batch_norm,
    windows,
)

windows.refuse_methods_of_padding()

__all__ = [
    "along_channels",
    "as_tensor",
    "attributes",
    "checkpointing",
    "convolutions",
    "elementwise",
    "hooks",
    "normalization",
    "pooling",
    "reductions",
    "resizing",
    "shapes",
    "sync_batch_norm",
    "windows",
]
