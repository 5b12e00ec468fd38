"""Rows under a kernel map: sparse features of any pattern, without tiles.

A kernel map is int32 `(rows_out, K)`: for every output row and kernel tap the input row that is read, -1 where there is
none. It describes any coordinates, strides, dilations and kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsecnx.common.memory import check_memory


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
    def compiled_map(self) -> tuple[Tensor, list[int], list[int]]:
        """Return the map as the compiled operators take it: the table, and neither grid nor window."""
        return self.kernel_map.contiguous(), [], []

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


def check_kernel_map(kernel_map: Tensor, rows: int, name: str = "kernel_map") -> None:
    """Raise RuntimeError unless every entry is -1 or one of `rows` rows.

    On a GPU and under torch.compile nothing waits for values: an assertion fails later.
    """
    if kernel_map.numel() == 0:
        return
    check_memory(**{name: kernel_map})
    low, high = kernel_map.aminmax()
    if not _readable(kernel_map):
        torch._assert_async((low >= -1) & (high < rows), f"{name} has an entry that is neither -1 nor a row")
    elif low < -1 or high >= rows:
        raise RuntimeError(f"{name} has entries from {int(low)} to {int(high)}, expected -1 to {rows - 1}")


def check_inverse_map(kernel_map: Tensor, inverse_map: Tensor) -> None:
    """Raise RuntimeError unless `inverse_map` is the inverse of `kernel_map`, both in range.

    On a GPU nothing waits for values: an assertion fails later.
    """
    check_memory(kernel_map=kernel_map, inverse_map=inverse_map)
    check_kernel_map(kernel_map, inverse_map.shape[0])
    check_kernel_map(inverse_map, kernel_map.shape[0], "inverse_map")
    present = kernel_map >= 0
    reader = torch.arange(kernel_map.shape[0], dtype=torch.int32, device=kernel_map.device)[:, None]
    # Without input rows there is nothing to gather from.
    back = inverse_map.gather(0, kernel_map.clamp(min=0).long()) if inverse_map.shape[0] else kernel_map
    missing, reads = ((back != reader) & present).sum(), present.sum()
    others = (inverse_map >= 0).sum() - (reads - missing)
    if not _readable(kernel_map):
        torch._assert_async((missing == 0) & (others == 0), "inverse_map contradicts kernel_map")
    elif missing or others:
        raise RuntimeError(
            f"inverse_map contradicts kernel_map: {int(missing)} of {int(reads)} reads are not in it"
            f" and it has {int(others)} others; leave it out, or pass the inverse of this kernel_map"
        )


def _readable(value: Tensor) -> bool:
    """Return whether the values of a tensor can be read here and now, at no cost but the reading."""
    return value.device.type == "cpu" and type(value) is Tensor and not torch.compiler.is_compiling()


def invert_kernel_map(kernel_map: Tensor, rows: int) -> Tensor:
    """Return for each of `rows` input rows the output row that reads it through each tap, -1 where none does.

    Raises:
        RuntimeError: two output rows read the same input row through the same tap, or an entry is neither -1 nor an
            input row; on a GPU, an assertion there fails.
    """
    check_memory(kernel_map=kernel_map)
    count, taps = kernel_map.shape
    reader = torch.arange(count, dtype=torch.int32, device=kernel_map.device)[:, None].expand(-1, taps)
    nowhere = kernel_map.new_full((), rows)  # Entries of -1 meet in a row of their own.
    found = kernel_map.new_full((rows + 1, taps), -1)
    found = found.scatter(0, torch.where(kernel_map < 0, nowhere, kernel_map).long(), reader)[:rows].contiguous()
    every_read = (found >= 0).sum() == (kernel_map != -1).sum()
    message = "two rows of kernel_map read the same input row through the same tap, or an entry is no input row"
    torch._assert_async(every_read, message)
    return found
