"""`ops.grn`."""

from __future__ import annotations

import functools
import itertools
import re

import cuda_emulator
import pytest
import torch
from cases import (
    BOUNDS,
    DEVICE,
    DTYPES,
    assert_close,
    assert_matches_reference,
    assert_same,
    backends,
    dtypes_of,
    example_layout,
    incoming_gradient,
    layouts,
    make_layout,
    name,
    needs_cuda,
    needs_cpu,
    outputs_and_gradients,
    place,
    random_sparse,
    suit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import channel_parameters

from sparsecnx import SparseTensor, ops, use_backend

SCOPES = pytest.mark.parametrize("scope", ["sample", "batch"])


def published(rows, gamma, beta, eps=1e-6):
    """The paper's algorithm 1 on the rows of one group."""
    norm = torch.norm(rows, p=2, dim=0, keepdim=True)
    return gamma * (rows * (norm / (norm.mean(dim=1, keepdim=True) + eps))) + beta + rows


@SCOPES
@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_reference_is_the_published_algorithm_image_by_image(ndim, scope, data):
    layout = data.draw(layouts(ndim, sites=(24, 12, 6)[ndim - 1]))
    x = random_sparse(layout, 5)
    gamma, beta = channel_parameters(5, "gamma", "beta").values()
    splits = layout.row_splits.tolist() if scope == "sample" else [0, layout.rows]
    groups = [published(x.features[a:b], gamma, beta) for a, b in itertools.pairwise(splits)]
    with use_backend("reference"):
        assert_close(ops.grn(x, gamma, beta, scope).features, torch.cat(groups))


@needs_cpu
@SCOPES
@DTYPES
@given(layout=layouts(), channels=st.sampled_from([1, 2, 7, 16, 37, 160]))
def test_native_equals_reference(dtype, scope, layout, channels):
    x, p = random_sparse(layout, channels), channel_parameters(channels, "gamma", "beta")
    assert_matches_reference(lambda x, **p: ops.grn(x, **p, scope=scope), x, p, dtype, statistics=("gamma", "beta"))


@needs_cuda
@SCOPES
@pytest.mark.parametrize("dtype", dtypes_of("cuda"), ids=name)
@settings(max_examples=15)
@given(layout=layouts(), channels=st.sampled_from([1, 3, 8, 20, 40, 352]))
def test_cuda_equals_reference(dtype, scope, layout, channels):
    x, p = random_sparse(layout, channels), channel_parameters(channels, "gamma", "beta")
    run = functools.partial(ops.grn, scope=scope)
    assert_matches_reference(run, x, p, dtype, statistics=("gamma", "beta"), backend="cuda")


# By what they have the kernels do: rows of each group, channels.
GROUPS = {
    "no-groups": ([], 8),
    "no-rows": ([0, 0, 0], 8),
    "one-row": ([1], 40),
    "empty-groups-at-both-ends": ([0, 0, 5, 0, 0, 9, 0], 40),
    "hundreds-of-groups-in-a-block": ([1, 0, 3] * 100, 24),
    "groups-over-many-blocks": ([900, 0, 700, 1, 30], 96),
    "one-group-in-many-blocks": ([3000], 136),
    "thousands-of-rows-of-one-channel": ([9000, 3], 1),
    "rows-without-whole-accesses": ([200, 7, 300], 37),
    "many-blocks-along-a-row": ([20, 5], 5640),
    "long-blocks-for-many-rows": ([4000, 4200], 1025),
}


def rows_of_groups(sizes, channels, dtype):
    """Rows of random scale, some channels zero; gamma, beta; an incoming gradient; row splits."""
    rows = sum(sizes)
    x = torch.randn(rows, channels) * torch.rand(channels)
    x[:, 1::7] = 0
    splits = torch.tensor([0, *itertools.accumulate(sizes)])
    return x.to(dtype), torch.randn(2, channels), (1 + torch.randn(rows, channels)).to(dtype), splits


# Every dtype, of the largest one.
GROUPS_AND_DTYPES = [
    pytest.param(sizes, channels, dtype, id=f"{case}-{name(dtype)}")
    for case, (sizes, channels) in GROUPS.items()
    for dtype in dtypes_of("cuda")
    if channels * sum(sizes) <= 1e6 or dtype == torch.bfloat16
]


@needs_cuda
@pytest.mark.parametrize(("sizes", "channels", "dtype"), GROUPS_AND_DTYPES)
def test_cuda_sums_any_groups(sizes, channels, dtype):
    x, (gamma, beta), grad, splits = rows_of_groups(sizes, channels, dtype)
    leaves = [value.double().requires_grad_() for value in (x, gamma, beta)]
    group = torch.arange(len(sizes)).repeat_interleave(splits.diff())
    energy = torch.zeros(len(sizes), channels, dtype=torch.float64).index_add(0, group, leaves[0].square())
    silent = energy == 0
    norm = torch.where(silent, 1, energy).sqrt() * ~silent
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    expected = leaves[1] * leaves[0] * response[group] + leaves[2] + leaves[0]
    gradients = torch.autograd.grad(expected, leaves, grad.double())

    x, gamma, beta, grad, splits = (place(value, "cuda") for value in (x, gamma, beta, grad, splits))
    forward = torch.ops.sparsecnx_cuda.grn(x, gamma, beta, splits, 1e-6)
    backward = torch.ops.sparsecnx_cuda.grn_backward(grad, x, gamma, splits, forward[1], 1e-6)
    names = ("out", "gradient of x", "gradient of gamma", "gradient of beta")
    found = dict(zip(names, (forward[0], *backward), strict=True))
    assert_same(found, dict(zip(names, (expected, *gradients), strict=True)), BOUNDS[dtype])
    assert forward[1].dtype == torch.float32
    assert_close(forward[1], energy, BOUNDS[torch.float32])
    assert torch.equal(forward[1].cpu() == 0, silent)

    if DEVICE.type == "cpu":
        cuda_emulator.load().seed(5)  # another order of threads
    again = (*torch.ops.sparsecnx_cuda.grn(x, gamma, beta, splits, 1e-6),)
    again += torch.ops.sparsecnx_cuda.grn_backward(grad, x, gamma, splits, forward[1], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(again, (*forward, *backward), strict=True))


@needs_cuda
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the emulator tells of its launches")
def test_cuda_takes_16_bytes_at_a_time_where_rows_allow():
    emulator = cuda_emulator.load()
    for dtype, channels, shift, values in (
        (torch.bfloat16, 40, 0, 8),
        (torch.bfloat16, 36, 0, 1),
        (torch.bfloat16, 40, 1, 1),
        (torch.float32, 36, 0, 4),
        (torch.float32, 37, 0, 1),
    ):
        x, (gamma, beta), _, splits = rows_of_groups([50, 20], channels, dtype)
        x = torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view(x.shape)
        emulator.forget_launches()
        torch.ops.sparsecnx_cuda.grn(x, gamma, beta, splits, 1e-6)
        kernels = [launch.kernel for launch in emulator.launches() if "<" in launch.kernel]
        assert len(kernels) == 2 and all(re.search(rf", {values}>", kernel) for kernel in kernels), kernels


@needs_cuda
def test_cuda_operators_pass_opcheck():
    x, (gamma, beta), grad, splits = (value.to(DEVICE) for value in rows_of_groups([5, 0, 4], 8, torch.float32))
    energy = torch.rand(3, 8, device=DEVICE)
    operators = torch.ops.sparsecnx_cuda
    torch.library.opcheck(operators.grn_backward.default, (grad, x, gamma, splits, energy, 1e-6))
    leaves = [value.clone().requires_grad_() for value in (x, gamma, beta)]
    torch.library.opcheck(operators.grn.default, (*leaves, splits, 1e-6))


@needs_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 4, dtype=torch.float64)}, "x is Double, expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(6, 0)}, "x has 0 channels, expected 1 to 65536"),
        ({"gamma": torch.zeros(5)}, "gamma has 5 elements, expected 4"),
        ({"beta": torch.zeros(4, dtype=torch.float16)}, "beta is Half, expected Float"),
        ({"segments": torch.tensor([0, 6], dtype=torch.int32)}, "segments is Int, expected Long"),
        ({"segments": torch.tensor([0])}, "segments has no groups, x has 6 rows"),
        ({"segments": torch.zeros(0, dtype=torch.int64)}, r"segments must be \(groups \+ 1,\)"),
    ],
    ids=str,
)
def test_cuda_refuses_what_does_not_fit(change, message):
    values = {"x": torch.zeros(6, 4), "gamma": torch.zeros(4), "beta": torch.zeros(4), "segments": torch.tensor([0, 6])}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.grn(*(value.to(DEVICE) for value in (values | change).values()), 1e-6)


@needs_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(5, 4)}, "grad has 20 elements, expected 24"),
        ({"grad": torch.zeros(6, 4, dtype=torch.float16)}, "grad is Half, expected Float"),
        ({"energy": torch.zeros(2, 4)}, "energy has 8 elements, expected 4"),
    ],
    ids=str,
)
def test_cuda_refuses_a_gradient_of_something_else(change, message):
    values = {"grad": torch.zeros(6, 4), "x": torch.zeros(6, 4), "gamma": torch.zeros(4)}
    values |= {"segments": torch.tensor([0, 6]), "energy": torch.zeros(1, 4)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.grn_backward(*(value.to(DEVICE) for value in (values | change).values()), 1e-6)


@pytest.mark.parametrize("backend", backends("grn"))
@SCOPES
def test_a_channel_that_is_zero_everywhere(backend, scope):
    """G = 0 there: its output is beta, the gradient of its input is as if N were constant."""
    x = random_sparse(example_layout(), 4)
    features = x.features.clone()
    features[:, 1] = 0
    x, p = suit(backend, x.with_features(features), channel_parameters(4, "gamma", "beta"))
    with use_backend(backend):
        found = outputs_and_gradients(lambda x, **p: ops.grn(x, **p, scope=scope), x, p)
    assert all(value.isfinite().all() for value in found.values())
    assert (found["output"][:, 1] == p["beta"][1]).all()
    assert torch.equal(found["gradient of x"][:, 1], incoming_gradient(features.shape).to(x.features)[:, 1])
    assert found["gamma"][1] == 0


@pytest.mark.parametrize("backend", backends("grn"))
@SCOPES
def test_an_image_that_is_zero_everywhere(backend, scope):
    x, p = suit(backend, random_sparse(example_layout(), 4), channel_parameters(4, "gamma", "beta"))
    with use_backend(backend):
        found = outputs_and_gradients(
            lambda x, **p: ops.grn(x, **p, scope=scope), x.with_features(torch.zeros_like(x.features)), p
        )
    assert all(value.isfinite().all() for value in found.values())
    assert (found["output"] == p["beta"]).all()
    assert (found["gamma"] == 0).all()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_squares_do_not_overflow_in_16_bits(dtype):
    x = random_sparse(make_layout(torch.zeros(1, 2, 2, dtype=torch.bool), 8), 8)
    x = x.with_features(300 + 100 * x.features)  # squares beyond 65504, the largest float16
    assert_matches_reference(
        ops.grn, x, {"gamma": torch.ones(8), "beta": torch.zeros(8)}, dtype, statistics=("gamma", "beta")
    )


@pytest.mark.parametrize("backend", backends("grn"))
def test_scope_decides_whether_images_depend_on_each_other(backend):
    x, p = suit(backend, random_sparse(example_layout(), 4), channel_parameters(4, "gamma", "beta"))
    gamma, beta = p.values()
    first = slice(0, x.layout.row_splits[1].item())
    changed = x.features.clone()
    changed[first.stop :] *= 2
    with use_backend(backend):
        for scope, same in (("sample", True), ("batch", False)):
            before = ops.grn(x, gamma, beta, scope).features[first]
            after = ops.grn(x.with_features(changed), gamma, beta, scope).features[first]
            assert torch.equal(before, after) == same


@pytest.mark.parametrize("backend", backends("grn"))
@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 1, 4)], ids=str)
def test_parameters_of_every_published_shape(backend, shape):
    x, p = suit(backend, random_sparse(example_layout(), 4), channel_parameters(4, "gamma", "beta"), torch.float32)
    with use_backend(backend):
        flat = outputs_and_gradients(ops.grn, x, p)
        shaped = outputs_and_gradients(ops.grn, x, {name: value.view(shape) for name, value in p.items()})
    assert torch.equal(flat["output"], shaped["output"])
    assert shaped["gamma"].shape == shape
    assert torch.equal(flat["gamma"], shaped["gamma"].flatten())


@pytest.mark.parametrize("backend", backends("grn"))
def test_eps_is_added_to_the_mean(backend):
    layout = make_layout(torch.zeros(1, 1, 1, dtype=torch.bool), 1)
    x = SparseTensor(torch.tensor([[3.0, 1.0]]), layout)
    x, p = suit(backend, x, {"gamma": torch.ones(2), "beta": torch.zeros(2)})
    with use_backend(backend):
        out = ops.grn(x, **p, eps=2.0)
    torch.testing.assert_close(out.features.cpu(), torch.tensor([[3 + 9 / 4.0, 1 + 1 / 4.0]]))


@pytest.mark.parametrize("scope", ["image", "", None])
def test_unknown_scope(scope):
    x = random_sparse(example_layout(), 4)
    with pytest.raises(ValueError, match=rf"scope is {scope!r}: expected 'sample' or 'batch'"):
        ops.grn(x, torch.zeros(4), torch.zeros(4), scope)


@pytest.mark.parametrize("wrong", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(3,), (4, 1), ()], ids=str)
def test_parameter_of_another_shape(wrong, shape):
    p = {"gamma": torch.zeros(4), "beta": torch.zeros(4)} | {wrong: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{wrong} is \({', '.join(map(str, shape))},?\): expected \(4,\)"):
        ops.grn(random_sparse(example_layout(), 4), **p)
