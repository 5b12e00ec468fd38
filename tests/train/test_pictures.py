"""Pictures of a run: they are there, they are right, and drawing them changes nothing."""

import errno
import json
import os
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from small_runs import SMALL, logged, train

from sparsecnx.common.errors import TrainingStopped
from sparsecnx.train import checkpoint, drawing
from sparsecnx.train.callbacks import jpeg
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.find import find_source
from sparsecnx.train.drawing import POINTS, Reconstructions, draw_losses
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe

NETWORK = """
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, x):
        torch.rand(1)  # draws in evaluation too
        return x

def net():
    layers = [Noise()]
    for channels, out in ((3, 4), (4, 8), (8, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5))
"""


@pytest.fixture(autouse=True)
def curves(tiny_model, monkeypatch):
    """Draw the curves that other tests go without."""
    monkeypatch.setattr(drawing, "draw_losses", draw_losses)


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Write a network with batch norm, dropout and randomness of its own, and return its name."""
    (tmp_path / "drawn_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    return "drawn_network:net"


CASES = {
    "float32": ({}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "compiled": ({}, {"compile": True}),
    "batch-norm": ({"method": "spark", "model": "drawn_network:net"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_drawing_leaves_losses_weights_and_generators_as_they_are(case, photos, tmp_path, network, monkeypatch):
    if case == "compiled":  # the graphs and guards of torch.compile, without a C++ compiler's minute
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fields, options = CASES[case]
    states = []
    for name, every in (("without", 0), ("with", 1)):
        torch.manual_seed(0)
        assert train(photos, tmp_path / name, options={**options, "draw_every": every}, **fields) == 0
        states.append(torch.get_rng_state())
    assert len(list((tmp_path / "with" / "reconstructions").iterdir())) == 2
    assert logged(tmp_path / "without") == logged(tmp_path / "with")
    assert torch.equal(*states)
    one, other = (checkpoint.read(tmp_path / name / "last.pt")["model"] for name in ("without", "with"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (case == "batch-norm") == any(name.endswith("running_mean") for name in one)


def test_modules_keep_the_mode_that_they_had(photos):
    recipe = Recipe(**SMALL)
    model = build_model(recipe)
    model.encoder.stages[0].eval()  # frozen
    modes = [module.training for module in model.modules()]
    drawn = Reconstructions(Crops(find_source(str(photos)), recipe), recipe, 1)
    drawn.draw(model, torch.device("cpu"), 4)
    assert [module.training for module in model.modules()] == modes


def test_pictures_show_the_same_images_under_the_same_masks(photos):
    recipe = Recipe(**SMALL)
    torch.manual_seed(0)
    model, crops = build_model(recipe), Crops(find_source(str(photos)), recipe)
    first, again = (jpeg(Reconstructions(crops, recipe, 1).draw(model, torch.device("cpu"), 4)) for _ in range(2))
    assert first == again
    panels = [
        Reconstructions(crops, recipe, 1).draw(build_model(recipe), torch.device("cpu"), 4).axes for _ in range(2)
    ]
    shown = [[axis.images[0].get_array() for axis in axes] for axes in panels]
    for column, same in ((0, True), (1, True), (2, False)):
        assert all(np.array_equal(*pair) is same for pair in zip(*(axes[column::3] for axes in shown), strict=True))


@pytest.mark.parametrize(
    ("every", "fields", "epochs"),
    [
        (None, {"epochs": 20}, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (None, {"epochs": 3}, [1, 2, 3]),
        (None, {"epochs": 60, "first_epoch": 20}, [*range(24, 61, 4)]),
        (8, {"epochs": 20}, [8, 16, 20]),
        (0, {"epochs": 20}, []),
    ],
)
def test_epochs_with_a_picture(every, fields, epochs, photos):
    recipe = Recipe(**{**SMALL, **fields})
    drawn = Reconstructions(Crops(find_source(str(photos)), recipe), recipe, every)
    assert [epoch for epoch in range(recipe.first_epoch + 1, recipe.epochs + 1) if drawn.due(epoch)] == epochs


def test_a_complete_run_leaves_its_pictures(photos, tmp_path):
    run = tmp_path / "run"
    train(photos, run, options={"draw_every": 1})
    names = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.suffix in (".jpg", ".png"))
    assert names == [
        "loss.png",
        "reconstructions/step-00000004.jpg",
        "reconstructions/step-00000008.jpg",
        "samples.png",
    ]
    for name in names:
        with Image.open(run / name) as image:
            image.load()
            assert min(image.size) > 300


def test_volumes_are_drawn_too(tmp_path):
    (tmp_path / "scans").mkdir()
    for i in range(4):
        values = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(i))
        smooth = torch.nn.functional.interpolate(values[None], (12, 36, 40))[0]
        np.save(tmp_path / "scans" / f"{i}.npy", smooth.numpy())
    fields = {"image_size": (8, 32, 32), "patch_size": (4, 16, 16), "epochs": 1}
    assert train(tmp_path / "scans", tmp_path / "run", options={"draw_every": 1}, **fields) == 0
    with Image.open(tmp_path / "run" / "samples.png") as image:
        assert image.height > 1.4 * image.width  # two volumes, three slices of each in four panels


def test_the_curves_are_those_of_the_whole_log(photos, tmp_path):
    run = tmp_path / "run"
    train(photos, run)
    (run / "checkpoint-00000008.pt").unlink()
    train(None, run, resume="auto")
    loss, rate = (axis.lines[0].get_xydata() for axis in draw_losses(run / "log.jsonl", 8).axes)
    lines = logged(run)
    assert loss.tolist() == [[line["epoch"], line["loss"]] for line in lines]
    assert rate.tolist() == [[line["epoch"], line["lr"]] for line in lines]


def test_a_long_log_is_drawn_as_means(tmp_path):
    steps = 5 * POINTS
    lines = [{"step": i + 1, "epoch": i / 10, "loss": float(i % 5), "lr": 0.5} for i in range(steps)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "ep')
    loss = draw_losses(tmp_path / "log.jsonl", steps).axes[0].lines[0].get_xydata()
    assert loss.shape == (POINTS, 2)
    assert (loss[:, 1] == 2.0).all()
    assert loss[:, 0] == pytest.approx(np.arange(POINTS) / 2 + 0.2)


@pytest.mark.parametrize("name", ["step-00000008.jpg", "samples.png", "loss.png"])
def test_a_picture_that_cannot_be_written_stops_and_keeps_the_last_good_checkpoint(name, photos, tmp_path, monkeypatch):
    save = Figure.savefig

    def full(figure, file, **options):
        if name in str(getattr(file, "name", "")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", full)
    problem = rf"step 8: .*{name} could not be written \(.*No space left on device\), last good checkpoint: .*00008.pt"
    with pytest.raises(TrainingStopped, match=problem):
        train(photos, tmp_path / "run", options={"draw_every": 1})
    assert not list((tmp_path / "run").rglob(f"*{name}*"))


def test_images_that_are_gone_when_they_are_drawn_stop_the_run(photos, tmp_path, monkeypatch):
    read = Reconstructions.read

    def read_nothing(drawn):
        for file in photos.rglob("*.png"):
            file.unlink()
        return read(drawn)

    monkeypatch.setattr(Reconstructions, "read", read_nothing)
    problem = r"step 4: reconstructions could not be drawn \(data is .*none of its 8 .*last good checkpoint: .*00004.pt"
    with pytest.raises(TrainingStopped, match=problem):
        train(photos, tmp_path / "run", options={"draw_every": 1})
