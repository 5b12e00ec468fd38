"""`ops.conv`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    assert_close,
    assert_matches_reference,
    draw_convolution,
    draw_mask,
    example_layout,
    make_layout,
    name,
    needs_cpu,
    random_sparse,
    site_mask,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import conv_parameters

from sparsecnx import ops, use_backend
from sparsecnx.ops import convolution

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def masked_dense(x, weight, bias, stride, padding):
    """Zero the masked input, convolve with enough zeros around, crop to H / stride sites, zero the masked output."""
    layout = x.layout
    margin = max(weight.shape[2:])
    corner = [margin * stride - p for p in padding]  # where the first output reads
    padded = F.pad(x.dense() * site_mask(layout), [margin * stride] * (2 * layout.ndim))
    for axis, start in enumerate(corner):
        extent = layout.shape[axis] - stride + weight.shape[2 + axis]
        padded = padded.narrow(2 + axis, start, extent)
    return CONV[layout.ndim](padded, weight, bias, stride=stride) * site_mask(layout.coarsen(stride))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_reference_is_a_dense_convolution_of_the_masked_input(ndim, data):
    layout, stride, kernel, padding = draw_convolution(data, ndim)
    x, p = random_sparse(layout, 3), conv_parameters(4, 3, *kernel)
    with use_backend("reference"):
        found = ops.conv(x, **p, stride=stride, padding=padding)
    assert found.layout.tile == layout.coarsen(stride).tile and found.layout.stride == (stride,) * ndim
    assert_close(found.dense(), masked_dense(x, *p.values(), stride, padding))


@needs_cpu
@DTYPES
@settings(max_examples=30)
@given(data=st.data(), channels=st.sampled_from([1, 7, 19]), out=st.sampled_from([1, 5, 24]), bias=st.booleans())
def test_cpu_equals_reference(dtype, data, channels, out, bias):
    layout, stride, kernel, padding = draw_convolution(data, 2)
    p = conv_parameters(out, channels, *kernel)
    if not bias:
        del p["bias"]

    def run(x, **p):
        return ops.conv(x, **p, stride=stride, padding=padding)

    assert_matches_reference(run, random_sparse(layout, channels), p, dtype)


@needs_cpu
@pytest.mark.parametrize("ndim", [1, 3])
@given(data=st.data())
def test_cpu_equals_reference_in_other_dimensions(ndim, data):
    layout, stride, kernel, padding = draw_convolution(data, ndim)
    assume(layout.rows < 3000)

    def run(x, **p):
        return ops.conv(x, **p, stride=stride, padding=padding)

    assert_matches_reference(run, random_sparse(layout, 3), conv_parameters(4, 3, *kernel), torch.float32)


# Networks have these: kernel, stride, tile, and the padding of torch.nn.functional.conv2d.
NETWORKS = {
    "1x1": (1, 1, 4, 0),
    "ResNet-3x3": (3, 1, 4, 1),
    "ResNet-3x3-stride2": (3, 2, 4, 1),
    "ResNet-1x1-stride2": (1, 2, 4, 0),
    "ResNet-stem-7x7-stride2": (7, 2, 16, 3),
    "ConvNeXt-stem-4x4-stride4": (4, 4, 16, 0),
    "ConvNeXt-downsample-2x2-stride2": (2, 2, 8, 0),
    "overlapping-4x4-stride2": (4, 2, 8, 1),
    "patch-of-the-whole-tile-6x6-stride6": (6, 6, 6, 0),
    "3x3-stride3-inside-a-larger-tile": (3, 3, 12, 0),
}


@pytest.mark.parametrize(("kernel", "stride", "tile", "padding"), NETWORKS.values(), ids=list(NETWORKS))
def test_default_padding_is_the_one_networks_use(kernel, stride, tile, padding):
    layout = make_layout(draw_mask("random counts", 2, (2, 3), seed=3), tile)
    x, p = random_sparse(layout, 3), conv_parameters(4, 3, kernel, kernel)
    keep = site_mask(layout.coarsen(stride))
    expected = F.conv2d(x.dense(), **p, stride=stride, padding=padding) * keep
    found = ops.conv(x, **p, stride=stride)
    assert_close(found.dense(), expected)
    torch.testing.assert_close(ops.conv(x, **p, stride=stride, padding=padding).features, found.features)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 6, 12], ids="stride{}".format)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_patchify_convolutions_need_no_gather(ndim, stride, monkeypatch):
    def no_gather(*args):
        raise AssertionError("a patchify convolution went through a gathering kernel")

    monkeypatch.setattr(convolution.operator, "choose", no_gather)
    tile = 8 if stride in (1, 2, 4, 8) else stride
    layout = make_layout(draw_mask("random counts", 2, (1, 2, 2)[:ndim], seed=1), tile)
    x, p = random_sparse(layout, 2), conv_parameters(3, 2, *[stride] * ndim)
    expected = CONV[ndim](x.dense(), **p, stride=stride) * site_mask(layout.coarsen(stride))
    assert_close(ops.conv(x, **p, stride=stride).dense(), expected)


@needs_cpu
def test_more_output_rows_than_one_chunk():
    """The compiled kernel gathers at most 2**20 values at a time."""
    layout = make_layout(torch.zeros(1, 10, 10, dtype=torch.bool), 8)
    channels = 24  # 6400 rows of 9 * 24 values
    p = conv_parameters(4, channels, 3, 3)
    assert layout.rows * 9 * channels > 2**20
    assert_matches_reference(ops.conv, random_sparse(layout, channels), p, torch.float32)


@pytest.mark.parametrize("weight", [(5, 3, 3, 3), (5, 4, 3), (5, 4, 3, 3, 3)], ids=name)
def test_weight_of_another_shape(weight):
    with pytest.raises(ValueError, match=r"weight is \(5, .*\): expected \(C_out, 4, k, k\)"):
        ops.conv(random_sparse(example_layout(), 4), torch.zeros(weight).double())


@pytest.mark.parametrize("stride", [0, -1, 3, 8])
def test_stride_that_does_not_divide_the_tile(stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}: it must divide the tile side, 4 sites"):
        ops.conv(random_sparse(example_layout(tile=4), 4), torch.zeros(5, 4, 3, 3).double(), stride=stride)


@pytest.mark.parametrize("padding", [-1, 3, (1,), (1, 3), (1, 1, 1)], ids=name)
def test_padding_that_does_not_fit_the_kernel(padding):
    with pytest.raises(ValueError, match=r"padding is .*: expected 0 to k - 1 for each axis of a kernel \(3, 3\)"):
        ops.conv(random_sparse(example_layout(), 4), torch.zeros(5, 4, 3, 3).double(), padding=padding)
