"""`ops.grn`."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    assert_close,
    assert_matches_reference,
    backends,
    boxes,
    example_layout,
    incoming_gradient,
    layouts,
    make_layout,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    suit,
)
from hypothesis import given
from hypothesis import strategies as st
from operators import channel_parameters

from sparsecnx import SparseTensor, ops, use_backend

SCOPES = pytest.mark.parametrize("scope", ["sample", "batch"])


def published(rows, gamma, beta, eps=1e-6):
    """Apply the paper's algorithm 1 to the rows of one group."""
    norm = torch.norm(rows, p=2, dim=0, keepdim=True)
    return gamma * (rows * (norm / (norm.mean(dim=1, keepdim=True) + eps))) + beta + rows


@SCOPES
@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_reference_is_the_published_algorithm_image_by_image(ndim, scope, data):
    layout = data.draw(boxes(ndim, sites=(24, 12, 6)))
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
def test_cpu_equals_reference(dtype, scope, layout, channels):
    x, p = random_sparse(layout, channels), channel_parameters(channels, "gamma", "beta")
    assert_matches_reference(lambda x, **p: ops.grn(x, **p, scope=scope), x, p, dtype, statistics=("gamma", "beta"))


@pytest.mark.parametrize("backend", backends("grn"))
@SCOPES
def test_a_channel_that_is_zero_everywhere(backend, scope):
    """At G = 0 the output is beta, and the gradient of the input is that of a constant N."""
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
