"""Runs of SparK and of networks of timm: training, checkpoints, and the way into timm's own models."""

from __future__ import annotations

import importlib.util
import signal

import pytest
import torch
from small_runs import logged, train

from sparsecnx import load_encoder
from sparsecnx.cli import main
from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.models import SparK
from sparsecnx.nn import ConvNeXtBlock
from sparsecnx.train import contents, networks
from sparsecnx.train.loop import Trainer
from sparsecnx.train.options import Options
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.schedule import param_groups
from sparsecnx.train.start import pretrain

timm = pytest.importorskip("timm")
RUN = {"method": "spark", "model": "timm:test_resnet", "base_lr": 0.01}


@pytest.fixture
def run(photos, tmp_path):
    """Return the folder of a run of two epochs of four steps."""
    assert train(photos, tmp_path / "run", **RUN) == 0
    return tmp_path / "run"


def encoder_of(run):
    saved = contents.load(run / "last.pt").model
    return {name.removeprefix("encoder."): value for name, value in saved.items() if name.startswith("encoder.")}


def test_a_run_loads_strictly_into_the_unmodified_network(run):
    recipe = contents.load(run / "last.pt").recipe
    assert (recipe.method, recipe.model) == ("spark", "timm:test_resnet")
    trained = encoder_of(run)
    timm.create_model("test_resnet", num_classes=0).load_state_dict(trained, strict=True)

    network = timm.create_model("test_resnet", num_classes=10)
    assert load_encoder(network, run / "last.pt") == ["fc.weight", "fc.bias"]
    assert all(torch.equal(network.state_dict()[name], value) for name, value in trained.items())
    assert network.bn1.num_batches_tracked == 8 and network.bn1.running_var.ne(1).any()
    features, x = timm.create_model("test_resnet", features_only=True).eval(), torch.randn(2, 3, 64, 64)
    assert load_encoder(features, run / "last.pt") == []
    assert torch.equal(features(x)[-1], network.eval().forward_features(x))


@pytest.mark.parametrize("trained_as", [{"num_classes": 0}, {"features_only": True}], ids=["plain", "features_only"])
@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("resnet18", "fc"),
        ("convnext_atto", "head.fc"),
        ("efficientnet_b0", "classifier"),
        ("mobilenetv3_small_100", "classifier"),
        ("regnety_002", "head.fc"),
        ("densenet121", "classifier"),
    ],
)
def test_weights_load_into_every_form_of_a_network(name, new, trained_as):
    encoder = timm.create_model(name, **trained_as)
    autoencoder = {f"encoder.{entry}": value for entry, value in encoder.state_dict().items()}
    autoencoder["mask_tokens.0"] = torch.zeros(1)
    network = timm.create_model(name, num_classes=3)
    kept = load_encoder(network, autoencoder)
    assert kept[-2:] == [f"{new}.weight", f"{new}.bias"]
    if "features_only" not in trained_as:
        assert len(kept) == 2
    for options in ({}, {"out_indices": (1, 2)}):
        assert load_encoder(timm.create_model(name, features_only=True, **options), autoencoder) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_efficientnet", {}, "holds conv1.0.weight, which the model, a EfficientNet, has not: expected the same"),
        ("test_resnet", {"layers": (2, 2, 2, 2)}, "lacks layer1.1.conv1.weight, which the model, a ResNet, has"),
        (
            "test_resnet",
            {"in_chans": 1},
            r"conv1.0.weight of the model, a ResNet, is \(16, 1, 3, 3\), expected \(16, 3, 3, 3\)",
        ),
        ("test_resnet", {"layers": (2, 2, 2, 2), "features_only": True}, "lacks layer1.1.conv1.weight"),
    ],
)
def test_another_network_is_refused(run, name, options, message):
    network = timm.create_model(name, **options)
    before = {entry: value.clone() for entry, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_encoder(network, run / "last.pt")
    assert all(torch.equal(value, before[entry]) for entry, value in network.state_dict().items())


def test_convert_and_reconstruct(run, tmp_path, capsys):
    out = tmp_path / "network.safetensors"
    assert main(["convert", str(run / "last.pt"), str(out), "--to", "timm"]) == 0
    network = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(out))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in encoder_of(run).items())
    assert "left out, because timm has no place for them" in capsys.readouterr().out
    assert main(["convert", str(run / "last.pt"), str(out), "--to", "convnextv2"]) == 2
    assert "--to is convnextv2: expected timm, since IN holds no ConvNeXt of sparsecnx" in capsys.readouterr().err
    assert main(["reconstruct", str(run / "last.pt"), "--out", str(tmp_path / "grid.png")]) == 0


def test_a_resumed_run_goes_on_with_the_same_losses(run, photos, tmp_path, monkeypatch):
    step = Trainer.train_step

    def stop_after_three(self, *arguments):
        record = step(self, *arguments)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_three)
        assert train(photos, tmp_path / "stopped", **RUN) == 130
    assert train(photos, tmp_path / "stopped", resume="newest") == 0
    assert logged(tmp_path / "stopped") == logged(run)
    for given in ({"method": "fcmae"}, {"model": "timm:test_efficientnet"}, {"model": "atto"}):
        ((field, value),) = given.items()
        with pytest.raises(InputError, match=f"{field} is {value}: the run to resume has {RUN[field]}"):
            train(photos, tmp_path / "stopped", resume="newest", **given)


def test_spark_of_our_own_networks(photos, tmp_path):
    assert train(photos, tmp_path / "run", method="spark", epochs=1) == 0
    network = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=2)
    kept = load_encoder(network, tmp_path / "run/last.pt")
    assert kept == ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"]
    out = tmp_path / "encoder.safetensors"
    assert main(["convert", str(tmp_path / "run/last.pt"), str(out), "--to", "timm"]) == 0


def test_fields_of_our_own_networks_reach_the_model():
    given = {"stem_type": "conv3x3", "norm_eps": 1e-5, "grn_eps": 1e-4, "dwconv_bias": False, "grn_scope": "batch"}
    model = networks.build_model(Recipe(patch_size=8, image_size=56, decoder_depth=2, loss_on="all", **given))
    assert (model.patch, model.stride, model.loss_on, len(model.decoder)) == ((8, 8), 8, "all", 2)
    stem, block = model.encoder.downsample_layers[0], model.encoder.stages[0][0]
    assert (stem[0].kernel_size, stem[3].stride, stem[1].eps) == ((3, 3), (1, 1), 1e-5)
    assert (block.dwconv.bias, block.norm.eps, block.grn.eps, block.grn.scope) == (None, 1e-5, 1e-4, "batch")
    spark = networks.build_model(Recipe(method="spark", block="v1", loss_on="visible"))
    assert spark.loss_on == "visible" and isinstance(spark.encoder.stages[0][0], ConvNeXtBlock)


def test_a_run_of_another_network_of_the_family(photos, tmp_path, capsys):
    given = {"block": "v1", "stem_type": "conv3x3", "norm_eps": 1e-5, "dwconv_bias": False, "decoder_depth": 2}
    assert train(photos, tmp_path / "run", epochs=1, patch_size=16, loss_on="all", **given) == 0
    said = capsys.readouterr().out
    assert "peak learning rate" in said and "GRN" not in said
    recipe = contents.load(tmp_path / "run/last.pt").recipe
    assert {field: getattr(recipe, field) for field in given} == given
    network = networks.build_model(recipe).encoder
    assert load_encoder(network, tmp_path / "run/last.pt") == []
    assert all(torch.equal(network.state_dict()[name], value) for name, value in encoder_of(tmp_path / "run").items())
    assert main(["reconstruct", str(tmp_path / "run/last.pt"), "--out", str(tmp_path / "grid.png")]) == 0


def test_fcmae_of_timm_trains_what_it_reaches(photos, tmp_path):
    """EfficientNet has layers between its last feature map and its head, which no pretraining reaches."""
    assert train(photos, tmp_path / "run", method="fcmae", model="timm:test_efficientnet", epochs=1) == 0
    saved = contents.load(tmp_path / "run/last.pt")
    model = networks.build_model(saved.recipe)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.conv_head.weight", "encoder.bn2.weight", "encoder.bn2.bias"}
    trained = sum(len(group["params"]) for group in param_groups(model, 0.05))
    assert len(saved.optimizer) == trained == len(list(model.parameters())) - 3
    network = timm.create_model("test_efficientnet", num_classes=2)
    assert load_encoder(network, tmp_path / "run/last.pt") == ["classifier.weight", "classifier.bias"]


def test_gradient_checkpointing_has_the_same_losses(run, photos, tmp_path):
    assert train(photos, tmp_path / "other", options={"grad_checkpointing": True}, **RUN) == 0
    for found, expected in zip(logged(tmp_path / "other"), logged(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_defaults_are_those_of_the_method(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda trainer: trainer.recipe)
    options = Options(data=str(photos), output=str(tmp_path), device="cpu")
    fcmae, spark = (pretrain(options, {"method": method, "batch_size": 2}) for method in ("fcmae", "spark"))
    assert (fcmae.epochs, fcmae.weight_decay, fcmae.clip_grad, fcmae.crop_area) == (800, 0.05, None, 0.2)
    assert (spark.epochs, spark.weight_decay, spark.clip_grad, spark.crop_area) == (1600, 0.04, 5.0, 0.67)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "mae"}, "method is mae: expected one of fcmae, spark"),
        ({"model": "resnet50"}, "model is resnet50: expected one of atto, .*, or timm: and a network of timm, such as"),
        ({"model": "timm:resnet5O"}, "model is timm:resnet5O: timm has no such network; did you mean timm:resnet50"),
        ({"model": "timm:resnet18", "grn_scope": "batch"}, "grn_scope is batch: expected sample, since timm:resnet18"),
        ({"crop_area": 0.0}, "crop_area is 0.0: expected more than 0, at most 1"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize("method", ["fcmae", "spark"])
@pytest.mark.parametrize("name", ["test_vit", "test_coatnet"])
def test_a_network_without_masked_meaning_is_named(name, method):
    message = rf"model is timm:{name}: cannot be pretrained on patches of 32 px \(.* on a SparseTensor"
    with pytest.raises(InputError, match=message):
        networks.build_model(Recipe(model=f"timm:{name}", method=method))


def test_without_timm(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    with pytest.raises(InputError, match="model is timm:resnet50: timm is not installed: pip install timm"):
        Recipe(model="timm:resnet50")


def test_weights_follow_the_seed():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(networks.build_model(Recipe(model="timm:test_resnet", method="spark")))
    assert isinstance(models[0], SparK)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
