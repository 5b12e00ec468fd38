"""Masks that a user gives, in a file or by a function."""

import numpy as np
import pytest
import torch
from small_runs import logged, train

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.train import checkpoint, masks
from sparsecnx.train.masks import Masks
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe

FUNCTIONS = """
import torch

def dark(images, generator):
    means = images.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((1, 3, 5)).flatten(1)
    return means > means.mean(1, keepdim=True)

def drawn(images, generator):
    return torch.rand(len(images), 4, generator=generator).argsort(1) < 2

def nothing(images, generator):
    return torch.zeros(len(images), 4, dtype=torch.bool)

def broken(images, generator):
    return {}["missing"]

def wrong(images, generator):
    return torch.zeros(len(images), 5)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_masks.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_follows_the_images(photos, tmp_path, functions, monkeypatch):
    seen = []
    of_function = Masks._of_function

    def watched(self, images, generator):
        seen.append((images, of_function(self, images, generator)))
        return seen[-1][1]

    monkeypatch.setattr(masks.Masks, "_of_function", watched)
    assert train(photos, tmp_path / "run", masks="my_masks:dark", epochs=1) == 0
    images, mask = seen[-1]
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32).mean((1, 4, 5)).flatten(1)
    assert torch.equal(mask, patches > patches.mean(1, keepdim=True))


def test_a_run_with_a_function_goes_on_with_the_same_losses_if_it_is_named_again(photos, tmp_path, functions):
    train(photos, tmp_path / "run", masks="my_masks:drawn")
    expected = logged(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-00000008.pt").unlink()
    with pytest.raises(InputError, match="names Python code, my_masks:drawn, which runs only with --masks"):
        train(photos, tmp_path / "run", resume="auto")
    assert train(photos, tmp_path / "run", resume="auto", masks="my_masks:drawn") == 0
    assert logged(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_masks:broken", r"KeyError: 'missing'; expected a function of images"),
        ("my_masks:wrong", r"ValueError: .*; expected a function of images"),
        ("my_masks:absent", r"AttributeError: .* has no attribute 'absent'; expected a function of images"),
        ("masks.npy", r"no such file; expected an array in a .npy file, or module:function"),
    ],
)
def test_what_gives_no_masks_is_refused_before_the_first_step(name, message, photos, tmp_path, functions):
    with pytest.raises(InputError, match=f"masks is {name}: {message}"):
        train(photos, tmp_path / "run", masks=name)
    assert not (tmp_path / "run").exists()


def test_masks_of_a_function_that_hide_nothing_stop_the_run(photos, tmp_path, functions):
    with pytest.raises(
        TrainingStopped, match=r"step 1: masks is my_masks:nothing: mask 0 masks nothing; .*no checkpoint"
    ):
        train(photos, tmp_path / "run", masks="my_masks:nothing")


@pytest.mark.parametrize("shape", [(4,), (2, 2), (3, 4), (3, 2, 2)])
def test_masks_in_a_file_have_the_shapes_of_patches(shape, tmp_path):
    array = np.zeros(shape, np.uint8)
    array[..., 0] = 1
    np.save(tmp_path / "masks.npy", array)
    given = Masks(Recipe(image_size=64, batch_size=2, masks=str(tmp_path / "masks.npy")), Processes())
    drawn = given.draw(torch.zeros(2, 3, 64, 64), 0)
    assert torch.equal(drawn.mask, torch.from_numpy(array.astype(bool)).view(-1, 4)[[0, 0]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 5)), r"an array \(3, 5\) of float64; expected an array \(N, 4\) or \(N, 2 x 2\)"),
        (np.full((3, 4), 2), r"an array \(3, 4\) of int64; expected an array"),
        (np.array([[1, 0, 0, 1], [1, 1, 1, 1]]), "mask 1 masks everything"),
        (np.zeros((1, 4)), "mask 0 masks nothing"),
    ],
)
def test_masks_in_a_file_that_do_not_fit_are_refused(array, message, photos, tmp_path):
    np.save(tmp_path / "masks.npy", array)
    with pytest.raises(InputError, match=rf"masks is .*masks.npy: {message}"):
        train(photos, tmp_path / "run", masks=str(tmp_path / "masks.npy"))
    with pytest.raises(InputError, match=r"mask_ratio is 0.5: expected none, since --masks says what is masked"):
        train(photos, tmp_path / "run", masks=str(tmp_path / "masks.npy"), mask_ratio=0.5)


def test_masks_that_were_replaced_are_noticed(photos, tmp_path):
    np.save(tmp_path / "masks.npy", np.array([1, 0, 0, 1]))
    train(photos, tmp_path / "run", masks=str(tmp_path / "masks.npy"), epochs=1)
    assert checkpoint.read(tmp_path / "run" / "last.pt")["data"]["masks"] is not None
    np.save(tmp_path / "masks.npy", np.array([1, 0, 1, 0]))
    with pytest.raises(InputError, match="other masks than the run was started with"):
        train(photos, tmp_path / "run", resume="auto")
