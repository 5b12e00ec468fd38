"""`load_encoder`: pretrained weights in models of ours, of timm and of transformers."""

from __future__ import annotations

import pytest
import torch

from sparsecnx import models
from sparsecnx.compat.checkpoints import CheckpointError, load_encoder

DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)


def autoencoder(**options):
    return models.FCMAE(models.ConvNeXtV2Encoder(DEPTHS, DIMS, **options), decoder_dim=12).double()


@pytest.fixture
def run(tmp_path):
    """Return the checkpoint of a pretraining run, and the outputs of its encoder on images."""
    model, path, images = autoencoder(), tmp_path / "last.pt", torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"step": 3, "model": model.state_dict()}, path)
    with torch.no_grad():
        return path, images, model.encoder.forward_features(images)


def of_timm(timm, **options):
    return timm.create_model("convnextv2_atto", depths=DEPTHS, dims=DIMS, **options).double().eval()


def test_models_of_ours(run):
    path, images, expected = run
    classifier = models.ConvNeXtV2(depths=DEPTHS, dims=DIMS, num_classes=5).double()
    head = classifier.head.weight.clone()
    assert load_encoder(classifier, path) == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert torch.equal(classifier.head.weight, head)
    assert torch.equal(classifier.forward_features(images), expected[-1])
    for model in (models.ConvNeXtV2Encoder(DEPTHS, DIMS).double(), autoencoder().encoder):
        assert load_encoder(model, path) == []
        assert torch.equal(model(images), expected[-1])
    contents = torch.load(path)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in contents["model"].items()}
    for given in (contents, contents["model"], compiled):
        model = models.ConvNeXtV2Encoder(DEPTHS, DIMS).double()
        assert load_encoder(model, given) == []
        assert torch.equal(model(images), expected[-1])
    wrapped = torch.nn.DataParallel(autoencoder())
    assert all(not name.startswith("module.encoder.") for name in load_encoder(wrapped, path))
    assert torch.equal(wrapped.module.encoder(images), expected[-1])


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_models_of_timm(run, conv_mlp):
    timm = pytest.importorskip("timm")
    path, images, expected = run
    model = of_timm(timm, conv_mlp=conv_mlp, num_classes=5)
    kept = ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"]
    assert load_encoder(model, path) == kept
    torch.testing.assert_close(model.forward_features(images), expected[-1], rtol=1e-10, atol=1e-10)
    for stages in ((0, 1, 2, 3), (0, 2)):
        features = of_timm(timm, conv_mlp=conv_mlp, features_only=True, out_indices=stages)
        assert load_encoder(features, path) == []
        for found, stage in zip(features(images), stages, strict=True):
            torch.testing.assert_close(found, expected[stage], rtol=1e-10, atol=1e-10)


def test_models_of_transformers(run):
    transformers = pytest.importorskip("transformers")
    path, images, expected = run
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.ConvNextV2Config(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), layer_norm_eps=1e-6, num_labels=5, out_features=stages
    )
    model = transformers.ConvNextV2Model(config).double().eval()
    assert load_encoder(model, path) == ["layernorm.weight", "layernorm.bias"]
    torch.testing.assert_close(model(images).last_hidden_state, expected[-1], rtol=1e-10, atol=1e-10)
    classifier = transformers.ConvNextV2ForImageClassification(config).double().eval()
    assert "classifier.weight" in load_encoder(classifier, path)
    backbone = transformers.ConvNextV2Backbone(config).double().eval()
    assert all(name.startswith("hidden_states_norms.") for name in load_encoder(backbone, path))
    backbone.hidden_states_norms = torch.nn.ModuleDict({name: torch.nn.Identity() for name in stages})
    for found, reference in zip(backbone(images).feature_maps, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_an_error_and_changes_nothing(run):
    path, _, _ = run
    others = {
        r"last.pt is a ConvNeXt V2 .*: the model has other stages or blocks \(stages.2.1": ((1, 2, 2, 1), DIMS),
        r"last.pt is a ConvNeXt V2 .*: .* of the model is \(16, 3, 4, 4\), expected \(8, 3, 4, 4\)": (
            DEPTHS,
            (16, 16, 24, 32),
        ),
    }
    for message, (depths, dims) in others.items():
        model = models.ConvNeXtV2Encoder(depths, dims)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_encoder(model, path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"model is on the device meta: model\.to_empty"):
        load_encoder(autoencoder(), path)
    with pytest.raises(TypeError, match="model is a OrderedDict: expected a module"):
        load_encoder(autoencoder().state_dict(), path)
    with pytest.raises(CheckpointError, match="model is a Linear: expected a ConvNeXt of"):
        load_encoder(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="checkpoint: none of its 2 entries"):
        load_encoder(autoencoder(), torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such file"):
        load_encoder(autoencoder(), "nowhere.pt")


def test_numbers_that_are_not_finite_are_named(run):
    path, _, _ = run
    state = torch.load(path, weights_only=True)["model"]
    state["encoder.stages.1.0.norm.bias"][3] = torch.inf
    model = models.ConvNeXtV2Encoder(DEPTHS, DIMS)
    with pytest.warns(UserWarning, match=r"^kept numbers that are not finite, in encoder\.stages\.1\.0\.norm\.bias$"):
        load_encoder(model, state)
    assert model.stages[1][0].norm.bias[3] == torch.inf
