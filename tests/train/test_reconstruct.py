import os

import pytest
import torch
from PIL import Image
from small_runs import train

from sparsecnx.common.errors import InputError
from sparsecnx.models import FCMAE
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import draw, fill_in, reconstruct


class Oracle(FCMAE):
    """A model that predicts every patch exactly, in the unit of the target."""

    def forward_decoder(self, encoded):
        target = self.patchify(self.truth)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target.mT.unflatten(2, self.grid(self.truth))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_gives_the_image_back(norm_pix_loss):
    model = build_model(Recipe(norm_pix_loss=norm_pix_loss))
    model.__class__ = Oracle
    model.truth = torch.rand(2, 3, 64, 96) - 0.5
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool()
    result = fill_in(model, model.truth, mask)
    assert result.loss == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(result.reconstructed, result.original, atol=1e-5, rtol=0)
    patches = model.patchify(result.masked)
    assert (patches[mask] == 0.5).all()
    assert torch.equal(patches[~mask], model.patchify(result.original)[~mask])


def test_visible_patches_are_the_originals_and_masked_ones_are_not():
    torch.manual_seed(0)
    model = build_model(Recipe())
    images = torch.randn(1, 3, 64, 64) * 0.3
    mask = torch.tensor([[True, False, False, True]])
    result = fill_in(model, images, mask)
    original, reconstructed = model.patchify(result.original), model.patchify(result.reconstructed)
    assert torch.equal(original[~mask], reconstructed[~mask])
    assert ((original[mask] - reconstructed[mask]).abs().amax(dim=1) > 0.05).all()


def test_one_row_of_three_titled_panels_per_image():
    model = build_model(Recipe())
    mask = torch.tensor([[True, False, False, True]]).expand(4, 4)
    figure = draw(fill_in(model, torch.zeros(4, 3, 64, 64), mask), "a title")
    assert len(figure.axes) == 3 * 4
    assert [axes.get_title() for axes in figure.axes[:3]] == ["original", "masked", "reconstruction"]
    assert figure.get_suptitle() == "a title"


def test_a_picture_from_a_run(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=1)
    last, out = tmp_path / "run" / "last.pt", tmp_path / "grid.png"
    one = reconstruct(last, [photos / "3.png"], out)
    with Image.open(out) as picture:
        one_row = picture.size
    reconstruct(last, [], out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width == one_row[0] > 600
        assert picture.height > 4 * one_row[1]
    assert 0 < one < 5
    assert reconstruct(last, [photos / "3.png"], out) == one
    state = torch.load(last)
    torch.save({**state, "recipe": {**state["recipe"], "loss_on": "all"}}, tmp_path / "all.pt")
    assert reconstruct(tmp_path / "all.pt", [photos / "3.png"], out) == one, "the loss is of the masked patches"
    assert reconstruct(last, [photos / "3.png"], out, mask_ratio=0.25) != one


def test_a_photograph_is_drawn_upright(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=1)
    exif = Image.Exif()
    exif[274] = 6  # turned left when it was taken
    with Image.open(photos / "3.png") as upright:
        upright.save(tmp_path / "upright.png")
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    one, other = (
        reconstruct(tmp_path / "run" / "last.pt", [tmp_path / f"{name}.png"], tmp_path / "grid.png")
        for name in ("upright", "lying")
    )
    assert one == other


def test_what_cannot_be_drawn_is_named(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=1)
    last, out = tmp_path / "run" / "last.pt", tmp_path / "grid.png"
    with pytest.raises(InputError, match=r"images is .*missing.png: cannot be read \(FileNotFoundError"):
        reconstruct(last, [tmp_path / "missing.png"], out)
    with pytest.raises(InputError, match=r"checkpoint is .*3.png: "):
        reconstruct(photos / "3.png", [], out)
    with pytest.raises(InputError, match=r"mask_ratio is 1\.5"):
        reconstruct(last, [], out, mask_ratio=1.5)
    with pytest.raises(InputError, match=r"out is .*missing/grid.png: cannot be written"):
        reconstruct(last, [photos / "3.png"], tmp_path / "missing" / "grid.png")
    with pytest.raises(InputError, match=r"out is .*grid.txt: cannot be written"):
        reconstruct(last, [photos / "3.png"], tmp_path / "grid.txt")
    (photos / "deep.ppm").write_bytes(b"P6 2 1 1023\n" + bytes(12))
    with pytest.raises(InputError, match=r"images is .*deep.ppm: has channels of more than 8 bits"):
        reconstruct(last, [photos / "deep.ppm"], out)
    with pytest.raises(InputError, match=r"images is .*3.png: an image beside an array, a.npy; expected one kind"):
        reconstruct(last, [photos / "3.png", "a.npy"], out)
    with pytest.raises(InputError, match=r"images is .*3.png: has 84 x 79 pixels, more than --max-pixels, 5000"):
        reconstruct(last, [photos / "3.png"], out, max_pixels=5000)
    with pytest.raises(InputError, match=r"max_pixels is 99: expected 4096 or more, the pixels of a crop"):
        reconstruct(last, [photos / "3.png"], out, max_pixels=99)
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(InputError, match=r"images is .*fifo.png: is a FIFO; expected a regular file"):
        reconstruct(last, [tmp_path / "fifo.png"], out)
    with pytest.raises(InputError, match=r"out is .*fifo.png: a FIFO; expected a regular file"):
        reconstruct(last, [photos / "3.png"], tmp_path / "fifo.png")
    with pytest.raises(InputError, match=r"seed is 9223372036854775808: expected"):
        reconstruct(last, [], out, seed=2**63)
    last.resolve().write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint is .*last.pt: truncated or damaged"):
        reconstruct(last, [], out)
    assert not out.exists()
