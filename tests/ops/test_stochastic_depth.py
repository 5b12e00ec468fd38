"""`ops.stochastic_depth` and `ops.draw_survival`."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    backends,
    draw_mask,
    dtypes_of,
    example_layout,
    layouts,
    make_layout,
    random_sparse,
    suit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecnx import SparseTensor, ops, use_backend
from sparsecnx.ops.drop_path import operator


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(*backend.values, dtype, marks=backend.marks)
        for backend in backends("stochastic_depth")
        for dtype in dtypes_of(*backend.values)
    ],
    ids=str,
)
@settings(max_examples=10)
@given(layout=layouts(), channels=st.sampled_from([1, 7, 40]))
def test_rows_are_scaled_image_by_image(backend, dtype, layout, channels):
    x, _ = suit(backend, random_sparse(layout, channels, dtype), {})
    scale = torch.tensor([0.0, 1.25, 2.5])[: layout.batch]
    cotangent = torch.randn(layout.rows, channels).to(dtype)
    features = x.features.requires_grad_()
    with use_backend(backend):
        out = operator(x, scale.to(x.device, torch.promote_types(dtype, torch.float32)))
    (gradient,) = torch.autograd.grad(out, features, cotangent.to(x.device))
    for value, source in ((out.detach().cpu(), x.features.detach().cpu()), (gradient.cpu(), cotangent)):
        splits = layout.row_splits.tolist()
        images = [source[a:b] for a, b in itertools.pairwise(splits)]
        expected = [image.double() * factor for image, factor in zip(images, scale.tolist(), strict=True)]
        assert torch.equal(value, torch.cat(expected).to(dtype))  # the product, rounded once


@pytest.mark.parametrize("backend", backends("stochastic_depth"))
def test_images_are_dropped_or_scaled_up(backend):
    layout = make_layout(draw_mask("random counts", 64, (2, 2), seed=0), 1)
    x, _ = suit(backend, SparseTensor(torch.ones(layout.rows, 3), layout), {})
    with use_backend(backend):
        out = ops.stochastic_depth(x, 0.25).features.cpu()
    images = [out[layout.row_image() == image] for image in range(64)]
    assert all(image.unique().numel() <= 1 for image in images)  # an image is kept or dropped whole
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))


def test_survival_is_drawn_with_the_given_probability():
    layout = make_layout(torch.zeros(20000, 1, 1, dtype=torch.bool), 1)
    scale = ops.draw_survival(random_sparse(layout, 1), 0.3, training=True)
    assert scale.shape == (20000,)
    assert scale.mean().item() == pytest.approx(1, abs=0.02)  # the expectation of a branch is unchanged
    assert (scale == 0).double().mean().item() == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_survival_is_float32_at_least(dtype):
    scale = ops.draw_survival(random_sparse(example_layout(), 1, dtype), 0.3, training=True)
    assert scale.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_identity(p, training):
    x = random_sparse(example_layout(), 3)
    assert ops.stochastic_depth(x, p, training) is x
    assert ops.draw_survival(x, p, training) is None


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("training", [True, False])
def test_probability_outside_its_range(p, training):
    with pytest.raises(ValueError, match=rf"p is {p}: expected 0 <= p < 1"):
        ops.stochastic_depth(random_sparse(example_layout(), 3), p, training)
