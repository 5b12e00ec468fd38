"""Segmentation: label maps of every kind, networks on pretrained encoders, and runs of `sparsecnx segment`."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import logged, signal_after, train

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra [segment]")
pytest.importorskip("torchmetrics", reason="needs the extra [segment]")

import segmentation_models_pytorch as smp

from sparsecnx.cli import main
from sparsecnx.common.errors import InputError
from sparsecnx.models import ConvNeXtV2Encoder
from sparsecnx.train.contents import load
from sparsecnx.transfer.segment import segmenter
from sparsecnx.transfer.segment.maps import find_maps
from sparsecnx.transfer.segment.recipe import SegmentRecipe
from sparsecnx.transfer.segment.scores import MapScores
from sparsecnx.transfer.segment.start import SegmentOptions, segment
from sparsecnx.transfer.segment.training import SEGMENTATION, build_segmenter, layer_groups, load_segmenter

SMALL = {
    "model": "atto",
    "image_size": 64,
    "num_classes": 3,
    "epochs": 2,
    "batch_size": 4,
    "decoder_dim": 32,
    "base_lr": 0.2,
    "crop_area": 0.7,
}


def scene(generator, sides=(64, 80)):
    """Return noise with a bright box and a striped one, and the map of both."""
    image, classes = generator.integers(40, 100, (*sides, 3)), np.zeros(sides, np.uint8)
    for number in (1, 2):
        top, left = (int(generator.integers(0, side // 2)) for side in sides)
        inside = np.s_[top : top + sides[0] // 2, left : left + sides[1] // 3]
        image[inside] = 220 if number == 1 else 0
        image[inside][::4] = 220
        classes[inside] = number
    return image.astype(np.uint8), classes


def write(folder, count=12, sides=(64, 80)):
    """Write images and label maps."""
    generator = np.random.default_rng(count)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image, classes = scene(generator, sides)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(classes).save(folder / "labels" / f"{number}.png")
    return folder


@pytest.fixture
def scenes(tmp_path):
    return write(tmp_path / "scenes")


def run(data, output, resume=None, options=None, **given):
    """Train a segmenter with the recipe SMALL and the given fields, or go on."""
    where = None if data is None else str(data)
    options = {"device": "cpu", "workers": 0, "draw_every": 0, **(options or {})}
    chosen = SegmentOptions(data=where, output=str(output), resume=resume, **options)
    given = given if resume else {name: value for name, value in {**SMALL, **given}.items() if value is not None}
    return segment(chosen, given)


def scores_of(output):
    return [json.loads(line) for line in (output / "tests.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("architecture", ["upernet", "unet"])
def test_a_run_learns_to_segment(scenes, tmp_path, architecture, capsys):
    write(tmp_path / "two" / "train", 16)
    write(tmp_path / "two" / "val", 4, sides=(70, 64))  # no multiples of the stride
    (tmp_path / "two" / "classes.txt").write_text("noise\nbright\nstripes\n")
    arguments = ["--data", str(tmp_path / "two"), "--output", str(tmp_path / "run"), "--architecture", architecture]
    arguments += ["--model=atto", "--image-size=64", "--batch-size=4", "--decoder-dim=32", "--base-lr=0.3"]
    arguments += ["--epochs=24", "--test-every=12", "--draw-every=24", "--device=cpu", "--workers=0", "--crop-area=0.7"]
    assert main(["segment", *arguments]) == 0
    assert "3 classes: noise, bright, stripes; 4 images to test on" in capsys.readouterr().out
    first, last = scores_of(tmp_path / "run")
    assert (first["step"], last["step"]) == (48, 96)
    assert last["miou"] > 0.8, last
    assert last["miou"] == pytest.approx(np.mean([last[f"iou/{name}"] for name in ("noise", "bright", "stripes")]))
    assert (tmp_path / "run" / "samples.png").is_file()
    assert [path.name for path in (tmp_path / "run" / "predictions").iterdir()] == ["step-00000096.jpg"]


def test_a_stopped_run_goes_on_with_the_same_losses(scenes, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = {"drop_path_rate": 0.2, "ema_decay": 0.9, "layer_decay": 0.8}
    assert run(scenes, whole, **given) == 0
    with monkeypatch.context() as patched:
        signal_after(3, patched)
        assert run(scenes, parts, **given) == 143
    assert run(None, parts, resume="newest") == 0
    assert logged(parts) == logged(whole)
    assert scores_of(parts) == scores_of(whole)
    assert "ema_miou" in scores_of(whole)[0]
    network, saved = load_segmenter(whole / "last.pt"), load(whole / "last.pt", kind=SEGMENTATION)
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    torch.testing.assert_close(network.state_dict(), saved.ema)
    with pytest.raises(InputError, match="checkpoint"):
        load_segmenter(scenes / "images" / "0.png")


@pytest.mark.parametrize("origin", ["fcmae", "spark", "timm"])
def test_a_run_starts_from_pretrained_weights(scenes, tmp_path, origin):
    timm = pytest.importorskip("timm")
    path, given = tmp_path / "pretrained" / "last.pt", {}
    if origin == "timm":
        path.parent.mkdir()
        torch.manual_seed(1)
        torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), path)
        given = {"model": "timm:resnet18"}
    elif origin == "spark":
        assert train(scenes / "images", path.parent, epochs=1, method="spark", model="timm:resnet18") == 0
    else:
        assert train(scenes / "images", path.parent, epochs=1, in_chans=3) == 0
    own = {name: value for name, value in SMALL.items() if name not in ("model", "image_size")} | given
    chosen = {"device": "cpu", "workers": 0, "draw_every": 0, "checkpoint": str(path)}
    still = {"base_lr": 1e-12, "weight_decay": 0.0, "epochs": 1}
    options = SegmentOptions(data=str(scenes), output=str(tmp_path / "run"), **chosen)
    assert segment(options, own | still | ({"image_size": 64} if given else {})) == 0
    source = torch.load(path, weights_only=False)
    source = source if origin == "timm" else source["model"]
    name = "stages.3.0.pwconv1.weight" if origin == "fcmae" else "layer4.1.conv2.weight"
    found = load(tmp_path / "run" / "last.pt", kind=SEGMENTATION)
    expected = source[name if origin == "timm" else f"encoder.{name}" if f"encoder.{name}" in source else name]
    torch.testing.assert_close(found.model[f"encoder.network.{name}"].flatten(), expected.flatten())
    assert found.recipe.model == ("atto" if origin == "fcmae" else "timm:resnet18")


def bad_value(folder):
    Image.fromarray(np.full((64, 80), 3, np.uint8)).save(folder / "labels" / "11.png")


def bad_sides(folder):
    Image.fromarray(np.zeros((50, 80), np.uint8)).save(folder / "labels" / "11.png")


def bad_type(folder):
    (folder / "labels" / "11.png").unlink()
    np.save(folder / "labels" / "11.npy", np.full((64, 80), 0.5))


def colours(folder):
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(folder / "labels" / "11.png")


def no_map(folder):
    (folder / "labels" / "3.png").unlink()


def no_image(folder):
    (folder / "images" / "3.png").unlink()


def two_maps(folder):
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(folder / "labels" / "3.bmp")


def no_maps(folder):
    (folder / "labels").rename(folder / "masks")


def turned(folder):
    image = Image.open(folder / "images" / "3.png").copy()
    exif = image.getexif()
    exif[274] = 3
    image.save(folder / "images" / "3.png", exif=exif)


@pytest.mark.parametrize(
    ("change", "argument", "words"),
    [
        (bad_value, "data", "holds 11.png, which has labels that do not fit .* value 3: expected 0 to 2, or 255"),
        (bad_sides, "data", "holds 11.png, which has labels of 50x80 values for 64x80 pixels"),
        (bad_type, "data", "11.png, which has labels with values between whole numbers"),
        (colours, "data", r"11.png, which has labels of the shape \(3, 64, 80\)"),
        (no_map, "data", "holds images/3.png and no map"),
        (no_image, "data", "holds labels/3.png and no image"),
        (two_maps, "data", "holds labels/3.bmp and labels/3.png"),
        (no_maps, "data", "has no folder labels"),
        (turned, "data", "EXIF"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_name(scenes, tmp_path, change, argument, words):
    change(scenes)
    with pytest.raises(InputError, match=words) as caught:
        run(scenes, tmp_path / "run")
    assert caught.value.argument == argument
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_arguments_that_cannot_work_are_refused_by_name(scenes, tmp_path, photos):
    def refuses(argument, words, data=scenes, options=None, **given):
        with pytest.raises(InputError, match=words) as caught:
            run(data, tmp_path / "run", options=options, **given)
        assert caught.value.argument == argument
        assert not (tmp_path / "run" / "log.jsonl").exists()

    refuses("num_classes", "classes.txt", num_classes=None)
    refuses("ignore_index", "none of the classes 0 to 2", ignore_index=2)
    refuses("architecture", "upernet, unet", architecture="fcn")
    refuses("batch_size", "2 or more", batch_size=1)
    refuses("data", "has no folder images", photos)
    refuses("model", "expected powers of 2|strides|depth", patch_size=2)
    assert train(scenes / "images", tmp_path / "pre", epochs=1) == 0
    refuses("model", "leave it out", options={"checkpoint": str(tmp_path / "pre/last.pt")}, model="femto")
    (scenes / "classes.txt").write_text("a\nb\n")
    refuses("num_classes", "expected 2, those of")
    two = {"num_classes": 2, "ignore_index": 2}
    assert run(scenes, tmp_path / "good", **two, epochs=1) == 0
    trained = {"checkpoint": str(tmp_path / "good" / "last.pt")}
    refuses("checkpoint", "is of another command", options=trained, **two, model=None)
    before = (tmp_path / "good" / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run(scenes, tmp_path / "good", num_classes=2, ignore_index=2)
    assert (tmp_path / "good" / "log.jsonl").read_bytes() == before


def test_maps_are_palettes_arrays_and_items(scenes, monkeypatch):
    whole, _ = find_maps(str(scenes), str(scenes))
    first, second = (np.asarray(whole.values(number)["labels"]) for number in (0, 1))
    picture = Image.fromarray(first).convert("P")
    picture.putdata(first.flatten().tolist())
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    picture.save(scenes / "labels" / "0.png")
    (scenes / "labels" / "1.png").unlink()
    np.save(scenes / "labels" / "1.npy", second.astype(np.int16))
    again, _ = find_maps(str(scenes), str(scenes))
    np.testing.assert_array_equal(again.values(0)["labels"], first)
    np.testing.assert_array_equal(again.values(1)["labels"], second)
    assert again.fingerprint() != whole.fingerprint()
    trained, others = find_maps(str(scenes))
    names = [[part.name(number) for number in range(len(part))] for part in (trained, others)]
    assert (len(names[0]), len(names[1]), len({*names[0], *names[1]})) == (10, 2, 12)


class Scenes:
    """Items of Python, with pixels that have no class."""

    def __init__(self, classes=None):
        self.classes = classes

    def __len__(self):
        return 8

    def __getitem__(self, number):
        image, classes = scene(np.random.default_rng(number))
        classes[:, :20] = 255
        return {"image": image, "labels": classes if self.classes is None else np.full_like(classes, self.classes)}


def nothing():
    return Scenes(255)


def test_pixels_without_a_class_count_nowhere(tmp_path):
    address = f"python:{__name__}:Scenes"
    assert run(address, tmp_path / "run", epochs=1) == 0
    assert run(address.replace("Scenes", "nothing"), tmp_path / "nothing", epochs=1) == 0
    assert [line["loss"] for line in logged(tmp_path / "nothing")] == [0]
    assert scores_of(tmp_path / "nothing")[0]["pixel_accuracy"] == 0


def test_scores_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    generator = np.random.default_rng(0)
    truth, found = generator.integers(0, 3, 1000), generator.integers(0, 4, 1000)
    counts = np.zeros((5, 5), np.int64)  # the class 4 is nowhere
    np.add.at(counts, (truth, found), 1)
    scores = MapScores(counts, ("a", "b", "c", "d;e", "f"), {}).overall()
    given = torch.from_numpy(found), torch.from_numpy(truth)
    each = multiclass_jaccard_index(*given, 5, average=None)[:4]
    assert scores["miou"] == pytest.approx(multiclass_jaccard_index(*given, 5, average="macro").item())
    assert [scores[f"iou/{name}"] for name in ("a", "b", "c", "d_e")] == pytest.approx(each.tolist())
    assert scores["pixel_accuracy"] == pytest.approx(multiclass_accuracy(*given, 5, average="micro").item())
    assert "iou/f" not in scores


def test_the_decoder_learns_faster_than_the_layers_of_the_network():
    recipe = SegmentRecipe(model="atto", num_classes=3, layer_decay=0.5, decoder_dim=32)
    model = build_segmenter(recipe)
    scales = {id(p): group["lr_scale"] for group in layer_groups(model, recipe) for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert scales[id(model.decoder.psp.out_conv[0].weight)] == 1
    assert scales[id(model.encoder.network.stages[3][0].pwconv1.weight)] == 0.5
    assert scales[id(model.encoder.network.downsample_layers[0][0].weight)] == min(scales.values()) == 0.5**4


def test_networks_are_those_of_segmentation_models_pytorch(scenes, tmp_path):
    images = torch.rand(2, 3, 64, 96)
    for kind in (smp.Unet, smp.UPerNet, smp.FPN):
        assert kind("sparsecnx-femto", encoder_weights=None, classes=5)(images).shape == (2, 5, 64, 96)
    assert train(scenes / "images", tmp_path / "pre", epochs=1) == 0
    model = segmenter(tmp_path / "pre" / "last.pt", 5, "unet")
    assert isinstance(model, smp.Unet)
    assert model(images).shape == (2, 5, 64, 96)
    assert model.encoder.out_channels == [3, 0, 8, 8, 16, 16]
    with pytest.raises(ValueError, match="in_channels is 4: expected 3"):
        smp.Unet("sparsecnx-femto", encoder_weights=None, in_channels=4)
    with pytest.raises(ValueError, match="stride 2x4"):
        segmenter(ConvNeXtV2Encoder((1, 1), (8, 8), stem=(2, 4)), 3, "unet")
    assert not [name for name in smp.encoders.get_encoder_names() if name[-1].isdigit() and "sparsecnx" in name]


def test_volumes_are_segmented_through_monai(tmp_path):
    pytest.importorskip("monai")
    generator = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / "volumes" / name).mkdir(parents=True)
    for number in range(6):
        values, classes = generator.normal(size=(24, 32, 40)).astype(np.float32), np.zeros((24, 32, 40), np.uint8)
        inside = np.s_[6:18, number : number + 16, 5:30]
        values[inside] += 4
        classes[inside] = 1
        np.save(tmp_path / "volumes" / "images" / f"{number}.npy", values)
        np.save(tmp_path / "volumes" / "labels" / f"{number}.npy", classes)
    volumes = {
        "num_classes": 2,
        "crop_area": None,
        "image_size": (16, 32, 32),
        "patch_size": 16,
        "ndim": 3,
        "architecture": "unet",
    }
    assert run(tmp_path / "volumes", tmp_path / "run", epochs=5, batch_size=2, **{**volumes, "base_lr": 0.5}) == 0
    (*_, last) = scores_of(tmp_path / "run")
    assert last["miou"] > 0.8
    assert math.isfinite(last["iou/1"])
