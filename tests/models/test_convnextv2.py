"""Tests of `sparsecnx.models.convnextv2`: sizes, dense and sparse results, initialisation, errors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import EVERY_MODEL_BACKEND, MODEL_BACKENDS, assert_close, assert_same, bound, device_of, draw_mask, widest
from torch.utils.flop_counter import FlopCounterMode

from sparsecnx import SparseTensor, models, use_backend
from sparsecnx.models import masked_dense
from sparsecnx.nn import ConvNeXtV2Block

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}

# These are parameters in millions and multiply-adds in billions at 224 x 224, as printed in arXiv 2301.00808.
PUBLISHED = {
    "atto": ("3.7", "0.55"),
    "femto": ("5.2", "0.78"),
    "pico": ("9.1", "1.37"),
    "nano": ("15.6", "2.45"),
    "tiny": ("28.6", "4.47"),
    "base": ("89", "15.4"),
    "large": ("198", "34.4"),
    "huge": ("660", "115"),
}


def randomise_grn(model):
    """Draw the parameters of GRN, which starts as the identity and would hide its errors."""
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model


def small_encoder(**options):
    return randomise_grn(models.ConvNeXtV2Encoder(**SMALL, **options)).double()


def images(batch: int = 3, channels: int = 3):
    return torch.randn(batch, channels, 64, 96, dtype=torch.float64)


def as_printed(value: float, printed: str) -> str:
    """Format a value with as many digits as its printed form has."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


def test_every_published_size_is_there():
    assert list(models.SIZES) == list(PUBLISHED)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(size):
    parameters, flops = PUBLISHED[size]
    normalised = []
    with torch.device("meta"):
        model = getattr(models, f"convnextv2_{size}")()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda _, inputs, output: normalised.append(output.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert as_printed(sum(p.numel() for p in model.parameters()) / 1e6, parameters) == parameters
    # The published table mixes two ways of counting: products only, or (for Tiny, as for the first ConvNeXt) also 5
    # operations for each normalised number.
    products = counter.get_total_flops() / 2
    assert flops in (as_printed(count / 1e9, flops) for count in (products, products + 5 * sum(normalised)))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(kind, *backend.values, marks=backend.marks)
        for kind, offered in {
            "random counts": EVERY_MODEL_BACKEND,
            "equal counts": MODEL_BACKENDS,
            "an empty and a full image": MODEL_BACKENDS,
        }.items()
        for backend in offered
    ],
)
def test_sparse_encoder_and_its_gradients_are_the_masked_dense_ones(kind, backend):
    encoder, x, mask = small_encoder(), images().float().double(), draw_mask(kind, 3, (2, 3), seed=2)
    parameters = dict(encoder.named_parameters())
    expected = masked_dense.forward_features(encoder, x, mask)
    cotangents = [torch.randn_like(stage).float().double() for stage in expected]
    place = {"device": device_of(backend), "dtype": widest(backend)}
    there = copy.deepcopy(encoder).to(**place)
    with use_backend(backend):
        stages = there.forward_features(x.to(**place), mask.to(place["device"]))
        assert [stage.layout.side for stage in stages] == [8, 4, 2, 1]
        assert [stage.layout.stride for stage in stages] == [(4, 4), (8, 8), (16, 16), (32, 32)]
        found = [stage.dense() for stage in stages]
        incoming = [cotangent.to(**place) for cotangent in cotangents]
        found_gradients = torch.autograd.grad(found, list(there.parameters()), incoming)
    for out, ref in zip(found, expected, strict=True):
        assert_close(out, ref, bound(backend))
    expected_gradients = torch.autograd.grad(expected, list(parameters.values()), cotangents)
    names = list(parameters)
    assert_same(
        dict(zip(names, found_gradients, strict=True)),
        dict(zip(names, expected_gradients, strict=True)),
        10 * bound(backend) if place["dtype"] == torch.float64 else bound(backend),
    )


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 3)], ids=["flat mask", "grid mask"])
def test_everything_visible_is_the_dense_encoder(shape):
    encoder, x = small_encoder(), images()
    sparse = encoder.forward_features(x, torch.zeros(shape, dtype=torch.bool))
    dense = encoder.forward_features(x)
    assert [tuple(stage.shape) for stage in dense] == [(3, 8, 16, 24), (3, 8, 8, 12), (3, 16, 4, 6), (3, 16, 2, 3)]
    for out, ref in zip(sparse, dense, strict=True):
        assert_close(out.dense(), ref)
    assert_close(encoder(x), dense[-1])


def test_masked_pixels_are_never_read():
    encoder, x, mask = small_encoder(), images(), draw_mask("equal counts", 3, (2, 3), seed=2)
    hidden = mask[:, None].repeat_interleave(32, 2).repeat_interleave(32, 3)
    poisoned = x.masked_fill(hidden, torch.nan)
    assert torch.equal(encoder(poisoned, mask).features, encoder(x, mask).features)


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_images_depend_on_each_other_only_with_batch_scope(scope):
    encoder, x, mask = small_encoder(grn_scope=scope), images(2), draw_mask("equal counts", 2, (2, 3), seed=2)
    alone, together = encoder(x[:1], mask[:1]).dense(), encoder(x, mask).dense()[:1]
    assert torch.allclose(alone, together) == (scope == "sample")


def timm_name(name: str) -> str:
    """Return the name in timm of a parameter of the classifier."""
    name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.(\d)\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    for ours, theirs in {
        ".dwconv.": ".conv_dw.",
        ".pwconv1.": ".mlp.fc1.",
        ".pwconv2.": ".mlp.fc2.",
        ".grn.gamma": ".mlp.grn.weight",
        ".grn.beta": ".mlp.grn.bias",
    }.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", name))


def timm_and_ours(name, block):
    """Return the same classifier of timm and of ours, with random parameters."""
    timm = pytest.importorskip("timm")
    size = {"depths": (2, 1, 1, 1), "dims": (40, 80, 160, 320)}
    theirs = randomise_grn(timm.create_model(name, num_classes=5, **size)).double().eval()
    ours = models.ConvNeXtV2(num_classes=5, block=block, **size).double().eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):  # LayerScale starts so small that it would hide the block
            torch.nn.init.normal_(parameter)
    state = theirs.state_dict()
    assert sorted(map(timm_name, ours.state_dict())) == sorted(state)
    # timm keeps the linear layers of V2 as 1x1 convolutions and GRN as vectors.
    ours.load_state_dict({name: state[timm_name(name)].view_as(p) for name, p in ours.state_dict().items()})
    return theirs, ours


@pytest.mark.parametrize("sides", [(64, 96), (100, 75), (33, 32), (224, 224)], ids=str)
@pytest.mark.parametrize(("name", "block"), [("convnextv2_atto", "v2"), ("convnext_tiny", "v1")])
def test_classifier_is_that_of_timm(name, block, sides):
    theirs, ours = timm_and_ours(name, block)
    x = torch.randn(2, 3, *sides, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), 1e-9)


@pytest.mark.parametrize("indices", [None, 1, 3, [0, -1], (2, 1), [1, 1], [-3]], ids=str)
def test_intermediates_are_those_of_timm(indices):
    theirs, ours = timm_and_ours("convnextv2_atto", "v2")
    x = torch.randn(1, 3, 100, 75, dtype=torch.float64)
    with torch.no_grad():
        for stop_early in (False, True):
            found, expected = (m.forward_intermediates(x, indices, stop_early=stop_early) for m in (ours, theirs))
            alone = ours.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            assert len(found[1]) == len(expected[1])
            for out, ref in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
                assert out.shape == ref.shape
                assert_close(out, ref, 1e-9)
            assert all(map(torch.equal, alone, found[1])) and len(alone) == len(found[1])


def test_stages_that_are_removed_leave_their_stride():
    encoder, x = small_encoder(), torch.randn(2, 3, 9, 24, dtype=torch.float64)
    assert encoder.prune_intermediate_layers([1]) == [1]
    assert encoder.stride == (8, 8)
    assert encoder(x).shape == (2, 8, 1, 3)
    assert encoder(x[:, :, :8], torch.zeros(2, 1, 3, dtype=torch.bool)).dense().shape == (2, 8, 1, 3)
    with pytest.raises(ValueError, match="its sides must be at least 8, the stride"):
        encoder(x[:, :, :7])


def test_intermediates_of_visible_pixels():
    encoder, x, mask = small_encoder(), images(), draw_mask("random counts", 3, (2, 3), seed=2)
    pixels, expected = SparseTensor.from_dense(x, mask), encoder.forward_features(x, mask)
    last, stages = encoder.forward_intermediates(pixels, [0, 2])
    assert torch.equal(last.features, expected[3].features)
    assert [info["num_chs"] for info in encoder.feature_info] == [stage.shape[1] for stage in expected]
    for found, stage in zip(stages, (0, 2), strict=True):
        assert torch.equal(found.features, expected[stage].features)
    encoder.stages[3] = None  # It must not run.
    last, _ = encoder.forward_intermediates(pixels, [0, 2], stop_early=True)
    assert torch.equal(last.features, expected[2].features)


def test_classifier_takes_the_weights_of_the_encoder():
    encoder, classifier = small_encoder(), models.ConvNeXtV2(num_classes=5, **SMALL).double()
    missing, unexpected = classifier.load_state_dict(encoder.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    x = images()
    assert_close(classifier(x), classifier.head(classifier.norm(encoder(x).mean(dim=(2, 3)))))


def test_state_dict_has_the_published_names():
    prefixes = {re.sub(r"\.(weight|bias|gamma|beta)$", "", name) for name in small_encoder().state_dict()}
    assert prefixes == {f"downsample_layers.{i}.{j}" for i in range(4) for j in range(2)} | {
        f"stages.{i}.0.{layer}" for i in range(4) for layer in ("dwconv", "norm", "pwconv1", "grn", "pwconv2")
    }


@pytest.mark.parametrize("depths", [(1, 2, 3, 1), (1, 1, 1, 1)])
def test_drop_path_grows_linearly_over_the_blocks(depths):
    encoder = models.ConvNeXtV2Encoder(depths=depths, dims=SMALL["dims"], drop_path_rate=0.3)
    rates = [block.drop_path.p for block in encoder.modules() if isinstance(block, ConvNeXtV2Block)]
    assert rates == pytest.approx(torch.linspace(0, 0.3, sum(depths)).tolist())


def test_initial_weights():
    model = models.create_convnextv2("atto", num_classes=100)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "gamma", "beta")):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.mean().item()) < 0.02 * 5 / parameter.numel() ** 0.5, name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_initial_head_is_scaled():
    model = models.ConvNeXtV2(num_classes=1000, head_init_scale=0.001, **SMALL)
    assert model.head.weight.std().item() == pytest.approx(0.02e-3, rel=0.05)


@pytest.mark.parametrize("create", [models.create_convnextv2, models.create_fcmae])
def test_unknown_size(create):
    with pytest.raises(ValueError, match="size is 'mini': expected one of atto, femto"):
        create("mini")


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.zeros(2, 3, 64, 31), ValueError, r"images is \(2, 3, 64, 31\): its sides must be .* 32, the stride"),
        (torch.zeros(2, 3, 31, 64), ValueError, r"images is \(2, 3, 31, 64\): its sides must be .* 32, the stride"),
        (torch.zeros(2, 3, 0, 64), ValueError, r"images is \(2, 3, 0, 64\)"),
        (torch.zeros(2, 4, 64, 64), ValueError, r"images is \(2, 4, 64, 64\): expected \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), ValueError, r"images is \(3, 64, 64\): expected \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 64, 64), ValueError, r"images is \(0, 3, 64, 64\): .* B >= 1"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, r"images is torch.uint8: expected a floating"),
        ([[1.0]], TypeError, "images is list"),
    ],
    ids=["width", "height", "no pixels", "channels", "no batch dimension", "empty batch", "uint8", "list"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_images_that_do_not_fit(value, error, message, masked):
    mask = torch.zeros(2, 2, 2, dtype=torch.bool) if masked else None
    with pytest.raises(error, match=message):
        models.ConvNeXtV2Encoder(**SMALL)(value, mask)


@pytest.mark.parametrize("sides", [(64, 80), (48, 64)], ids=["width", "height"])
def test_only_masks_need_sides_that_are_multiples_of_the_stride(sides):
    encoder, x = models.ConvNeXtV2Encoder(**SMALL), torch.zeros(2, 3, *sides)
    assert encoder(x).shape == (2, 16, *(side // 32 for side in sides))
    with pytest.raises(ValueError, match=r"images is \(2, 3, .*\): its sides must be multiples of 32, the stride"):
        encoder(x, torch.zeros(2, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.full((3, 2, 3), 0.5), ValueError, r"mask has the values 0\.5: expected 0 and 1"),
        (torch.full((3, 6), 2), ValueError, "mask has the values 2: expected 0 and 1"),
        (torch.zeros(3, 5, dtype=torch.bool), ValueError, r"mask is \(3, 5\)"),
        (torch.zeros(3, 3, 2, dtype=torch.bool), ValueError, r"mask is \(3, 3, 2\)"),
        (torch.zeros(2, 2, 3, dtype=torch.bool), ValueError, r"mask is \(2, 2, 3\): dense holds 3 images"),
        (torch.zeros(3, 4, 6, dtype=torch.bool), ValueError, r"mask is \(3, 4, 6\): its patches of 16 pixels"),
        (torch.zeros(5, dtype=torch.bool), ValueError, r"mask is \(5,\)"),
        ([True] * 6, TypeError, "mask is a list"),
    ],
    ids=["float", "int", "cells", "grid", "batch", "patches of 16 pixels", "no batch dimension", "list"],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        small_encoder()(images(), mask)


def test_encoder_takes_the_sparse_tensor_of_its_visible_pixels():
    encoder, x, mask = small_encoder(), images(), draw_mask("random counts", 3, (2, 3), seed=2)
    pixels = SparseTensor.from_dense(x, mask)
    for found, expected in zip(encoder.forward_features(pixels), encoder.forward_features(x, mask), strict=True):
        assert torch.equal(found.features, expected.features)
    with pytest.raises(ValueError, match="mask is given"):
        encoder(pixels, mask)
    with pytest.raises(ValueError, match=r"images is \(3, 2, 64, 96\): expected \(B, 3, H, W\)"):
        encoder(pixels.with_features(pixels.features[:, :2]))
    with pytest.raises(ValueError, match=r"images is \(3, 3, 64, 96\): its patches of 16 pixels"):
        encoder(SparseTensor.from_dense(x, torch.zeros(3, 4, 6, dtype=torch.bool)))


def test_visible_that_is_not_the_count():
    with pytest.raises((ValueError, RuntimeError), match="visible"):
        small_encoder()(images(), torch.zeros(3, 6, dtype=torch.bool), visible=4)
