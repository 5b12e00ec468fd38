"""MinkowskiEngine.utils: batches of coordinates, and initialisation."""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.compat.minkowski.errors import QUANTIZED, refusing, require, require_type


def batched_coordinates(
    coords: Sequence[Tensor | np.ndarray], dtype: torch.dtype = torch.int32, device: torch.device | str | None = None
) -> Tensor:
    """Join the coordinates of several images, each `(n_i, D)`, to `(sum n_i, 1 + D)` with the image number first.

    Args:
        coords: tensors or arrays; fractions are rounded down if `dtype` is int32.
        dtype: int32 or float32.
        device: of the result; by default that of the first tensor.
    """
    require_type(coords, Sequence, "coords", "a sequence of tensors or arrays (n, D)")
    require(dtype in (torch.int32, torch.float32), f"dtype is {dtype}: expected torch.int32 or torch.float32")
    tensors = [_tensor(entry, f"coords[{number}]") for number, entry in enumerate(coords)]
    require(bool(tensors), "coords is empty: expected the coordinates of at least one image")
    axes = {entry.shape[1] for entry in tensors}
    require(len(axes) == 1, f"coords have {sorted(axes)} columns: expected the same number D in all")
    batched = []
    for image, entry in enumerate(tensors):
        if dtype == torch.int32 and entry.is_floating_point():
            entry = entry.floor()
        entry = entry.to(device or tensors[0].device, dtype)
        batched.append(torch.nn.functional.pad(entry, (1, 0), value=image))
    return torch.cat(batched)


def sparse_collate(
    coords: Sequence[Tensor | np.ndarray],
    feats: Sequence[Tensor | np.ndarray],
    labels: Sequence[Any] | None = None,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Return `batched_coordinates` of `coords`, the features joined, and the labels if they are given.

    Labels are joined if they are tensors, and otherwise returned as a list.
    """
    batched = batched_coordinates(coords, dtype, device)
    require_type(feats, Sequence, "feats", "a sequence of tensors or arrays (n, C)")
    features = torch.cat([_tensor(entry, f"feats[{number}]") for number, entry in enumerate(feats)])
    require(
        features.shape[0] == batched.shape[0],
        f"feats have {features.shape[0]} rows in all: coords have {batched.shape[0]}",
    )
    if labels is None:
        return batched, features
    require_type(labels, Sequence, "labels", "a sequence with one entry for each image")
    entries = [torch.from_numpy(entry) if isinstance(entry, np.ndarray) else entry for entry in labels]
    return batched, features, torch.cat(entries) if isinstance(entries[0], Tensor) else entries


def batch_sparse_collate(
    data: Sequence[Any], dtype: torch.dtype = torch.int32, device: torch.device | str | None = None
) -> tuple[Any, ...]:
    """Apply `sparse_collate` to `(coordinates, features)` or `(coordinates, features, labels)` of each image."""
    coords, feats, *labels = zip(*data, strict=True)
    return sparse_collate(coords, feats, labels[0] if labels else None, dtype, device)


class SparseCollation:
    """`sparse_collate` as the `collate_fn` of a DataLoader.

    Args:
        limit_numpoints: largest number of sites in a batch; later images are left out, with a warning. There is no
            limit if it is not positive.
    """

    def __init__(
        self, limit_numpoints: int = -1, dtype: torch.dtype = torch.int32, device: torch.device | str | None = None
    ) -> None:
        self.limit_numpoints = limit_numpoints
        self.dtype = dtype
        self.device = device

    def __call__(self, list_data: Sequence[Any]) -> tuple[Any, ...]:
        kept = len(list_data)
        if self.limit_numpoints > 0:
            ends = list(itertools.accumulate(len(entry[0]) for entry in list_data))
            kept = bisect.bisect_right(ends, self.limit_numpoints)
            require(kept > 0, f"limit_numpoints is {self.limit_numpoints}: the first image alone has {ends[0]} sites")
            if kept < len(list_data):
                warnings.warn(
                    f"{ends[-1]} sites are more than limit_numpoints={self.limit_numpoints}: "
                    f"{len(list_data) - kept} of {len(list_data)} images are left out of the batch",
                    stacklevel=2,
                )
        return batch_sparse_collate(list_data[:kept], self.dtype, self.device)


def kaiming_normal_(tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: Any = "leaky_relu") -> Tensor:
    """Initialise a kernel `(K, C_in, C_out)` in place by He's method (arXiv 1502.01852).

    A matrix is taken for that of a linear layer in torch, `(C_out, C_in)`, as in MinkowskiEngine.

    Raises:
        ArgumentError: `tensor` is no kernel, or `mode` is neither `"fan_in"` nor `"fan_out"`.
    """
    require(tensor.ndim >= 2, f"tensor is {tuple(tensor.shape)}: expected a kernel (K, C_in, C_out)")
    require(mode.lower() in ("fan_in", "fan_out"), f"mode is {mode!r}: expected 'fan_in' or 'fan_out'")
    taps, fan_in, fan_out = (1, *tensor.shape[::-1]) if tensor.ndim == 2 else tensor.shape[:3]
    fan = taps * (fan_in if mode.lower() == "fan_in" else fan_out)
    with torch.no_grad():
        return tensor.normal_(0, torch.nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fan))


def _tensor(entry: Any, name: str) -> Tensor:
    """Return a tensor or array of rows as a tensor."""
    require_type(entry, (Tensor, np.ndarray), name, "a tensor or an array")
    require(entry.ndim == 2, f"{name} is {tuple(entry.shape)}: expected two axes, the rows first")
    return torch.from_numpy(entry) if isinstance(entry, np.ndarray) else entry


sparse_quantize = refusing("utils.sparse_quantize", QUANTIZED)
unique_coordinate_map = refusing("utils.unique_coordinate_map", "CoordinateManager.insert_and_map")
ravel_hash_vec = refusing("utils.ravel_hash_vec", "torch.unique(coordinates, dim=0, return_inverse=True)")
fnv_hash_vec = ravel_hash_vec
summary = refusing("utils.summary", "print(model)")
