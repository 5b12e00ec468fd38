"""Fine-tuning: published recipes, runs from every kind of checkpoint, and tests of classifiers."""

import json
import math

import numpy as np
import pytest
import tifffile
import torch
from cases import assert_close
from PIL import Image
from small_runs import logged, signal_after, train
from test_probe import KINDS, write
from test_processes import expect_close, in_ranks  # noqa: F401 (a fixture)

from sparsecnx import models
from sparsecnx.cli import main
from sparsecnx.common.errors import InputError
from sparsecnx.models.convnextv2 import Size
from sparsecnx.train.command import parse
from sparsecnx.train.contents import load
from sparsecnx.train.data.crops import Draw
from sparsecnx.train.learner import Pass
from sparsecnx.train.schedule import learning_rate
from sparsecnx.transfer.classifier import FINETUNING, build_classifier, layer_groups
from sparsecnx.transfer.evaluate import Scores, evaluate
from sparsecnx.transfer.features import load_pretrained
from sparsecnx.transfer.finetuning import Classifying, LabelledCrops, seeded
from sparsecnx.transfer.labels import find_labelled
from sparsecnx.transfer.options import FinetuneOptions
from sparsecnx.transfer.recipe import RAND_AUGMENT, FinetuneRecipe
from sparsecnx.transfer.start import FINETUNE, finetune

pytest.importorskip("timm", reason="needs the extra [finetune]")
pytest.importorskip("torchmetrics", reason="needs the extra [finetune]")

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
DEPTHS = {"nano": (2, 2, 8, 2), "tiny": (3, 3, 9, 3)} | dict.fromkeys(("atto", "femto", "pico"), (2, 2, 6, 2))
FIELDS = {"image_size": 64, "epochs": 2, "batch_size": 4, "base_lr": 0.02, "layer_decay": 0.9}


@pytest.fixture
def pictures(tmp_path):
    write(tmp_path / "pictures" / "train", 8)
    write(tmp_path / "pictures" / "val", 4)
    return tmp_path / "pictures"


@pytest.fixture
def checkpoint(pictures, tmp_path):
    assert train(pictures / "train", tmp_path / "pre", epochs=1) == 0
    return tmp_path / "pre" / "last.pt"


def tune(checkpoint, data, output, resume=None, options=None, **given):
    where = None if checkpoint is None else str(checkpoint)
    options = {"device": "cpu", "workers": 0, "resume": resume, **(options or {})}
    chosen = FinetuneOptions(checkpoint=where, data=None if data is None else str(data), output=str(output), **options)
    return finetune(chosen, given if resume else {**FIELDS, **given})


@pytest.mark.parametrize("size", SIZES)
def test_published_recipes(size, monkeypatch):
    """The numbers of the paper's tables 9 to 11: 1024 images a step, and the layers of its two decays."""
    small, depths = size in ("atto", "femto", "pico", "nano"), DEPTHS.get(size, (3, 3, 27, 3))
    for name in SIZES:  # few channels: the layers are what matters
        monkeypatch.setitem(models.SIZES, name, Size(DEPTHS.get(name, (3, 3, 27, 3)), (8, 8, 8, 8)))
    recipe = FinetuneRecipe(**parse(["--config", size], FINETUNE)[1])
    assert recipe.effective_batch == 1024 and recipe.ema_decay == 0.9999 and recipe.head_init_scale == 0.001
    rates = {"tiny": 8e-4, "base": 6.25e-4, "large": 6.25e-4, "huge": 1.25e-4}
    assert recipe.peak_lr == pytest.approx(4 * rates.get(size, 2e-4)) and recipe.min_lr == 1e-6
    epochs = {"tiny": (300, 40), "base": (100, 20), "large": (100, 20), "huge": (50, 10)}
    assert (recipe.epochs, recipe.warmup) == epochs.get(size, (600, 0))
    assert recipe.weight_decay == (0.3 if size in ("atto", "pico", "nano") else 0.05)
    assert recipe.label_smoothing == (0.2 if small else 0.1) and recipe.random_erasing == 0.25
    mixed = {"atto": (0, 0), "femto": (0.3, 0.3), "pico": (0.3, 0.3), "nano": (0.5, 0.5)}
    assert (recipe.mixup, recipe.cutmix) == mixed.get(size, (0.8, 1.0))
    drop = {"femto": 0, "pico": 0, "tiny": 0.2, "large": 0.2, "huge": 0.3}
    assert recipe.drop_path_rate == drop.get(size, 0.1)

    model = build_classifier(recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    for group in layer_groups(model, recipe):
        assert group["betas"] == (0.9, 0.999)
        scales |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
        decays |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert scales.keys() == set(names.values())
    if size in ("base", "large", "huge"):
        decay, last = {"huge": 0.75}.get(size, 0.6), 13
        layers = {"downsample_layers.0.0.weight": 0, "stages.0.2.dwconv.weight": 1, "downsample_layers.1.1.bias": 2}
        layers |= {"stages.1.0.grn.gamma": 2, "downsample_layers.2.0.weight": 3, "stages.2.2.norm.weight": 3}
        layers |= {"stages.2.3.pwconv1.weight": 4, "stages.2.26.pwconv2.bias": 11, "downsample_layers.3.1.weight": 12}
        layers |= {"stages.3.2.dwconv.bias": 12, "norm.weight": 13, "head.bias": 13}
    else:
        decay, last, before = 0.9, sum(depths) + 1, sum(depths[:2])
        layers = {"downsample_layers.0.1.bias": 1, "stages.0.0.dwconv.weight": 1, "stages.0.1.grn.beta": 2}
        layers |= {"downsample_layers.1.0.weight": depths[0] + 1, "stages.1.0.norm.bias": depths[0] + 1}
        layers |= {f"stages.2.{depths[2] - 1}.pwconv1.weight": before + depths[2]}
        layers |= {"downsample_layers.3.1.weight": before + depths[2] + 1, "head.weight": last, "norm.bias": last}
    for name, layer in layers.items():
        assert scales[name] == pytest.approx(decay ** (last - layer)), name
    assert {name for name, value in decays.items() if value} == {
        name for name in decays if name.endswith("weight") and "norm" not in name and model.get_parameter(name).ndim > 1
    }


def test_the_published_schedule():
    """Linear to the peak, half a cosine to the least rate, per step: 100 epochs of 10 steps with 20 of warm-up."""
    rate = [learning_rate(i, peak=2e-3, warmup_steps=200, total_steps=1000, least=1e-6) for i in range(1000)]
    assert rate[100] == pytest.approx(1e-3) and rate[200] == pytest.approx(2e-3)
    for step in (300, 600, 999):
        cosine = 0.5 * (1 + math.cos(math.pi * (step / 10 - 20) / (100 - 20)))
        assert rate[step] == pytest.approx(1e-6 + (2e-3 - 1e-6) * cosine)


def test_a_run_learns_and_goes_on(pictures, checkpoint, tmp_path, capsys):
    given = {
        "mixup": 0.8,
        "cutmix": 1.0,
        "ema_decay": 0.9,
        "drop_path_rate": 0.1,
        "epochs": 3,
        "base_lr": 0.3,
        "auto_augment": None,
    }
    assert tune(checkpoint, pictures, tmp_path / "whole", **given) == 0
    said = capsys.readouterr().out
    assert "24 images of 64 px" in said and "3 classes: blue, green, red; 12 images to test on" in said
    tests = [json.loads(line) for line in (tmp_path / "whole" / "tests.jsonl").read_text().splitlines()]
    assert [line["step"] for line in tests] == [6, 12, 18] and tests[-1]["top1"] > 0.9 and "ema_top1" in tests[-1]

    parts = tmp_path / "parts"
    assert tune(checkpoint, pictures, parts, **given, options={"save_every": 0.5}) == 0
    for path in [parts / "last.pt", *sorted(parts.glob("checkpoint-*.pt"))[-2:]]:
        path.unlink()
    assert tune(None, None, parts, resume="newest") == 0
    assert logged(parts) == logged(tmp_path / "whole")
    assert (parts / "tests.jsonl").read_text() == (tmp_path / "whole" / "tests.jsonl").read_text()
    assert main(["finetune", "--config", str(parts / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert logged(tmp_path / "again") == logged(parts)

    out = tmp_path / "evaluation"
    assert main(["evaluate", str(parts / "last.pt"), "--out", str(out), "--device", "cpu", "--workers", "0"]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["overall"]["top1"] == tests[-1]["ema_top1"] and set(found["classes"]) == set(KINDS)
    assert found["overall"]["loss"] == pytest.approx(tests[-1]["ema_loss"])
    assert (out / "confusion.png").is_file()
    with pytest.raises(InputError, match=r"out is .*evaluation: holds results already"):
        evaluate(parts / "last.pt", out=out)


def test_a_test_that_a_signal_cut_off_is_made_up_for(pictures, checkpoint, tmp_path, monkeypatch):
    assert tune(checkpoint, pictures, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        signal_after(12, patch)
        assert tune(checkpoint, pictures, tmp_path / "cut") == 143
    assert tune(None, None, tmp_path / "cut", resume="newest") == 0
    assert (tmp_path / "cut" / "tests.jsonl").read_text() == (tmp_path / "whole" / "tests.jsonl").read_text()


def test_a_fine_tuned_network_is_tuned_on_and_probed(pictures, checkpoint, tmp_path):
    assert tune(checkpoint, pictures, tmp_path / "first", epochs=1) == 0
    first = tmp_path / "first" / "last.pt"
    given = {"image_size": 96, "epochs": 1, "base_lr": 1e-12, "min_lr": 0.0}
    assert tune(first, pictures, tmp_path / "second", **given) == 0
    before, after = (load(tmp_path / name / "last.pt", kind=FINETUNING) for name in ("first", "second"))
    assert after.recipe.image_size == 96 and after.data.pretrained == str(first)
    assert_close(after.model["stages.3.0.pwconv1.weight"], before.model["stages.3.0.pwconv1.weight"], 1e-6)
    assert load_pretrained(first).recipe.image_size == 64


def test_files_alone_run_no_code(pictures, checkpoint, tmp_path):
    assert tune(checkpoint, pictures, tmp_path / "run", epochs=1) == 0
    code = "python:no_such_module:make"
    for part, name, value in (("data", "test", code), ("recipe", "transform", code), ("recipe", "masks", "a:b")):
        state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        state[part][name] = value
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=r"runs only with --data python:|expected none"):
            evaluate(tmp_path / "bad.pt")
        with pytest.raises(InputError, match=r"runs only with --test python:|expected none"):
            tune(None, None, tmp_path / "other", resume=str(tmp_path / "bad.pt"))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["data"] |= {"test": None, "folder": code}
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="runs only with --data python:"):
        evaluate(tmp_path / "bad.pt")


def test_images_that_were_held_out_are_those_of_the_run(pictures, checkpoint, tmp_path):
    flat = pictures / "train"
    assert tune(checkpoint, flat, tmp_path / "run", epochs=1) == 0
    found = evaluate(tmp_path / "run" / "last.pt", workers=0, device="cpu")
    tests = json.loads((tmp_path / "run" / "tests.jsonl").read_text())
    assert found.overall()["top1"] == tests["top1"] and len(found.classes) == 6
    (flat / "red").rename(flat / "aaa")
    with pytest.raises(InputError, match=r"data is .*train: its images changed since the run"):
        evaluate(tmp_path / "run" / "last.pt", out=tmp_path / "out")


def test_images_to_test_on_are_looked_at_first(pictures, checkpoint, tmp_path, capsys):
    (pictures / "val" / "red" / "1.png").write_bytes(b"no image")
    assert tune(checkpoint, pictures, tmp_path / "run", epochs=1) == 0
    said = capsys.readouterr().out
    assert "skipped unreadable image red/1.png" in said and "tested on 11 images" in said
    deep = np.zeros((5, 64, 64), np.uint8)
    tifffile.imwrite(pictures / "val" / "blue" / "0.tif", deep, photometric="minisblack", planarconfig="separate")
    with pytest.raises(InputError, match=r"test is .*val: holds blue/0.tif, which"):
        tune(checkpoint, pictures, tmp_path / "other")


def test_two_processes_tune_as_one_does(in_ranks, pictures, checkpoint, tmp_path):  # noqa: F811 (a fixture)
    base = ["finetune", str(checkpoint), f"--data={pictures}", "--device=cpu", "--workers=0", "--random-erasing=0"]
    base += [f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items()]
    ways = {"two": [], "shard": ["--shard", "--ema-decay=0.9"], "odd": ["--batch-size=6", "--mixup=0.8"]}
    runs = in_ranks(*[[2, [*base, f"--output={tmp_path / name}", *more]] for name, more in ways.items()])
    assert [run["codes"] for run in runs] == [[0, 0], [0, 0], [2, 2]], [run["output"] for run in runs]
    assert "expected an even number for each of the 2 processes" in runs[2]["output"][0]
    assert tune(checkpoint, pictures, tmp_path / "one", random_erasing=0.0, ema_decay=0.9) == 0
    for name in ("two", "shard"):
        expect_close(logged(tmp_path / name), logged(tmp_path / "one"))
        found, expected = (
            json.loads((tmp_path / run / "tests.jsonl").read_text().splitlines()[-1]) for run in (name, "one")
        )
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-3)


def encoder():
    return models.ConvNeXtV2Encoder((1, 1), (8, 16), stem=4, strides=2)


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({"model": "timm:resnet18", "method": "spark"}, {}),
        ({"model": "timm:convnextv2_atto"}, {}),
        ({"model": "test_finetune:encoder", "patch_size": 8}, {"model": "test_finetune:encoder"}),
        ({"ndim": 1, "in_chans": 2}, None),
    ],
)
def test_runs_from_every_network(given, more, pictures, tmp_path):
    data = pictures
    if more is None:
        data = tmp_path / "signals"
        for part, kind, number in ((p, k, n) for p in ("train", "val") for k in (0, 1) for n in range(4)):
            (data / part / str(kind)).mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).normal(size=(2, 300)) + np.sin(np.arange(300) / (3 + 3 * kind))
            np.save(data / part / str(kind) / f"{number}.npy", values.astype(np.float32))
        given = {**given, "patch_size": 16, "normalize": "zscore", "crop_area": None}
        more = {}
    assert train(data / "train", tmp_path / "pre", epochs=1, **given) == 0
    path = tmp_path / "pre" / "last.pt"
    assert tune(path, data, tmp_path / "run", **more, epochs=1) == 0
    trained, model = load(path, more.get("model")), tmp_path / "run" / "last.pt"
    tuned = load(model, more.get("model"), FINETUNING)
    assert {
        getattr(tuned.recipe, name) == getattr(trained.recipe, name) for name in ("model", "normalize", "ndim")
    } == {True}
    assert len(logged(tmp_path / "run")) > 0


def test_the_weights_of_the_checkpoint_are_what_training_begins_with(pictures, checkpoint, tmp_path):
    assert tune(checkpoint, pictures, tmp_path / "run", epochs=1, base_lr=1e-12, min_lr=0.0) == 0
    before, after = load(checkpoint).model, load(tmp_path / "run" / "last.pt", kind=FINETUNING).model
    for name, value in before.items():
        if name.startswith("encoder."):
            assert_close(after[name.removeprefix("encoder.")], value, 1e-6)
    assert tune(None, pictures, tmp_path / "scratch", model="atto", epochs=1, base_lr=1e-12, min_lr=0.0) == 0
    other = load(tmp_path / "scratch" / "last.pt", kind=FINETUNING).model
    assert not torch.allclose(other["stages.3.0.pwconv1.weight"], after["stages.3.0.pwconv1.weight"])


def test_a_share_of_the_labels_is_trained_on(pictures, checkpoint, tmp_path, capsys):
    assert tune(checkpoint, pictures, tmp_path / "run", labels=0.5, epochs=1) == 0
    assert "12 images of 64 px" in capsys.readouterr().out
    assert tune(None, None, tmp_path / "run", resume="newest") == 0  # it finds the same images


def learner(**given):
    recipe = FinetuneRecipe(**{**FIELDS, "num_classes": 3, **given})
    made = Classifying(recipe, FinetuneOptions(device="cpu"), *_processes())
    made.connect(None)
    return made


def _processes():
    from sparsecnx.train.processes import Processes

    return Processes(), None


def test_batches_are_mixed_and_erased_as_timm_does_it():
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing

    made = learner(mixup=0.8, cutmix=1.0, random_erasing=0.5, label_smoothing=0.2)
    images, classes = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    for seed in range(6):
        found = made.inputs(Pass(images, {"class": classes}, None, seed))
        again = made.inputs(Pass(images, {"class": classes}, None, seed))
        assert torch.equal(found.images, again.images)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = ((images.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
        with seeded(seed):
            expected = RandomErasing(0.5, mode="pixel", max_count=1, device="cpu")(expected)
            expected, target = Mixup(0.8, 1.0, label_smoothing=0.2, num_classes=3)(expected, classes)
        assert_close(found.images, expected, 1e-6)
        assert_close(found.given["target"], target, 1e-7)
        logits = made.model(found.images)
        assert_close(made.losses(found, None)[0], -(target * logits.log_softmax(1)).sum(1).mean(), 1e-6)


def test_crops_that_pillow_refuses_are_changed_in_another_way(pictures):
    """RandAugment keeps 0 bits at times, of which Pillow 12 makes an error."""
    trained, _ = find_labelled(str(pictures))
    recipe = FinetuneRecipe(**FIELDS, num_classes=3, auto_augment=RAND_AUGMENT)
    crops = LabelledCrops(trained.source, recipe, trained.classes)
    found = [crops[Draw(i % 24, i)] for i in range(300)]
    assert not any(sample.unreadable for sample in found) and len({sample.image.sum().item() for sample in found}) > 200
    assert all(sample.targets["class"] == trained.classes[i % 24] for i, sample in enumerate(found))
    assert torch.equal(crops[Draw(5, 5)].image, found[5].image)


def test_scores_are_those_of_their_definitions():
    generator = np.random.default_rng(0)
    logits, classes = generator.normal(size=(200, 7)).astype(np.float32), generator.integers(0, 7, 200)
    found = Scores(logits, classes, {}).overall()
    order = np.argsort(-logits, axis=1)
    assert found["top1"] == pytest.approx((order[:, 0] == classes).mean())
    assert found["top5"] == pytest.approx((order[:, :5] == classes[:, None]).any(1).mean())
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(chances[np.arange(200), classes]).mean(), rel=1e-5)
    most, right, error = chances.max(1), order[:, 0] == classes, 0.0
    for low in np.arange(15) / 15:
        within = (most > low) & (most <= low + 1 / 15)
        error += within.mean() * abs(most[within].mean() - right[within].mean()) if within.any() else 0
    assert found["calibration_error"] == pytest.approx(error, rel=1e-4)
    for number, one in enumerate(Scores(logits, classes, {}).by_class()):
        assert one["images"] == (classes == number).sum()
        assert one["recall"] == pytest.approx((order[classes == number, 0] == number).mean())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "femto"}, "model is femto: .*last.pt has atto; leave it out, or name another checkpoint"),
        ({"in_chans": 1}, "in_chans is 1: .*last.pt has 3; leave it out"),
        ({"patch_size": 16}, "patch_size is 16: .*last.pt has 32; leave it out"),
        (
            {"mixup": 0.8, "batch_size": 3},
            "batch_size is 3: expected an even number, since mixup takes images in pairs",
        ),
        ({"labels": 0.0}, "labels is 0.0: expected more than 0, at most 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5: expected more than 0, at most 1"),
        ({"layer_decay_type": "stage"}, "layer_decay_type is stage: expected one of single, group"),
        ({"batch_size": 64}, "batch_size is 64: expected at most the 24 images of an epoch"),
    ],
)
def test_what_does_not_fit_is_named(given, said, pictures, checkpoint, tmp_path):
    with pytest.raises(InputError, match=said):
        tune(checkpoint, pictures, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_other_commands_and_classes_are_named(pictures, checkpoint, tmp_path):
    assert tune(checkpoint, pictures, tmp_path / "run", epochs=1) == 0
    with pytest.raises(InputError, match="recipe is of another command than sparsecnx finetune"):
        evaluate(checkpoint)
    assert main(["pretrain", "--resume", "--output", str(tmp_path / "run")]) == 2
    (pictures / "val" / "red").rename(pictures / "val" / "pink")
    with pytest.raises(InputError, match=r"test is .*val: has the class pink, and"):
        tune(None, None, tmp_path / "run", resume="newest")
    with pytest.raises(InputError, match=r"data is .*val: has the class pink, which the run has not; expected blue"):
        evaluate(tmp_path / "run" / "last.pt")
    (pictures / "val" / "pink").rename(pictures / "val" / "red")
    Image.new("RGB", (64, 64)).save(pictures / "train" / "red" / "new.png")
    with pytest.raises(InputError, match="25 image files, not the 24 that the run was started with"):
        tune(None, None, tmp_path / "run", resume="newest")
