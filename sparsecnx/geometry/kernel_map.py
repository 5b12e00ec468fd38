"""Rows under a kernel map: sparse features of any pattern, without tiles.

A kernel map is int32 `(rows_out, K)`: for every output row and kernel tap the input row that is read, -1 where there is
none. It describes any coordinates, strides, dilations and kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MappedRows:
    """The input of an operator on an explicit kernel map.

    Attributes:
        features: `(rows_in, C)`.
        kernel_map: int32 `(rows_out, K)`.
        inverse_map: int32 `(rows_in, K)`: for every input row and tap the output row that reads it through that tap, -1
            where none does; None where it is to be computed when a gradient needs it.
    """

    features: Tensor
    kernel_map: Tensor
    inverse_map: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    def to(self, dtype: torch.dtype) -> MappedRows:
        """Return the same rows with features of another dtype."""
        return replace(self, features=self.features.to(dtype))

    def __repr__(self) -> str:
        return (
            f"MappedRows(features={tuple(self.features.shape)}, kernel_map={tuple(self.kernel_map.shape)}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def invert_kernel_map(kernel_map: Tensor, rows: int) -> Tensor:
    """Return for each of `rows` input rows the output row that reads it through each tap, -1 where none does.

    Raises:
        RuntimeError: two output rows read the same input row through the same tap; on a GPU, an assertion there fails.
    """
    count, taps = kernel_map.shape
    reader = torch.arange(count, dtype=torch.int32, device=kernel_map.device)[:, None].expand(-1, taps)
    nowhere = kernel_map.new_full((), rows)  # Entries of -1 meet in a row of their own.
    found = kernel_map.new_full((rows + 1, taps), -1)
    found = found.scatter(0, torch.where(kernel_map < 0, nowhere, kernel_map).long(), reader)[:rows].contiguous()
    every_read = (found >= 0).sum() == (kernel_map >= 0).sum()
    torch._assert_async(every_read, "two rows of kernel_map read the same input row through the same tap")
    return found
