"""`sparsecnx.nn`: each module against its torch counterpart, and on a SparseTensor against the masked dense layer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_close, draw_mask, make_layout, random_sparse, site_mask
from torch.nn.utils import parametrizations, prune

from sparsecnx import SparseTensor, nn
from sparsecnx.models import masked_dense
from sparsecnx.nn import block as block_module
from sparsecnx.nn.block import FUSED

CHANNELS = 6

# These are our module, torch's, and the dense input that both take.
IMAGES = (2, CHANNELS, 16, 24)
COUNTERPARTS = {
    "conv 1x1": (lambda m: m.Conv2d(CHANNELS, 8, 1), IMAGES),
    "conv patchify": (lambda m: m.Conv2d(CHANNELS, 8, 4, stride=4), IMAGES),
    "conv 3x3": (lambda m: m.Conv2d(CHANNELS, 8, 3, padding=1), IMAGES),
    "conv 3x3 same": (lambda m: m.Conv2d(CHANNELS, 8, 3, padding="same"), IMAGES),
    "conv 3x3 without bias": (lambda m: m.Conv2d(CHANNELS, 8, 3, padding=1, bias=False), IMAGES),
    "conv 3x3 stride 2": (lambda m: m.Conv2d(CHANNELS, 8, 3, stride=2, padding=1), IMAGES),
    "conv 3x3 in two groups": (lambda m: m.Conv2d(CHANNELS, 8, 3, padding=1, groups=2), IMAGES),
    "conv 3x3 dilated": (lambda m: m.Conv2d(CHANNELS, 8, 3, padding=2, dilation=2, stride=(1, 2)), IMAGES),
    "depthwise 7x7": (lambda m: m.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS), IMAGES),
    "linear": (lambda m: m.Linear(CHANNELS, 8), (2, 5, CHANNELS)),
    "linear without bias": (lambda m: m.Linear(CHANNELS, 8, bias=False), (2, 5, CHANNELS)),
    "gelu": (lambda m: m.GELU(), (2, 5, CHANNELS)),
    "gelu tanh": (lambda m: m.GELU(approximate="tanh"), (2, 5, CHANNELS)),
    "layer norm": (lambda m: m.LayerNorm(CHANNELS, eps=1e-6), (2, 5, CHANNELS)),
}
each_counterpart = pytest.mark.parametrize("make, shape", list(COUNTERPARTS.values()), ids=list(COUNTERPARTS))
CONVOLUTIONS = {key: make for key, (make, _) in COUNTERPARTS.items() if "conv" in key or "depthwise" in key}
each_conv = pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
each_mask = pytest.mark.parametrize("kind", ["random counts", "equal counts", "an empty and a full image"])


def randomise(module):
    """Draw every parameter, so that none hides an error by being zero or one; return the module in float64."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def example(kind: str = "random counts", channels: int = CHANNELS) -> SparseTensor:
    """Return three images of 16 x 24 sites in tiles of 8."""
    return random_sparse(make_layout(draw_mask(kind, 3, (2, 3), seed=1), 8), channels)


def channels_last(module, x):
    """Apply a module over the last dimension of images."""
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@each_counterpart
def test_parameters_and_results_are_those_of_torch(make, shape):
    ours, theirs = make(nn).double(), randomise(make(torch.nn))
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in theirs.named_parameters()
    }
    ours.load_state_dict(theirs.state_dict())
    make(torch.nn).double().load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_layer_norm_2d_is_torch_over_the_channels_of_images():
    ours, theirs = nn.LayerNorm2d(CHANNELS).double(), randomise(torch.nn.LayerNorm(CHANNELS, eps=1e-6))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_close(ours(x), channels_last(theirs, x))


def test_grn_starts_as_the_identity_with_the_published_shapes():
    grn = nn.GRN(CHANNELS)
    assert {name: tuple(p.shape) for name, p in grn.named_parameters()} == {
        "gamma": (1, 1, 1, CHANNELS),
        "beta": (1, 1, 1, CHANNELS),
    }
    x = torch.randn(2, 4, 4, CHANNELS)
    assert torch.equal(grn(x), x)


@each_mask
@each_conv
def test_sparse_convolution_is_the_masked_dense_one(make, kind):
    conv, x = randomise(make(nn)), example(kind)
    found = conv(x)
    assert_close(found.dense(), conv(x.dense()) * site_mask(found.layout))


POINTWISE = {
    "linear": lambda: nn.Linear(CHANNELS, 8),
    "gelu": nn.GELU,
    "layer norm": lambda: nn.LayerNorm(CHANNELS),
    "grn": lambda: nn.GRN(CHANNELS),
    "layer norm 2d": lambda: nn.LayerNorm2d(CHANNELS),
}


@each_mask
@pytest.mark.parametrize("name", POINTWISE)
def test_sparse_module_is_the_masked_dense_one(name, kind):
    module, x = randomise(POINTWISE[name]()), example(kind)
    found = module(x)
    assert found.layout is x.layout
    dense = module(x.dense()) if name == "layer norm 2d" else channels_last(module, x.dense())
    assert_close(found.dense(), dense * site_mask(x.layout))


@each_mask
def test_sparse_grn_per_batch_takes_its_norm_over_all_images(kind):
    grn, x = randomise(nn.GRN(CHANNELS, scope="batch")), example(kind)
    dense = x.dense()
    side_by_side = torch.cat(list(dense), dim=-1)[None]  # one image that holds the whole batch
    expected = torch.cat(channels_last(grn, side_by_side).split(dense.shape[-1], dim=-1))
    assert_close(grn(x).dense(), expected * site_mask(x.layout))


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_stochastic_depth_is_the_identity_in_evaluation(p, sparse):
    module = nn.StochasticDepth(p).train(p == 0.0)
    x = example() if sparse else torch.randn(IMAGES)
    assert module(x) is x


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_stochastic_depth_drops_whole_images_and_scales_the_others(sparse):
    batch, p = 64, 0.2
    x = torch.rand(batch, 3, 4, 4, dtype=torch.float64) + 1
    mask = draw_mask("equal counts", batch, (2, 2), seed=1)
    module = nn.StochasticDepth(p)
    found = module(SparseTensor.from_dense(x, mask)).dense() if sparse else module(x)
    visible = site_mask(make_layout(mask, 2)).expand_as(x).bool() if sparse else torch.ones_like(x, dtype=torch.bool)
    scales = [(out / image)[seen] for out, image, seen in zip(found, x, visible, strict=True)]
    for scale in scales:
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
    kept = [scale[0].item() for scale in scales if scale[0] != 0]
    assert kept == pytest.approx([1 / (1 - p)] * len(kept))
    assert 0 < batch - len(kept) < batch / 2


def test_block_has_the_published_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in nn.ConvNeXtV2Block(4).named_parameters()}
    assert shapes == {
        "dwconv.weight": (4, 1, 7, 7),
        "dwconv.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "pwconv1.weight": (16, 4),
        "pwconv1.bias": (16,),
        "grn.gamma": (1, 1, 1, 16),
        "grn.beta": (1, 1, 1, 16),
        "pwconv2.weight": (4, 16),
        "pwconv2.bias": (4,),
    }


@pytest.mark.parametrize("kernel", [3, 7])
def test_dense_block_is_the_sparse_one_with_everything_visible(kernel):
    block, x = randomise(nn.ConvNeXtV2Block(CHANNELS, kernel_size=kernel)), example("all visible")
    assert_close(block(x).dense(), block(x.dense()))


@each_mask
def test_sparse_block_is_the_masked_dense_one(kind):
    block, x = randomise(nn.ConvNeXtV2Block(CHANNELS)), example(kind)
    assert_close(block(x).dense(), masked_dense.masked_block(block, x.dense(), site_mask(x.layout)))


class LowRank(torch.nn.Module):
    """Adds a product of narrow matrices to a linear layer, as LoRA does."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down = layer, torch.nn.Linear(layer.in_features, 2)
        self.up = torch.nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def plain_layers(block):
    for name, kind in {"norm": torch.nn.LayerNorm, "pwconv1": torch.nn.Linear, "pwconv2": torch.nn.Linear}.items():
        getattr(block, name).__class__ = kind


def double_the_output(module, arguments, output):
    return output.with_features(2 * output.features) if isinstance(output, SparseTensor) else 2 * output


def replace(name, make):
    return lambda block: setattr(block, name, make(getattr(block, name)))


def without(layer, name):
    return lambda block: setattr(getattr(block, layer), name, None)


# Each alters a block, and says whether the fused operator can still stand for its layers.
ALTERATIONS = {
    **{f"hook on {name}": (lambda b, n=name: getattr(b, n).register_forward_hook(double_the_output), False)
       for name in FUSED},
    "hook before pwconv1": (lambda b: b.pwconv1.register_forward_pre_hook(lambda m, x: (2 * x[0],)), False),
    "replaced activation": (replace("act", lambda _: torch.nn.ReLU()), False),
    "other GELU": (replace("act", lambda _: torch.nn.GELU(approximate="tanh")), False),
    "our GELU": (replace("act", lambda _: nn.GELU()), True),
    "no stochastic depth": (replace("drop_path", lambda _: torch.nn.Identity()), True),
    "no GRN": (replace("grn", lambda _: torch.nn.Identity()), False),
    "layers of torch": (plain_layers, True),
    "subclass": (replace("pwconv2", lambda old: Doubled(old.in_features, old.out_features)), False),
    "low rank": (replace("pwconv1", LowRank), False),
    "pruning": (lambda b: prune.random_unstructured(b.pwconv1, "weight", 0.5), False),
    "weight norm": (lambda b: parametrizations.weight_norm(b.pwconv1), False),
    "old weight norm": (lambda b: torch.nn.utils.weight_norm(b.dwconv), False),
    "forward": (lambda b: setattr(b.norm, "forward", lambda x, f=b.norm.forward: 2 * f(x)), False),
    "narrower kernel": (
        replace("dwconv", lambda _: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)),
        True,
    ),
    "no drop path in training": (lambda b: (setattr(b.drop_path, "p", 0.9), b.drop_path.eval()), True),
    "epsilons": (lambda b: (setattr(b.norm, "eps", 0.3), setattr(b.grn, "eps", 0.7)), True),
    "no bias of dwconv": (without("dwconv", "bias"), True),
    "no weight of norm": (without("norm", "weight"), True),
    "no bias of norm": (without("norm", "bias"), True),
    "no bias of pwconv1": (without("pwconv1", "bias"), True),
    "no bias of pwconv2": (without("pwconv2", "bias"), True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("alter, fused", ALTERATIONS.values(), ids=list(ALTERATIONS))
def test_altered_block_computes_the_same_sparse_and_dense(alter, fused, caplog):
    block, x = nn.ConvNeXtV2Block(CHANNELS), example("all visible")
    alter(block)
    randomise(block)
    caplog.set_level("INFO", "sparsecnx")
    block_module._logged.clear()
    expected = block(x.dense())
    parameters = list(block.parameters())
    for _ in range(2):
        found = block(x).dense()
        assert_close(found, expected)
        gradients = torch.autograd.grad(found.square().sum(), parameters)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        assert_close(gradient, reference)
    said = [record for record in caplog.records if "one by one" in record.message]
    assert len(said) == (0 if fused else 1)


def test_global_hooks_reach_the_layers_of_a_block():
    block, x = randomise(nn.ConvNeXtV2Block(CHANNELS)), example("all visible")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, x, out: seen.append(type(module)))
    try:
        block(x)
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.LayerNorm, nn.Linear, torch.nn.GELU, nn.GRN} <= set(seen)


def test_hook_after_compiling_is_noticed():
    torch.compiler.reset()
    block, x = randomise(nn.ConvNeXtV2Block(CHANNELS)), example()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert_close(compiled(x).features, block(x).features)
    block.pwconv1.register_forward_hook(double_the_output)
    assert_close(compiled(x).features, block(x).features)


def test_altered_block_has_the_dtype_of_the_fused_one_under_autocast():
    block, x = nn.ConvNeXtV2Block(CHANNELS), example().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = block(x).features
        block.pwconv1.register_forward_hook(lambda *_: None)
        altered = block(x).features
    assert fused.dtype == altered.dtype == torch.bfloat16
    torch.testing.assert_close(fused, altered, rtol=2e-2, atol=2e-2)


def test_parameter_with_operators_of_its_own_is_not_fused():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    block = nn.ConvNeXtV2Block(CHANNELS)
    assert block.unfused() is None
    block.grn._parameters["gamma"] = block.grn.gamma.detach().as_subclass(Own)
    assert block.unfused() == "a parameter of grn is a Own"


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size is 4: expected an odd size"):
        nn.ConvNeXtV2Block(CHANNELS, kernel_size=4)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_block_drops_the_branch_of_whole_images(sparse):
    block = randomise(nn.ConvNeXtV2Block(2, drop_path=0.5))
    x = random_sparse(make_layout(draw_mask("all visible", 32, (2, 2), seed=0), 2), 2)
    branch = block.eval()(x).dense() - x.dense()
    block.train()
    found = (block(x).dense() if sparse else block(x.dense())) - x.dense()
    dropped = found.flatten(1).abs().amax(1) < 1e-12
    assert 0 < dropped.sum() < 32
    assert_close(found[~dropped], 2 * branch[~dropped])


UNSUPPORTED = {
    "padding mode": ({"padding": 1, "padding_mode": "reflect"}, "mode is 'reflect'"),
    "depthwise without padding": ({"groups": CHANNELS, "padding": 0}, "expected extent / stride.* padding=1 does"),
    "padding wider than the kernel": ({"padding": 3}, r"padding.*\(3, 3\).*expected"),
    "stride that leaves the tile": ({"stride": 3}, "stride is 3: it must divide the tile side, 8"),
}


@pytest.mark.parametrize("options, message", list(UNSUPPORTED.values()), ids=list(UNSUPPORTED))
def test_convolution_without_submanifold_counterpart_is_an_error(options, message):
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, **options).double()
    with pytest.raises((TypeError, ValueError), match=message):
        conv(example())


def test_what_a_sparse_input_does_not_fit():
    with pytest.raises(ValueError, match=r"x has 6 channels: weight \(8, 4, 3, 3\)"):
        nn.Conv2d(4, 8, 3, padding=1).double()(example())
    with pytest.raises(ValueError, match="scope is 'image'"):
        nn.GRN(CHANNELS, scope="image").double()(example())
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"p is {p}"):
            nn.StochasticDepth(p)
