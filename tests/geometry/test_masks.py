"""`random_mask`: how many tiles it keeps, and which."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecnx import random_mask
from sparsecnx.geometry.masks import visible_count


@pytest.mark.parametrize(
    ("cells", "ratio", "kept"),
    [(49, 0.6, 19), (49, 0.0, 49), (196, 0.75, 49), (49, 0.75, 12), (144, 0.6, 57), (1, 0.0, 1), (4, 0.5, 2)],
)
def test_counts(cells: int, ratio: float, kept: int) -> None:
    assert visible_count(cells, ratio) == kept


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 4), st.floats(0, 1, exclude_max=True))
def test_every_image_keeps_exactly_that_many(grid: list[int], batch: int, ratio: float) -> None:
    cells = math.prod(grid)
    kept = int(cells * (1 - ratio))
    if kept == 0:
        with pytest.raises(ValueError, match=rf"it leaves none of the {cells} patches visible"):
            random_mask(batch, tuple(grid), ratio)
        return
    mask = random_mask(batch, tuple(grid), ratio)
    assert mask.shape == (batch, cells) and mask.dtype == torch.bool and mask.device.type == "cpu"
    assert (~mask).sum(dim=1).tolist() == [kept] * batch


def test_default_ratio_is_that_of_the_paper() -> None:
    assert (~random_mask(3, (7, 7))).sum(dim=1).tolist() == [19] * 3


def test_a_generator_makes_masks_reproducible() -> None:
    def draw(seed: int) -> torch.Tensor:
        return random_mask(8, (7, 7), generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(0)
    first, second = (random_mask(8, (7, 7), generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_images_and_positions_are_drawn_independently_and_uniformly() -> None:
    batch, cells, kept = 20_000, 12, 4
    visible = ~random_mask(batch, (3, 4), 0.66, generator=torch.Generator().manual_seed(0))
    share = kept / cells
    deviation = math.sqrt(share * (1 - share) / batch)
    assert (visible.double().mean(dim=0) - share).abs().max() < 4 * deviation
    pairs = visible.double().T @ visible.double() / batch
    both = share * (kept - 1) / (cells - 1)
    off_diagonal = pairs[~torch.eye(cells, dtype=torch.bool)]
    assert (off_diagonal - both).abs().max() < 5 * math.sqrt(both * (1 - both) / batch)
    assert visible.unique(dim=0).shape[0] == math.comb(cells, kept)


def test_device() -> None:
    assert random_mask(2, (3, 3), device="meta").device.type == "meta"
    assert random_mask(2, (3, 3), generator=torch.Generator(), device="cpu").device.type == "cpu"


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_ratio_out_of_bounds(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"ratio is {ratio}: expected 0 <= ratio < 1"):
        random_mask(2, (7, 7), ratio)


def test_ratio_that_leaves_nothing_visible() -> None:
    with pytest.raises(ValueError, match=r"ratio is 0\.99: it leaves none of the 49 patches visible"):
        random_mask(2, (7, 7), 0.99)


@pytest.mark.parametrize("batch", [0, -1])
def test_empty_batch(batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch is {batch}: expected at least one image"):
        random_mask(batch, (7, 7))


@pytest.mark.parametrize("grid", [(), (0,), (7, 0), (7, -7)])
def test_empty_grid(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"grid is \(.*\): expected a positive number of patches per axis"):
        random_mask(2, grid)
    with pytest.raises(TypeError, match=r"grid is 7: expected the patches per axis"):
        random_mask(2, 7)  # type: ignore[arg-type]
