"""Images that do not fit the others: those of another type, range or size are refused, or skipped and named."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import train

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.train.data import crops as crops_module
from sparsecnx.train.data import source
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_source
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

tifffile = pytest.importorskip("tifffile", reason="needs the extra [train]")
RANDOM = np.random.default_rng(8)
RUN = {"patch_size": 16, "image_size": 32, "epochs": 1}


def write(folder, number=6, dtype=np.uint8, top=200, size=(40, 48), channels=3):
    """Write RGB or bands as TIFF."""
    folder.mkdir(exist_ok=True)
    for i in range(number):
        write_one(folder / f"{i}.tif", RANDOM.uniform(0, top, (*size, channels)).astype(dtype))
    return folder


def write_one(path, values):
    """Write `(H, W, C)` as RGB, or as bands."""
    photometric = "rgb" if values.shape[2] == 3 else "minisblack"
    tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig")


def crops_of(folder, **fields):
    files = find_source(str(folder), fields.get("ndim"))
    return Crops(files, Recipe(**{**files.defaults(fields), **fields}))


def skipped(crops, place):
    """Return why an entry is skipped, None if it is not."""
    return crops[Draw(place, seed=0)].unreadable.get(crops.source.name(place))


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 60_000), ("float32", 1)])
def test_the_numbers_of_imagenet_take_8_bits_alone(dtype, top, tmp_path):
    write(tmp_path / "data", dtype=dtype, top=top)
    problem = f"data is .*: holds 0.tif, which holds values of type {dtype}: expected uint8; --normalize dataset"
    with pytest.raises(InputError, match=problem):
        train(tmp_path / "data", tmp_path / "run", normalize="imagenet", **RUN)
    assert not (tmp_path / "run").exists()


def test_arrays_are_not_normalised_by_the_numbers_of_imagenet(tmp_path, photos):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "0.npy", RANDOM.uniform(0, 1, (3, 40, 48)))
    with pytest.raises(InputError, match="normalize is imagenet: expected another one, since the data are arrays"):
        train(tmp_path / "data", tmp_path / "run", ndim=2, normalize="imagenet", **RUN)
    assert train(photos, tmp_path / "photographs", **RUN) == 0
    with pytest.raises(InputError, match=r"images is .*0.npy: is an array: expected an image file"):
        reconstruct(tmp_path / "photographs" / "last.pt", [tmp_path / "data" / "0.npy"], tmp_path / "grid.png")


@pytest.mark.parametrize("normalize", ["imagenet", "dataset"])
@pytest.mark.parametrize(("dtype", "top"), [("uint16", 250), ("float32", 1)])
def test_another_type_outside_the_sample_is_skipped_and_named(dtype, top, normalize, tmp_path, monkeypatch):
    write(tmp_path / "data")
    write_one(tmp_path / "data" / "3.tif", RANDOM.uniform(0, top, (40, 48, 3)).astype(dtype))
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 2)  # 0 and 3
    (tmp_path / "data" / "3.tif").rename(tmp_path / "data" / "4.tif")
    write_one(tmp_path / "data" / "3.tif", RANDOM.uniform(0, 200, (40, 48, 3)).astype(np.uint8))
    crops = crops_of(tmp_path / "data", normalize=normalize, **RUN)
    assert f"holds values of type {dtype}: expected uint8" in skipped(crops, 4) and skipped(crops, 5) is None
    resumed = Crops(find_source(str(tmp_path / "data")), crops.recipe)
    assert f"holds values of type {dtype}: expected uint8" in skipped(resumed, 4)
    given = {"normalize": "dataset", "value_range": (0.0, 250.0)}  # a range that is given takes all types
    assert skipped(crops_of(tmp_path / "data", **given, **RUN), 4) is None


def test_a_range_holds_for_8_bits_too(tmp_path, monkeypatch):
    write(tmp_path / "data", channels=5, top=100)
    write_one(tmp_path / "data" / "4.tif", RANDOM.uniform(0, 200, (40, 48, 5)).astype(np.uint8))
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 2)
    crops = crops_of(tmp_path / "data", value_range=(0.0, 100.0), **RUN)
    assert "expected 0 to 100, --value-range" in skipped(crops, 4) and skipped(crops, 3) is None


@pytest.mark.parametrize("normalize", ["dataset", "none", "zscore", "percentiles"])
def test_an_image_without_any_value_is_skipped(normalize, tmp_path):
    write(tmp_path / "data", dtype=np.float32, channels=5)
    write_one(tmp_path / "data" / "4.tif", np.full((40, 48, 5), np.nan, np.float32))
    reason = skipped(crops_of(tmp_path / "data", normalize=normalize, **RUN), 4)
    assert re.search("UnsupportedValues: has no values? (in channel 0|anywhere; move it elsewhere)", reason)


def test_an_image_without_a_crop_is_skipped_and_not_shown(tmp_path, monkeypatch):
    write(tmp_path / "data", size=(96, 96))
    write_one(tmp_path / "data" / "4.tif", np.zeros((32, 96, 3), np.uint8))
    given = {**RUN, "image_size": (96, 32), "crop_area": None}
    with pytest.raises(InputError, match=r"holds 4.tif, which is 32 x 96, smaller than the crop of 96 x 32; a smaller"):
        train(tmp_path / "data", tmp_path / "bad", **given)
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 2)
    assert train(tmp_path / "data", tmp_path / "run", **given) == 0
    crops = crops_of(tmp_path / "data", **given)
    assert "UnsupportedImage: is 32 x 96, smaller than the crop of 96 x 32" in skipped(crops, 4)
    with pytest.raises(InputError, match=r"images is .*4.tif: is 32 x 96, smaller than the crop"):
        reconstruct(tmp_path / "run" / "last.pt", [tmp_path / "data" / "4.tif"], tmp_path / "grid.png")


def test_a_lying_photograph_is_as_large_as_the_upright_one(tmp_path):
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[274] = 6  # its width is its height when it is upright
    pixels = RANDOM.integers(0, 256, (32, 96, 3)).astype(np.uint8)
    for i, ending in enumerate(("jpg", "png", "webp")):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.{ending}", exif=exif)
    tifffile.imwrite(tmp_path / "data" / "3.tif", pixels, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    given = {**RUN, "crop_area": None, "batch_size": 2}
    assert train(tmp_path / "data", tmp_path / "run", **{**given, "image_size": (96, 32)}) == 0
    with pytest.raises(InputError, match="which is 96 x 32, smaller than the crop of 32 x 96"):
        train(tmp_path / "data", tmp_path / "bad", **{**given, "image_size": (32, 96)})


def test_a_transform_that_fails_later_ends_the_run_by_its_name(photos, tmp_path, monkeypatch):
    (tmp_path / "failing_transform.py").write_text(
        "def sometimes(crop):\n    if int(crop[0, 0, 0]) % 2:\n        raise KeyError('label')\n    return crop\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for photo in photos.rglob("*.png"):  # the first one, which is tried out, is even
        Image.new("RGB", (80, 80), (2, 2, 2) if photo.name == "0.png" else (3, 3, 3)).save(photo)
    with pytest.raises(TrainingStopped, match=r"step 1: transform is failing_transform:sometimes: KeyError: 'label'"):
        train(photos, tmp_path / "run", transform="failing_transform:sometimes")


def test_the_first_lines_name_what_is_not_read(photos, tmp_path, capsys):
    for name in ("3.png", "cat/1.png", "cat/4.png"):
        (photos / name).write_bytes(b"damaged")
    (photos / "a.jp2").write_bytes(b"no image either")
    (photos / "cat" / "b.HEIC").write_bytes(b"")
    assert train(photos, tmp_path / "run") == 0
    out = capsys.readouterr().out
    told = "files: 8 looked at, 5 uint8 RGB, 3 unreadable, such as 3.png (UnidentifiedImageError: cannot identify"
    assert told in out and "; as 3 channels" in out
    assert "not read: 2 images of other formats, such as a.jp2; .jpg, .jpeg, " in out


def test_the_first_lines_name_arrays_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        np.save(tmp_path / "data" / f"{i}.npy", RANDOM.uniform(0, 1, (3, 40, 48)))
    (tmp_path / "data" / "1.npy").write_bytes(b"damaged")
    assert train(tmp_path / "data", tmp_path / "run", ndim=2, **RUN) == 0
    assert re.search(r"files: 3 looked at, 2 float64, 1 unreadable, such as 1.npy \(\w+: ", capsys.readouterr().out)


def test_the_fingerprint_of_pages_is_of_all_files(tmp_path):
    (tmp_path / "data").mkdir()
    pages = RANDOM.integers(0, 9, (3, 40, 48)).astype(np.uint16)
    for i in range(3):
        tifffile.imwrite(tmp_path / "data" / f"{i}.tif", pages, photometric="minisblack")

    def fingerprint():
        return find_source(str(tmp_path / "data"), pages="images").fingerprint()

    before = fingerprint()
    with open(tmp_path / "data" / "2.tif", "ab") as file:
        file.write(b"\0")
    assert fingerprint().sizes != before.sizes and fingerprint().contents != before.contents


def test_statistics_of_entries_are_kept_while_there_is_room(tmp_path, monkeypatch):
    write(tmp_path / "data", dtype=np.float32)
    monkeypatch.setattr(crops_module, "HELD_SCALES", 2)
    crops = crops_of(tmp_path / "data", normalize="zscore", **RUN)
    first, *_ = crops[Draw(0, seed=0)]
    for place in range(1, 5):
        assert skipped(crops, place) is None
    assert list(crops.scales) == [3, 4] and torch.equal(first, crops[Draw(0, seed=0)][0])
