"""The options of `ConvNeXtV2Encoder` that make other networks of the family: stem, block, epsilons, depthwise bias."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import EVERY_MODEL_BACKEND, assert_close, assert_same, bound, device_of, draw_mask, widest

from sparsecnx import SparseTensor, models, use_backend
from sparsecnx.models import masked_dense
from sparsecnx.nn import ConvNeXtBlock, ConvNeXtV2Block, LayerNorm

SIZES = {"depths": (1, 1, 2, 1), "dims": (4, 6, 8, 8), "in_chans": 2}
PUBLISHED = (4, 8, 16, 32)
# Options, the strides of the stages, and the grid of patches.
CASES = {
    "3x3 stem": ({"stem_type": "conv3x3"}, PUBLISHED, (2, 3)),
    "3x3 stem of stride 1": ({"stem_type": "conv3x3", "stem": 1}, (1, 2, 4, 8), (7, 7)),
    "3x3 stem of stride 2": ({"stem_type": "conv3x3", "stem": 2}, (2, 4, 8, 16), (4, 3)),
    "blocks v1": ({"block": "v1"}, PUBLISHED, (2, 3)),
    "epsilons": ({"norm_eps": 0.3, "grn_eps": 0.7}, PUBLISHED, (2, 3)),
    "no depthwise bias": ({"dwconv_bias": False}, PUBLISHED, (2, 3)),
    "v1 without depthwise bias": ({"block": "v1", "dwconv_bias": False, "norm_eps": 0.3}, PUBLISHED, (2, 3)),
    "signals": ({"ndim": 1, "stem_type": "conv3x3", "block": "v1"}, PUBLISHED, (5,)),
    "volumes": (
        {"ndim": 3, "kernel_size": 3, "stem": 2, "stem_type": "conv3x3", "block": "v1", "dwconv_bias": False},
        (2, 4, 8, 16),
        (2, 1, 2),
    ),
}
each_case = pytest.mark.parametrize(("options", "strides", "grid"), CASES.values(), ids=list(CASES))


def drawn(model):
    """Draw the parameters that start at 0, 1 or LayerScale's 1e-6, which would hide errors."""
    for parameter in model.parameters():
        if parameter.squeeze().ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def images(stride, grid, batch=2):
    return torch.randn(batch, 2, *(cells * stride for cells in grid), dtype=torch.float64)


def gradients(value, model):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))


@each_case
@pytest.mark.parametrize("kind", ["random counts", "an empty and a full image"])
def test_sparse_encoder_and_its_gradients_are_the_masked_dense_ones(options, strides, grid, kind):
    model = drawn(models.ConvNeXtV2Encoder(**SIZES, **options))
    x, mask = images(strides[-1], grid), draw_mask(kind, 2, grid, seed=2)
    expected, found = masked_dense.forward_features(model, x, mask), model.forward_features(x, mask)
    for out, reference, stride in zip(found, expected, strides, strict=True):
        assert out.layout.stride == (stride,) * len(grid)
        assert_close(out.dense(), reference, 1e-10)
    loss = sum(out.dense().square().sum() for out in found)
    assert_same(gradients(loss, model), gradients(sum(out.square().sum() for out in expected), model), 1e-8)


@each_case
def test_everything_visible_is_the_dense_classifier(options, strides, grid):
    model, x = drawn(models.ConvNeXtV2(5, **SIZES, **options)), images(strides[-1], grid)
    pixels = SparseTensor.from_dense(x, torch.zeros(2, *grid, dtype=torch.bool))
    assert_close(model(pixels), model(x), 1e-10)


@each_case
def test_masked_pixels_are_never_read(options, strides, grid):
    model = drawn(models.ConvNeXtV2Encoder(**SIZES, **options))
    x, mask = images(strides[-1], grid), draw_mask("random counts", 2, grid, seed=2)
    hidden = mask[:, None]
    for axis in range(2, hidden.ndim):
        hidden = hidden.repeat_interleave(strides[-1], axis)
    assert torch.equal(model(x.masked_fill(hidden, torch.nan), mask).features, model(x, mask).features)


@pytest.mark.parametrize(("side", "patch"), [(56, 8), (112, 16), (64, 16), (64, 32)])
@pytest.mark.parametrize("stem_type", ["patchify", "conv3x3"])
def test_patches_have_the_stem_that_they_imply(side, patch, stem_type):
    options = {"in_chans": 2, "stem": patch // 8, "stem_type": stem_type, "decoder_dim": 8}
    model = models.create_fcmae("atto", **options)
    assert model.patch_size == patch
    loss, pred, mask = model(torch.randn(1, 2, side, side))
    cells = side // patch
    assert pred.shape == (1, 2 * patch * patch, cells, cells) and mask.shape == (1, cells**2)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_options_reach_every_layer():
    model = models.create_fcmae("atto", norm_eps=1e-5, grn_eps=1e-4, dwconv_bias=False, decoder_dim=8)
    assert {module.eps for module in model.modules() if isinstance(module, LayerNorm)} == {1e-5}
    blocks = [module for module in model.modules() if isinstance(module, ConvNeXtV2Block)]
    assert len(blocks) == 12 + 1
    assert all(block.grn.eps == 1e-4 and block.dwconv.bias is None for block in blocks)
    assert models.ConvNeXtV2(**SIZES, norm_eps=1e-5).norm.eps == 1e-5


def test_names_of_parameters():
    names = models.ConvNeXtV2Encoder(**SIZES, block="v1", stem_type="conv3x3").state_dict().keys()
    stem = {name.rpartition(".")[0] for name in names if name.startswith("downsample_layers.0.")}
    assert stem == {f"downsample_layers.0.{layer}" for layer in (0, 1, 3, 4)}
    published = {"gamma"} | {f"{a}.{b}" for a in ("dwconv", "norm", "pwconv1", "pwconv2") for b in ("weight", "bias")}
    assert {name.removeprefix("stages.0.0.") for name in names if name.startswith("stages.0.0.")} == published


@pytest.mark.parametrize("backend", EVERY_MODEL_BACKEND)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no depthwise bias"])
def test_block_v1_and_its_gradients_are_the_masked_dense_ones(bias, backend):
    block, mask = drawn(ConvNeXtBlock(4, dwconv_bias=bias)), draw_mask("random counts", 2, (2, 2), seed=2)
    dense = torch.randn(2, 4, 8, 8).double()
    active = (~mask)[:, None].double().repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = masked_dense.masked_block(block, dense * active, active)
    names, parameters = zip(*block.named_parameters(), strict=True)
    place = {"device": device_of(backend), "dtype": widest(backend)}
    there = copy.deepcopy(block).to(**place)
    with use_backend(backend):
        found = there(SparseTensor.from_dense(dense.to(**place), mask.to(place["device"]))).dense()
        gradients = torch.autograd.grad(found.square().sum(), list(there.parameters()))
    assert_close(found, expected, bound(backend))
    references = torch.autograd.grad(expected.square().sum(), list(parameters))
    limit = 1e-9 if place["dtype"] == torch.float64 else bound(backend)
    assert_same(dict(zip(names, gradients, strict=True)), dict(zip(names, references, strict=True)), limit)


def test_blocks_v1_are_fused_until_a_layer_is_replaced():
    x = SparseTensor.from_dense(images(4, (3, 3)), draw_mask("random counts", 2, (3, 3), seed=2))
    block = drawn(ConvNeXtBlock(2))
    assert block.unfused() is None
    fused = block(x).features
    block.act = torch.nn.ReLU()
    assert block.unfused() == "act is a ReLU"
    block.act = torch.nn.GELU()
    block.pwconv2.register_forward_hook(lambda *_: None)
    assert block.unfused() == "pwconv2 has a hook"
    assert_close(block(x).features, fused, 1e-12)


@pytest.mark.parametrize(("block", "scale"), [(ConvNeXtBlock, 1e-6), (ConvNeXtV2Block, None)])
def test_compiled_block_is_the_eager_one(block, scale):
    block = block(4, dwconv_bias=False)
    assert scale is None or (block.gamma == scale).all()
    drawn(block)
    mask = draw_mask("random counts", 2, (2, 2), seed=2)
    x = SparseTensor.from_dense(torch.randn(2, 4, 8, 8, dtype=torch.float64), mask)
    torch.compiler.reset()
    assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x).features, block(x).features, 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_type": "conv"}, "stem_type is 'conv': expected one of patchify, conv3x3"),
        ({"block": "v3"}, "block is 'v3': expected one of v2, v1"),
        ({"block": "v1", "grn_eps": 1e-4}, "grn_eps is 0.0001: expected 1e-06, since the blocks v1 have no GRN"),
        ({"block": "v1", "grn_scope": "batch"}, "grn_scope is 'batch': expected 'sample', since the blocks v1"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        models.ConvNeXtV2Encoder(**SIZES, **options)
