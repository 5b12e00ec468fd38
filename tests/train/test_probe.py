"""Probes: labelled images of every source, and classifiers of frozen features."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from small_runs import train

from sparsecnx.cli import main
from sparsecnx.common.errors import InputError
from sparsecnx.models import ConvNeXtV2Encoder
from sparsecnx.models.convnextv2 import SIZES
from sparsecnx.train.contents import load
from sparsecnx.transfer.features import features, load_pretrained, pooled
from sparsecnx.transfer.labels import find_labelled, subset
from sparsecnx.transfer.probe import linear, nearest, probe

KINDS = ("blue", "green", "red")


def picture(kind, generator):
    """Return noise with more of a colour."""
    noise = generator.integers(0, 128, (64, 64, 3))
    noise[..., 2 - KINDS.index(kind)] += 100
    return noise.astype(np.uint8)


def write(folder, count, kinds=KINDS):
    generator = np.random.default_rng(len(str(folder)) + count)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(kind, generator)).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    write(tmp_path / "pictures" / "train", 12)
    write(tmp_path / "pictures" / "val", 5)
    return tmp_path / "pictures"


@pytest.fixture
def checkpoint(pictures, tmp_path):
    assert train(pictures / "train", tmp_path / "run", epochs=1) == 0
    return tmp_path / "run" / "last.pt"


def test_a_probe_tells_classes_apart(pictures, checkpoint, tmp_path, capsys):
    out = tmp_path / "probe"
    arguments = ["probe", str(checkpoint), "--data", str(pictures), "--out", str(out), "--device=cpu", "--workers=0"]
    assert main([*arguments, "--labels", "0.25", "1", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "36 images to train on, 15 to test on, 3 classes: blue, green, red" in said
    found = json.loads((out / "probe.json").read_text())
    scores = {(one["features"], one["probe"], one["share"]): one["accuracies"] for one in found["scores"]}
    assert list(dict.fromkeys(name for name, *_ in scores)) == [str(checkpoint), "random weights", "pixels"]
    assert len(scores) == 3 * 2 * 2 and all(0 <= min(values) <= max(values) <= 1 for values in scores.values())
    assert [len(scores[str(checkpoint), "linear", share]) for share in (0.25, 1)] == [2, 1]
    assert [len(scores["random weights", "knn", share]) for share in (0.25, 1)] == [2, 2]
    assert scores[str(checkpoint), "linear", 1][0] > 0.9
    table = said[said.index("labels ") :].splitlines()
    assert table[0].split() == ["labels", "25%", "(9)", "25%", "(9)", "100%", "(36)", "100%", "(36)"]
    assert table[2].split()[-1] == f"{100 * scores[str(checkpoint), 'linear', 1][0]:.1f}"
    assert all(Image.open(out / name).size[0] > 300 for name in ("confusion.png", "curves.png"))
    assert main(arguments) == 2 and "holds results already" in capsys.readouterr().err


def test_features_are_means_of_the_last_map(pictures, checkpoint):
    network, skipped = load_pretrained(checkpoint), {}
    part, _ = find_labelled(str(pictures))
    found, classes = features(pooled(network.encoder), part, network.recipe, torch.device("cpu"), 0, skipped)
    encoder = ConvNeXtV2Encoder(SIZES["atto"].depths, SIZES["atto"].dims).eval()
    saved = load(checkpoint).model
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in saved.items() if k.startswith("encoder.")})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for row, index in ((0, 0), (17, 17), (35, 35)):
        pixels = torch.from_numpy(np.array(Image.open(pictures / "train" / part.source.name(index)))) / 255
        expected = encoder(((pixels - mean) / std).permute(2, 0, 1)[None]).mean((2, 3))[0]
        assert np.allclose(found[row], expected.detach(), atol=1e-5) and classes[row] == row // 12
    assert not skipped


def test_a_network_that_goes_on_dense_below_its_patch_is_probed(pictures, tmp_path):
    given = {"model": "timm:resnet18", "method": "spark", "patch_size": 16, "below_tile": "dense"}
    assert train(pictures / "train", tmp_path / "run", epochs=1, **given) == 0
    network = load_pretrained(tmp_path / "run" / "last.pt")
    saved = load(tmp_path / "run" / "last.pt").model
    assert torch.equal(network.encoder.conv1.weight, saved["encoder.conv1.weight"])
    assert pooled(network.encoder)(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


def test_images_of_other_sizes_are_whole_and_centred(checkpoint, tmp_path):
    generator = np.random.default_rng(0)
    for kind in KINDS:
        (tmp_path / "wide" / kind).mkdir(parents=True)
        wide = np.repeat(np.repeat(picture(kind, generator), 2, axis=0), 2, axis=1)
        wide = np.concatenate([np.zeros((128, 16, 3), np.uint8), wide, np.zeros((128, 16, 3), np.uint8)], axis=1)
        for number in range(2):
            Image.fromarray(wide).save(tmp_path / "wide" / kind / f"{number}.png")
    network = load_pretrained(checkpoint)
    part, _ = find_labelled(str(tmp_path / "wide"))
    seen = []
    features(lambda images: seen.append(images) or images.flatten(1), part, network.recipe, torch.device("cpu"), 0, {})
    assert seen[0].shape[1:] == (3, 64, 64) and (seen[0][..., 0].mean(1) > -1.7).any()  # no black bar at the left


def test_weights_of_other_programs_need_the_name_of_their_network(pictures, tmp_path):
    encoder = ConvNeXtV2Encoder(SIZES["atto"].depths, SIZES["atto"].dims)
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"checkpoint is .*weights that are no run need --model NAME"):
        load_pretrained(tmp_path / "weights.pt")
    found = load_pretrained(tmp_path / "weights.pt", "atto", 64)
    assert torch.equal(found.encoder.stages[3][0].norm.weight, encoder.stages[3][0].norm.weight)
    with pytest.raises(InputError, match=r"checkpoint is .*weights.pt is a ConvNeXt V2 atto .*expected"):
        load_pretrained(tmp_path / "weights.pt", "femto", 64)


def test_the_classifiers_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 8)) * 2
    classes, asked = np.repeat(np.arange(3), 40), np.repeat(np.arange(3), 10)
    images, tested = (centres[part] + generator.normal(size=(len(part), 8)) for part in (classes, asked))
    cosines = (tested / np.linalg.norm(tested, axis=1, keepdims=True)) @ (
        images / np.linalg.norm(images, axis=1, keepdims=True)
    ).T
    for number, row in enumerate(nearest(images, classes, tested)):
        closest = np.argsort(-cosines[number])[:20]
        votes = np.bincount(classes[closest], np.exp(cosines[number][closest] / 0.07), 3)
        assert row == votes.argmax()
    best = max(
        (LogisticRegression(C=1 / (penalty * 120)).fit(images, classes).score(tested, asked))
        for penalty in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    )
    assert (linear(images, classes, tested) == asked).mean() >= best - 0.07


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1])
def test_a_share_of_the_labels_has_all_classes(share):
    classes = np.repeat(np.arange(3), (10, 100, 1000))
    chosen = subset(classes, share, 1)
    counts = np.bincount(classes[chosen])
    assert counts.tolist() == [max(1, round(share * count)) for count in (10, 100, 1000)]
    assert len(set(chosen)) == len(chosen) and (share == 1 or not np.array_equal(chosen, subset(classes, share, 2)))


def test_a_fifth_is_held_out_where_there_is_no_other_part(tmp_path):
    folder = str(write(tmp_path / "alone", 10))
    trained, tested = find_labelled(folder)
    names = [{part.source.name(i) for i in range(len(part.source))} for part in (trained, tested)]
    assert list(map(len, names)) == [24, 6] and not names[0] & names[1]
    assert np.bincount(tested.classes).tolist() == [2, 2, 2]


def test_images_that_cannot_be_read_are_named(pictures, checkpoint, tmp_path, capsys):
    (pictures / "train" / "green" / "3.png").write_bytes(b"no image")
    probe([checkpoint], str(pictures), tmp_path / "probe", shares=(1,), workers=0, baselines=False)
    assert "skipped green/3.png (" in capsys.readouterr().out
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["skipped"] == 1


def other_classes(folder):
    (folder / "val" / "red").rename(folder / "val" / "other")


def no_folder(folder):
    Image.new("RGB", (64, 64)).save(folder / "train" / "a.png")


def one_class(folder):
    for kind in ("green", "red"):
        for path in (folder / "train" / kind).iterdir():
            path.unlink()


def three_parts(folder):
    (folder / "test").mkdir()


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (other_classes, {}, "test is .*val: has the class other, and .*train has not"),
        (no_folder, {}, "data is .*train: holds a.png, which is in no folder of a class"),
        (one_class, {}, "data is .*train: has 1 classes .blue.; expected 2"),
        (three_parts, {}, "data is .*pictures: has val, test beside train; expected one folder"),
        (None, {"shares": (0,)}, "labels is .0,.: expected shares of the labels, more than 0, at most 1"),
        (
            None,
            {"shares": (0.01,)},
            "labels is 0.01: expected larger shares: 0.01 of the images of blue",
        ),
        (None, {"seeds": 0}, "seeds is 0: expected 1 or more"),
        (None, {"image_size": 70}, "image_size is 70: expected a multiple of the patch size"),
        (None, {"test": "nowhere"}, "test is nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_named(change, given, said, pictures, checkpoint, tmp_path):
    if change is not None:
        change(pictures)
    with pytest.raises(InputError, match=said):
        probe([checkpoint], str(pictures), tmp_path / "probe", workers=0, **given)
    assert not (tmp_path / "probe").exists()


class Pairs:
    classes = ("ape", "bee")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.full((64, 64, 3), index, np.uint8), index % 2


class Dicts(Pairs):
    classes = None
    wrong = None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": torch.tensor(10 - label) if index or self.wrong is None else self.wrong}


class Wrong(Dicts):
    wrong = 1.5


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("python:test_probe:Pairs", ("ape", "bee")),
        ("python:test_probe:Dicts", ("9", "10")),
        ("torchvision:FakeData?size=30&num_classes=3", ("0", "1", "2")),
    ],
)
def test_labels_of_items(data, names):
    if data.startswith("torchvision"):
        pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    trained, tested = find_labelled(data)
    assert trained.names == names and set(trained.classes) == set(tested.classes) == set(range(len(names)))
    if data.endswith("Pairs"):
        assert trained.classes.tolist() == [place % 2 for place in trained.source.places]


def test_labels_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    kinds = datasets.Features({"image": datasets.Image(), "animal": datasets.ClassLabel(names=["ape", "bee"])})
    images = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": images, "animal": [0, 1, 0, 1, 0, 1]}, features=kinds)
    rows.save_to_disk(tmp_path / "saved")
    trained, _ = find_labelled(f"hf:{tmp_path}/saved")
    assert trained.names == ("ape", "bee") and trained.classes.tolist() == [
        place % 2 for place in trained.source.places
    ]
    rows.add_column("size", [1, 1, 1, 2, 2, 2]).save_to_disk(tmp_path / "two")
    assert find_labelled(f"hf:{tmp_path}/two?label=size")[0].names == ("1", "2")
    with pytest.raises(InputError, match="has no column sort; its columns are image, animal, size"):
        find_labelled(f"hf:{tmp_path}/two?label=sort")


def test_labels_that_are_none_are_named():
    with pytest.raises(InputError, match=r"item 0 has the label 1.5; expected a whole number or text"):
        find_labelled("python:test_probe:Wrong")
