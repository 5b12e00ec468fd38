"""Sparse convolution kernels for masked-autoencoder pretraining of ConvNets."""

from sparsecnx import models, nn, ops
from sparsecnx.backends.dispatch import BackendError
from sparsecnx.backends.selection import use_backend
from sparsecnx.compat.checkpoints import load_encoder
from sparsecnx.geometry.layout import Layout, TileSet
from sparsecnx.geometry.masks import random_mask
from sparsecnx.tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Layout",
    "SparseTensor",
    "TileSet",
    "load_encoder",
    "models",
    "nn",
    "ops",
    "random_mask",
    "use_backend",
]
