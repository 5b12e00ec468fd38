"""Properties of every operator: gradients, bits, threads, memory layouts, torch.compile, autocast, errors."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from cases import (
    ON_GPU,
    assert_close,
    assert_same,
    backends,
    bound,
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
from operators import CASES, in_dimensions
from torch._subclasses import FakeTensorMode

from sparsecnx import Layout, SparseTensor, ops, use_backend

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
CHANNELS = 20


def on_every_backend(cases, without=()):
    """Return a mark for each case with each backend that offers its operator."""
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
    """Return features and parameters in `dtype`, statistics in float32 at least, where the backend takes them."""
    if layout is None:
        layout = example_layout(3, (2, 2), tile=2) if backend in ON_GPU else example_layout(3, tile=4)
    x = random_sparse(layout, CHANNELS, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    p = case.parameters(CHANNELS)
    return suit(backend, x, {name: value.to(wide if name in case.statistics else dtype) for name, value in p.items()})


def seeded(case):
    """Return `case.run`, which then draws the same random numbers every time."""

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
def test_same_bits_twice_and_nearly_the_same_with_other_threads(case):
    x, p = arguments(case, layout=make_layout(torch.rand(5, 4, 4) < 0.4, 8))
    with threads(2):
        first, second = (outputs_and_gradients(seeded(case), x, p) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for count in (1, 3):
        with threads(count):
            assert_same(outputs_and_gradients(seeded(case), x, p), first, 2e-6)


def strided(value):
    """Return the same values with gaps between them and, beyond one dimension, in another order of axes."""
    order = tuple(reversed(range(value.ndim)))
    spread = torch.stack([value.permute(order)] * 2, dim=-1)[..., 0].permute(order)
    assert torch.equal(spread, value) and (value.numel() <= 1 or not spread.is_contiguous())
    return spread


def shifted(value):
    """Return the same values, not at the beginning of their storage."""
    moved = torch.cat([value.new_full((3,), torch.nan), value.flatten()])[3:].view(value.shape)
    assert moved.storage_offset() == 3
    return moved


@on_every_backend(CASES)
def test_any_memory_layout(backend, case):
    """Features, parameters and incoming gradients may have any strides."""
    x, p = arguments(case, backend=backend)

    def run(layout):
        leaves = [value.detach().requires_grad_() for value in (x.features, *p.values())]
        features, *values = map(layout, leaves)
        out = seeded(case)(x.with_features(features), **dict(zip(p, values, strict=True))).features
        incoming = incoming_gradient(out.shape).to(out)
        gradients = torch.autograd.grad(out, leaves, layout(incoming), retain_graph=True)
        (broadcast,) = torch.autograd.grad(out.sum(), leaves[:1])  # A gradient with strides 0.
        return dict(enumerate((out.detach(), *gradients, broadcast)))

    with use_backend(backend):
        expected = run(torch.clone)
        for layout in (strided, shifted):
            assert_same(run(layout), expected, 1e-6)


@on_every_backend(CASES, without=["reference", "cpu", "triton"])  # for these see test_derivatives.py
def test_gradients_of_gradients(backend, case):
    """They are those of the reference, or they are refused. They are never left out."""
    x, p = arguments(case, torch.float64, layout=example_layout(2, (2, 1), tile=2), backend=backend)

    def second(name, x, p):
        leaves = [value.requires_grad_() for value in (x.features, *p.values())]
        with use_backend(name):
            out = seeded(case)(x, **p).features
        incoming = incoming_gradient(out.shape).to(out)
        first = torch.autograd.grad(out, leaves, incoming, create_graph=True)
        penalty = sum(value.square().sum() for value in first) + sum(0 * leaf.sum() for leaf in leaves)
        return torch.autograd.grad(penalty, leaves)

    expected = second("reference", *suit("reference", x, p, torch.float64))
    try:
        found = second(backend, x, p)
    except NotImplementedError as error:
        assert re.search("has no second derivatives .*reference|no gradients of the gradients", str(error))
    else:
        assert_same(dict(enumerate(found)), dict(enumerate(expected)), 10 * bound(backend))


@on_every_backend({name: case for name, case in CASES.items() if not name.endswith("batch")})
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # Triton's interpreter
def test_an_image_that_is_not_finite_leaves_the_others_alone(backend, case):
    x, p = arguments(case, backend=backend)
    features = x.features.clone()
    first = features[: x.layout.row_splits[1]]
    first[::3, ::2], first[1::3, 1::2] = torch.nan, torch.inf
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
    """There is no graph break (fullgraph=True) and no value is read back, geometry included."""
    torch._dynamo.reset()
    device = device_of(backend)
    mask = torch.tensor([[True, False, False, True, False, True], [False, False, True, True, True, False]]).to(device)
    p = {name: value.to(device, torch.float32) for name, value in case.parameters(CHANNELS).items()}

    def step(dense, **p):
        x = SparseTensor.from_dense(dense, mask.view(2, 3, 2), visible=3)
        return case.run(x, **p).dense()

    def run(function):
        dense = torch.randn(2, CHANNELS, 6, 4, generator=torch.Generator().manual_seed(1))
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
    """A layout may be used compiled first or eagerly first. Its tables serve both."""
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
    """`torch.compile` compiles gather, convolution, block, scatter and gradients by its default backend."""
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
    """Tables are built on first use and kept. Those of evaluation, or of a trace, must not get in the way."""
    x, p = arguments(case)
    with mode(**({"allow_non_fake_inputs": True} if mode is FakeTensorMode else {})):
        seeded(case)(x, **p)
    fresh = make_layout(x.layout.tiles.mask().view(3, *x.layout.tiles.grid), x.layout.side)
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
def test_input_of_another_kind(case):
    x, p = arguments(case)
    for wrong in (torch.randn(4, CHANNELS), None):
        with pytest.raises(TypeError, match=rf"x is a {type(wrong).__name__}: expected a SparseTensor"):
            case.run(wrong, **p)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"x is {dtype}: expected one of torch.float32, torch.float64"):
            case.run(x.with_features(x.features.to(dtype)), **p)


@EVERY
def test_parameters_of_another_dtype_device_or_shape(case):
    x, p = arguments(case)
    for name, value in p.items():
        with pytest.raises(ValueError, match=rf"{name} is on meta: x is on cpu"):
            case.run(x, **{**p, name: value.to("meta")})
        if value.ndim > 1:
            with pytest.raises(TypeError, match=rf"{name} is torch.float64: x is torch.float32, expected the same"):
                case.run(x, **{**p, name: value.double()})
            continue
        for shape in (value[1:].shape, (*value.shape, 1), ()):
            message = rf"{name} is \({', '.join(map(str, shape))},?\): expected \({len(value)},\)"
            with pytest.raises(ValueError, match=message):
                case.run(x, **{**p, name: torch.zeros(shape)})


@pytest.mark.filterwarnings("ignore:.* runs on the slow dense reference")
@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize(
    "case",
    ["depthwise_conv-7x7", "conv-3x3-stride2", "grn-sample", "layer_norm", "stochastic_depth", "block-keep-survival"],
)
def test_other_dimensions(ndim, case):
    """The result in one or three dimensions does not depend on the backend that auto takes."""
    case = CASES[case]
    mask = torch.rand(2, *(3, 2, 2)[:ndim]) < 0.4
    x, p = arguments(case, torch.float64, Layout.from_mask(mask, tuple(4 * size for size in mask.shape[1:])))
    p = in_dimensions(p, ndim)
    with use_backend("reference"):
        expected = outputs_and_gradients(seeded(case), x, p)
    assert_same(outputs_and_gradients(seeded(case), x, p), expected, 1e-11)
