"""Per-image scaling of rows, in plain torch."""

from __future__ import annotations

from torch import Tensor

from sparsecnx.tensor import SparseTensor


def scale_images(x: SparseTensor, scale: Tensor) -> Tensor:
    """Return features `(rows, C)`, those of image `n` times `scale[n]`."""
    return x.features * scale[x.layout.row_image()][:, None].to(x.dtype)
