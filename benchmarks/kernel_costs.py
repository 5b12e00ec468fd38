"""What every kernel has to move and to compute at least, from the arguments of a launch.

Bytes: every element that the result depends on read once, every element of the result written once. Arithmetic: of
matrix products, which tensor cores do, and all other, in float32; an exponential, a root or a division counts as one
operation, so that counts of elementwise work are low. Buffers of partial sums count as they are: they are the price
of the two-stage reductions, but the kernels have no other way to hand their sums on.

A CUDA operator is one entry, whatever kernels it launches. It counts what a Triton kernel of the same purpose does, so
that fractions of the two can be compared, but for its buffers of partial sums, which nobody else sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GELU = 16  # operations of `gelu` on one value
GELU_AND_SLOPE = 19

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Least work of a launch.

    Attributes:
        bytes: moved from and to memory.
        matrix: floating point operations of matrix products.
        vector: other floating point operations.
    """

    bytes: int
    matrix: int = 0
    vector: int = 0


def bound(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, Arguments]:
    """A kernel's name, and the arguments of a launch by name, without Triton's decorators and options."""
    while hasattr(kernel, "fn") and hasattr(kernel.fn, "arg_names"):
        kernel = kernel.fn
    names = list(kernel.arg_names)
    found = dict(zip(names, arguments, strict=False))
    found |= {name: value for name, value in options.items() if name in names}
    return kernel.__name__, found


def cost(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Cost:
    """The cost of a launch.

    Raises:
        KeyError: the kernel is not in `COSTS`.
    """
    name, by_name = bound(kernel, arguments, options)
    if name not in COSTS:
        raise KeyError(f"{name} has no entry in benchmarks/kernel_costs.py")
    return COSTS[name](by_name)


def size(*tensors: Any) -> int:
    """Bytes of tensors; of an absent one, none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def everything(a: Arguments) -> int:
    """Bytes of all tensors of a launch, each of which is read once or written once."""
    return size(*a.values())


def elementwise(values: str, operations: int) -> Callable[[Arguments], Cost]:
    """A kernel that moves all its tensors, and does some operations for every element of one of them."""

    def count(a: Arguments) -> Cost:
        return Cost(everything(a), vector=operations * a[values].numel())

    return count


def active_taps(table: Tensor, tile: int, kernel: tuple[int, int]) -> int:
    """Pairs of a site and a tap that reads an active site, over all tiles.

    Args:
        table: neighbouring tiles of each tile, int32 `(tiles, span**2)`, negative where masked.
        tile: sites per tile side.
        kernel: its height and width.
    """
    span = math.isqrt(table.shape[1])
    reach = (span - 1) // 2

    def pairs(taps: int) -> Tensor:
        """How many pairs of a coordinate and a tap lead from a tile to each of the tiles in reach."""
        site = torch.arange(tile)[:, None] + torch.arange(taps)[None, :] - taps // 2
        step = torch.div(site, tile, rounding_mode="floor") + reach
        return torch.bincount(step.flatten(), minlength=span)

    visible = (table >= 0).sum(0).cpu().view(span, span)
    return int((visible * pairs(kernel[0])[:, None] * pairs(kernel[1])[None, :]).sum())


def depthwise_conv(a: Arguments) -> Cost:
    taps = active_taps(a["table_ptr"], a["TILE"], (a["KERNEL_H"], a["KERNEL_W"]))
    return Cost(everything(a), vector=2 * taps * a["C"] + (8 if a["NORMALISE"] else 0) * a["out_ptr"].numel())


def depthwise_conv_weight_grad(a: Arguments) -> Cost:
    taps = active_taps(a["table_ptr"], a["TILE"], (a["KERNEL_H"], a["KERNEL_W"]))
    return Cost(everything(a), vector=2 * taps * a["C"] + a["grad_ptr"].numel())


def mapped_depthwise_conv(a: Arguments) -> Cost:
    return Cost(everything(a), vector=2 * int((a["map_ptr"] >= 0).sum()) * a["C"])


def mapped_depthwise_conv_weight_grad(a: Arguments) -> Cost:
    taps = int((a["map_ptr"] >= 0).sum())
    return Cost(everything(a), vector=2 * taps * a["C"] + a["grad_ptr"].numel())


def linear_gelu(a: Arguments) -> Cost:
    values = a["rows"] * a["N"]
    return Cost(everything(a), matrix=2 * values * a["K"], vector=(GELU + 3) * values)


def linear_scaled(a: Arguments) -> Cost:
    values = a["rows"] * a["N"]
    return Cost(everything(a), matrix=2 * values * a["K"], vector=a["hidden_ptr"].numel() + 3 * values)


def hidden_backward(a: Arguments) -> Cost:
    """One product for the hidden layer where it was not kept, one for its gradient where that was not."""
    gradients, kept = a["GRADIENTS"], a["KEPT"]
    values = a["rows"] * a["N"]
    moved = size(a["row_scale_ptr"], a["group_ptr"], a["partial_ptr"])
    products = 0
    if kept:
        moved += size(a["pre_ptr"], a["product_ptr"])
    else:
        moved += size(a["x_ptr"], a["weight1_ptr"], a["bias1_ptr"])
        products += 1
    if not (kept and gradients):
        moved += size(a["grad_ptr"], a["weight2_ptr"])
        products += 1
    if gradients:
        moved += size(a["scale_ptr"], a["grad_energy_ptr"], a["grad_pre_ptr"], a["scaled_ptr"])
    per_value = GELU_AND_SLOPE + 7 if gradients else GELU + 2
    return Cost(moved, matrix=2 * products * values * a["K"], vector=per_value * values)


def fold(a: Arguments) -> Cost:
    """Without a scale the matrix stays what it is."""
    written = size(a["scale_ptr"], a["folded_ptr"]) if a["HAS_SCALE"] else 0
    read = size(a["weight_ptr"], a["shift_ptr"], a["bias_ptr"], a["out_ptr"])
    return Cost(read + written, vector=(3 if a["HAS_SCALE"] else 2) * a["weight_ptr"].numel())


def unfold(a: Arguments) -> Cost:
    """In place: the product is read and written."""
    return Cost(everything(a) + size(a["product_ptr"]), vector=(7 if a["HAS_SCALE"] else 4) * a["weight_ptr"].numel())


def gather(a: Arguments) -> Cost:
    """Of the dense tensor only what is visible."""
    return Cost(2 * size(a["rows_ptr"]) + size(a["index_ptr"]))


def gather_columns(a: Arguments) -> Cost:
    """Rows that several taps read are read once; a chunk of the output may need fewer than all."""
    columns = size(a["columns_ptr"])
    return Cost(min(size(a["x_ptr"]), columns) + size(a["map_ptr"]) + columns)


def fill_grad(a: Arguments) -> Cost:
    """Of the dense tensor only what is masked."""
    slots, dense = a["slots_ptr"], a["dense_ptr"]
    masked = int((slots < 0).sum()) * dense.numel() // slots.numel()
    return Cost(size(slots, a["sums_ptr"]) + masked * dense.element_size(), vector=masked)


COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "depthwise_conv_kernel": depthwise_conv,
    "depthwise_conv_weight_grad_kernel": depthwise_conv_weight_grad,
    "mapped_depthwise_conv_kernel": mapped_depthwise_conv,
    "mapped_depthwise_conv_weight_grad_kernel": mapped_depthwise_conv_weight_grad,
    "linear_gelu_kernel": linear_gelu,
    "linear_scaled_kernel": linear_scaled,
    "hidden_backward_kernel": hidden_backward,
    "fold_kernel": fold,
    "unfold_kernel": unfold,
    "column_sums_kernel": elementwise("values_ptr", 1),
    "layer_norm_kernel": elementwise("x_ptr", 8),
    "layer_norm_backward_kernel": elementwise("x_ptr", 13),
    "normalised_backward_kernel": elementwise("grad_ptr", 7),
    "energy_kernel": elementwise("x_ptr", 2),
    "gradient_sums_kernel": elementwise("x_ptr", 3),
    "apply_kernel": elementwise("x_ptr", 2),
    "apply_backward_kernel": elementwise("x_ptr", 4),
    "sum_partials_kernel": elementwise("partial_ptr", 1),
    "response_kernel": elementwise("partial_ptr", 1),
    "response_backward_kernel": elementwise("partial_ptr", 1),
    "gather_kernel": gather,
    "scatter_kernel": elementwise("rows_ptr", 0),
    "fill_grad_kernel": fill_grad,
    "gather_columns_kernel": gather_columns,
    "scale_rows_kernel": elementwise("x_ptr", 1),
}


def cuda_depthwise_conv(a: Arguments) -> Cost:
    """Also of the fused operator, whose statistics cost a few operations per value."""
    kernel = (int(a["weight"].shape[-2]), int(a["weight"].shape[-1]))
    taps = active_taps(a["table"], a["tile"], kernel)
    values = a["x"].numel()
    return Cost(everything(a), vector=2 * taps * a["x"].shape[1] + (8 * values if a.get("eps") is not None else 0))


def cuda_depthwise_conv_weight_grad(a: Arguments) -> Cost:
    taps = active_taps(a["table"], a["tile"], (a["kernel_h"], a["kernel_w"]))
    return Cost(everything(a), vector=2 * taps * a["x"].shape[1] + a["grad"].numel())


def cuda_grn(a: Arguments) -> Cost:
    """No row can be written before the sums over its image are known: rows are read twice."""
    return Cost(everything(a) + size(a["x"]), vector=4 * a["x"].numel())


def cuda_grn_backward(a: Arguments) -> Cost:
    """As above, with two tensors of rows to read."""
    return Cost(everything(a) + size(a["grad"], a["x"]), vector=7 * a["x"].numel())


def cuda_gather(a: Arguments) -> Cost:
    """Of the dense tensor only what is visible."""
    return Cost(2 * size(a["output 0"]) + size(a["index"]))


def cuda_scatter(a: Arguments) -> Cost:
    """All of the dense tensor, visible or not, is written."""
    return Cost(size(a["rows"], a["fill"], a["slots"], a["output 0"]))


def integers(a: Arguments) -> Cost:
    """Tables: their arithmetic is nothing beside the time of a launch."""
    return Cost(everything(a))


CUDA_COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "depthwise_conv": cuda_depthwise_conv,
    "depthwise_conv_fused": cuda_depthwise_conv,
    "depthwise_conv_weight_grad": cuda_depthwise_conv_weight_grad,
    "grn": cuda_grn,
    "grn_backward": cuda_grn_backward,
    "gather_tiles": cuda_gather,
    "scatter_tiles": cuda_scatter,
    "tile_index": integers,
    "neighbour_table": integers,
}


def cuda_cost(operator: Any, arguments: Sequence[Any], options: dict[str, Any], outputs: Sequence[Any]) -> Cost:
    """The cost of an operator of namespace `sparsecnx_cuda`.

    Args:
        operator: the overload that was called.
        arguments, options: what it was called with.
        outputs: what it returned, a flat list.

    Raises:
        KeyError: the operator is not in `CUDA_COSTS`.
    """
    name = operator._schema.name.split("::")[1]
    if name not in CUDA_COSTS:
        raise KeyError(f"{name} has no entry among the CUDA operators of benchmarks/kernel_costs.py")
    found = {argument.name: value for argument, value in zip(operator._schema.arguments, arguments, strict=False)}
    return CUDA_COSTS[name]({**found, **options, **{f"output {index}": out for index, out in enumerate(outputs)}})


def dense_depthwise_conv(batch: int, channels: int, shape: tuple[int, int], kernel: tuple[int, int]) -> int:
    """FLOPs of a dense depthwise convolution, taps outside the image not counted."""

    def pairs(sites: int, taps: int) -> int:
        """Pairs of a coordinate and a tap that reads inside."""
        return sum(max(0, sites - abs(step)) for step in range(-(taps // 2), taps // 2 + 1))

    lines, columns = (pairs(*axis) for axis in zip(shape, kernel, strict=True))
    return 2 * batch * channels * lines * columns


def operator_cost(name: str, arguments: Any, output: Any) -> Cost:
    """The cost of one of torch's own operators: its tensors once each, and the arithmetic of matrix products.

    Args:
        name: such as `torch.mm`.
        arguments, output: its tensors, flat lists; other things in them are ignored.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    results = [value for value in output if isinstance(value, Tensor)]
    kind = name.split(".")[1]
    matrix = 0
    if kind in MATRIX_PRODUCTS:
        left = tensors[1 if kind in ("addmm", "baddbmm") else 0]
        matrix = 2 * results[0].numel() * left.shape[-1]
    vector = 0 if matrix else max((value.numel() for value in (*tensors, *results)), default=0)
    return Cost(size(*tensors, *results), matrix, vector)


MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
