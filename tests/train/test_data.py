import pickle
from dataclasses import replace

import pytest
import torch

from sparsecnx.common.errors import InputError
from sparsecnx.train.data import augment, crops
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_data
from sparsecnx.train.data.images import ImageSet
from sparsecnx.train.data.loader import load_batches
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.recipe import Recipe

SMALL = Recipe(image_size=64, epochs=2, batch_size=2, seed=5)


def draws(start=0, images=8, **fields):
    source = ImageSet("", tuple(f"{i}.png" for i in range(images)))
    return list(crops.draws(replace(SMALL, **fields), source, start=start))


def test_normalize_is_imagenets():
    images = torch.tensor([0, 255]).to(torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = normalize(images, SMALL).flatten(1)
    torch.testing.assert_close(black, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


def test_an_epoch_shows_every_image_epoch_repeats_times():
    batches = draws(epoch_repeats=3)
    assert len(batches) == 2 * 12
    shown = [draw.image for batch in batches[:12] for draw in batch]
    assert sorted(shown) == sorted(list(range(8)) * 3)


def test_epochs_differ_in_order_and_crops():
    first, second = draws()[:4], draws()[4:]
    assert [d.image for b in first for d in b] != [d.image for b in second for d in b]
    assert len({d.seed for b in first + second for d in b}) == 16
    assert draws(seed=6)[:4] != first


@pytest.mark.parametrize("start", [1, 4, 7])
def test_draws_go_on_where_they_stopped(start):
    assert draws(start=start) == draws()[start:]


def test_a_crop_depends_on_its_draw_alone(photos):
    crops = Crops(find_data(photos), SMALL)
    first, *_ = crops[Draw(2, seed=1)]
    state = torch.get_rng_state()
    other, *_ = crops[Draw(2, seed=2)]
    again, *_ = crops[Draw(2, seed=1)]
    assert first.shape == (3, 64, 64)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def read_all(images, start, workers):
    with load_batches(images, draws(start=start), pin_memory=False, workers=workers) as batches:
        return list(batches)


def test_batches_do_not_depend_on_the_number_of_workers(photos):
    crops = Crops(find_data(photos), SMALL)
    none, two = ([batch.images for batch in read_all(crops, start=1, workers=n)] for n in (0, 2))
    assert len(none) == len(two) == 7
    assert all(torch.equal(a, b) for a, b in zip(none, two, strict=True))


def test_unreadable_files_give_their_place_to_others(photos):
    whole = (photos / "6.png").read_bytes()
    (photos / "3.png").write_bytes(whole[: len(whole) // 2])
    (photos / "cat" / "1.png").write_bytes(b"not an image")
    crops = Crops(find_data(photos), SMALL)
    assert crops.source.names[1:4] == ("3.png", "6.png", "cat/1.png")

    crop, _, unreadable, _ = crops[Draw(1, seed=4)]
    first, *others = crops.source.instead(1, SMALL.seed)
    place = next(other for other in others if other != 3)
    assert first == 1 and torch.equal(crop, crops[Draw(place, seed=4)][0])
    assert next(iter(unreadable)) == "3.png" and "truncated" in unreadable["3.png"]

    batches = read_all(crops, start=0, workers=0)
    assert all(batch.images.shape == (2, 3, 64, 64) for batch in batches)
    assert {name for batch in batches for name in batch.unreadable} == {"3.png", "cat/1.png"}


def test_no_readable_file_at_all(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 2 image files can be read, first a\.jpg"):
        Crops(find_data(tmp_path), SMALL).try_out()


def test_an_input_error_survives_pickling():
    error = pickle.loads(pickle.dumps(InputError("data", "here", "gone")))
    assert (str(error), error.argument, error.problem) == ("data is here: gone", "data", "is here: gone")


SIZES = [(37, 61), (5, 300), (300, 5), (64, 64), (240, 320), (1, 1)]


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_crops_are_those_of_torchvision(size):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="needs a torchvision that fits this torch")
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip()])
    for seed, sides in enumerate(SIZES * 4):
        pixels = torch.randint(256, (3, *sides), dtype=torch.uint8)
        torch.manual_seed(seed)
        expected = theirs(pixels)
        torch.manual_seed(seed)
        (top, left), (height, width) = augment.random_box(sides, size, 0.2, (1, 1))
        crop = augment.resize(pixels[:, top : top + height, left : left + width], size)
        assert torch.equal(crop.flip(augment.mirrored_axes(2)), expected)


def test_the_centre_is_that_of_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="needs a torchvision that fits this torch")
    for sides in SIZES:
        pixels = torch.randint(256, (3, *sides), dtype=torch.uint8)
        resized = v2.functional.resize(pixels, [64], interpolation=v2.InterpolationMode.BICUBIC)
        assert torch.equal(augment.central_crop(pixels, (64, 64)), v2.functional.center_crop(resized, [64]))
    wide = augment.central_crop(torch.arange(96, dtype=torch.uint8).expand(3, 64, 96), (32, 96))
    assert wide.shape == (3, 32, 96) and torch.equal(wide[0, 0], torch.arange(96, dtype=torch.uint8))


def test_values_do_not_spread_into_pixels_that_have_none():
    torch.manual_seed(0)
    pixels = torch.rand(2, 40, 60) + 5
    whole = augment.resize(pixels, (16, 24))
    pixels[0, :20, :30] = torch.nan
    found = augment.resize(pixels, (16, 24))
    torch.testing.assert_close(found[1], whole[1])
    missing = found[0].isnan()
    assert missing[:8, :12].all() and not missing[8:].any() and not missing[:, 12:].any()
    assert found[0][~missing].min() > 4.5 and found[0][~missing].max() < 6.5
    far = torch.ones(16, 24, dtype=torch.bool)
    far[:10, :14] = False  # the filter reaches two pixels
    torch.testing.assert_close(found[0][far], whole[0][far])
    flat = torch.full((1, 40, 60), 300.0).masked_fill(pixels[:1].isnan(), torch.nan)
    torch.testing.assert_close(augment.resize(flat, (100, 100)).nan_to_num(300), torch.full((1, 100, 100), 300.0))
