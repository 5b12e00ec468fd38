"""Sparse convolution kernels for masked-autoencoder pretraining of ConvNets."""

import sys as _sys

if _sys.version_info < (3, 10):  # noqa: UP036 - a script in the folder of a clone runs without installing
    raise ImportError(f"sparsecnx needs Python 3.10 or later: this is {_sys.version.split()[0]}", name="sparsecnx")
try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "sparsecnx needs torch 2.11 or later, which is not installed: pip install torch", name="sparsecnx"
    ) from None

from sparsecnx import functions as functions  # fills the table that SparseTensor answers torch from
from sparsecnx import models, nn, ops
from sparsecnx.backends.dispatch import BackendError
from sparsecnx.backends.selection import use_backend
from sparsecnx.compat.checkpoints import load_encoder
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.masks import random_mask
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.tensor import SparseTensor, UnsupportedFunctionError

sparse = SparseTensor.from_dense

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Layout",
    "SparseTensor",
    "TileSet",
    "UnsupportedFunctionError",
    "load_encoder",
    "models",
    "nn",
    "ops",
    "random_mask",
    "sparse",
    "use_backend",
]
