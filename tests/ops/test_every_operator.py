"""What every operator owes: gradients, bits, threads, memory formats, torch.compile, autocast, errors."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import (
    assert_close,
    assert_same,
    backends,
    device_of,
    example_layout,
    incoming_gradient,
    make_layout,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    suit,
    threads,
)
from operators import CASES
from torch._subclasses import FakeTensorMode

from sparsecnx import Layout, SparseTensor, ops, use_backend

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
CHANNELS = 20


def on_every_backend(cases, without=()):
    """Each case with each backend that offers its operator."""
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(*backend.values, case, marks=backend.marks, id=f"{backend.values[0]}-{name}")
            for name, case in cases.items()
            for backend in backends(case.operator)
            if backend.values[0] not in without
        ],
    )


def arguments(case, dtype=torch.float32, layout=None, backend="cpu"):
    """Features and parameters in `dtype`, statistics in float32 at least, where the backend takes them."""
    x = random_sparse(example_layout(3, tile=4) if layout is None else layout, CHANNELS, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    p = case.parameters(CHANNELS)
    return suit(backend, x, {name: value.to(wide if name in case.statistics else dtype) for name, value in p.items()})


def seeded(case):
    """`case.run` that draws the same random numbers every time."""

    def run(x, **p):
        torch.manual_seed(3)
        return case.run(x, **p)

    return run


def test_every_public_operator_has_a_case():
    public = {name for name in ops.__all__ if not name.startswith("mapped_")}  # those: test_mapped.py
    public -= {"BlockParameters", "draw_survival"}
    assert {case.operator for case in CASES.values()} == public


@needs_cpu
@EVERY
def test_gradcheck(case):
    layout = example_layout(2, (2, 1), tile=2)
    assert 4 <= layout.rows <= 12
    x = random_sparse(layout, 3)
    p = case.parameters(3)
    run = seeded(case)
    leaves = [value.requires_grad_() for value in (x.features, *p.values())]

    def function(features, *values):
        return run(x.with_features(features), **dict(zip(p, values, strict=True))).features

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(function, leaves)


@needs_cpu
@EVERY
def test_same_bits_twice(case):
    x, p = arguments(case)
    with threads(2):
        first, second = (outputs_and_gradients(seeded(case), x, p) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_cpu
@EVERY
def test_any_number_of_threads(case):
    x, p = arguments(case, layout=make_layout(torch.rand(5, 4, 4) < 0.4, 8))
    with threads(1):
        alone = outputs_and_gradients(seeded(case), x, p)
    for count in (2, 3):
        with threads(count):
            assert_same(outputs_and_gradients(seeded(case), x, p), alone, 2e-6)


def strided(value):
    """The same values with gaps between them and, beyond one dimension, in another order of axes."""
    order = tuple(reversed(range(value.ndim)))
    spread = torch.stack([value.permute(order)] * 2, dim=-1)[..., 0].permute(order)
    assert torch.equal(spread, value) and (value.numel() <= 1 or not spread.is_contiguous())
    return spread


def shifted(value):
    """The same values, not at the beginning of their storage."""
    moved = torch.cat([value.new_full((3,), torch.nan), value.flatten()])[3:].view(value.shape)
    assert moved.storage_offset() == 3
    return moved


@on_every_backend(CASES)
@pytest.mark.parametrize("layout", [strided, shifted])
def test_any_memory_layout(layout, backend, case):
    x, p = arguments(case, backend=backend)

    def run(x, **p):
        return seeded(case)(x.with_features(layout(x.features)), **{name: layout(value) for name, value in p.items()})

    with use_backend(backend):
        assert_same(outputs_and_gradients(run, x, p), outputs_and_gradients(seeded(case), x, p), 1e-6)


@on_every_backend(CASES)
def test_incoming_gradient_of_any_memory_layout(backend, case):
    x, p = arguments(case, layout=example_layout(3, (2, 2), tile=2), backend=backend)
    leaves = [value.requires_grad_() for value in (x.features, *p.values())]
    with use_backend(backend):
        out = seeded(case)(x, **p).features
    gradient = incoming_gradient(out.shape).to(out)
    expected = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    for layout in (strided, shifted):
        found = torch.autograd.grad(out, leaves, layout(gradient), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 1e-6)
    (broadcast,) = torch.autograd.grad(out.sum(), leaves[:1], retain_graph=True)  # a gradient with strides 0
    assert_close(broadcast, torch.autograd.grad(out, leaves[:1], torch.ones_like(out))[0], 1e-6)


@on_every_backend({name: case for name, case in CASES.items() if not name.endswith("batch")})
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_leaves_the_others_alone(bad, backend, case):
    x, p = arguments(case, backend=backend)
    features = x.features.clone()
    features[: x.layout.row_splits[1]][::3, ::2] = bad
    with use_backend(backend):
        clean = outputs_and_gradients(seeded(case), x, p)
        spoilt = outputs_and_gradients(seeded(case), x.with_features(features), p)
    assert not spoilt["output"].isfinite().all()
    for name in ("output", "gradient of x"):
        others = x.layout.tiles.splits[1] * (clean[name].shape[0] // x.layout.tiles.count)
        assert 0 < others < len(clean[name])
        assert torch.equal(spoilt[name][others:], clean[name][others:])


@on_every_backend(CASES)
def test_nothing_visible_at_all(backend, case):
    x, p = arguments(case, layout=make_layout(torch.ones(2, 2, 3, dtype=torch.bool), 4), backend=backend)
    assert x.layout.rows == 0
    with use_backend(backend):
        found = outputs_and_gradients(seeded(case), x, p)
    assert found["output"].shape[0] == 0
    assert all((found[name] == 0).all() for name in p)


@on_every_backend(CASES, without=["minkowski"])  # which torch cannot trace, see test_minkowski_backend.py
def test_compiled_whole(backend, case):
    """fullgraph=True: no graph break and no value read back, geometry and all."""
    torch._dynamo.reset()
    device = device_of(backend)
    mask = torch.tensor([[True, False, False, True, False, True], [False, False, True, True, True, False]]).to(device)
    p = {name: value.to(device, torch.float32) for name, value in case.parameters(CHANNELS).items()}

    def step(dense, **p):
        x = SparseTensor.from_dense(dense, mask.view(2, 3, 2), visible=3)
        return case.run(x, **p).dense()

    def run(function):
        dense = torch.randn(2, CHANNELS, 12, 8, generator=torch.Generator().manual_seed(1))
        dense = dense.to(device).requires_grad_()
        leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
        torch.manual_seed(3)
        out = function(dense, **leaves)
        gradients = torch.autograd.grad(out, [dense, *leaves.values()], torch.ones_like(out))
        return {"output": out.detach(), **dict(zip(["dense", *leaves], gradients, strict=True))}

    with use_backend(backend):
        assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), 1e-6)


@needs_cpu
def test_compiled_with_a_layout_from_outside():
    """A layout may be used compiled first, or eagerly first: its tables serve both."""
    torch._dynamo.reset()
    case = CASES["block-recompute"]
    for _ in range(2):
        x, p = arguments(case)
        compiled = torch.compile(lambda x=x, p=p: case.run(x, **p).features, fullgraph=True, backend="aot_eager")
        assert_close(compiled(), case.run(x, **p).features, 1e-6)
        other, q = arguments(case)
        case.run(other, **q)
        again = torch.compile(lambda x=other, p=q: case.run(x, **p).features, fullgraph=True, backend="aot_eager")
        assert_close(again(), case.run(other, **q).features, 1e-6)


@needs_cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
def test_compiled_by_inductor():
    """What `torch.compile` does by default: a gather, a convolution, the fused block, a scatter, and gradients."""
    torch._dynamo.reset()
    mask = torch.tensor([[True, False, False, True], [False, False, True, True]])
    stem = {name: value.float() for name, value in CASES["conv-2x2-stride2"].parameters(3).items()}
    p = {name: value.float() for name, value in CASES["block-recompute"].parameters(5).items()}

    def step(dense, **p):
        x = ops.conv(SparseTensor.from_dense(dense, mask, visible=2), **stem, stride=2)
        return ops.convnextv2_block(x, ops.BlockParameters(**p)).dense()

    def run(function):
        dense = torch.ones(2, 3, 8, 8).cumsum(-1).requires_grad_()
        leaves = [value.clone().requires_grad_() for value in p.values()]
        out = function(dense, **dict(zip(p, leaves, strict=True)))
        gradients = torch.autograd.grad(out.sin().sum(), [dense, *leaves])
        return {"output": out.detach(), **dict(zip(["dense", *p], gradients, strict=True))}

    assert_same(run(torch.compile(step, fullgraph=True)), run(step), 1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode], ids=lambda mode: mode.__name__)
@EVERY
def test_a_layout_serves_training_after_any_other_use(mode, case):
    """Tables are built on first use and kept: those of evaluation, or of a trace, must not get in the way."""
    x, p = arguments(case)
    with mode(**({"allow_non_fake_inputs": True} if mode is FakeTensorMode else {})):
        seeded(case)(x, **p)
    fresh = make_layout(x.layout.tiles.mask().view(3, *x.layout.tiles.grid), x.layout.tile)
    found = outputs_and_gradients(seeded(case), x, p)
    expected = outputs_and_gradients(seeded(case), SparseTensor(x.features, fresh), p)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


DRAWN_ONCE = {name: case for name, case in CASES.items() if not name.endswith("drawn")}


@on_every_backend(DRAWN_ONCE, without=["minkowski"])  # which takes float32 and float64
def test_autocast_to_bfloat16(backend, case):
    x, p = arguments(case, torch.float32, backend=backend)
    p = {name: value.float() for name, value in p.items()}
    features = x.features.requires_grad_()
    leaves = {name: value.requires_grad_() for name, value in p.items()}
    with use_backend(backend), torch.autocast(x.device.type, torch.bfloat16):
        out = seeded(case)(x, **leaves).features
    assert out.dtype == (torch.bfloat16 if case.follows_autocast else torch.float32)
    incoming = incoming_gradient(out.shape).bfloat16().to(out.device)
    gradients = torch.autograd.grad(out, [features, *leaves.values()], incoming.to(out.dtype))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with use_backend("reference"):
        exact = outputs_and_gradients(
            seeded(case), x.to(torch.float64), {name: value.double() for name, value in p.items()}, torch.bfloat16
        )
    found = {"output": out.detach(), **dict(zip(["gradient of x", *p], gradients, strict=True))}
    assert_same(found, exact, 1e-2)


@EVERY
def test_autocast_leaves_float64_alone(case):
    x, p = arguments(case, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = seeded(case)(x, **p).features
    assert inside.dtype == torch.float64
    assert torch.equal(inside, seeded(case)(x, **p).features)


@EVERY
def test_the_layout_and_the_input_stay_as_they_were(case):
    x, p = arguments(case)
    before = x.features.clone(), {name: value.clone() for name, value in p.items()}
    y = seeded(case)(x, **p)
    assert torch.equal(x.features, before[0])
    assert all(torch.equal(p[name], before[1][name]) for name in p)
    assert y.layout.tiles is x.layout.tiles
    if y.layout.tile == x.layout.tile:
        assert y.layout is x.layout


@EVERY
@pytest.mark.parametrize("wrong", [torch.randn(4, CHANNELS), None], ids=["tensor", "None"])
def test_input_that_is_no_sparse_tensor(wrong, case):
    _, p = arguments(case)
    with pytest.raises(TypeError, match=rf"x is a {type(wrong).__name__}: expected a SparseTensor"):
        case.run(wrong, **p)


@EVERY
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_features_of_another_kind(dtype, case):
    x, p = arguments(case)
    with pytest.raises(TypeError, match=rf"x is {dtype}: expected one of torch.float32, torch.float64"):
        case.run(x.with_features(x.features.to(dtype)), **p)


MIXED = [
    (case_name, parameter)
    for case_name, case in CASES.items()
    for parameter in case.parameters(2)
    if parameter not in case.statistics and parameter != "bias"
]


@pytest.mark.parametrize(("case", "parameter"), MIXED, ids="-".join)
def test_weight_of_another_dtype(case, parameter):
    x, p = arguments(CASES[case])
    with pytest.raises(TypeError, match=rf"{parameter} is torch.float64: x is torch.float32, expected the same"):
        CASES[case].run(x, **{**p, parameter: p[parameter].double()})


ALL = [(case_name, parameter) for case_name, case in CASES.items() for parameter in case.parameters(2)]


@pytest.mark.parametrize(("case", "parameter"), ALL, ids="-".join)
def test_parameter_on_another_device(case, parameter):
    x, p = arguments(CASES[case])
    with pytest.raises(ValueError, match=rf"{parameter} is on meta: x is on cpu"):
        CASES[case].run(x, **{**p, parameter: p[parameter].to("meta")})


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize("operator", ["depthwise_conv", "conv", "grn", "layer_norm", "stochastic_depth", "block"])
def test_other_dimensions(ndim, operator):
    """The result in one dimension, or three, does not depend on the backend that auto takes."""
    case = {
        "depthwise_conv": CASES["depthwise_conv-7x7"],
        "conv": CASES["conv-3x3-stride2"],
        "grn": CASES["grn-sample"],
        "layer_norm": CASES["layer_norm"],
        "stochastic_depth": CASES["stochastic_depth"],
        "block": CASES["block-keep-survival"],
    }[operator]
    mask = torch.rand(2, *(3, 2, 2)[:ndim]) < 0.4
    x, p = arguments(case, torch.float64, Layout.from_mask(mask, tuple(4 * size for size in mask.shape[1:])))
    for name, value in p.items():
        if value.ndim == 4:
            size = value.shape[-1]
            p[name] = torch.randn(*value.shape[:2], *[size] * ndim, dtype=torch.float64)
    with use_backend("reference"):
        expected = outputs_and_gradients(seeded(case), x, p)
    assert_same(outputs_and_gradients(seeded(case), x, p), expected, 1e-11)
