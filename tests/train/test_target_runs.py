"""A run may predict several targets of an image: crops of all of them belong together, and the losses are MPMAE's."""

import itertools
import json

import many_targets
import numpy as np
import pytest
import torch
import yaml
from cases import assert_close
from many_targets import TARGETS
from PIL import Image
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
        height = (rows[::2, ::2] // 2 + columns[::2, ::2] // 2 / 100) / 10  # blocks of four pixels, mirrored or not
        assert_close(targets["height"][0], height, 1e-6)
        assert torch.equal(targets["weather"], torch.tensor([1.0, -1.0])) and targets["biome"] == 1


def test_targets_of_resized_crops_keep_their_places():
    for seed in range(20):
        image, targets, *_ = crops(crop_area=0.3)[Draw(1, seed)]
        rows, columns = 100 * image
        inner = (slice(4, -4), slice(4, -4))  # bicubic edges differ
        assert_close(targets["radar"][0][inner], rows[inner], 1e-4)
        half = torch.nn.functional.avg_pool2d(image[None] * 100, 2)[0]
        height = (half[0] - 0.5 + (half[1] - 0.5) / 100) / 20
        assert_close(targets["height"][0, 4:-4, 4:-4], height[4:-4, 4:-4], 1e-3)
        classes = (rows.round() + 2 * columns.round()) % 7
        assert targets["cover"].shape == classes.shape and set(targets["cover"].unique().tolist()) <= set(range(7))


def test_crops_begin_anywhere_where_a_map_is_coarse():
    """A map of 12 x 12 for 96 pixels: crops of 64 begin at each fifth part of the rest equally often."""
    targets = {"coarse": {"type": "image", "channels": 1, "patch_size": 4}}
    coarse = {"coarse": np.zeros((1, 12, 12), np.float32)}
    reader, starts = crops(crop_area=None, targets=targets), torch.zeros(97)
    reader.source.values = lambda index: coarse
    for seed in range(500):
        rows = 100 * reader[Draw(0, seed)].image[0, :, 0]
        starts[int(rows.min().round())] += 1
    assert starts.nonzero().flatten().tolist() == [0, 8, 16, 24, 32] and starts[starts > 0].min() > 60


def test_crops_have_whole_pixels_of_every_map(tmp_path):
    """A map of 4 x 4 for 96 pixels does not fit crops of 64, and one of 3 x 3 leaves hardly any that are resized."""
    given = {**FIELDS, "targets": {"coarse": {"type": "image", "channels": 1, "patch_size": 1}}}
    with pytest.raises(InputError) as caught:
        train("python:many_targets:coarse", tmp_path / "run", **given, crop_area=None)
    problem = "has coarse of 4x4 values for 96x96 pixels, whose pixels begin together every 24x24"
    assert f"{problem}: expected crops, now of 64x64, that are a multiple of them" in str(caught.value)
    with pytest.raises(InputError) as caught:
        train("python:many_targets:coarser", tmp_path / "run", **given)
    problem = "has coarse of 3x3 values for 96x96 pixels, whose pixels begin together every 32x32"
    assert f"{problem}: expected 4 such steps or more" in str(caught.value)


def test_boxes_of_a_map_that_is_coarse_on_one_axis_differ():
    """They are drawn in pixels, and begin and end where pixels of the map do."""
    reader = crops(targets={"coarse": {"type": "image", "channels": 1, "patch_size": (32, 4)}}, crop_area=0.2)
    reader.source.values = lambda index: {"coarse": np.arange(96 * 12, dtype=np.float32).reshape(1, 96, 12)}
    seen = []
    reader._cut = lambda entry, start, box: seen.append((*start, *box)) or torch.zeros(2, 64, 64)
    for seed in range(60):
        reader.crop(0, seed)
    assert len(set(seen)) > 50
    for top, left, height, width in seen:
        assert left % 8 == width % 8 == 0 and width and top + height <= 96 and left + width <= 96
        assert height * width >= 0.15 * 96**2


def test_a_crop_without_any_value_predicts_nothing(tmp_path):
    """Networks of real size have infinite gradients where all of the input is 0."""
    targets = {"weather": TARGETS["weather"], "cover": {**TARGETS["cover"], "loss_on": "all"}}
    given = {**FIELDS, "targets": targets, "model": "nano", "epochs": 1}
    assert train("python:many_targets:half_empty", tmp_path / "run", **given) == 0
    norms = [line["grad_norm"] for line in logged(tmp_path / "run")]
    assert max(norms) < 1e3 and sum(norm > 0 for norm in norms) >= 3


def test_items_may_hold_tensors_pictures_and_bool():
    reader = crops(crop_area=None)
    item = many_targets.Tiles()[0]
    item |= {"radar": torch.from_numpy(item["radar"]).bfloat16().requires_grad_(), "biome": True}
    item["cover"] = Image.fromarray(item["cover"])
    reader.source.values = lambda index: item
    image, targets, unreadable, _ = reader[Draw(0, 0)]
    rows, columns = (100 * image).round()
    assert not unreadable and targets["biome"] == 1
    assert torch.equal(targets["cover"], ((rows + 2 * columns) % 7).long())
    assert_close(targets["radar"][0], rows, 0.5)


def test_infinities_of_a_target_are_no_values_and_do_not_spread():
    reader = crops(crop_area=0.5)
    item = many_targets.Tiles()[0]
    item["radar"][:, 40, 40] = np.inf
    reader.source.values = lambda index: item
    radar = reader[Draw(0, 3)].targets["radar"]
    assert not radar.isinf().any() and radar.isnan().sum() <= 3 * 4 and radar.nan_to_num(0).abs().max() < 200


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
        ("flat_radar", "targets is item 3: has radar of the shape (3, 96): expected (3, height, width)"),
        ("odd_cover", "has cover of 60x60 values for 96x96 pixels: expected a multiple or an equal part"),
        ("high_class", "cover has the value 7: expected 0 to 6, or 255 for none"),
        ("fine_height", "has height of 64x64 values in a crop: its patch_size expects 32x32"),
        ("text_biome", "has biome of <U6: expected numbers"),
        ("half_class", "has biome of float64: expected whole numbers, classes"),
        ("flat_cover", "has cover of the shape (96,): expected (height, width)"),
    ],
)
def test_targets_that_do_not_fit_are_named_before_the_first_step(data, said, tmp_path):
    with pytest.raises(InputError) as caught:
        train(f"python:many_targets:{data}", tmp_path / "run", **FIELDS, crop_area=None)
    assert said.replace("item 3: ", "item 3: ") in str(caught.value) and not (tmp_path / "run").exists()


def test_batches_that_are_accumulated_have_the_losses_of_one(tmp_path):
    """Two of eight images have a biome, so that most batches have none."""
    for passes in (1, 4):
        sizes = {"batch_size": 8 // passes, "grad_accum_steps": passes, "crop_area": None}
        assert train("python:many_targets:rare", tmp_path / str(passes), **FIELDS, **sizes) == 0
    for line, other in zip(logged(tmp_path / "1"), logged(tmp_path / "4"), strict=True):
        assert line["losses"]["biome"] > 1
        assert other["losses"]["biome"] == pytest.approx(line["losses"]["biome"], rel=0.1)  # other masks are drawn


def test_a_step_without_a_value_has_no_loss(tmp_path):
    assert train("python:many_targets:rare", tmp_path / "run", **{**FIELDS, "batch_size": 1}) == 0
    assert sum("biome" in line["losses"] for line in logged(tmp_path / "run")) == 2 * 2  # two images, two epochs


def test_a_step_with_nothing_to_learn_changes_no_weight(tmp_path, capsys):
    """Two of eight images have the only target."""
    given = {**FIELDS, "batch_size": 1, "epochs": 1, "targets": {"biome": TARGETS["biome"]}}
    assert train("python:many_targets:rare", tmp_path / "run", **given, options={"save_every": 1 / 8, "keep": 8}) == 0
    said, lines = capsys.readouterr().out, logged(tmp_path / "run")
    idle = {line["step"] for line in lines if not line.get("losses")}
    assert len(lines) == 8 and len(idle) == 6
    assert all(f"step {step}: no value of its images counts in the loss, so no weight changes" in said for step in idle)
    saved = [load(path) for path in sorted((tmp_path / "run").glob("checkpoint-*.pt"))]
    assert [one.step for one in saved] == list(range(1, 9))
    for before, after in itertools.pairwise(saved):
        alike = all(torch.equal(value, after.model[name]) for name, value in before.model.items())
        assert alike == (after.step in idle)


def test_changed_targets_are_not_the_data_of_a_run():
    prints = {name: find_source(f"python:many_targets:{name}").fingerprint() for name in ("tiles", "other_classes")}
    assert prints["tiles"].contents != prints["other_classes"].contents
    assert prints["tiles"] == find_source(DATA).fingerprint()


def test_a_picture_and_its_maps_are_turned_alike(tmp_path):
    given = {"in_chans": 1, "value_range": (0, 255), "mean": (0,), "std": (1,), "normalize": "dataset"}
    targets = {"cover": {"type": "class_map", "classes": 256}}
    given = {**FIELDS, **given, "crop_area": None, "targets": targets}
    image, values, *_ = Crops(find_source("python:many_targets:turned"), Recipe(**given))[Draw(0, 0)]
    assert len(image.unique()) > 64 and torch.equal(image[0].long(), values["cover"])
    reader = Crops(find_source("python:many_targets:turned_tiff"), Recipe(**given))
    image, values, *_ = reader[Draw(0, 0)]
    assert torch.equal(image[0].long(), values["cover"])
    for data in ("turned_image", "turned_cover", "turned_image_beside_array", "turned_tiff_beside_array"):
        with pytest.raises(InputError, match="has cover that EXIF data do not turn as they turn its image"):
            train(f"python:many_targets:{data}", tmp_path / "run", **given)


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
        ({"targets": {"a.b": IMAGE}}, "targets is 'a.b': expected a name of 1 to 200 letters, digits"),
        ({"targets": {"NDVI (%)": IMAGE}}, "targets is 'NDVI (%)': expected a name"),
        ({"targets": {3: IMAGE}}, "targets is 3: expected a name"),
        (
            {"targets": {"a": {**IMAGE, "weight": 2}}, "uncertainty": True},
            "weight of a is 2: expected 1, since uncertainty learns the weights",
        ),
        ({"targets": None, "uncertainty": True}, "uncertainty is True: expected False, since there are no targets"),
        ({"method": "spark"}, "method is spark: expected fcmae, that of targets"),
        ({"loss_on": "all"}, "loss_on is all: expected masked, since each target has its own"),
        ({"targets": {"a": {**IMAGE, "type": [1]}}}, "expected a type, image, class_map"),
        ({"targets": {"half": IMAGE}}, "targets is half: targets has the name 'half': expected text without a dot"),
        (
            {"targets": {"a": {"type": "classification", "classes": 2, "ignore_index": 10**23}}},
            "expected a number of 64 bits",
        ),
        ({"ndim": 3, "patch_size": 16, "crop_area": None}, "targets is radar: expected image alone"),
        ({"transform": "a:b"}, "transform is a:b: expected None, since targets would not follow it"),
    ],
)
def test_recipes_with_other_targets_are_named(given, said):
    with pytest.raises(InputError) as caught:
        Recipe(**{**FIELDS, **given})
    assert said in str(caught.value)
