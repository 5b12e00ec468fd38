"""Encoders that no published format holds load into the same network by name: other blocks, stems and targets."""

from __future__ import annotations

import pytest
import torch

from sparsecnx import load_encoder, models
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_another_network_is_refused(options):
    trained, published = (models.ConvNeXtV2Encoder(**SIZES, **given) for given in (options, {}))
    with pytest.raises(CheckpointError):
        load_encoder(published, fcmae(trained).state_dict())
    with pytest.raises(CheckpointError):
        load_encoder(trained, fcmae(published).state_dict())
