"""Our networks as timm's tools and torch.fx use them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from cases import assert_close

from sparsecnx import models

timm = pytest.importorskip("timm")


def images():
    return torch.randn(2, 3, 64, 96)


def atto(**options):
    return timm.create_model("sparsecnx_convnextv2_atto", **options)


def test_registration_needs_no_import_of_timm():
    script = """
import sys, sparsecnx
assert "timm" not in sys.modules
import timm
assert len(timm.list_models("sparsecnx_*")) == len(sparsecnx.models.SIZES)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_timm_without_a_registry_like_todays_is_imported_all_the_same(monkeypatch):
    monkeypatch.delitem(sys.modules, "sparsecnx.models.timm_models", raising=False)
    monkeypatch.setitem(sys.modules, "timm.models", type(sys)("timm.models"))
    models.timm_hook.register_with_timm()
    with pytest.raises(ImportError, match="build_model_with_cfg"):
        import sparsecnx.models.timm_models  # noqa: F401


@pytest.mark.parametrize("size", models.SIZES)
def test_timm_builds_the_models_of_our_factories(size):
    with torch.device("meta"):
        theirs = timm.create_model(f"sparsecnx_convnextv2_{size}", num_classes=7, in_chans=4, drop_path_rate=0.1)
        ours = getattr(models, f"convnextv2_{size}")(num_classes=7, in_chans=4, drop_path_rate=0.1)
        autoencoder = getattr(models, f"fcmae_convnextv2_{size}")(in_chans=4)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert theirs.pretrained_cfg["classifier"] == "head"
    assert autoencoder.encoder.dims == ours.dims and autoencoder.in_chans == 4


def test_factories_are_functions_that_document_themselves():
    for name in models.__all__:
        factory = getattr(models, name)
        if "convnextv2_" in name:
            assert inspect.isfunction(factory) and factory.__name__ == name and factory.__doc__
            assert {"in_chans", "drop_path_rate"} <= inspect.signature(factory).parameters.keys()


def test_head_and_features():
    model, x = atto(num_classes=10).eval(), images()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3)
    assert_close(model.forward_head(features), model(x), 1e-6)
    vectors = model.forward_head(features, pre_logits=True)
    assert vectors.shape == (2, model.head_hidden_size)
    assert_close(model.get_classifier()(vectors), model(x), 1e-6)

    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    sites = model.forward_head(features)
    model.reset_classifier(5, "")
    model.head.load_state_dict(atto(num_classes=5).head.state_dict())
    assert model(x).shape == (2, 5, 2, 3) != sites.shape
    model.reset_classifier(0, "avg")
    assert_close(model(x), vectors, 1e-6)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    with pytest.raises(ValueError, match="global_pool is 'max': expected 'avg' or ''"):
        model.reset_classifier(5, "max")


def test_dropout_of_the_head():
    model, features = atto(num_classes=5, drop_rate=0.5), torch.randn(2, 320, 2, 3)
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert model.eval().forward_head(features, pre_logits=True).all()


def test_intermediates_are_those_of_timms_method():
    theirs = inspect.signature(timm.models.ConvNeXt.forward_intermediates).parameters
    assert list(inspect.signature(models.ConvNeXtV2.forward_intermediates).parameters) == list(theirs)
    model, x = atto().eval(), images()
    last, stages = model.forward_intermediates(x)
    assert [(stage.shape[1], x.shape[2] // stage.shape[2]) for stage in stages] == [
        (info["num_chs"], info["reduction"]) for info in model.feature_info
    ]
    assert torch.equal(last, stages[-1]) and torch.equal(last, model.forward_features(x))
    for indices, expected in ((2, stages[2:]), ([0, -1], [stages[0], stages[3]]), ([1], [stages[1]])):
        found = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
    with pytest.raises(ValueError, match=r"indices is \[4\]: expected some of the 4 stages, 0 to 3"):
        model.forward_intermediates(x, [4])
    with pytest.raises(ValueError, match="output_fmt is 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("feature_cls", [None, "hook", "fx"])
def test_features_only(feature_cls):
    x, whole = torch.randn(2, 3, 75, 100), atto().eval()
    network = atto(features_only=True, out_indices=(1, 2), feature_cls=feature_cls).eval()
    assert network.feature_info.channels() == [80, 160]
    assert network.feature_info.reduction() == [8, 16]
    if feature_cls is None:  # timm's default for our networks keeps their names, and drops what is not needed.
        network.model.load_state_dict({name: whole.state_dict()[name] for name in network.model.state_dict()})
        assert not any(name.startswith(("stages.3", "norm", "head")) for name in network.model.state_dict())
        assert all(map(torch.equal, network(x), whole.forward_intermediates(x, [1, 2], intermediates_only=True)))
    else:
        assert [tuple(map_.shape) for map_ in network(x)] == [(2, 80, 9, 12), (2, 160, 4, 6)]


def test_parameter_groups_of_timm():
    from timm.optim import create_optimizer_v2

    model = atto(num_classes=5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    without, with_decay = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05).param_groups
    assert without["weight_decay"] == 0 and with_decay["weight_decay"] == 0.05
    vectors = {name for name in names.values() if name.endswith("bias") or ".grn." in name or "norm" in name}
    vectors |= {f"downsample_layers.{i}.{0 if i else 1}.weight" for i in range(4)}
    assert {names[parameter] for parameter in without["params"]} == vectors

    groups = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    scale = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = [
        "downsample_layers.0.0",
        *(f"stages.{i}.{j}.dwconv" for i, n in enumerate((2, 2, 6, 2)) for j in range(n)),
    ]
    scales = [scale[f"{name}.weight"] for name in [*blocks, "head"]]
    assert scales == [0.5 ** (len(scales) - 1 - layer) for layer in range(len(scales))]


def test_gradient_checkpointing_computes_the_same(monkeypatch):
    model, x = atto(num_classes=3), images()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("train", [False, True])
def test_symbolic_tracing(train):
    model, x = models.convnextv2_atto(num_classes=5, drop_path_rate=0.2).train(train), images()
    traced = torch.fx.symbolic_trace(model)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert_close(traced(x), expected, 1e-6)
    with pytest.raises(ValueError, match=r"images is \(2, 3, 31, 96\): its sides must be at least 32"):
        traced(torch.zeros(2, 3, 31, 96))


def test_an_encoder_is_traced_without_a_mask():
    encoder, x = models.ConvNeXtV2Encoder((1, 1, 1, 1), (8, 8, 16, 16)).eval(), images()
    with pytest.raises(TypeError, match="mask is traced: expected concrete_args="):
        torch.fx.symbolic_trace(encoder)
    traced = torch.fx.symbolic_trace(encoder, concrete_args={"mask": None, "visible": None})
    assert torch.equal(traced(x), encoder(x))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_feature_extractor_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = models.convnextv2_atto(num_classes=5).eval(), images()
    extractor = extraction.create_feature_extractor(model, {"stages.1": "1", "stages.3": "3", "head": "logits"})
    found, stages = extractor(x), model.forward_intermediates(x, intermediates_only=True)
    assert_close(found["1"], stages[1], 1e-6)
    assert_close(found["3"], stages[3], 1e-6)
    assert_close(found["logits"], model(x), 1e-6)
