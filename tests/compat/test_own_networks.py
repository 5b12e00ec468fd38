"""Encoders with other blocks, stems and targets: what formats hold them, and that they load into the same network."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparsecnx import load_encoder, models
from sparsecnx.cli import main
from sparsecnx.common.errors import CheckpointError

SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
OPTIONS = {
    "blocks v1": {"block": "v1"},
    "3x3 stem": {"stem_type": "conv3x3"},
    "no depthwise bias": {"dwconv_bias": False},
    "all": {"block": "v1", "stem_type": "conv3x3", "dwconv_bias": False},
}


def fcmae(encoder):
    return models.FCMAE(encoder, decoder_dim=8)


def spark(encoder):
    return models.SparK(encoder, decoder_dim=32)


def mpmae(encoder):
    return models.MPMAE(encoder, {"image": models.ImageTarget(3)}, decoder_dim=8, uncertainty=True)


@pytest.mark.parametrize("around", [fcmae, spark, mpmae])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["published", *OPTIONS])
def test_an_autoencoder_loads_into_the_same_network(options, around, tmp_path):
    trained = models.ConvNeXtV2Encoder(**SIZES, **options)
    torch.save({"model": around(trained).state_dict()}, tmp_path / "last.pt")
    kept = {models.ConvNeXtV2Encoder: [], models.ConvNeXtV2: ["norm.weight", "norm.bias", "head.weight", "head.bias"]}
    for kind, entries in kept.items():
        network = kind(**SIZES, **options)
        assert load_encoder(network, tmp_path / "last.pt") == entries
        state = network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["published", "all"])
def test_an_autoencoder_of_several_targets_is_found_after_a_prefix(options):
    trained = models.ConvNeXtV2Encoder(**SIZES, **options)
    state = {f"module.model.{name}": value for name, value in mpmae(trained).state_dict().items()}
    network = models.ConvNeXtV2Encoder(**SIZES, **options)
    assert load_encoder(network, {**state, "criterion.weight": torch.ones(2)}) == []
    assert all(torch.equal(network.state_dict()[name], value) for name, value in trained.state_dict().items())


def test_a_classifier_of_blocks_v1_is_loaded_to_fine_tune_it():
    trained = models.ConvNeXtV2(5, **SIZES, block="v1")
    for network in (models.ConvNeXtV2Encoder(**SIZES, block="v1"), models.ConvNeXtV2(3, **SIZES, block="v1")):
        assert not [name for name in load_encoder(network, trained.state_dict()) if name.startswith("stages.")]
        assert torch.equal(network.stages[1][1].pwconv1.weight, trained.stages[1][1].pwconv1.weight)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("3x3 stem", "a stem of 3x3 convolutions"),
        ("no depthwise bias", "no bias of the depthwise convolutions"),
        ("all", "a stem of 3x3 convolutions and no bias of the depthwise convolutions"),
    ],
)
@pytest.mark.parametrize("around", [fcmae, spark])
def test_convert_names_what_no_format_holds(options, what, around, tmp_path, capsys):
    torch.save(
        {"model": around(models.ConvNeXtV2Encoder(**SIZES, **OPTIONS[options])).state_dict()}, tmp_path / "in.pt"
    )
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--to", "timm"]) == 2
    assert f"has an encoder with {what}, which no format holds: sparsecnx.load_encoder" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def timm_v1(**options):
    """Return the first ConvNeXt of timm, with the sizes of ours and LayerScale that is not nearly 0."""
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_tiny", depths=SIZES["depths"], dims=SIZES["dims"], num_classes=5, **options)


def drawn(model):
    """Return a model in evaluation mode whose parameters are drawn from a normal distribution."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    return model.eval()


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_blocks_v1_become_the_first_convnext_of_timm_and_back(conv_mlp, tmp_path):
    ours, theirs = drawn(models.ConvNeXtV2(5, **SIZES, block="v1")), timm_v1(conv_mlp=conv_mlp).eval()
    torch.save(ours.state_dict(), tmp_path / "in.pt")
    option = ["--conv-mlp"] if conv_mlp else []
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "timm.pt"), "--to", "timm", *option]) == 0
    theirs.load_state_dict(torch.load(tmp_path / "timm.pt", weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
    assert main(["convert", str(tmp_path / "timm.pt"), str(tmp_path / "ours.pt"), "--to", "convnextv2"]) == 0
    again = torch.load(tmp_path / "ours.pt", weights_only=True)["model"]
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("around", [fcmae, spark])
def test_a_pretrained_encoder_of_blocks_v1_loads_into_timm(around, tmp_path, capsys):
    trained, model = drawn(models.ConvNeXtV2Encoder(**SIZES, block="v1")), timm_v1().eval()
    torch.save({"model": around(trained).state_dict()}, tmp_path / "last.pt")
    kept = ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"]
    assert load_encoder(model, tmp_path / "last.pt") == kept
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), trained(images), rtol=1e-4, atol=1e-4)
    for form in ("fcmae", "fcmae-encoder", "transformers"):
        assert main(["convert", str(tmp_path / "last.pt"), str(tmp_path / "out.pt"), "--to", form]) == 2
        told = capsys.readouterr().err
        assert f"has blocks v1: {form} holds ConvNeXt V2 only; convert to one of sparsecnx, convnextv2, timm" in told


@pytest.fixture
def unusual(tmp_path):
    """Write what a run with other epsilons has in its checkpoint."""
    encoder = models.ConvNeXtV2Encoder(**SIZES, norm_eps=1e-2, grn_eps=1e-4)
    recipe = {"model": "atto", "norm_eps": 1e-2, "grn_eps": 1e-4}
    torch.save({"model": fcmae(encoder).state_dict(), "recipe": recipe}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_other_epsilons_are_said_where_weights_are_converted(unusual, tmp_path, capsys):
    assert main(["convert", str(unusual), str(tmp_path / "folder/"), "--to", "transformers"]) == 2
    assert "epsilons of 1e-06 only, and IN has norm_eps 0.01, grn_eps 0.0001" in capsys.readouterr().err
    assert main(["convert", str(unusual), str(tmp_path / "out.pt"), "--to", "timm"]) == 0
    assert "holds weights alone: make the network with norm_eps 0.01, grn_eps 0.0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the run had norm_eps 0\.01, downsample_layers\.0\.1 of the model has 1e-06"),
        ({"norm_eps": 1e-2}, r"the run had grn_eps 0\.0001, stages\.0\.0\.grn of the model has 1e-06"),
    ],
)
def test_a_model_with_other_epsilons_is_said(options, message, unusual):
    with pytest.warns(UserWarning, match=message):
        load_encoder(models.ConvNeXtV2(3, **SIZES, **options), unusual)


def test_a_model_with_the_same_epsilons_is_silent(unusual):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_encoder(models.ConvNeXtV2Encoder(**SIZES, norm_eps=1e-2, grn_eps=1e-4), unusual) == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_another_network_is_refused(options):
    trained, published = (models.ConvNeXtV2Encoder(**SIZES, **given) for given in (options, {}))
    with pytest.raises(CheckpointError):
        load_encoder(published, fcmae(trained).state_dict())
    with pytest.raises(CheckpointError):
        load_encoder(trained, fcmae(published).state_dict())
