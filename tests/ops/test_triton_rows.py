"""Test the Triton functions that other kernels build on: staircase sums, the statistics of GRN, LayerNorm backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import (
    BOUNDS,
    DEVICE,
    assert_close,
    assert_matches_reference,
    draw_mask,
    make_layout,
    move,
    needs_triton,
    random_sparse,
)
from operators import channel_parameters
from torch import Tensor

from sparsecnx import ops
from sparsecnx.backends import triton_launch
from sparsecnx.ops.global_response_norm.groups import group_splits, row_groups

if triton_launch.available:
    from sparsecnx.ops.global_response_norm import triton_kernels as grn
    from sparsecnx.ops.layer_normalization import triton_kernels as layer_norm

pytestmark = needs_triton

EXACT = BOUNDS[torch.float32]
EPS = 1e-6

# These are the rows of each group. Some groups have no rows, some lie within a block, some cover many.
GROUPS = {
    "one": [37],
    "empty ones": [0, 5, 0, 0, 90, 1, 0],
    "within a block": [1, 2, 1, 3, 1],
    "whole blocks": [16, 32, 16],
    "no rows": [0, 0],
    "many blocks": [700, 0, 2500],
}
EVERY_GROUPING = pytest.mark.parametrize("sizes", GROUPS.values(), ids=list(GROUPS))


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a read of an element that was not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def splits_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)


def staircase(rows: Tensor, sizes: list[int], block_rows: int) -> Tensor:
    """Return partial sums as the kernels leave them, float32 `(blocks + groups, C)`; unfilled slots hold NaN."""
    blocks = -(-len(rows) // block_rows)
    partial = torch.full((blocks + len(sizes), rows.shape[1]), torch.nan)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for block in range(blocks):
        here = slice(block * block_rows, (block + 1) * block_rows)
        for g in group[here].unique().tolist():
            assert partial[block + g].isnan().all()
            partial[block + g] = rows[here][group[here] == g].sum(0)
    return partial.to(DEVICE)


def group_sums(rows: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum(0) for part in rows.split(sizes)])


def statistics(energy: Tensor, gamma: Tensor) -> Tensor:
    """Return 1 + gamma N of the published formula. Channels are silent only in groups without rows."""
    norm = torch.where(energy > 0, energy, 1).sqrt() * (energy > 0)
    return 1 + gamma * norm / (norm.mean(dim=1, keepdim=True) + EPS)


@EVERY_GROUPING
@pytest.mark.parametrize(("block_rows", "channels"), [(16, 40), (16, 3), (5, 33)])
def test_sum_partials(sizes, block_rows, channels):
    rows = torch.rand(sum(sizes), channels, dtype=torch.float64)
    found = grn.sum_partials(staircase(rows, sizes, block_rows), splits_of(sizes), block_rows)
    assert_close(found, group_sums(rows, sizes), EXACT)
    assert (found[torch.tensor(sizes) == 0] == 0).all()


@EVERY_GROUPING
@pytest.mark.parametrize(("block_rows", "channels"), [(16, 40), (5, 33)])
def test_response(sizes, block_rows, channels):
    rows = torch.rand(sum(sizes), channels, dtype=torch.float64)
    gamma = torch.randn(channels)
    partial, splits = staircase(rows, sizes, block_rows), splits_of(sizes)
    energy, scale = grn.response(partial, splits, block_rows, gamma.to(DEVICE), EPS)
    assert_close(energy, group_sums(rows, sizes), EXACT)
    assert_close(scale, statistics(group_sums(rows, sizes), gamma.double()), EXACT)
    assert (scale[torch.tensor(sizes) == 0] == 1).all()


@EVERY_GROUPING
@pytest.mark.parametrize(("block_rows", "channels"), [(16, 40), (5, 33)])
def test_response_backward(sizes, block_rows, channels):
    rows = torch.randn(sum(sizes), channels, dtype=torch.float64)  # gradients of the scale, row by row
    energy = group_sums(torch.rand_like(rows), sizes).float().double().requires_grad_()
    gamma = torch.randn(channels).double().requires_grad_()
    scale = statistics(energy, gamma)
    expected = (*torch.autograd.grad(scale, [gamma, energy], group_sums(rows, sizes)), scale.detach())
    found = grn.response_backward(
        staircase(rows, sizes, block_rows),
        splits_of(sizes),
        block_rows,
        energy.detach().float().to(DEVICE),
        gamma.detach().float().to(DEVICE),
        EPS,
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, EXACT)


def test_more_channels_than_a_program_holds_at_once():
    """There are the 4C channels of the last stage of ConvNeXt V2 Huge, with a silent one in every block."""
    sizes, channels = [3, 0, 2], 11264
    assert channels > 2 * grn.FINALISER_VALUES
    rows = torch.rand(5, channels, dtype=torch.float64)
    rows[:, ::1000] = 0
    gamma = torch.randn(channels, dtype=torch.float64).float()
    partial, splits = staircase(rows, sizes, 2), splits_of(sizes)
    energy, scale = grn.response(partial, splits, 2, gamma.to(DEVICE), EPS)
    assert_close(scale, statistics(group_sums(rows, sizes), gamma.double()), EXACT)
    sums = torch.randn(5, channels, dtype=torch.float64)
    exact = energy.cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(statistics(exact, gamma.double()), exact, group_sums(sums, sizes))
    _, grad_energy, _ = grn.response_backward(staircase(sums, sizes, 2), splits, 2, energy, gamma.to(DEVICE), EPS)
    silent = energy.cpu() == 0
    assert_close(grad_energy.cpu()[~silent], expected[~silent], EXACT)
    assert (grad_energy.cpu()[silent] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_group_that_is_not_finite_leaves_the_others_alone(bad):
    sizes, gamma = [20, 40, 20], torch.randn(8, device=DEVICE)
    rows = torch.rand(80, 8, dtype=torch.float64)
    spoilt = rows.index_put((torch.tensor(30), torch.tensor(2)), torch.tensor(bad).double())
    splits, others = splits_of(sizes), torch.tensor([0, 2])
    found = []
    for values in (rows, spoilt):
        partial = staircase(values, sizes, 16)
        energy, scale = grn.response(partial, splits, 16, gamma, EPS)
        _, grad_energy, _ = grn.response_backward(partial, splits, 16, energy, gamma, EPS)
        found.append((energy, scale, grad_energy))
    for clean, other in zip(*found, strict=True):
        assert not other[1].isfinite().all()
        assert torch.equal(other.cpu()[others], clean.cpu()[others])


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_row_groups(scope):
    x = move(random_sparse(make_layout(draw_mask("an empty and a full image", 3, (3, 2), seed=2), 2), 1), DEVICE)
    found, sizes = row_groups(x.layout, scope), group_splits(x.layout, scope).diff()
    assert found.dtype == torch.int32
    assert torch.equal(found, torch.arange(len(sizes), device=DEVICE).repeat_interleave(sizes).int())
    assert row_groups(x.layout, scope) is found


@pytest.mark.parametrize("operator", ["grn", "layer_norm"])
@pytest.mark.parametrize("kind", ["random counts", "an empty and a full image", "none visible"])
@pytest.mark.parametrize("channels", [3, 40, 130])
def test_nothing_is_read_that_was_not_written(operator, kind, channels):
    """Some blocks are not full, several images share some blocks, and some images cover several blocks."""
    x = random_sparse(make_layout(draw_mask(kind, 3, (3, 2), seed=1), 5), channels)
    names = ("gamma", "beta") if operator == "grn" else ("weight", "bias")
    run, p = getattr(ops, operator), channel_parameters(channels, *names)
    assert_matches_reference(run, x, p, torch.float32, statistics=names, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(1, 96), (37, 20), (70, 40), (5, 130), (3, 2816), (0, 8)])
def test_normalised_backward(rows, channels, dtype):
    """It is the gradient of layer normalization without scale and shift, from its result."""
    x = (2 + 3 * torch.randn(rows, channels, dtype=torch.float64)).requires_grad_()
    rstd = ((x - x.mean(1, keepdim=True)).square().mean(1) + EPS).rsqrt().detach()
    out = torch.nn.functional.layer_norm(x, (channels,), eps=EPS)
    grad = (1 + torch.randn(rows, channels, dtype=torch.float64)).to(dtype)
    (expected,) = torch.autograd.grad(out, x, grad.double())
    found = layer_norm.normalised_backward(
        grad.to(DEVICE), out.detach().to(DEVICE, dtype), rstd.to(DEVICE, torch.float32)
    )
    assert found.dtype == dtype
    assert_close(found, expected, BOUNDS[dtype])
