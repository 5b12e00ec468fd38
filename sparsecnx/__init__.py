"""Sparse convolution kernels for masked-autoencoder pretraining of ConvNets."""

from sparsecnx import models, nn, ops
from sparsecnx.backend import BackendError
from sparsecnx.layout import Layout, TileSet
from sparsecnx.masking import random_mask
from sparsecnx.selection import use_backend
from sparsecnx.tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Layout",
    "SparseTensor",
    "TileSet",
    "models",
    "nn",
    "ops",
    "random_mask",
    "use_backend",
]
