"""`ops.layer_norm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    assert_close,
    assert_matches_reference,
    backends,
    example_layout,
    layouts,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    site_mask,
    suit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import channel_parameters

from sparsecnx import ops, use_backend


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_reference_is_torch_layer_norm_over_channels_of_the_visible_sites(ndim, data):
    layout = data.draw(layouts(ndim, sites=(24, 12, 6)[ndim - 1]))
    x = random_sparse(layout, 5)
    weight, bias = channel_parameters(5, "weight", "bias").values()
    dense = F.layer_norm(x.dense().movedim(1, -1), (5,), weight, bias, 1e-6).movedim(-1, 1)
    with use_backend("reference"):
        assert_close(ops.layer_norm(x, weight, bias).dense(), dense * site_mask(layout))


@needs_cpu
@DTYPES
@settings(max_examples=30)
@given(layout=layouts(), channels=st.sampled_from([4, 7, 16, 37, 160]))
def test_cpu_equals_reference(dtype, layout, channels):
    x, p = random_sparse(layout, channels), channel_parameters(channels, "weight", "bias")
    assert_matches_reference(ops.layer_norm, x, p, dtype, statistics=("weight", "bias"))


@needs_cpu
@pytest.mark.parametrize("channels", [4, 8, 16, 17, 40])
def test_rows_far_from_zero(channels):
    """The variance is that of the deviations from the mean, not a difference of large sums."""
    x, p = random_sparse(example_layout(), channels), channel_parameters(channels, "weight", "bias")
    x = x.with_features(x.features + 30)
    assert_matches_reference(ops.layer_norm, x, p, torch.float32, statistics=("weight", "bias"))


@pytest.mark.parametrize("backend", backends("layer_norm"))
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_constant_rows_become_the_bias(backend, channels):
    x = random_sparse(example_layout(), 1, torch.float32)
    rows = x.features.expand(-1, channels).round()  # integers: their mean is exact
    x, p = suit(backend, x.with_features(rows), channel_parameters(channels, "weight", "bias"), torch.float32)
    with use_backend(backend):
        found = outputs_and_gradients(ops.layer_norm, x, p)
    assert (found["output"] == p["bias"]).all()
    assert found["weight"].abs().max() < 1e-2  # the deviations are 0, or a rounding error times 1 / sqrt(eps) = 1000
    assert found["gradient of x"].isfinite().all()


@pytest.mark.parametrize("backend", backends("layer_norm"))
def test_eps_is_added_to_the_biased_variance(backend):
    x = random_sparse(example_layout(), 2, torch.float32)
    x = x.with_features(torch.tensor([1.0, 3.0]).expand(x.features.shape))  # mean 2, biased variance 1
    x, p = suit(backend, x, {"weight": torch.ones(2), "bias": torch.zeros(2)})
    with use_backend(backend):
        out = ops.layer_norm(x, **p, eps=3.0)
    assert (out.features.cpu() == torch.tensor([-0.5, 0.5])).all()
