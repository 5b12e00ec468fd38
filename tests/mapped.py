"""Build kernel maps of random sites, site by site, and run operators on them with all their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from cases import device_of, incoming_gradient
from torch import Tensor

from sparsecnx import ops
from sparsecnx.common.dtypes import statistics_dtype

Tensors = dict[str, Tensor]


def offsets(kernel: tuple[int, ...], dilation: int) -> list[tuple[int, ...]]:
    """Return where the taps read, in raster order: centred at the site for odd sizes, from 0 on for even ones."""
    axes = [[dilation * (tap - size // 2 * (size % 2)) for tap in range(size)] for size in kernel]
    return list(itertools.product(*axes))


def sites(present: Tensor) -> dict[tuple[int, ...], int]:
    """Return the row of each site `(image, *position)` where bool `(B, *spatial)` is True."""
    return {tuple(site): row for row, site in enumerate(present.nonzero().tolist())}


def site_map(present: Tensor, outputs: Tensor, kernel: tuple[int, ...], stride: int, dilation: int) -> Tensor:
    """Return the kernel map, int32 `(rows_out, K)`, from the sites of `present` to those of `outputs`.

    The sites of `outputs` are `stride` times coarser.
    """
    rows = sites(present)
    taps = offsets(kernel, dilation)
    found = [
        [rows.get((image, *(p * stride + d for p, d in zip(place, tap, strict=True))), -1) for tap in taps]
        for image, *place in sites(outputs)
    ]
    return torch.tensor(found, dtype=torch.int32).view(-1, len(taps))


def random_map(rows_in: int, rows_out: int, taps: int, density: float, seed: int = 0) -> Tensor:
    """Return a kernel map of no geometry in which about that share of the entries is present."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(rows_in, rows_out)
    found = torch.stack([torch.randperm(rows, generator=generator)[:rows_out] for _ in range(taps)], 1)
    missing = (found >= rows_in) | (torch.rand(found.shape, generator=generator) >= density)
    return found.masked_fill(missing, -1).int()


def inverse(kernel_map: Tensor, rows_in: int) -> Tensor:
    """Return the `inverse_map`, found entry by entry."""
    found = torch.full((rows_in, kernel_map.shape[1]), -1, dtype=torch.int32)
    for out, tap in (kernel_map >= 0).nonzero().tolist():
        found[kernel_map[out, tap], tap] = out
    return found


def mapped_values(operator: str, kernel_map: Tensor, rows_in: int, channels: int, out: int = 5) -> Tensors:
    """Return features and parameters, float64, that keep the variance."""
    taps = kernel_map.shape[1]
    shape = (taps, channels) if operator == "mapped_depthwise_conv" else (taps, channels, out)
    scale = (taps if operator == "mapped_depthwise_conv" else taps * channels) ** -0.5
    return {
        "features": torch.randn(rows_in, channels, dtype=torch.float64),
        "weight": torch.randn(shape, dtype=torch.float64) * scale,
        "bias": torch.randn(shape[-1], dtype=torch.float64),
    }


def suited(values: Tensors, dtype: torch.dtype, backend: str, operator: str) -> Tensors:
    """Return the same in `dtype`, where the backend takes them; statistics in float32 at least."""
    statistics = ("bias",) if operator == "mapped_depthwise_conv" else ()
    return {
        name: value.to(device_of(backend), statistics_dtype(dtype) if name in statistics else dtype)
        for name, value in values.items()
    }


def run_mapped(operator: str, values: Tensors, kernel_map: Tensor, inverse_map: Tensor | None = None) -> Tensors:
    """Return the output of `ops.<operator>` and the gradients of all values, by name."""
    place = values["features"].device
    inverse_map = None if inverse_map is None else inverse_map.to(place)
    function = getattr(ops, operator)

    def run(features: Tensor, **parameters: Tensor) -> Tensor:
        return function(features, kernel_map=kernel_map.to(place), inverse_map=inverse_map, **parameters)

    return with_gradients(run, values)


def with_gradients(function: Callable[..., Tensor], values: Tensors, **arguments: Any) -> Tensors:
    """Return the output of a function of tensors by name, and their gradients."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    out = function(**leaves, **arguments)
    assert out.dtype == values["features"].dtype
    gradients = torch.autograd.grad(out, list(leaves.values()), incoming_gradient(out.shape).to(out))
    for gradient, leaf in zip(gradients, leaves.values(), strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_mapped_depthwise_conv(backend: str) -> Tensors:
    """Run a small call, forward and backward."""
    kernel_map = random_map(9, 7, 4, 0.6)
    values = mapped_values("mapped_depthwise_conv", kernel_map, 9, 4)
    values = suited(values, torch.float32, backend, "mapped_depthwise_conv")
    return run_mapped("mapped_depthwise_conv", values, kernel_map)
