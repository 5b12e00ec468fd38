"""Tests of `sparsecnx.compat.checkpoints`: pairs of formats, the classes of timm and transformers, files, errors."""

from __future__ import annotations

import argparse
import errno
import importlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from sparsecnx import models
from sparsecnx.cli import main
from sparsecnx.common.errors import MissingExtra
from sparsecnx.compat import checkpoints, minkowski
from sparsecnx.compat.checkpoints import CheckpointError, convert, detect_format
from sparsecnx.train import checkpoint

DEPTHS, DIMS, CLASSES = (1, 1, 2, 1), (8, 16, 24, 32), 5
SIZES = {"depths": DEPTHS, "dims": DIMS}
AUTOENCODERS = ("fcmae", "sparsecnx")
CLASSIFIERS = ("convnextv2", "timm", "timm conv_mlp", "transformers")


@pytest.fixture(scope="session")
def transformers():
    """Import transformers once, and only for the tests that need it: it takes seconds."""
    return pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="session")
def timm():
    return pytest.importorskip("timm", reason="needs timm")


def randomised(model):
    """Draw every parameter, because GRN starts as the identity and biases at 0."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def classifier():
    return randomised(models.ConvNeXtV2(CLASSES, **SIZES))


def autoencoder(patch_size=32):
    return randomised(models.FCMAE(models.ConvNeXtV2Encoder(**SIZES), patch_size, decoder_depth=2, decoder_dim=12))


def minkowski_kernel(weight):
    """Convert `(O, I, kh, kw)`, or depthwise `(C, 1, kh, kw)`, to a kernel of MinkowskiEngine, number by number."""
    outputs, inputs, height, width = weight.shape
    kernel = torch.empty(width, height, inputs, outputs, dtype=weight.dtype)
    for o, i, y, x in itertools.product(range(outputs), range(inputs), range(height), range(width)):
        kernel[x, y, i, o] = weight[o, i, y, x]
    return kernel.view(width * height, inputs, outputs)


def published_state_dict(model):
    """Return the state dict that the published pretraining saves for the parameters of our model."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        layer = module.rpartition(".")[2]
        if not name.startswith("encoder.") or module.startswith("encoder.downsample_layers.0"):
            state[name] = tensor
        elif layer == "dwconv":
            if parameter == "weight":
                state[f"{module}.kernel"] = minkowski_kernel(tensor)[:, 0]
            else:
                state[name] = tensor[None]
        elif layer == "grn":
            state[name] = tensor[0, 0]
        elif layer.startswith("pwconv"):
            state[f"{module}.linear.{parameter}"] = tensor
        elif tensor.ndim == 4:
            state[f"{module}.kernel"] = minkowski_kernel(tensor)
        elif layer == "1":  # bias of a downsampling convolution
            state[name] = tensor[None]
        else:
            state[f"{module}.ln.{parameter}"] = tensor
    return state


def timm_model(timm, conv_mlp=False, num_classes=CLASSES):
    options = {"use_grn": True, "ls_init_value": None, "conv_mlp": conv_mlp, "num_classes": num_classes}
    return randomised(timm.models.ConvNeXt(depths=DEPTHS, dims=DIMS, **options))


def transformers_config(transformers, **options):
    options = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS), "layer_norm_eps": 1e-6, **options}
    return transformers.ConvNextV2Config(**options)


MADE = {}


def state_dict(kind, request):
    """Return a checkpoint in a format, made once, by the class of that library if it is installed."""
    if kind not in MADE:
        MADE[kind] = make_state_dict(kind, request)
    return MADE[kind]


def make_state_dict(kind, request):
    if kind == "fcmae":
        return published_state_dict(autoencoder())
    if kind == "fcmae-encoder":
        dense = randomised(models.ConvNeXtV2Encoder(**SIZES)).state_dict()
        return {name: tensor[0, 0] if ".grn." in name else tensor for name, tensor in dense.items()}
    if kind == "sparsecnx":
        return autoencoder().state_dict()
    if kind == "convnextv2":
        return classifier().state_dict()
    if kind == "encoder":
        return randomised(models.ConvNeXtV2Encoder(**SIZES)).state_dict()
    if kind.startswith("timm"):
        conv_mlp, classes = "conv_mlp" in kind, 0 if "features" in kind else CLASSES
        return timm_model(request.getfixturevalue("timm"), conv_mlp, classes).state_dict()
    library = request.getfixturevalue("transformers")
    if kind == "transformers":
        config = transformers_config(library, num_labels=CLASSES)
        return randomised(library.ConvNextV2ForImageClassification(config)).state_dict()
    assert kind == "transformers model"
    return randomised(library.ConvNextV2Model(transformers_config(library))).state_dict()


FORMAT_OF = {  # the format of a kind of checkpoint, and the options of `convert` for it
    "encoder": ("convnextv2", {}),
    "timm conv_mlp": ("timm", {"conv_mlp": True}),
    "timm features": ("timm", {}),
    "transformers model": ("transformers", {}),
}
KINDS = ("fcmae", "fcmae-encoder", "sparsecnx", *CLASSIFIERS, *(k for k in FORMAT_OF if k not in CLASSIFIERS))


def to_kind(tensors, kind):
    name, options = FORMAT_OF.get(kind, (kind, {}))
    return convert(tensors, name, **options)


def assert_same_bits(actual, expected):
    """Compare names, dtypes, shapes and bits, including NaNs and the sign of zero."""
    assert actual.keys() == expected.keys()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        integer = integers[tensor.element_size()]
        assert torch.equal(actual[name].view(integer), tensor.contiguous().view(integer)), name


def images(dtype=torch.float64):
    return torch.randn(2, 3, 64, 96, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_formats_are_recognised(kind, request):
    tensors = state_dict(kind, request)
    name, _ = FORMAT_OF.get(kind, (kind, {}))
    assert detect_format(tensors).name == name
    assert convert(tensors, name).left_out == []


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_every_pair_of_formats_goes_there_and_back_bit_for_bit(here, there, request):
    tensors = state_dict(here, request)
    converted = to_kind(tensors, there)
    expected = {name: tensor for name, tensor in tensors.items() if name not in converted.left_out}
    if "classifier.weight" in converted.left_out:  # then the ConvNextV2Model inside it comes back
        expected = {name.removeprefix("convnextv2."): tensor for name, tensor in expected.items()}
    returned = to_kind(converted.state_dict, here)
    assert returned.left_out == []
    assert_same_bits(returned.state_dict, expected)
    encoder = len(models.ConvNeXtV2Encoder(**SIZES).state_dict())
    assert len(converted.state_dict) >= encoder
    if (here in AUTOENCODERS) == (there in AUTOENCODERS) and there not in ("encoder", "fcmae-encoder"):
        assert converted.left_out == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_bit_changes_in_any_dtype(dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in published_state_dict(autoencoder()).items()}
    for tensor in tensors.values():
        tensor.flatten()[:4] = torch.tensor([-0.0, math.nan, -math.inf, torch.finfo(dtype).tiny], dtype=dtype)
    first = (
        "encoder.downsample_layers.0.0.weight, encoder.downsample_layers.0.0.bias, encoder.downsample_layers.0.1.weight"
    )
    with pytest.warns(UserWarning, match=f"^kept numbers that are not finite, in {first} and {len(tensors) - 3} more$"):
        dense = convert(tensors, "sparsecnx").state_dict
        back = convert(dense, "fcmae").state_dict
    assert {tensor.dtype for tensor in dense.values()} == {dtype}
    assert_same_bits(back, tensors)


def test_minkowski_layout_number_by_number():
    model = autoencoder()
    converted = convert(published_state_dict(model), "sparsecnx")
    assert_same_bits(converted.state_dict, dict(model.state_dict()))
    kernel = published_state_dict(model)["encoder.downsample_layers.2.1.kernel"]
    assert kernel.shape == (4, DIMS[1], DIMS[2])
    weight = converted.state_dict["encoder.downsample_layers.2.1.weight"]
    # In MinkowskiEngine the row varies fastest: row 1, column 0 is the second tap.
    assert torch.equal(weight[:, :, 1, 0], kernel[1].T)


def test_what_has_no_place_is_named():
    tensors = published_state_dict(autoencoder())
    decoder = [name for name in tensors if not name.startswith("encoder.")]
    assert len(decoder) == 25
    for to in ("convnextv2", "fcmae-encoder", "timm", "transformers"):
        assert sorted(convert(tensors, to).left_out) == sorted(decoder)
    for to in ("fcmae", "sparsecnx", "fcmae-encoder"):
        left_out = convert(classifier().state_dict(), to).left_out
        assert left_out == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_our_models_load_what_is_converted():
    """Our autoencoder has the loss of the published one, and our classifier takes its encoder."""
    model = autoencoder().double()
    tensors = published_state_dict(model)
    ours = autoencoder().double()
    ours.load_state_dict(convert(tensors, "sparsecnx").state_dict)
    x, mask = images(), torch.tensor([[True, False, True, False, True, False]] * 2)
    assert torch.equal(ours(x, mask=mask)[0], model(x, mask=mask)[0])

    dense = randomised(models.ConvNeXtV2(**SIZES)).double()
    missing = dense.load_state_dict(convert(tensors, "convnextv2").state_dict, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    torch.testing.assert_close(dense.forward_features(x), model.encoder(x), rtol=0, atol=0)


def test_code_written_for_minkowski_engine_computes_the_same(monkeypatch):
    """The model in the style of the published one, on the API of MinkowskiEngine, has the loss of ours."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "published_style", raising=False)
    minkowski.install()
    try:
        theirs = importlib.import_module("published_style").FCMAE(DEPTHS, DIMS, decoder_dim=12).double()
        encoder = models.ConvNeXtV2Encoder(**SIZES, grn_scope="batch")  # as in the published code
        ours = randomised(models.FCMAE(encoder, decoder_dim=12)).double()
        theirs.load_state_dict(convert(ours.state_dict(), "fcmae").state_dict)
        x, mask = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
        torch.testing.assert_close(theirs(x, mask.double()), ours(x, mask=mask.bool())[0], rtol=1e-10, atol=1e-10)
        assert_same_bits(convert(theirs.state_dict(), "sparsecnx").state_dict, dict(ours.state_dict()))
    finally:
        minkowski.uninstall()
        sys.modules.pop("published_style", None)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm_computes_the_same(conv_mlp, timm):
    ours, theirs, x = classifier().double(), timm_model(timm, conv_mlp).double(), images()
    theirs.load_state_dict(convert(ours.state_dict(), "timm", conv_mlp=conv_mlp).state_dict)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-10, atol=1e-10)

    randomised(theirs)
    ours.load_state_dict(convert(theirs.state_dict(), "convnextv2").state_dict)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["fcmae", "sparsecnx"])
def test_timm_computes_the_features_of_an_autoencoder(kind, timm, request):
    theirs = timm_model(timm, num_classes=0).double()
    tensors = {name: tensor.double() for name, tensor in state_dict(kind, request).items()}
    missing = theirs.load_state_dict(convert(tensors, "timm").state_dict, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["head.norm.weight", "head.norm.bias"], [])
    encoder = models.ConvNeXtV2Encoder(**SIZES).double()
    encoder.load_state_dict(convert(tensors, "convnextv2").state_dict)
    x = images()
    torch.testing.assert_close(theirs.forward_features(x), encoder(x), rtol=1e-10, atol=1e-10)


def test_atto_is_what_timm_and_transformers_build(timm, transformers):
    """timm builds atto with 1x1 convolutions; `convert` knows that without an option."""
    ours, x = randomised(models.convnextv2_atto(num_classes=10)), torch.randn(1, 3, 64, 64)
    expected = ours(x)
    theirs = timm.create_model("convnextv2_atto", num_classes=10).eval()
    conversion = convert(ours.state_dict(), "timm")
    assert conversion.architecture.size == "atto"
    assert str(conversion.architecture) == "ConvNeXt V2 atto (encoder, final norm, head of 10 classes)"
    theirs.load_state_dict(conversion.state_dict)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))

    config = transformers.ConvNextV2Config(
        depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], num_labels=10, layer_norm_eps=1e-6
    )
    model = transformers.ConvNextV2ForImageClassification(config).eval()
    model.load_state_dict(convert(theirs.state_dict(), "transformers").state_dict)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    assert_same_bits(convert(model.state_dict(), "convnextv2").state_dict, dict(ours.state_dict()))


@pytest.mark.parametrize("size", models.SIZES)
def test_every_named_size_fits_the_model_timm_builds(size, timm):
    with torch.device("meta"):
        ours = models.create_convnextv2(size)
        theirs = timm.create_model(f"convnextv2_{size}")
    converted = convert(ours.state_dict(), "timm").state_dict
    assert {name: t.shape for name, t in converted.items()} == {n: t.shape for n, t in theirs.state_dict().items()}


def test_transformers_computes_the_same(transformers):
    ours, x = classifier().double(), images()
    config = transformers_config(transformers, num_labels=CLASSES)
    theirs = transformers.ConvNextV2ForImageClassification(config).double().eval()
    theirs.load_state_dict(convert(ours.state_dict(), "transformers").state_dict)
    torch.testing.assert_close(theirs(x).logits, ours(x), rtol=1e-10, atol=1e-10)

    randomised(theirs)
    ours.load_state_dict(convert(theirs.state_dict(), "convnextv2").state_dict)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ending", ["", "/"])
def test_transformers_loads_a_folder(ending, tmp_path, transformers):
    pytest.importorskip("safetensors", reason="needs safetensors")
    ours, x = classifier(), images(torch.float32)
    folder = f"{tmp_path}/converted{ending}"
    checkpoints.save(folder, convert(ours.state_dict(), "transformers"))
    theirs, told = transformers.ConvNextV2ForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(theirs(x).logits, ours(x), rtol=1e-5, atol=1e-5)

    loaded = checkpoints.load(folder)
    assert_same_bits(convert(loaded.state_dict, "convnextv2").state_dict, dict(ours.state_dict()))
    theirs.save_pretrained(tmp_path / "saved by transformers")
    loaded = checkpoints.load(tmp_path / "saved by transformers")
    assert_same_bits(convert(loaded.state_dict, "convnextv2").state_dict, dict(ours.state_dict()))


def test_transformers_loads_the_folder_of_an_encoder(tmp_path, transformers):
    pytest.importorskip("safetensors", reason="needs safetensors")
    model, x = autoencoder(), images(torch.float32)
    checkpoints.save(f"{tmp_path}/", convert(model.state_dict(), "transformers"))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ConvNextV2Model"]
    expected = model.encoder.forward_features(x)
    theirs, told = transformers.ConvNextV2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == {"layernorm.weight", "layernorm.bias"}
    assert not told["unexpected_keys"]
    torch.testing.assert_close(theirs(x).last_hidden_state, expected[-1], rtol=1e-5, atol=1e-5)

    backbone = transformers.ConvNextV2Backbone.from_pretrained(tmp_path, out_features=["stage2", "stage4"])
    maps = backbone(x).feature_maps
    for found, stage in zip(maps, (expected[1], expected[3]), strict=True):
        normalised = torch.nn.functional.layer_norm(stage.permute(0, 2, 3, 1), stage.shape[1:2], eps=1e-6)
        torch.testing.assert_close(found, normalised.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


NORM = "stages.1.blocks.0.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, NORM), rf"lacks {NORM} \(16,\)$"),
        (lambda t: without(t, "stem.0.weight"), r"lacks stem\.0\.weight"),
        (lambda t: without(t, "head.norm.bias"), r"lacks head\.norm\.bias \(32,\)"),
        (lambda t: without(t, "head.norm.weight", "head.norm.bias"), r"lacks head\.norm\.weight \(32,\), head\.norm"),
        (
            lambda t: {n: x for n, x in t.items() if "grn" not in n},
            r"lacks stages\.0\.blocks\.0\.mlp\.grn\.weight \(32,\), .*, 7 more$",
        ),
        (lambda t: {**t, NORM: torch.ones(7)}, rf"{NORM} is \(7,\): expected \(16,\)$"),
        (lambda t: {**t, NORM: torch.ones(16, 1)}, rf"{NORM} is \(16, 1\): expected \(16,\)$"),
        (
            lambda t: {**t, "stages.0.blocks.0.conv_dw.weight": torch.ones(8, 1, 3, 3)},
            r"conv_dw\.weight is \(8, 1, 3, 3\): expected \(8, 1, 7, 7\)$",
        ),
        (lambda t: {**t, "stem.0.weight": torch.ones(8, 48)}, r"stem\.0\.weight is \(8, 48\): expected \(8, channels"),
        (lambda t: {**t, "stem.0.weight": torch.ones(8, 3, 2, 2)}, r"is \(8, 3, 2, 2\): expected \(8, 3, 4, 4\)"),
        (
            lambda t: {**t, "stages.0.blocks.0.gamma": torch.ones(8)},
            r"a network of depths 1 1 2 1 has no stages\.0\.blocks\.0\.gamma \(8,\)",
        ),
        (
            lambda t: {**t, "stages.5.downsample.0.bias": torch.ones(8)},
            r"a network of depths 1 1 2 1 has no stages\.5\.downsample\.0\.bias \(8,\)",
        ),
        (lambda t: {**t, "stages.00.blocks.0.norm.bias": torch.ones(8)}, r"no place for stages\.00"),
        (lambda t: {**t, "stages.9.blocks.0.norm.bias": torch.ones(8)}, r"lacks stages\.4\.0?.*norm\.weight"),
        (lambda t: {**t, "epoch": 3}, "epoch is int: expected a state dict"),
        (
            lambda t: {"a": torch.ones(2), "b": torch.ones(3)},
            r"none of its 2 entries is one of a ConvNeXt: they are a",
        ),
        (lambda t: {}, "none of its 0 entries is one of a ConvNeXt"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_entry(change, message, timm):
    with pytest.raises(CheckpointError, match=message):
        convert(change(dict(timm_model(timm).state_dict())), "fcmae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "mask_token"), r"lacks mask_token \(1, 12, 1, 1\)$"),
        (lambda t: without(t, "pred.bias"), r"lacks pred\.bias \(3072,\)$"),
        (
            lambda t: {**t, "pred.bias": torch.ones(3000)},
            r"pred\.bias is \(3000,\): expected \(3072,\)$",
        ),
        (
            lambda t: {**t, "encoder.stages.0.0.dwconv.kernel": torch.ones(7, 7, 8)},
            r"encoder\.stages\.0\.0\.dwconv\.kernel is \(7, 7, 8\): expected \(49, 8\)$",
        ),
        (
            lambda t: {**t, "encoder.downsample_layers.1.1.bias": torch.ones(16)},
            r"encoder\.downsample_layers\.1\.1\.bias is \(16,\): expected \(1, 16\)$",
        ),
    ],
)
def test_a_published_checkpoint_that_does_not_fit_is_refused_with_the_entry(change, message):
    with pytest.raises(CheckpointError, match=message):
        convert(change(published_state_dict(autoencoder())), "timm")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stages.0.blocks.0.norm.weight", lambda t: t[:0], r"is \(0,\): expected sizes of at least 1$"),
        ("stem.0.weight", lambda t: t[:, :0], r"is \(8, 0, 4, 4\): expected sizes of at least 1$"),
        ("head.fc.weight", torch.Tensor.to_sparse, r"is torch\.sparse_coo: expected a dense tensor$"),
        ("head.fc.weight", torch.Tensor.to_sparse_csr, r"is torch\.sparse_csr: expected a dense tensor$"),
        ("head.fc.weight", lambda t: torch.nested.nested_tensor(list(t)), r"is nested: expected a dense tensor$"),
        ("head.fc.weight", lambda t: t.to(torch.complex64), r"is torch\.complex64: expected floating-point numbers$"),
        ("head.fc.weight", lambda t: t.to(torch.int8), r"is torch\.int8: expected floating-point numbers$"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_a_tensor_of_no_use_is_refused_with_its_name(name, change, message, timm):
    tensors = dict(timm_model(timm).state_dict())
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)} {message}"):
        convert({**tensors, name: change(tensors[name])}, "fcmae")


def test_a_network_without_channels_is_refused():
    """The entries of such a network agree with each other."""
    tensors = {name: tensor[:0] if len(tensor) == 8 else tensor for name, tensor in classifier().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"downsample_layers\.0\.0\.weight is \(0, 3, 4, 4\): expected sizes"):
        convert(tensors, "timm")


def test_networks_beyond_all_bounds_are_refused():
    with pytest.raises(CheckpointError, match="has 10001 entries: expected at most 10000"):
        convert({f"head.{i}": torch.ones(1) for i in range(10_001)}, "timm")
    one = torch.ones(1)
    many = {"head.weight": one.expand(2**20 + 1, DIMS[-1]), "head.bias": one.expand(2**20 + 1)}
    with pytest.raises(CheckpointError, match="has 1048577 classes: transformers takes 1048576 at most"):
        convert({**classifier().state_dict(), **many}, "transformers")
    ends = ("dwconv.bias", "norm.weight", "norm.bias", "pwconv2.bias")
    wide = {name: one.expand(2**40) for name in classifier().state_dict() if name.endswith(ends)}
    with pytest.raises(CheckpointError, match=r"^no network is a ConvNeXt V2 with .* dims 1099511627776"):
        convert({**classifier().state_dict(), **wide}, "timm")


def test_a_decoder_for_larger_patches_has_no_published_form():
    tensors = autoencoder(patch_size=64).state_dict()
    assert convert(tensors, "sparsecnx").architecture.decoder == (12, 2, 64)
    with pytest.raises(CheckpointError, match="patches of 64 pixels: decoders of fcmae predict 32 pixels only"):
        convert(tensors, "fcmae")


def test_arguments_are_checked():
    tensors = classifier().state_dict()
    with pytest.raises(ValueError, match="to is 'jax': expected one of fcmae, sparsecnx, convnextv2"):
        convert(tensors, "jax")
    with pytest.raises(ValueError, match="source is 'jax': expected one of"):
        convert(tensors, "timm", source="jax")
    with pytest.raises(ValueError, match="conv_mlp is True: expected only with to='timm', not 'fcmae'"):
        convert(tensors, "fcmae", conv_mlp=True)
    with pytest.raises(CheckpointError, match=r"none of its .* entries is one of transformers: they are downsample"):
        convert(tensors, "transformers", source="transformers")


def test_no_tensors_share_memory():
    """torch.save would write views of one storage as the whole storage, and safetensors refuses them."""
    tensors = dict(classifier().state_dict())
    flat = torch.randn(100)
    tensors["stages.0.0.norm.weight"], tensors["stages.0.0.norm.bias"] = flat[:8], flat[:8]
    tensors["norm.bias"] = tensors["norm.weight"]
    converted = convert(tensors, "timm").state_dict
    assert all(tensor.is_contiguous() for tensor in converted.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in converted.values())
    assert len({tensor.data_ptr() for tensor in converted.values()}) == len(converted)
    assert torch.equal(converted["head.norm.bias"], tensors["norm.weight"])


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("to", checkpoints.FORMATS)
def test_files_hold_what_was_converted(to, ending, tmp_path):
    if ending == ".safetensors":
        pytest.importorskip("safetensors", reason="needs safetensors")
    path = tmp_path / f"model{ending}"
    conversion = convert(autoencoder().state_dict(), to)
    checkpoints.save(path, conversion)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    loaded = checkpoints.load(path)
    assert_same_bits(loaded.state_dict, conversion.state_dict)
    nested = to in ("fcmae", "fcmae-encoder", "convnextv2") and ending != ".safetensors"
    assert loaded.key == ("model" if nested else None)
    if ending != ".safetensors":
        contents = torch.load(path, weights_only=True)
        assert (contents["model"] if nested else contents).keys() == conversion.state_dict.keys()


@pytest.mark.parametrize(
    "path, to", [("model.npz", "timm"), ("model", "timm"), ("folder/", "fcmae"), ("a.b", "transformers")]
)
def test_other_endings_are_refused(path, to, tmp_path):
    conversion = convert(classifier().state_dict(), to)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.pt, \.pth, \.safetensors"):
        checkpoints.save(f"{tmp_path}/{path}", conversion)
    assert list(tmp_path.iterdir()) == []


def published_file(path, **more):
    """Write a checkpoint as the published code does, with the command line beside the model."""
    state = published_state_dict(autoencoder())
    args = argparse.Namespace(model="convnextv2_atto", blr=1.5e-4, betas=(0.9, 0.95), data_path=None)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 799, "args": args, **more}, path)
    return state


def test_the_command_line_in_a_published_file_is_no_hindrance(tmp_path):
    state = published_file(tmp_path / "checkpoint-799.pth")
    loaded = checkpoints.load(tmp_path / "checkpoint-799.pth")
    assert (loaded.key, loaded.parts, loaded.prefix) == ("model", ("model", "optimizer", "epoch", "args"), "")
    assert_same_bits(loaded.state_dict, state)
    # The class is allowed only while loading.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_part_of_a_file_by_name(tmp_path):
    path = tmp_path / "checkpoint.pth"
    average = classifier().state_dict()
    published_file(path, model_ema=average)
    assert_same_bits(checkpoints.load(path, "model_ema").state_dict, dict(average))
    with pytest.raises(CheckpointError, match="holds no state dict under ema: it holds model, optimizer, epoch, args"):
        checkpoints.load(path, "ema")
    with pytest.raises(CheckpointError, match="holds no state dict under epoch"):
        checkpoints.load(path, "epoch")
    torch.save(average, path)
    with pytest.raises(CheckpointError, match="is a state dict itself: there is no part model in it"):
        checkpoints.load(path, "model")
    torch.save({"state_dict_ema": average, "arch": "atto"}, path)
    with pytest.raises(CheckpointError, match=r"under model or state_dict: it holds state_dict_ema, arch$"):
        checkpoints.load(path)


def test_a_part_of_a_part(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state, average = dict(classifier().state_dict()), {"stem.0.bias": torch.ones(8)}
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}}
    contents = {"model": {"net": state}, "model.ema": average, "opt": moments, "epoch": 3}
    contents["model"]["itself"] = contents
    torch.save(contents, path)
    with pytest.raises(checkpoints.PartError, match=r"model or state_dict: it holds model, model\.ema, opt, epoch$"):
        checkpoints.load(path)
    with pytest.raises(checkpoints.PartError) as error:
        checkpoints.load(path, "model")
    assert error.value.candidates == ["model.net", "model.ema"]
    assert_same_bits(checkpoints.load(path, "model.net").state_dict, state)
    assert_same_bits(checkpoints.load(path, "model.ema").state_dict, average)


def test_two_names_of_one_part(tmp_path):
    state = dict(classifier().state_dict())
    torch.save({"model": state, "state_dict": state}, tmp_path / "checkpoint.pt")
    assert_same_bits(checkpoints.load(tmp_path / "checkpoint.pt", "state_dict").state_dict, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."])
def test_wrappers_before_every_name_are_taken_off(prefix, tmp_path):
    """The names are those of DistributedDataParallel and torch.compile in any order."""
    path, state = tmp_path / "checkpoint.pt", dict(classifier().state_dict())
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    for contents in (wrapped, {"model": wrapped}):
        torch.save(contents, path)
        loaded = checkpoints.load(path)
        assert loaded.prefix == prefix
        assert_same_bits(loaded.state_dict, state)
    torch.save({**wrapped, "stem.0.bias": torch.ones(8)}, path)
    loaded = checkpoints.load(path)
    assert (loaded.prefix, loaded.beside) == (prefix, ["stem.0.bias"])
    assert_same_bits(loaded.state_dict, state)


def test_torch_compile_is_such_a_wrapper(tmp_path):
    model = classifier()
    torch.save(torch.compile(model).state_dict(), tmp_path / "compiled.pt")
    loaded = checkpoints.load(tmp_path / "compiled.pt")
    assert loaded.prefix == "_orig_mod."
    assert_same_bits(loaded.state_dict, dict(model.state_dict()))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_a_training_checkpoint_is_not_read_whole(tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = published_file(path)
    loaded = checkpoints.load(path)
    assert any(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())
    checkpoints.save(path, convert(loaded.state_dict, "fcmae"))  # over the file that it is read from
    assert_same_bits(checkpoints.load(path).state_dict, state)


def test_numbers_that_are_nowhere_are_refused(tmp_path):
    state = models.ConvNeXtV2(CLASSES, **SIZES).to("meta").state_dict()
    torch.save(state, tmp_path / "meta.pt")
    with pytest.raises(
        CheckpointError, match=r"^downsample_layers\.0\.0\.weight is on the device meta: expected numbers"
    ):
        checkpoints.load(tmp_path / "meta.pt")


@pytest.mark.parametrize("true", [".pt", ".safetensors"])
@pytest.mark.parametrize("named", [".pt", ".pth", ".safetensors", ".bin", ""])
def test_the_kind_of_a_file_is_recognised_by_its_contents(true, named, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    conversion = convert(classifier().state_dict(), "timm")
    checkpoints.save(tmp_path / f"true{true}", conversion)
    (tmp_path / f"true{true}").rename(tmp_path / f"named{named}")
    assert_same_bits(checkpoints.load(tmp_path / f"named{named}").state_dict, conversion.state_dict)


def test_an_old_file_of_torch_is_recognised_too(tmp_path):
    state = dict(classifier().state_dict())
    for name in ("old.pt", "old.safetensors"):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
        assert_same_bits(checkpoints.load(tmp_path / name).state_dict, state)


class Code:
    """A class that no loader should build."""


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    torch.save({"model": Code()}, tmp_path / "code.pt")
    torch.save(torch.nn.Linear(1, 2), tmp_path / "whole.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    torch.save({}, tmp_path / "empty.pt")
    (tmp_path / "garbage.pt").write_bytes(b"<html>not found</html>")
    for name, message in {
        "none.pt": "no such file",
        "": r"a folder without model\.safetensors",
        "a" * 300: r"cannot be read \(.*File name too long",
        "code.pt": r"holds a whole \S*test_checkpoints\.Code under model: expected its state dict",
        "whole.pt": r"holds one torch\.nn\.modules\.linear\.Linear: expected a state dict",
        "tensor.pt": "holds one Tensor: expected a state dict",
        "empty.pt": "it holds nothing",
        "garbage.pt": "truncated or damaged",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(tmp_path / name)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoints.load(path)
    checkpoints.save(path, convert(classifier().state_dict(), "timm"))
    whole = path.read_bytes()
    for garbage in (b"", whole[:100], whole[:-100], b"<html>not found</html>"):
        path.write_bytes(garbage)
        with pytest.raises(CheckpointError, match="truncated or damaged, or not of safetensors"):
            checkpoints.load(path)


def test_without_safetensors_its_files_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    conversion = convert(classifier().state_dict(), "transformers")
    (tmp_path / "in.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for work in (
        lambda: checkpoints.load(tmp_path / "in.safetensors"),
        lambda: checkpoints.save(tmp_path / "model.safetensors", conversion),
        lambda: checkpoints.save(f"{tmp_path}/folder/", conversion),
    ):
        with pytest.raises(MissingExtra, match="pip install safetensors"):
            work()
    assert list(tmp_path.iterdir()) == [tmp_path / "in.safetensors"]


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_write_that_fails_leaves_the_old_file(ending, tmp_path, monkeypatch):
    if ending == ".safetensors":
        pytest.importorskip("safetensors", reason="needs safetensors")
    path = tmp_path / f"model{ending}"
    old = convert(classifier().state_dict(), "timm")
    checkpoints.save(path, old)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, convert(autoencoder().state_dict(), "timm"))
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert_same_bits(checkpoints.load(path).state_dict, old.state_dict)


def test_a_full_disk_leaves_a_folder_as_it_was(tmp_path, monkeypatch):
    """Both files stay, even if the disk is full only at the second one."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    checkpoints.save(f"{tmp_path}/", convert(autoencoder().state_dict(), "transformers"))
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fsync, synced = os.fsync, []

    def full_at_the_second(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(f"{tmp_path}/", convert(classifier().state_dict(), "transformers"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_a_folder_that_others_use_too_stays_after_an_error(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="needs safetensors")

    def full(descriptor):
        (tmp_path / "new" / "note").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(f"{tmp_path}/new/folder", convert(classifier().state_dict(), "transformers"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["note"]


def test_what_saving_would_overwrite_is_known(tmp_path):
    folder, weights = tmp_path / "folder", tmp_path / "folder" / "model.safetensors"
    folder.mkdir()
    weights.touch()
    (tmp_path / "other.pt").touch()
    (tmp_path / "soft.safetensors").symlink_to(weights)
    os.link(weights, tmp_path / "hard.safetensors")
    (tmp_path / "same").symlink_to(folder)
    names = [folder, f"{folder}/", weights, *(tmp_path / n for n in ("soft.safetensors", "hard.safetensors", "same"))]
    for target, source in itertools.product(names, names):
        assert checkpoints.overwrites(target, source), (target, source)
    for name in names:
        assert not checkpoints.overwrites(tmp_path / "other.pt", name)
        assert not checkpoints.overwrites(name, tmp_path / "other.pt")
        assert not checkpoints.overwrites(tmp_path / "none", name)
        assert not checkpoints.overwrites(name, tmp_path / "none")
        assert not checkpoints.overwrites(tmp_path / ("a" * 300), name)


def test_what_lies_in_a_sharded_checkpoint_is_known(tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert not checkpoints.is_inside(folder / "encoder.pt", folder)
    (folder / "run.pt").touch()
    (tmp_path / "last").symlink_to(folder)
    for target in (folder / "encoder.pt", folder / "new" / "encoder.pt", folder, tmp_path / "last" / "run.pt"):
        assert checkpoints.is_inside(target, folder) and checkpoints.is_inside(target, tmp_path / "last")
    assert not checkpoints.is_inside(tmp_path / "encoder.pt", folder)
    source, target = str(folder), str(folder / "encoder.pt")
    assert main(["convert", source, target, "--to", "timm"]) == 2
    assert f"OUT is {target}: in the folder of IN, a sharded checkpoint" in capsys.readouterr().err


def test_our_training_checkpoints_are_read(tmp_path):
    model = autoencoder()
    parts = {"optimizer": {}, "step": 8, "epoch": 2.0, "recipe": {"model": "atto"}, "data": {"folder": None}}
    path = checkpoint.CheckpointFolder(tmp_path).save({"model": model.state_dict(), **parts})
    loaded = checkpoints.load(tmp_path / "last.pt")
    assert path.is_file()
    assert loaded.key == "model"
    assert_same_bits(convert(loaded.state_dict, "sparsecnx").state_dict, dict(model.state_dict()))
