"""`from_dense` reads every form of mask that people hold, and refuses what could mean two things."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import draw_mask, needs_gpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsecnx
from sparsecnx import SparseTensor, use_backend
from sparsecnx.geometry.mask_reading import read_mask
from sparsecnx.models import create_fcmae

MASK = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]]).bool().view(2, 2, 3)
IMAGES = torch.arange(2 * 8 * 12.0).view(2, 1, 8, 12)  # tiles of 4x4


def pixels(mask: Tensor, *sides: int) -> Tensor:
    for axis, side in enumerate(sides):
        mask = mask.repeat_interleave(side, axis - len(sides))
    return mask


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "(B, L)": lambda mask: mask.flatten(1),
    "(B, *grid)": lambda mask: mask,
    "(B, 1, *grid)": lambda mask: mask[:, None],
    "(B, H, W)": lambda mask: pixels(mask, 4, 4),
    "(B, 1, H, W)": lambda mask: pixels(mask, 4, 4)[:, None],
}
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_form_dtype_and_polarity(form: str, dtype: torch.dtype) -> None:
    expected = SparseTensor.from_dense(IMAGES, MASK)
    assert (expected.layout.tile, expected.layout.tiles.grid) == ((4, 4), (2, 3))
    given_mask = FORMS[form](MASK).to(dtype)
    for found in (
        sparsecnx.sparse(IMAGES, given_mask),
        sparsecnx.sparse(IMAGES, given_mask, ones="masked"),
        sparsecnx.sparse(IMAGES, ~given_mask if dtype == torch.bool else 1 - given_mask, ones="visible"),
    ):
        assert found.layout.difference(expected.layout) is None and torch.equal(found.features, expected.features)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6), (1, 2, 3), (1, 1, 2, 3), (8, 12), (1, 8, 12)], ids=str)
def test_one_mask_for_all_images(shape: tuple[int, ...]) -> None:
    one = MASK[0] if shape[-1] != 12 else pixels(MASK[0], 4, 4)
    images = IMAGES[:1].repeat(5, 1, 1, 1)
    expected = SparseTensor.from_dense(images, MASK[:1].expand(5, 2, 3))
    found = SparseTensor.from_dense(images, one.reshape(shape))
    assert found.layout.difference(expected.layout) is None and torch.equal(found.features, expected.features)


@given(st.data(), st.integers(1, 3))
def test_tiles_that_are_not_square_and_sites_that_are_tiles(data: st.DataObject, ndim: int) -> None:
    grid = data.draw(st.tuples(*[st.integers(1, 4)] * ndim))
    tile = data.draw(st.tuples(*[st.sampled_from([1, 2, 3, 4])] * ndim))
    mask = draw_mask("random counts", 2, grid, data.draw(st.integers(0, 99)))
    images = torch.randn(2, 3, *(cells * side for cells, side in zip(grid, tile, strict=True)))
    x = SparseTensor.from_dense(images, mask[:, None])
    merged = grid == tuple(images.shape[2:])  # A mask of single sites may consist of tiles by chance.
    assert merged or (x.layout.tile == tile and x.layout.tiles.grid == grid)
    y = SparseTensor.from_dense(images, pixels(mask, *tile))
    kept = images.masked_fill(pixels(mask, *tile)[:, None], 0)
    assert torch.equal(y.dense(), kept) and torch.equal(x.dense(), kept)


def test_the_largest_tile_of_sites() -> None:
    images = torch.zeros(2, 1, 24, 16)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0]]).bool().view(2, 3, 2)
    assert SparseTensor.from_dense(images, pixels(mask, 8, 8)).layout.tile == (8, 8)
    narrow = torch.cat([mask, ~mask.roll(1, 1)], dim=2)
    assert SparseTensor.from_dense(images, pixels(narrow, 8, 4)).layout.tile == (4, 4)
    rows_of_pixels = torch.arange(24).remainder(5).eq(0)[:, None].expand(24, 16)
    assert SparseTensor.from_dense(images, rows_of_pixels).layout.tile == (1, 16)
    one_pixel = pixels(mask, 8, 8).clone()
    one_pixel[1, 23, 15] = ~one_pixel[1, 23, 15]
    assert SparseTensor.from_dense(images, one_pixel).layout.tile == (1, 1)
    # What is known says that nothing is read.
    x = SparseTensor.from_dense(images, pixels(mask, 8, 8), count=6 * 64)
    assert x.layout.tile == (1, 1) and x.layout.tiles.count == 6 * 64


IMAGES_7 = torch.zeros(7, 3, 224, 224)
AMBIGUOUS = [
    (
        IMAGES_7,
        torch.zeros(7, 7),
        "mask is (7, 7), which can be 7 tiles in raster order, one for each of 7 images, or a grid of 7x7 tiles, one "
        "for all images: give it as (B, *grid), for example mask.view(7, 1, 7) or mask.view(7, 7, 1) or "
        "mask.view(1, 7, 7)",
    ),
    (
        torch.zeros(2, 1, 12, 12),
        torch.zeros(2, 12),
        "mask is (2, 12), which can be 12 tiles in raster order, one for each of 2 images, or a grid of 2x12 tiles, "
        "one for all images: give it as (B, *grid), for example mask.view(2, 3, 4) or mask.view(2, 4, 3) or "
        "mask.view(1, 2, 12)",
    ),
    (
        torch.zeros(16, 1, 64, 64),
        torch.zeros(16, 16),
        "mask is (16, 16), which can be 16 tiles in raster order, one for each of 16 images, or a grid of 16x16 tiles, "
        "one for all images: give it as (B, *grid), for example mask.view(16, 4, 4) or mask.view(1, 16, 16)",
    ),
    (
        torch.zeros(4, 1, 8, 8, 8),
        torch.zeros(4, 2, 2),
        "mask is (4, 2, 2), which can be a grid of 4x2x2 tiles, one for all images, or a grid of 2x2 tiles for each of "
        "4 images, an axis short for 8x8x8 sites: give it as (B, *grid), for example mask[None] or mask[:, None]",
    ),
    (
        torch.zeros(2, 1, 8, 6),
        torch.zeros(2, 8),
        "mask is (2, 8): its tiles can be a grid of 4x2 or 8x1, on 8x6 sites none of them square; give the mask "
        "as (B, *grid)",
    ),
    (
        torch.zeros(4, 3, 32, 32),
        torch.zeros(4, 16, 1, dtype=torch.bool),
        "mask is (4, 16, 1), which can be a grid of 16x1 tiles, one for each of 4 images, or 16 tiles in raster order, "
        "one for each of 4 images: give it as (B, *grid), for example mask.view(4, 1, 16, 1) or mask.view(4, 1, 4, 4)",
    ),
]


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    AMBIGUOUS,
    ids=[
        "B or one grid",
        "B or one grid of several",
        "both square",
        "an axis short",
        "two grids",
        "a mask of MAE with an axis more",
    ],
)
def test_two_meanings_are_an_error_that_shows_both(images: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseTensor.from_dense(images, mask)


def test_masks_of_mae_are_read_as_ever() -> None:
    """(B, L) on square tiles is not taken for a grid of tiles that are not square, whatever the batch."""
    for batch in (4, 8):
        x = SparseTensor.from_dense(torch.zeros(batch, 1, 64, 64), torch.zeros(batch, 64))
        assert (x.layout.batch, x.layout.tile) == (batch, (8, 8))
    assert SparseTensor.from_dense(IMAGES_7, torch.zeros(7, 49)).layout.tile == (32, 32)
    # One grid that divides the image is the only meaning of this one.
    assert SparseTensor.from_dense(torch.zeros(2, 1, 8, 12), torch.zeros(2, 6)).layout.tiles.grid == (2, 3)


@pytest.mark.parametrize(
    ("mask", "ones", "error", "message"),
    [
        (MASK.float() * 0.5, "masked", ValueError, "mask has the values 0.5: expected 0 and 1; give a threshold"),
        (MASK.float().masked_fill(MASK, torch.nan), "masked", ValueError, "mask has the values nan: expected"),
        (MASK.float() * torch.arange(12.0).view(2, 2, 3), "masked", ValueError, "mask has the values 2, 3, 5, ...: "),
        (MASK.int() - 1, "visible", ValueError, "mask has the values -1: expected 0 and 1"),
        (MASK.to(torch.complex64), "masked", TypeError, "mask is torch.complex64 (2, 2, 3): expected a tensor (B, L)"),
        (
            MASK.float().requires_grad_(),
            "masked",
            ValueError,
            "mask requires grad, and would get none: pass mask.detach",
        ),
        (MASK.tolist(), "masked", TypeError, "mask is a list: expected a tensor (B, L) or (B, *grid) of bool"),
        (MASK, "kept", ValueError, "ones is 'kept': expected one of ('masked', 'visible')"),
        (MASK.to("meta"), "masked", ValueError, "mask is on meta, dense on cpu: pass mask.to(dense.device)"),
        (MASK[:, :, :2], "masked", ValueError, "mask is (2, 2, 2): no grid of tiles with that many cells divides"),
        (torch.zeros(3, 6), "masked", ValueError, "mask is (3, 6): dense holds 2 images"),
        (torch.zeros(3, 1, 2, 3), "masked", ValueError, "mask is (3, 1, 2, 3): dense holds 2 images"),
        (torch.zeros(2, 2, 2, 3), "masked", ValueError, "mask is (2, 2, 2, 3): no grid of tiles"),
        (torch.zeros(()), "masked", ValueError, "mask is (): expected (B, L), (B, g, g) or (B, 1, g, g), with 1 or"),
        (torch.zeros(2, 0), "masked", ValueError, "mask is (2, 0): no grid of tiles"),
    ],
)
def test_masks_that_mean_nothing(mask: Tensor, ones: str, error: type[Exception], message: str) -> None:
    images = torch.zeros(2, 1, 8, 9) if message.endswith("divides") else IMAGES
    with pytest.raises(error, match=re.escape(message)):
        SparseTensor.from_dense(images, mask, ones=ones)


def test_everything_may_be_masked() -> None:
    x = SparseTensor.from_dense(IMAGES, torch.ones(2, 6))
    assert x.layout.rows == 0 and torch.equal(x.dense(), torch.zeros_like(IMAGES))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_compile_and_batch(dtype: torch.dtype) -> None:
    mask = torch.stack([MASK[0], MASK[0].roll(1, 1)])

    def run(images: Tensor, mask: Tensor) -> Tensor:
        return SparseTensor.from_dense(images, mask[:, None], visible=2, ones="masked").features

    expected = run(IMAGES, mask)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IMAGES, mask.to(dtype)), expected)
    if dtype != torch.bool:
        with pytest.raises(ValueError, match="mask has the values 2"):
            compiled(IMAGES, 2 * mask.to(dtype))
        with pytest.raises(ValueError, match="mask has the values 2"):
            torch.vmap(run)(torch.stack([IMAGES] * 3), torch.stack([mask, 2 * mask, mask]).to(dtype))
    batched = torch.stack([mask, mask.roll(1, 0), mask.roll(1, 1)])
    found = torch.vmap(run, in_dims=(None, 0))(IMAGES, batched.to(dtype))
    for sample, alone in zip(found, batched, strict=True):
        assert torch.equal(sample, run(IMAGES, alone))


def test_masks_of_tiles_that_are_not_square_compile_for_any_size() -> None:
    def run(images: Tensor, mask: Tensor) -> Tensor:
        return SparseTensor.from_dense(images, mask, visible=4).features

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    mask = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]])
    for shape in ((9, 4), (8, 15)):
        images = torch.randn(2, 3, *shape)
        assert torch.equal(compiled(images, mask), run(images, mask))


@needs_gpu
def test_a_gpu_reads_masks_of_pixels_only_where_nothing_is_known() -> None:
    images, mask = IMAGES.cuda(), pixels(MASK, 4, 4).float().cuda()
    assert SparseTensor.from_dense(images, mask).layout.tile == (4, 4)
    assert SparseTensor.from_dense(images, mask, count=5 * 16).layout.tile == (1, 1)


def test_masked_autoencoders_take_the_same_masks() -> None:
    model = create_fcmae("atto", decoder_depth=1, decoder_dim=8).eval()
    images, mask = torch.randn(2, 3, 64, 96), MASK
    with use_backend("auto"), torch.no_grad():
        loss, _, flat = model(images, mask=mask.flatten(1))
        for given_mask in (mask[:, None].float(), mask.long(), pixels(mask, 32, 32), pixels(mask, 32, 32)[:, None]):
            found, _, returned = model(images, mask=given_mask)
            assert found == loss and torch.equal(returned, flat) and returned.dtype == torch.bool
        assert torch.equal(model(images, mask=mask[0])[2], mask[:1].flatten(1).expand(2, 6))
    for wrong, message in [
        (
            pixels(mask, 32, 32).roll(1, 1),
            "mask is (2, 64, 96): expected one value all over each of its tiles of 32x32 sites",
        ),
        (mask[:, :1], "mask is (2, 1, 3): a 2x3 grid needs (2, 6) or (2, 2, 3), or one of these for all images"),
        (mask.repeat(2, 1, 1)[:3], "mask is (3, 2, 3): images holds 2 images"),
        (mask.float() - 0.5, "mask has the values -0.5, 0.5"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            model(images, mask=wrong)


def test_read_mask_takes_the_batch_of_the_mask_where_none_is_given() -> None:
    assert torch.equal(read_mask(MASK.flatten(1).float(), (8, 12)), MASK)
    assert torch.equal(read_mask(MASK[0].flatten(), (8, 12)), MASK[:1])
