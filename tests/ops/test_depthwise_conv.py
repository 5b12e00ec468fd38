"""`ops.depthwise_conv`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    assert_close,
    assert_matches_reference,
    boxes,
    draw_mask,
    example_layout,
    make_layout,
    name,
    needs_cpu,
    random_sparse,
    site_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import conv_parameters

from sparsecnx import ops, use_backend

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_reference_is_a_dense_convolution_of_the_masked_input(ndim, data):
    layout = data.draw(boxes(ndim))
    kernel = data.draw(st.tuples(*[st.sampled_from([1, 3, 5, 7])] * ndim))
    p = conv_parameters(3, 1, *kernel)
    keep = site_mask(layout)
    x = random_sparse(layout, 3)
    dense = x.dense() + torch.randn(x.shape, dtype=torch.float64) * (1 - keep)
    padding = tuple(size // 2 for size in kernel)
    expected = CONV[ndim](dense * keep, p["weight"], p["bias"], padding=padding, groups=3) * keep
    with use_backend("reference"):
        assert_close(ops.depthwise_conv(x, **p).dense(), expected)


@needs_cpu
@DTYPES
@settings(max_examples=30)
@given(
    layout=boxes(),
    channels=st.sampled_from([1, 7, 16, 37, 80]),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5, 7, 9, 11])] * 3),
    bias=st.booleans(),
)
def test_cpu_equals_reference(dtype, layout, channels, kernel, bias):
    p = conv_parameters(channels, 1, *kernel[-layout.ndim :])
    if not bias:
        del p["bias"]
    assert_matches_reference(ops.depthwise_conv, random_sparse(layout, channels), p, dtype, statistics=("bias",))


@needs_cpu
@pytest.mark.parametrize("tile", range(1, 25))
def test_cpu_equals_reference_at_every_tile_side(tile):
    layout = make_layout(draw_mask("random counts", 2, (2, 3), seed=tile), tile)
    assert_matches_reference(ops.depthwise_conv, random_sparse(layout, 5), conv_parameters(5, 1, 7, 7), torch.float32)


@needs_cpu
@pytest.mark.parametrize("kernel", [(7, 7, 7), (5, 5, 5), (3, 3, 3), (1, 7, 7), (3, 5, 7), (7, 3, 1)], ids=name)
@pytest.mark.parametrize(
    "tile", [(8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1), (2, 4, 8), (6, 9, 3), (1, 16, 2)], ids=name
)
def test_cpu_equals_reference_in_three_dimensions(tile, kernel):
    layout = make_layout(draw_mask("random counts", 1, (3, 2, 2), seed=2), tile)
    assert_matches_reference(
        ops.depthwise_conv, random_sparse(layout, 5), conv_parameters(5, 1, *kernel), torch.float64
    )


@needs_cpu
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11, 15, 31])
def test_cpu_equals_reference_for_every_kernel(kernel):
    layout = example_layout(grid=(4, 3))
    p = conv_parameters(20, 1, kernel, kernel)
    assert_matches_reference(ops.depthwise_conv, random_sparse(layout, 20), p, torch.float32)


def test_gradients_only_where_they_are_wanted():
    x = random_sparse(example_layout(), 4)
    weight, bias = conv_parameters(4, 1, 3, 3).values()
    for wanted in (weight, bias):
        wanted.requires_grad_()
        ops.depthwise_conv(x, weight, bias).features.sum().backward()
        assert wanted.grad is not None
        wanted.requires_grad_(False)
    assert x.features.grad is None


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ((5, 1, 7, 7), r"weight is \(5, 1, 7, 7\): expected \(4, 1, k, k\)"),
        ((4, 4, 7, 7), r"weight is \(4, 4, 7, 7\): expected \(4, 1, k, k\)"),
        ((4, 1, 7), r"weight is \(4, 1, 7\): expected \(4, 1, k, k\)"),
        ((4, 1, 7, 6), r"weight is \(4, 1, 7, 6\): kernel sizes must be odd"),
    ],
)
def test_weight_of_another_shape(weight, message):
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv(random_sparse(example_layout(), 4), torch.zeros(weight).double())
