"""Runs on images of any channels, depth and range, and what is refused before the first step."""

import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import logged, train

from sparsecnx.cli import main
from sparsecnx.common.errors import InputError
from sparsecnx.train import contents
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.data import source
from sparsecnx.train.data.crops import Batch, Crops, Draw
from sparsecnx.train.data.find import find_data, find_source
from sparsecnx.train.data.scale import values_in
from sparsecnx.train.log import RunLog
from sparsecnx.train.options import Options
from sparsecnx.train.pretraining import Pretraining
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

tifffile = pytest.importorskip("tifffile", reason="needs the extra [train]")
RUN = {"patch_size": 16, "image_size": 32, "epochs": 1}


def smooth(number, channels=5, height=50, width=60, top=10_000.0):
    coarse = torch.rand(1, channels, 5, 6, generator=torch.Generator().manual_seed(number))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].mul(top).numpy()


def write(folder, number=6, dtype=np.uint16, change=lambda array, i: array, **options):
    """Write images of bands `(C, H, W)` as interleaved TIFF, and return them."""
    folder.mkdir(exist_ok=True)
    images = [change(smooth(i, **options).astype(dtype), i) for i in range(number)]
    for i, image in enumerate(images):
        write_one(folder / f"{i}.tif", image)
    return images


def write_one(path, image):
    tifffile.imwrite(path, image.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")


def recipe_of(run):
    return contents.load(run / "last.pt").recipe


def test_bands_of_16_bits(tmp_path, capsys, monkeypatch):
    images = write(tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "whole", **RUN | {"epochs": 2}) == 0
    out = capsys.readouterr().out
    assert (
        "6 images of 2 dimensions and 5 channels, normalised by dataset, crops of 32x32 in patches of 16x16, from"
        in out
    )
    assert "files: 6 looked at, 6 uint16 5 bands; as 5 channels, upright as their EXIF data say" in out
    assert "values from 0 to 65535 (known), mean 0.0" in out and " ... (measured), standard deviation 0.0" in out
    recipe = recipe_of(tmp_path / "whole")
    stack = np.concatenate([image.reshape(5, -1) for image in images], 1) / 65535
    assert (recipe.in_chans, recipe.normalize, recipe.value_range) == (5, "dataset", (0, 65535))
    np.testing.assert_allclose(recipe.mean, stack.mean(1), rtol=1e-6)
    np.testing.assert_allclose(recipe.std, stack.std(1), rtol=1e-6)

    def stop(log, record):
        RunLog_write(log, record)
        if record.step == 2:
            signal.raise_signal(signal.SIGTERM)

    RunLog_write = RunLog.write  # noqa: N806
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", stop)
        assert train(tmp_path / "data", tmp_path / "parts", **RUN | {"epochs": 2}) == 143
    assert train(None, tmp_path / "parts", resume="auto", workers=1) == 0
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    with pytest.raises(InputError, match="in_chans is 4: the run to resume has 5"):
        train(None, tmp_path / "parts", resume="newest", in_chans=4)

    out = tmp_path / "grid.png"
    last = tmp_path / "whole" / "last.pt"
    assert 0 < reconstruct(last, [tmp_path / "data" / "0.tif"], out) < 5
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=2) > 20).any()  # the first three bands in colour
    reconstruct(last, [], out, channels=[4])
    with pytest.raises(InputError, match=r"channels is \(0, 7, 1\): expected one or, of images, three of 0 to 4"):
        reconstruct(last, [], out, channels=(0, 7, 1))


def batch(folder, **fields):
    """Return the recipe of a run on a folder, and its first crops, normalised."""
    from sparsecnx.train.data.scale import normalize

    files = find_source(str(folder), fields.get("ndim"), pages=fields.get("pages"))
    recipe = Recipe(**{**files.defaults(fields), **fields})
    crops = Crops(files, recipe)
    images = torch.stack([crops[Draw(i, seed=i)][0] for i in range(len(files))])
    return recipe, images, normalize(images, recipe)


def test_a_range_that_is_given_scales_and_is_enforced(tmp_path, monkeypatch):
    write(tmp_path / "data", change=lambda array, i: array + 200)
    given = {
        **RUN,
        "value_range": (100.0, 10_300.0),
        "mean": (0.5,),
        "std": (0.25, 0.25, 0.25, 0.25, 0.5),
        "crop_area": None,
    }
    recipe, images, normalized = batch(tmp_path / "data", **given)
    expected = (images.double() - 100) / 10_200
    expected = (expected - 0.5) / torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5]).double().view(5, 1, 1)
    torch.testing.assert_close(normalized.double(), expected, atol=1e-5, rtol=0)
    assert train(tmp_path / "data", tmp_path / "run", **given) == 0
    assert train(None, tmp_path / "run", resume="newest", mean=0.5, value_range=(100, 10_300)) == 0
    with pytest.raises(InputError, match=r"0.tif, which holds values from .*: expected 0 to 900, --value-range"):
        train(tmp_path / "data", tmp_path / "bad", **{**given, "value_range": (0.0, 900.0)})

    write_one(tmp_path / "data" / "3.tif", np.full((5, 50, 60), 20_000, np.uint16))
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 1)
    files = find_data(tmp_path / "data")
    crop, _, unreadable, _ = Crops(files, recipe)[Draw(3, seed=0)]
    assert unreadable.keys() == {"3.tif"} and "from 20000 to 20000: expected 100 to 10300" in unreadable["3.tif"]
    assert torch.equal(crop, Crops(files, recipe)[Draw(4, seed=0)][0])


def test_the_first_lines_say_what_values_the_sample_has(tmp_path, capsys):
    images = write(tmp_path / "data", dtype=np.float32, change=lambda array, i: np.where(array > 9000, np.nan, array))
    assert train(tmp_path / "data", tmp_path / "run", **RUN) == 0
    low, high = np.nanmin(images), np.nanmax(images)
    holed = [f"{i}.tif" for i, image in enumerate(images) if np.isnan(image).any()]
    out = capsys.readouterr().out
    assert f"no value: NaN, in {len(holed)} of 6 images looked into, such as {holed[0]}" in out
    assert f"values from {low:g} to {high:g} in the sample, in the units of the files, mean" in out
    seen = contents.load(tmp_path / "run" / "last.pt").data.seen
    assert seen == [(np.nanmin(one), np.nanmax(one)) for one in np.stack(images, 1)]
    assert train(None, tmp_path / "run", resume="newest") == 0
    assert f"values from {low:g} to {high:g} in the sample, in the units of the files, mean" in capsys.readouterr().out


def test_values_far_beyond_those_of_the_sample_are_named_and_not_refused(tmp_path, capsys, monkeypatch):
    images = write(tmp_path / "data", dtype=np.float32, change=lambda array, i: array * (1, 1.5, -90)[min(i, 2)])
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 1)
    low, high = images[0][0].min(), images[0][0].max()
    sample = rf"in channel 0, the sample {low:g} to {high:g}"
    told = rf"unusual values in image (\d).tif \(holds -\S+ to \S+ {sample}: other units, or"
    for of_run in ({"data": tmp_path / "data", **RUN}, {"data": None, "resume": "newest", "options": {"extend": 1}}):
        assert train(output=tmp_path / "run", **of_run) == 0
        out = capsys.readouterr().out
        assert sorted(re.findall(told, out)) == ["2", "3", "4", "5"] and "skipped" not in out
    assert train(tmp_path / "data", tmp_path / "given", value_range=(-1e6, 2e4), **RUN) == 0
    assert "unusual" not in capsys.readouterr().out


def test_a_measured_range_only_scales(tmp_path, monkeypatch):
    images = write(tmp_path / "data", dtype=np.float32, top=3.0, change=lambda array, i: array * (-9) ** (i == 5))
    monkeypatch.setattr(source, "SAMPLED_ENTRIES", 1)
    recipe, crops, normalized = batch(tmp_path / "data", **RUN)
    assert recipe.value_range is None and recipe.mean == pytest.approx(images[0].mean((1, 2)).tolist(), rel=1e-5)
    assert crops[5].min() < -5 and torch.isfinite(normalized).all()
    monkeypatch.undo()
    recipe, crops, normalized = batch(tmp_path / "data", **RUN, mean=(2.0,), std=(3.0,))
    torch.testing.assert_close(normalized, (crops - 2) / 3)


def test_values_of_photographs_do_not_change(photos):
    files = find_data(photos)
    assert files.defaults({}) == {} and files.defaults({"normalize": "imagenet", "in_chans": 3}) == {}
    grey = files.defaults({"in_chans": 1})
    assert (grey["normalize"], grey["value_range"], len(grey["mean"])) == ("dataset", (0, 255), 1)
    recipe, images, _ = batch(photos, in_chans=1, image_size=64)
    assert images.dtype == torch.uint8 and images.shape == (8, 1, 64, 64)
    with Image.open(photos / "0.png") as image:
        whole = np.asarray(image.convert("L"))
    assert np.array_equal(Crops(files, recipe).whole(0).pixels.values[0].numpy(), whole)


@pytest.mark.parametrize("normalize", ["zscore", "percentiles", "none"])
def test_images_normalised_one_by_one(normalize, tmp_path):
    images = write(tmp_path / "data", dtype=np.float32)
    recipe, crops, normalized = batch(tmp_path / "data", **RUN, normalize=normalize, crop_area=None)
    assert recipe.mean is None and torch.equal(crops, normalized)
    image = images[2].astype(np.float64)
    if normalize == "zscore":
        image = (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)
    if normalize == "percentiles":
        low, high = np.percentile(image, (0.5, 99.5), axis=(1, 2), keepdims=True)
        image = np.clip((image - low) / (high - low), 0, 1)
    boxes = (image[:, i : i + 32, j : j + 32] for i in range(19) for j in range(29))
    found = [b for box in boxes for b in (box, box[:, :, ::-1]) if np.allclose(b, normalized[2], rtol=1e-4, atol=1e-4)]
    assert len(found) == 1  # a box of the image, mirrored or not, and not resized


def test_bands_and_types_that_differ(tmp_path):
    write(tmp_path / "data", number=2)
    write_one(tmp_path / "data" / "9.tif", smooth(9, 4).astype(np.uint16))
    with pytest.raises(
        InputError, match=r"data is .*: holds 0.tif of 5 channels and 9.tif of 4; expected the same in all"
    ):
        train(tmp_path / "data", tmp_path / "run", **RUN)
    with pytest.raises(InputError, match=r"data is .*: holds 9.tif, which has 4 channels: expected 5"):
        train(tmp_path / "data", tmp_path / "run", in_chans=5, **RUN)
    write_one(tmp_path / "data" / "9.tif", smooth(9).astype(np.float32))
    with pytest.raises(
        InputError, match="holds values of the types float32 and uint16; expected one type, or --value-r"
    ):
        train(tmp_path / "data", tmp_path / "run", **RUN)
    assert train(tmp_path / "data", tmp_path / "run", value_range=(0.0, 10_000.0), **RUN) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mean": (1200.0,)},
            r"mean is \(1200.0,\): expected 0 to 1, the share of the value range from 0 to 65535; where",
        ),
        ({"mean": (0.1, 0.2)}, r"mean is \(0.1, 0.2\): expected one finite number, or one for each of 5 channels"),
        ({"std": (0.0,)}, r"std is \(0.0,\): expected more than 0"),
        ({"value_range": (5.0, 5.0)}, r"value_range is \(5.0, 5.0\): expected two finite numbers, the lower one first"),
        ({"mean": (0.5,), "normalize": "zscore"}, r"mean is \(0.5,\): expected none, since normalize is zscore"),
        ({"mean": ("a",)}, r"mean is \('a',\): expected numbers, such as"),
        ({"nodata": float("inf")}, "nodata is inf: expected a finite number"),
        ({"pages": "both"}, "pages is both: expected one of channels, images"),
        ({"normalize": "imagenet"}, "normalize is imagenet: expected one of dataset, zscore, .* no photographs"),
        (
            {"crop_area": None, "image_size": 64},
            "0.tif, which is 50 x 60, smaller than the crop of 64 x 64; .*--crop-area",
        ),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message, tmp_path):
    write(tmp_path / "data", number=2)
    with pytest.raises(InputError, match=message):
        train(tmp_path / "data", tmp_path / "run", **{**RUN, **fields})
    assert not (tmp_path / "run").exists()


def test_a_channel_without_values_is_named(tmp_path):
    def flatten(array, i):
        array[3] = 7
        return array

    write(tmp_path / "data", number=2, change=flatten)
    with pytest.raises(InputError, match="channel 3 is constant in the sample, 7; expected others, or --std"):
        train(tmp_path / "data", tmp_path / "run", **RUN)
    assert train(tmp_path / "data", tmp_path / "run", std=(1.0,), **RUN) == 0
    with pytest.raises(InputError, match="channel 3 has no values in the sample"):
        train(tmp_path / "data", tmp_path / "empty", nodata=7.0, **RUN)


def test_pages_as_channels_and_as_images(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        tifffile.imwrite(tmp_path / "data" / f"{i}.tif", smooth(i, 4).astype(np.uint16), photometric="minisblack")
    with pytest.raises(
        InputError, match=r"holds 0.tif, which has 4 pages or frames: .* --pages channels or --pages im"
    ):
        train(tmp_path / "data", tmp_path / "run", **RUN)
    assert train(tmp_path / "data", tmp_path / "channels", pages="channels", **RUN) == 0
    assert recipe_of(tmp_path / "channels").in_chans == 4
    assert train(tmp_path / "data", tmp_path / "images", pages="images", **RUN) == 0
    assert "12 images of 2 dimensions and 1 channel" in capsys.readouterr().out
    assert train(None, tmp_path / "images", resume="newest") == 0
    files = find_source(str(tmp_path / "data"), pages="images")
    assert files.name(5) == "1.tif page 2"
    found = Crops(files, recipe_of(tmp_path / "images")).whole(5).pixels.values
    assert np.array_equal(found[0].numpy(), smooth(1, 4).astype(np.uint16)[1])


def test_images_smaller_than_the_crop_are_enlarged(tmp_path, capsys):
    write(tmp_path / "data", number=3)
    assert train(tmp_path / "data", tmp_path / "run", **RUN | {"image_size": (64, 96)}) == 0
    assert "3 of them are smaller than the crop and are enlarged" in capsys.readouterr().out


def test_transforms_of_torchvision(photos, tmp_path, monkeypatch):
    pytest.importorskip("torchvision.transforms.v2", reason="needs a torchvision that fits this torch")
    (tmp_path / "my_v2.py").write_text(
        "import torch\nfrom torchvision.transforms import v2\n"
        "jitter = v2.Compose([v2.ColorJitter(0.5, 0.5), v2.RandomVerticalFlip()])\n"
        "scaled = v2.ToDtype(torch.float32, scale=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, images, _ = batch(photos, image_size=64)
    _, changed, _ = batch(photos, image_size=64, transform="my_v2:jitter")
    _, again, _ = batch(photos, image_size=64, transform="my_v2:jitter")
    assert changed.dtype == torch.uint8 and torch.equal(changed, again) and not torch.equal(changed, images)
    assert train(photos, tmp_path / "run", epochs=1, transform="my_v2:jitter") == 0
    with pytest.raises(
        InputError, match=r"transform is my_v2:scaled: ValueError: it returned float32 .* for uint8 \(3"
    ):
        train(photos, tmp_path / "bad", epochs=1, transform="my_v2:scaled")


def test_arrays_of_images(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(4):
        image = smooth(i).astype(np.float32)
        image[:, :9, :9] = (np.nan, -1)[i % 2]
        np.save(tmp_path / "data" / f"{i}.npy", image if i else image.transpose(1, 2, 0))
    fields = {**RUN, "ndim": 2, "nodata": -1.0}
    recipe, boxes, normalized = batch(tmp_path / "data", **fields)
    assert recipe.normalize == "zscore" and recipe.crop_area is None
    torch.testing.assert_close(boxes, normalized, rtol=0, atol=0, equal_nan=True)
    recipe, crops, normalized = batch(tmp_path / "data", **fields, crop_area=0.9, normalize="dataset")
    there = ~crops.isnan()
    assert recipe.value_range is None and all(not image.all() for image in there)
    assert abs(normalized[there].mean()) < 0.5 and 0.5 < normalized[there].std() < 1.5
    assert crops[there].min() > -1  # nodata does not spread


@pytest.fixture
def holed(tmp_path):
    """Write float images of which the upper left quarter has no values."""

    def cut(array, i):
        array[:, :32, :32] = np.nan
        return array

    write(tmp_path / "holed", dtype=np.float32, height=64, width=64, number=2, change=cut)
    return tmp_path / "holed"


def test_a_number_that_no_value_can_be_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    tifffile.imwrite(tmp_path / "deep" / "a.tif", np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    with pytest.raises(InputError, match=r"nodata is 99999999.*: expected a number that uint16 can hold"):
        train(tmp_path / "deep", tmp_path / "run", nodata=99999999, **RUN)


def trainer_of(holed, tmp_path, **given):
    fields = {**RUN, "image_size": 64, "crop_area": None, "batch_size": 2, "mask_ratio": 0.5, **given}
    files = find_source(str(holed))
    recipe = Recipe(**{**files.defaults(fields), **fields})
    processes = Processes()
    trainer = Pretraining(
        recipe, files, files.fingerprint(), CheckpointFolder(tmp_path, 1), Options(device="cpu"), processes
    )
    trainer.connect()
    return trainer


def test_a_batch_is_read_when_the_one_before_it_is_done(holed, tmp_path):
    """Accumulated batches never lie on the device together, even where their pixels are counted together."""
    trainer, happened = trainer_of(holed, tmp_path, grad_accum_steps=3, epoch_repeats=3), []

    def forward(images, **rest):
        happened.append("forward")
        return (trainer.learner.model.mask_token.sum(), None, None)

    def passes():
        for number in range(3):
            happened.append("read")
            images = torch.stack([trainer.crops[Draw(i, seed=number)][0] for i in range(2)])
            yield trainer.ready(Batch(images, values_in(images), {}, {}, {}), number)

    trainer.learner.forward = forward
    trainer.learner.backward(passes())
    assert happened == ["read", "forward"] * 3


def test_pixels_without_values_reach_the_model_as_invalid(holed, tmp_path):
    trainer = trainer_of(holed, tmp_path)
    images = torch.stack([trainer.crops[Draw(i, seed=i)][0] for i in range(2)])
    seen = {}

    def forward(images, **rest):
        seen.update(rest, images=images)
        return (trainer.learner.model.mask_token.sum(), None, None)

    trainer.learner.forward = forward
    trainer.learner.backward([trainer.ready(Batch(images, values_in(images), {}, {}, {}), 0)])
    assert torch.equal(seen["valid"], ~images.isnan()) and torch.equal(seen["images"].isnan(), images.isnan())
    empty = images.isnan().all(1).unflatten(1, (4, 16)).unflatten(3, (4, 16)).all(4).all(2).flatten(1)
    assert empty.sum() == 2 * 4 and seen["mask"][empty].all()
    assert seen["mask"].sum(1).tolist() == [10, 10]  # and half of the 12 others
    first = seen["mask"]
    trainer.learner.backward([trainer.ready(Batch(images, values_in(images), {}, {}, {}), 0)])
    assert torch.equal(seen["mask"], first)
    trainer.learner.backward([trainer.ready(Batch(images.nan_to_num(0), None, {}, {}, {}), 0)])
    assert seen["valid"] is None


def test_values_of_pixels_that_have_none_do_not_matter(holed, tmp_path):
    for path in holed.iterdir():
        image = tifffile.imread(path)
        (tmp_path / "marked").mkdir(exist_ok=True)
        write_one(tmp_path / "marked" / path.name, np.nan_to_num(image, nan=-7).transpose(2, 0, 1))
    given = {**RUN, "image_size": 64, "mask_ratio": 0.5, "epoch_repeats": 2}
    assert train(holed, tmp_path / "nan", **given) == 0
    assert train(tmp_path / "marked", tmp_path / "nodata", nodata=-7.0, **given) == 0
    assert logged(tmp_path / "nan") == logged(tmp_path / "nodata")
    assert 0 < reconstruct(tmp_path / "nan" / "last.pt", [], tmp_path / "grid.png") < 5


def test_the_command_takes_the_fields(tmp_path, capsys):
    write(tmp_path / "data", number=2)
    arguments = ["pretrain", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--image-size", "32", "--patch-size", "16", "--epochs", "1", "--batch-size", "2", "--workers", "0"]
    arguments += ["--value-range", "[0, 10000]", "--mean", "[0.5]", "--std", "[0.3]", "--nodata", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "no value: NaN and 3" in out
    assert "values from 0 to 10000 (given), mean 0.5 (given), standard deviation 0.3 (given)" in out
