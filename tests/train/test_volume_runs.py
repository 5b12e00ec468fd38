"""Runs of `sparsecnx pretrain` on volumes and signals, and what is made of their checkpoints."""

import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import logged, train

import sparsecnx
from sparsecnx.cli import main
from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.models import ConvNeXtV2
from sparsecnx.train import contents, phantoms
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_data
from sparsecnx.train.log import RunLog
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

RUN = {"image_size": (8, 32, 32), "patch_size": (4, 16, 16), "base_lr": 0.05}
NETWORK = """
from torch import nn

def net():
    layers = []
    for channels, out in ((2, 4), (4, 8), (8, 8)):
        layers += [nn.Conv3d(channels, out, 3, stride=2, padding=1), nn.InstanceNorm3d(out, affine=True), nn.ReLU()]
    return nn.Sequential(*layers)
"""


def smooth(seed, *shape):
    coarse = torch.rand(1, 1, *(side // 3 for side in shape), generator=torch.Generator().manual_seed(seed))
    mode = {1: "linear", 3: "trilinear"}[len(shape)]
    return torch.nn.functional.interpolate(coarse, shape, mode=mode)[0, 0].numpy()


@pytest.fixture
def scans(tmp_path):
    """Write eight volumes of two channels and of different sizes."""
    (tmp_path / "scans" / "more").mkdir(parents=True)
    for i in range(8):
        volume = smooth(i, 12 + i, 36, 40)
        np.save(tmp_path / "scans" / ("", "more")[i % 2] / f"{i}.npy", np.stack([volume, volume**2]) * 1000)
    return tmp_path / "scans"


def stop_after(step, monkeypatch):
    write = RunLog.write

    def write_and_signal(log, record):
        write(log, record)
        if record.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "write", write_and_signal)


@pytest.mark.parametrize("method", ["fcmae", "spark"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(method, scans, tmp_path, monkeypatch, capsys):
    assert train(scans, tmp_path / "whole", method=method, **RUN) == 0
    lines = capsys.readouterr().out.splitlines()
    told = "of 3 dimensions and 2 channels, normalised by zscore, crops of 8x32x32 in patches of 4x16x16, from"
    assert lines[1] == f"8 volumes {told} {scans}"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert train(scans, tmp_path / "parts", method=method, **RUN) == 143
    assert train(None, tmp_path / "parts", resume="auto", workers=1) == 0
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert whole == parts and len({line["loss"] for line in whole}) == 8

    recipe = contents.load(tmp_path / "parts" / "last.pt").recipe
    assert (recipe.ndim, recipe.in_chans, recipe.normalize, recipe.mask_ratio) == (3, 2, "zscore", 0.75)
    assert recipe.size == (8, 32, 32) and recipe.patch == (4, 16, 16)
    for given in ({"normalize": "none"}, {"patch_size": 8}, {"image_size": 32}):
        with pytest.raises(InputError, match="the run to resume has"):
            train(scans, tmp_path / "parts", resume="newest", **given)


def test_the_encoder_loads_into_a_classifier_of_volumes(scans, tmp_path):
    assert train(scans, tmp_path / "run", epochs=1, **RUN) == 0
    shape = {"ndim": 3, "stem": (1, 2, 2), "strides": ((1, 2, 2), 2, 2), "in_chans": 2}
    model = ConvNeXtV2(3, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **shape)
    new = sparsecnx.load_encoder(model, tmp_path / "run" / "last.pt")
    assert new == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert model(torch.randn(2, 2, 8, 32, 32)).shape == (2, 3)


def test_three_slices_of_every_volume_are_drawn(scans, tmp_path, capsys):
    assert train(scans, tmp_path / "run", epochs=1, **RUN) == 0
    last, out = tmp_path / "run" / "last.pt", tmp_path / "grid.png"
    loss = reconstruct(last, [scans / "0.npy"], out)
    with Image.open(out) as picture:
        one = picture.size
    assert 0 < loss < 5 and reconstruct(last, [scans / "0.npy"], out) == loss
    assert main(["reconstruct", str(last), "--out", str(out)]) == 0  # the first volumes of the run
    with Image.open(out) as picture:
        assert picture.width == one[0] and picture.height > 1.8 * one[1]
    np.save(tmp_path / "thin.npy", np.ones((2, 4, 40, 40)))
    np.save(tmp_path / "grey.npy", smooth(1, 12, 36, 40))
    for name, reason in (("thin", "is 4 x 40 x 40, smaller than the crop"), ("grey", "has 1 channels: expected 2")):
        with pytest.raises(InputError, match=rf"images is .*{name}.npy: {reason}"):
            reconstruct(last, [tmp_path / f"{name}.npy"], out)
    with pytest.raises(InputError, match=r"images is .*missing.npy: cannot be read \(FileNotFoundError"):
        reconstruct(last, [tmp_path / "missing.npy"], out)


def test_signals(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(4):
        np.save(tmp_path / "data" / f"{i}.npy", np.stack([smooth(i, 300), smooth(i + 9, 300)]))
    assert train(tmp_path / "data", tmp_path / "run", image_size=256, epochs=1, base_lr=0.05) == 0
    assert "4 volumes of 1 dimension and 2 channels" in capsys.readouterr().out
    reconstruct(tmp_path / "run" / "last.pt", [], tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("method", "normalize", "shape", "given"),
    [
        ("fcmae", "zscore", (18, 72, 80), RUN),
        ("fcmae", "none", (18, 72, 80), RUN),
        ("spark", "dataset", (18, 72, 80), RUN),
        ("fcmae", "percentiles", (900,), {"image_size": 256, "base_lr": 0.05}),
    ],
)
def test_values_of_voxels_that_have_none_do_not_matter(method, normalize, shape, given, tmp_path, capsys):
    for name, fill in (("nan", np.nan), ("marked", -7)):
        (tmp_path / name).mkdir()
        for i in range(4):
            two = np.stack([smooth(i, *shape), smooth(i + 9, *shape)])
            two[:, ..., : shape[-1] // 2 - 5] = fill
            if len(shape) == 3 and i < 3:
                two[:, :, :40] = fill  # most boxes have no value at all
            np.save(tmp_path / name / f"{i}.npy", two)
    given = {**given, "method": method, "normalize": normalize, "batch_size": 2, "epoch_repeats": 2}
    for name, nodata in (("nan", {}), ("marked", {"nodata": -7.0})):
        assert train(tmp_path / name, tmp_path / f"{name}-run", options={"draw_every": 1}, **nodata, **given) == 0
        told = "no value: NaN and -7" if name == "marked" else "no value: NaN"
        assert f"{told}, in 4 of 4 volumes looked into, such as 0.npy" in capsys.readouterr().out
    assert logged(tmp_path / "nan-run") == logged(tmp_path / "marked-run")
    assert {line["loss"] > 0 for line in logged(tmp_path / "nan-run")} >= {True}
    assert (tmp_path / "nan-run" / "samples.png").is_file()
    assert 0 <= reconstruct(tmp_path / "nan-run" / "last.pt", [], tmp_path / "grid.png") < 50


def test_images_of_any_channels_in_smaller_patches(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(4):
        np.save(tmp_path / "data" / f"{i}.npy", np.random.default_rng(i).integers(0, 4096, (5, 70, 80), np.uint16))
    given = {"image_size": (64, 64), "patch_size": 16, "epochs": 1}
    assert train(tmp_path / "data", tmp_path / "run", **given) == 0
    told = "of 2 dimensions and 5 channels, normalised by zscore, crops of 64x64 in patches of 16x16, from"
    assert f"4 volumes {told}" in capsys.readouterr().out
    assert train(tmp_path / "data", tmp_path / "run", resume="newest", image_size=64) == 0
    assert main(["reconstruct", str(tmp_path / "run" / "last.pt"), "--out", str(tmp_path / "grid.png")]) == 0


def test_phantoms_are_ellipsoids_and_the_same_every_time(tmp_path):
    assert phantoms.main([str(tmp_path), "--count", "2", "--side", "24"]) == 0
    first, other = (np.load(tmp_path / f"phantom-00{i}.npy") for i in range(2))
    assert first.dtype == np.int16 and first.shape == (24, 24, 24)
    assert np.array_equal(first, phantoms.phantom(0, 24)) and not np.array_equal(first, other)
    for volume in (first, other):
        assert abs(volume[0, 0, 0]) <= 5 and volume[8:16, 8:16, 8:16].mean() > 500  # a body, and nothing around it
    before = (tmp_path / "phantom-000.npy").stat().st_mtime_ns
    assert phantoms.main([str(tmp_path), "--count", "3", "--side", "24"]) == 0
    assert (tmp_path / "phantom-000.npy").stat().st_mtime_ns == before and (tmp_path / "phantom-002.npy").exists()


@pytest.fixture
def network(tmp_path, monkeypatch):
    (tmp_path / "my_volume_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_volume_network:net"


def test_a_network_from_python(network, scans, tmp_path):
    run = {"image_size": (16, 32, 32), "patch_size": 8, "method": "spark", "model": network, "epochs": 1}
    (scans / "0.npy").unlink(), (scans / "more" / "1.npy").unlink()
    (scans / "2.npy").unlink(), (scans / "more" / "3.npy").unlink()
    assert train(scans, tmp_path / "run", **run) == 0
    last, out = tmp_path / "run" / "last.pt", tmp_path / "grid.png"
    with pytest.raises(CheckpointError, match=r"recipe\.model is 'my_volume_network:net': it names Python code, which"):
        contents.load(last)  # a file alone runs no code
    with pytest.raises(InputError, match=f"which runs only with --model {network}"):
        train(None, tmp_path / "run", resume="newest")
    assert train(None, tmp_path / "run", resume="newest", model=network) == 0
    assert main(["reconstruct", str(last), "--out", str(out)]) == 2
    assert main(["reconstruct", str(last), "--out", str(out), "--model", network]) == 0
    fresh = __import__("my_volume_network").net()
    assert sparsecnx.load_encoder(fresh, last) == []
    assert torch.equal(fresh[0].weight, contents.load(last, network).model["encoder.0.weight"])


def test_transforms_of_the_user_are_seeded(scans, tmp_path, monkeypatch):
    (tmp_path / "my_transforms.py").write_text(
        "import random, numpy, torch\n"
        "class Noise:\n"
        "    def set_random_state(self, seed):\n"
        "        self.own = numpy.random.RandomState(seed)\n"
        "    def __call__(self, crop):\n"
        "        drawn = torch.rand(1).item(), numpy.random.rand(), random.random(), self.own.rand()\n"
        "        return crop * 0 + torch.tensor([drawn[:2], drawn[2:]]).mean(1)[:, None, None, None]\n"
        "noise = Noise()\n"
        "def half(crop):\n"
        "    return crop[:, ::2]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fields = {**RUN, "ndim": 3, "in_chans": 2, "normalize": "zscore", "crop_area": None}
    fields["transform"] = "my_transforms:noise"
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    crops = [Crops(find_data(scans), Recipe(**fields)) for _ in range(2)]
    first, other, again = crops[0][Draw(0, 1)][0], crops[0][Draw(0, 2)][0], crops[1][Draw(0, 1)][0]
    assert torch.equal(first, again) and all((first[c] != other[c]).all() for c in range(2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())

    assert train(scans, tmp_path / "run", transform="my_transforms:noise", epochs=1, **RUN) == 0
    with pytest.raises(InputError, match="which runs only with --transform my_transforms:noise"):
        train(None, tmp_path / "run", resume="newest")
    assert train(None, tmp_path / "run", resume="newest", transform="my_transforms:noise") == 0
    reconstruct(tmp_path / "run" / "last.pt", [], tmp_path / "grid.png")
    for name, reason in (
        ("half", r"ValueError: it returned float32 \(2, 4, 32, 32\) for float32 \(2, 8"),
        ("no", "AttributeError: "),
    ):
        with pytest.raises(InputError, match=f"transform is my_transforms:{name}: {reason}"):
            train(scans, tmp_path / "bad", transform=f"my_transforms:{name}", **RUN)
    with pytest.raises(InputError, match="transform is noise: expected module:function"):
        Recipe(**{**fields, "transform": "noise"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_dim": 12}, "decoder_dim is 12: expected a multiple of 8, to be halved so often"),
        ({"in_chans": 1}, "it takes 2 channels and 3 dimensions, the data have 1 channels and 3 dimensions"),
        ({"image_size": (8, 16, 16), "patch_size": (4, 8, 8)}, "cannot be pretrained on patches of 4x8x8 px"),
        ({"image_size": 16, "patch_size": 4}, "; --below-tile dense lets it go on dense below the"),
    ],
)
def test_a_network_that_does_not_fit_the_volumes(fields, message, network):
    base = {"ndim": 3, "in_chans": 2, "normalize": "zscore", "crop_area": None}
    base |= {"method": "spark", "image_size": 16, "patch_size": 8}
    with pytest.raises(InputError, match=f"model is {network}: .*{message}"):
        build_model(Recipe(model=network, **{**base, **fields}))
    build_model(Recipe(model=network, **{**base, "patch_size": 4}, below_tile="dense"))


def test_options_of_images_alone(scans, photos, tmp_path):
    with pytest.raises(InputError, match=r"crop_area is 0.5: expected together with images; crops of volumes are not"):
        train(scans, tmp_path / "run", crop_area=0.5, **RUN)
    with pytest.raises(InputError, match=r"image_size is \(64, 64, 64\): expected a whole number, or two"):
        train(photos, tmp_path / "run", image_size=(64, 64, 64))
    with pytest.raises(InputError, match=r"data is .*scans: holds .*0.npy, which is .* smaller than the crop of 64 x"):
        train(scans, tmp_path / "run", image_size=64)
    assert not (tmp_path / "run").exists()
