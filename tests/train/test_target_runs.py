"""A run may predict several targets of an image: crops of all of them belong together, and the losses are MPMAE's."""

import json

import many_targets
import numpy as np
import pytest
import torch
import yaml
from cases import assert_close
from many_targets import TARGETS
from small_runs import SMALL, logged, train

from sparsecnx import load_encoder, models
from sparsecnx.cli import main
from sparsecnx.common.errors import InputError
from sparsecnx.train.contents import load
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_source
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

DATA = "python:many_targets:tiles"
FIELDS = {"image_size": 64, "decoder_dim": 16, "in_chans": 2, "normalize": "none", "targets": TARGETS}


def crops(**given):
    recipe = Recipe(**{**FIELDS, **given})
    return Crops(find_source(DATA), recipe)


def test_targets_of_a_crop_belong_to_its_pixels():
    for seed in range(20):
        image, targets, unreadable, _ = crops(crop_area=None)[Draw(1, seed)]
        rows, columns = (100 * image).round()
        assert not unreadable and image.shape == (2, 64, 64)
        assert torch.equal(targets["radar"], torch.stack([rows, columns, rows + columns]))
        assert torch.equal(targets["cover"], ((rows + 2 * columns) % 7).long())
        height = 100 * (rows[::2, ::2] // 2) + columns[::2, ::2] // 2  # the same blocks of four pixels, mirrored or not
        assert torch.equal(targets["height"][0], height)
        assert torch.equal(targets["weather"], torch.tensor([1.0, -1.0])) and targets["biome"] == 1


def test_targets_of_resized_crops_keep_their_places():
    for seed in range(20):
        image, targets, *_ = crops(crop_area=0.3)[Draw(1, seed)]
        rows, columns = 100 * image
        inner = (slice(4, -4), slice(4, -4))  # bicubic edges differ
        assert_close(targets["radar"][0][inner], rows[inner], 1e-4)
        half = torch.nn.functional.avg_pool2d(image[None] * 100, 2)[0]
        assert_close(targets["height"][0, 4:-4, 4:-4], (100 * half[0] + half[1] - 50.5)[4:-4, 4:-4] / 2, 0.6)
        classes = (rows.round() + 2 * columns.round()) % 7
        assert targets["cover"].shape == classes.shape and set(targets["cover"].unique().tolist()) <= set(range(7))


def test_what_an_image_does_not_have_is_no_value():
    _, targets, *_ = crops()[Draw(2, 0)]
    assert targets["radar"].shape == (3, 64, 64) and targets["radar"].isnan().all()
    assert (targets["cover"] == 255).all() and targets["cover"].shape == (64, 64)
    assert targets["weather"].isnan().all() and targets["biome"] == -100


def config(tmp_path, **given):
    path = tmp_path / "many.yaml"
    path.write_text(
        yaml.safe_dump({"data": DATA, **SMALL, **FIELDS, "device": "cpu", "workers": 0, **given}, sort_keys=False)
    )
    return str(path)


def test_a_run_predicts_several_targets_and_goes_on(tmp_path, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    path = config(tmp_path, draw_every=1, ema_decay=0.9)
    assert main(["pretrain", "--config", path, "--output", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "predicts image (image), radar (image), height (image), cover (class_map), weather (regression)" in said
    assert list((whole / "reconstructions").iterdir())

    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(list(line["losses"]) == list(TARGETS) for line in lines)
    weights = {name: values.get("weight", 1) for name, values in TARGETS.items()}
    for line in lines:
        total = sum(weights[name] * loss for name, loss in line["losses"].items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)

    assert main(["pretrain", "--config", str(whole / "config.yaml"), "--output", str(half), "--device=cpu"]) == 0
    assert logged(half) == logged(whole)  # config.yaml is the run
    newest = whole / "last.pt"
    saved = load(newest)
    assert saved.recipe.targets == TARGETS
    model = build_model(saved.recipe)
    assert isinstance(model, models.MPMAE)
    model.load_state_dict(saved.model)
    encoder = build_model(saved.recipe).encoder
    load_encoder(encoder, newest)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
    array = tmp_path / "image.npy"
    np.save(array, many_targets.Tiles()[0]["image"])
    assert reconstruct(newest, [array], tmp_path / "picture.png") > 0


def test_a_run_that_was_stopped_has_the_same_losses(tmp_path):
    given = {"uncertainty": True, "targets": {k: {**v, "weight": 1.0} for k, v in TARGETS.items()}}
    fields = {**FIELDS, **given, "crop_area": None}
    assert train(DATA, tmp_path / "whole", **fields) == 0
    assert train(DATA, tmp_path / "parts", epochs=2, **fields, options={"save_every": 0.25}) == 0
    folder = tmp_path / "parts"
    for path in sorted(folder.glob("checkpoint-*.pt"))[-1:]:
        path.unlink()
    (folder / "last.pt").unlink(missing_ok=True)
    assert train(DATA, folder, resume="newest") == 0
    assert logged(folder) == logged(tmp_path / "whole")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("without_cover", "item 3: has no cover: expected a value, or None where there is none"),
        ("flat_radar", "targets is item 3: has a target that does not fit: radar is (1, 3, 96): expected"),
        ("odd_cover", "has cover of 60x60 values for 96x96 pixels: expected a multiple or an equal part"),
        ("high_class", "cover has the value 7: expected 0 to 6, or 255 for none"),
        ("fine_height", "has height of 64x64 values in a crop: its patch_size expects 32x32"),
        ("text_biome", "has biome of <U6: expected numbers"),
        ("half_class", "has biome of float64: expected whole numbers, classes"),
    ],
)
def test_targets_that_do_not_fit_are_named_before_the_first_step(data, said, tmp_path):
    with pytest.raises(InputError) as caught:
        train(f"python:many_targets:{data}", tmp_path / "run", **FIELDS, crop_area=None)
    assert said.replace("item 3: ", "item 3: ") in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_of_images_has_no_other_targets(photos, tmp_path):
    only = {"image": {"type": "image", "channels": 3, "norm_pix_loss": True}}
    assert train(photos, tmp_path / "run", targets=only) == 0
    assert [line["losses"]["image"] for line in logged(tmp_path / "run")] == [
        line["loss"] for line in logged(tmp_path / "run")
    ]
    with pytest.raises(InputError, match=r"targets is .*photos: holds images alone; expected --data python:"):
        train(photos, tmp_path / "other", targets={**only, "biome": {"type": "classification", "classes": 2}})


IMAGE = {"type": "image", "channels": 2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": {}}, "targets is {}: expected one or more"),
        ({"targets": {"a": 3}}, "targets is a: 3: expected a type, image, class_map"),
        ({"targets": {"a": {"type": "audio"}}}, "expected a type, image, class_map, regression, classification"),
        ({"targets": {"a": {"type": "image"}}}, "expected channels too"),
        ({"targets": {"a": {**IMAGE, "chans": 3}}}, "targets is a: chans: expected one of type, "),
        ({"targets": {"a": {"type": "image", "channels": "3"}}}, "targets is a: channels is '3': expected int"),
        ({"targets": {"a": {"type": "image", "channels": 0}}}, "channels is 0: expected 1 or more"),
        ({"targets": {"a": {**IMAGE, "patch_size": [16]}}}, "expected a patch_size of two dimensions"),
        ({"targets": {"a": {**IMAGE, "channels": 10**6}}}, "values in a patch, not 1024000000"),
        ({"targets": {"image": {**IMAGE, "channels": 3}}}, "expected {type: image, channels: 2} without a patch_size"),
        ({"targets": {"a.b": IMAGE}}, "a.b"),
        (
            {"targets": {"a": {**IMAGE, "weight": 2}}, "uncertainty": True},
            "weight of a is 2: expected 1, since uncertainty learns the weights",
        ),
        ({"targets": None, "uncertainty": True}, "uncertainty is True: expected False, since there are no targets"),
        ({"method": "spark"}, "method is spark: expected fcmae, that of targets"),
        ({"loss_on": "all"}, "loss_on is all: expected masked, since each target has its own"),
        ({"norm_pix_loss": False}, "norm_pix_loss is False: expected True, since each image target has its own"),
        ({"transform": "a:b"}, "transform is a:b: expected None, since targets would not follow it"),
    ],
)
def test_recipes_with_other_targets_are_named(given, said):
    with pytest.raises(InputError) as caught:
        Recipe(**{**FIELDS, **given})
    assert said in str(caught.value)
