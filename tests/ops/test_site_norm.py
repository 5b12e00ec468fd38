"""`ops.batch_norm`, `ops.group_norm` and `ops.instance_norm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BOUNDS,
    DTYPES,
    assert_matches_reference,
    assert_same,
    backends,
    bound,
    boxes,
    draw_mask,
    example_layout,
    layouts,
    make_layout,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    suit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import channel_parameters

from sparsecnx import SparseTensor, ops, use_backend
from sparsecnx.ops.site_normalization.activations import ACTIVATIONS

OPERATORS = ["batch_norm", "group_norm", "instance_norm"]
EVERY = pytest.mark.parametrize("name", OPERATORS)
EVERY_BACKEND = pytest.mark.parametrize("backend", backends(*OPERATORS))
STATISTICS = ("weight", "bias")


def by_torch(name: str, groups: int, activation: str):
    """Return a function that normalises by torch's own function: the batch's sites, or those of image after image."""

    def run(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor) -> SparseTensor:
        sizes = x.layout.row_splits.diff().tolist() if name != "batch_norm" else [x.layout.rows]
        parts = []
        for rows in x.features.split(sizes):
            if rows.shape[0] == 0:
                out = rows
            elif name == "group_norm":
                out = F.group_norm(rows.t()[None], groups, weight, bias, 1e-3)[0].t()
            else:
                out = F.batch_norm(rows, None, None, weight, bias, True, 0.1, 1e-3)
            parts.append(ACTIVATIONS[activation](out, 0.2))
        features = torch.cat(parts) + 0 * (weight.sum() + bias.sum())
        return x.with_features(features)

    return run


def ours(name: str, groups: int, activation: str):
    options = {"eps": 1e-3, "activation": activation, "slope": 0.2}

    def run(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor) -> SparseTensor:
        if name == "group_norm":
            return ops.group_norm(x, groups, weight, bias, **options)
        training = {"training" if name == "batch_norm" else "use_input_stats": True}
        return getattr(ops, name)(x, None, None, weight, bias, **training, **options)

    return run


@EVERY_BACKEND
@EVERY
@pytest.mark.parametrize("ndim", [1, 2, 3])
@settings(max_examples=8)
@given(data=st.data())
def test_is_torch_on_the_visible_sites(backend, name, ndim, data):
    layout = data.draw(boxes(ndim, sites=(24, 8, 4), tiles=(2, 4, 6)))
    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    x, p = suit(backend, random_sparse(layout, 6), channel_parameters(6, "weight", "bias"))
    expected = outputs_and_gradients(
        by_torch(name, groups, "relu"),
        x.with_features(x.features.double().cpu(), layout),
        {key: value.double().cpu() for key, value in p.items()},
    )
    with use_backend(backend):
        assert_same(outputs_and_gradients(ours(name, groups, "relu"), x, p), expected, bound(backend))


@EVERY_BACKEND
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(backend, activation):
    x, p = random_sparse(example_layout(), 20), channel_parameters(20, "weight", "bias")
    p["weight"] = 4 * p["weight"]  # beyond every bend
    expected = outputs_and_gradients(by_torch("batch_norm", 1, activation), x, p)
    x, p = suit(backend, x, p)
    with use_backend(backend):
        assert_same(outputs_and_gradients(ours("batch_norm", 1, activation), x, p), expected, bound(backend))


@needs_cpu
@pytest.mark.parametrize(("activation", "value_error", "slope_error"), [("gelu", 6, 6), ("silu", 3, 20)])
def test_activations_over_the_whole_range(activation, value_error, slope_error):
    """Errors are multiples of 2^-24 |z| and 2^-24: those of torch's own, or less. Infinity, NaN and 0 are exact."""
    powers = torch.exp2(torch.linspace(-140, 126, 20000, dtype=torch.float64))
    around = torch.linspace(-100, 100, 50001, dtype=torch.float64)
    z = torch.cat([powers, -powers, around]).float()
    for special in (float("inf"), float("nan"), 0.0):
        z = torch.cat([z, torch.tensor([special])])
    x = SparseTensor.from_dense(torch.zeros(1, len(z), 1, 2), torch.zeros(1, 1, 2, dtype=torch.bool))
    bias, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    with use_backend("cpu"):  # x and the weight are zero, so that the bias is what is activated
        value = ops.batch_norm(x, None, None, torch.zeros_like(z), bias, training=True, activation=activation).features[
            0
        ]
    expected = ACTIVATIONS[activation](exact, 0.0)
    value.sum().backward()
    expected.sum().backward()
    finite, magnitude = slice(0, -3), z[:-3].abs().double()
    assert ((value - expected).abs()[finite] <= value_error * 2**-24 * magnitude + 2**-149).all()
    assert ((bias.grad - exact.grad).abs()[finite] <= slope_error * 2**-24).all()
    assert value[-3:].tolist()[::2] == [float("inf"), 0.0] and value[-2].isnan()
    assert bias.grad[-1] == 0.5 and bias.grad[-2].isnan()


@needs_cpu
@EVERY
@DTYPES
@settings(max_examples=8)
@given(layout=layouts(tiles=(1, 2, 4, 8)), channels=st.sampled_from([4, 16, 36, 160]))
def test_cpu_equals_reference(name, dtype, layout, channels):
    """Rows of 16 bits keep parameters and statistics in float32."""
    if layout.rows == 1:
        return
    x, p = random_sparse(layout, channels), channel_parameters(channels, "weight", "bias")
    if name != "group_norm" and layout.rows_per_image == 1:
        return
    assert_matches_reference(ours(name, 4, "silu"), x, p, dtype, statistics=STATISTICS)


@pytest.mark.parametrize("backend", [one for one in backends(*OPERATORS) if one.values != ("reference",)])
@EVERY
def test_far_from_zero(backend, name):
    """Moments are those of differences from a value nearby: float32 keeps what is small beside the mean.

    Batch normalization without an activation is torch's own.
    """
    layout = make_layout(draw_mask("equal counts", 2, (4, 4), seed=9), 8)
    x, p = random_sparse(layout, 8), channel_parameters(8, "weight", "bias")
    x = x.with_features((x.features + 30).float().double())
    expected = outputs_and_gradients(by_torch(name, 2, "silu"), x, p, mean=0.0)
    x, p = suit(backend, x, p, torch.float32)
    with use_backend(backend):
        found = outputs_and_gradients(ours(name, 2, "silu"), x, p, mean=0.0)
    assert_same(found, expected, BOUNDS[torch.float32])


@EVERY_BACKEND
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_of_the_batch_move_as_torch_moves_them(backend, momentum):
    x, _ = suit(backend, random_sparse(example_layout(), 5, torch.float32), {})
    running = [torch.randn(5, device=x.device), torch.rand(5, device=x.device)]
    expected = [value.clone() for value in running]
    F.batch_norm(x.features, *expected, training=True, momentum=momentum)
    before = [value.clone() for value in running]
    with use_backend(backend):
        ops.batch_norm(x, *running, training=False)
        assert all(map(torch.equal, running, before))
        ops.batch_norm(x, *running, training=True, momentum=momentum)
    torch.testing.assert_close(running, expected)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_running_statistics_of_another_dtype_move(activation):
    x = random_sparse(example_layout(), 5, torch.bfloat16)
    running, expected = (
        [torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)] for dtype in (torch.bfloat16, torch.float32)
    )
    F.batch_norm(x.features, *expected, training=True)
    ops.batch_norm(x, *running, training=True, activation=activation)
    torch.testing.assert_close(running, [value.bfloat16() for value in expected])


@EVERY_BACKEND
def test_running_statistics_of_instances_leave_out_images_without_a_variance(backend):
    mask = torch.tensor([[[False, False]], [[True, True]], [[True, False]], [[False, False]]])
    x, _ = suit(backend, random_sparse(make_layout(mask, 1), 5, torch.float32), {})
    running = [torch.randn(5, device=x.device), torch.rand(5, device=x.device)]
    expected = [value.clone() for value in running]
    pairs = x.features[[0, 1, 3, 4]].view(2, 2, 5).mT  # of the two images with two sites
    F.instance_norm(pairs, *expected)
    with use_backend(backend):
        out = ops.instance_norm(x, *running)
        torch.testing.assert_close(running, expected)
        frozen = ops.instance_norm(x, *running, use_input_stats=False)
    assert out.features.isfinite().all() and (out.features[2] == 0).all()
    torch.testing.assert_close(frozen.features, F.batch_norm(x.features, *running))


def test_running_statistics_without_a_visible_site_stay():
    x = random_sparse(make_layout(torch.ones(2, 1, 2, dtype=torch.bool), 2), 5, torch.float32)
    running = [torch.randn(5), torch.rand(5)]
    before = [value.clone() for value in running]
    ops.batch_norm(x, *running, training=True)
    ops.instance_norm(x, *running)
    assert all(map(torch.equal, running, before))


@needs_cpu
def test_running_statistics_move_under_torch_compile():
    torch._dynamo.reset()
    module = torch.nn.BatchNorm1d(5)
    x = random_sparse(example_layout(), 5, torch.float32)

    def step(features):
        found = module.running_mean, module.running_var
        return ops.batch_norm(x.with_features(features), *found, module.weight, module.bias, training=True).features

    torch.compile(step, fullgraph=True, backend="aot_eager")(x.features)
    torch.testing.assert_close(module.running_mean, 0.1 * x.features.mean(0))
    torch.testing.assert_close(module.running_var, 0.9 + 0.1 * x.features.var(0))


@needs_cpu
def test_backward_keeps_the_rows_and_nothing_else_of_their_size():
    x, p = random_sparse(example_layout(), 20, torch.float32), channel_parameters(20, "weight", "bias")
    features = x.features.requires_grad_()
    kept = []
    p = {key: value.float().requires_grad_() for key, value in p.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        ops.batch_norm(x, None, None, **p, training=True, activation="gelu")
    assert [value.data_ptr() for value in kept if value.numel() >= features.numel()] == [features.data_ptr()]


@needs_cpu
def test_opcheck():
    x, splits = torch.randn(9, 6, requires_grad=True), torch.tensor([0, 4, 4, 9])
    p = [torch.randn(6, requires_grad=True) for _ in range(2)]
    for weights in (p, (None, None)):
        torch.library.opcheck(torch.ops.sparsecnx.site_norm.default, (x, *weights, splits, 3, 1e-5, 4, 0.01))


WRONG = [
    ("batch_norm", {"training": False}, r"running_mean or running_var is None: expected both in evaluation"),
    ("batch_norm", {"training": True, "activation": "tanh"}, r"activation is 'tanh': expected one of 'none', 'relu'"),
    ("group_norm", {"groups": 4}, r"groups is 4: expected a divisor of the channels, 6"),
    ("group_norm", {"groups": 0}, r"groups is 0: expected a divisor of the channels, 6"),
    ("instance_norm", {"use_input_stats": False}, r"running_mean or running_var is None: expected both where"),
    ("instance_norm", {"running_mean": torch.zeros(5)}, r"running_mean is \(5,\): expected \(6,\)"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_does_not_fit_is_refused(name, change, message):
    x = random_sparse(example_layout(), 6)
    missing = {"running_mean": None, "running_var": None} if name == "batch_norm" else {}
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(x, **{**missing, **change})


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_a_single_value_has_no_variance(name):
    one = random_sparse(make_layout(torch.tensor([[[False, True]]]), 1), 3)
    arguments = {"running_mean": None, "running_var": None, "training": True} if name == "batch_norm" else {}
    with pytest.raises(
        ValueError, match=r"Expected more than 1 .* when training, got x \(1, 3, .*\) with one visible site"
    ):
        getattr(ops, name)(one, **arguments)
