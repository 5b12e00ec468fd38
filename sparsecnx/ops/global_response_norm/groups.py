"""The groups of rows that GRN normalises together: the images (scope "sample") or the whole batch (scope "batch")."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.tables import cached_table

SCOPES = ("sample", "batch")


def check_scope(scope: str) -> None:
    """Raise ValueError unless `scope` is `"sample"` or `"batch"`."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}: expected 'sample' or 'batch'")


def group_splits(layout: Layout, scope: str) -> Tensor:
    """Return int64 `(groups + 1,)`: the rows of group `g` are `splits[g]:splits[g + 1]`."""
    if scope == "sample":
        return layout.row_splits
    key = ("batch splits", layout.tile)
    return cached_table(layout.tiles, key, lambda: torch.arange(2, device=layout.device) * layout.rows)


def row_groups(layout: Layout, scope: str) -> Tensor:
    """Return the group of each row, int32 `(rows,)`."""
    if scope == "sample":
        return layout.row_image()
    key = ("batch groups", layout.tile)
    return cached_table(layout.tiles, key, lambda: torch.zeros(layout.rows, dtype=torch.int32, device=layout.device))
