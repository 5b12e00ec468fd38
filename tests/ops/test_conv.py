"""`ops.conv`."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    ON_GPU,
    assert_close,
    assert_matches_reference,
    backends,
    boxes,
    draw_mask,
    example_layout,
    make_layout,
    name,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    site_mask,
    suit,
    threads,
    widest,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import conv_parameters
from torch.utils.flop_counter import FlopCounterMode

from sparsecnx import ops, use_backend
from sparsecnx.ops import convolution

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
ON = [pytest.param(*case.values, marks=case.marks, id=case.values[0]) for case in backends("conv", "conv_transpose")]
FAST = pytest.mark.parametrize("backend", ON[1:])


def masked_dense(x, weight, bias, stride, padding, dilation=1, groups=1):
    """Zero the masked input, convolve with enough zeros around, crop to H / stride sites, zero the masked output."""
    layout, ndim = x.layout, x.layout.ndim
    strides = (stride,) * ndim if isinstance(stride, int) else stride
    dilations = (dilation,) * ndim if isinstance(dilation, int) else dilation
    margin = 4 * max(weight.shape[2:]) * max(dilations) * max(strides)
    padded = F.pad(x.dense() * site_mask(layout), [margin] * (2 * ndim))
    for axis in range(ndim):
        extent = layout.shape[axis] - strides[axis] + dilations[axis] * (weight.shape[2 + axis] - 1) + 1
        padded = padded.narrow(2 + axis, margin - padding[axis], extent)
    out = CONV[ndim](padded, weight, bias, stride=stride, dilation=dilation, groups=groups)
    return out * site_mask(layout.coarsen(stride))


def masked_dense_transpose(x, weight, bias, stride, padding, dilation, groups):
    """Zero the masked input, convolve backwards without padding, crop to H * stride, zero the masked output."""
    fine = x.layout.refine(stride)
    out = CONV_TRANSPOSE[fine.ndim](
        x.dense() * site_mask(x.layout), weight, stride=stride, dilation=dilation, groups=groups
    )
    for axis, (size, before) in enumerate(zip(fine.shape, padding, strict=True)):
        out = out.narrow(2 + axis, before, min(size, out.shape[2 + axis] - before))
        missing = [0, 0] * (fine.ndim - 1 - axis) + [0, size - out.shape[2 + axis]]
        out = F.pad(out, missing)
    return (out + bias.view(-1, *[1] * fine.ndim)) * site_mask(fine)


@st.composite
def convolutions(draw, ndim):
    """Draw a layout and the arguments of a convolution on it: kernel, stride, padding, dilation, all per axis."""
    layout = draw(boxes(ndim, sites=(24, 12, 6)))
    assume(layout.rows < 3000)
    per_axis = {
        "kernel": [1, 2, 3, 4, 5][: 7 - 2 * ndim],
        "stride": [1, 1, 2, 3, 4],
        "dilation": [1, 1, 2, 3],
    }
    kernel, stride, dilation = (draw(st.tuples(*[st.sampled_from(sizes)] * ndim)) for sizes in per_axis.values())
    stride = tuple(step if side % step == 0 else 1 for step, side in zip(stride, layout.tile, strict=True))
    padding = tuple(draw(st.integers(0, step * (size - 1))) for size, step in zip(kernel, dilation, strict=True))
    return layout, kernel, {"stride": stride, "padding": padding, "dilation": dilation}


# Groups, channels and outputs: dense, of 1, 4, 8 and 16 channels a group, depthwise, with copies, a stem, and odd ones.
GROUPS = [
    (1, 7, 24),
    (1, 3, 5),
    (1, 70, 40),
    (1, 20, 100),
    (3, 12, 12),
    (5, 40, 40),
    (2, 32, 32),
    (6, 6, 6),
    (5, 5, 15),
    (2, 6, 10),
    (1, 1, 3),
]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data(), groups=st.sampled_from(GROUPS))
def test_reference_is_a_dense_convolution_of_the_masked_input(ndim, data, groups):
    layout, kernel, window = data.draw(convolutions(ndim))
    groups, channels, out = groups
    x, p = random_sparse(layout, channels), conv_parameters(out, channels // groups, *kernel)
    with use_backend("reference"):
        found = ops.conv(x, **p, **window, groups=groups)
    steps = window["stride"]
    assert found.layout.tile == tuple(side // step for side, step in zip(layout.tile, steps, strict=True))
    assert_close(found.dense(), masked_dense(x, *p.values(), **window, groups=groups))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data(), groups=st.sampled_from(GROUPS))
def test_transposed_reference_is_dense_too(ndim, data, groups):
    layout, kernel, window = data.draw(convolutions(ndim))
    groups, channels, out = groups
    x = random_sparse(layout.coarsen(window["stride"]), channels)
    weight = torch.randn(channels, out // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    with use_backend("reference"):
        found = ops.conv_transpose(x, weight, bias, **window, groups=groups)
    assert found.layout.tile == layout.tile
    assert_close(found.dense(), masked_dense_transpose(x, weight, bias, **window, groups=groups))


def compare(data, backend, dtype, ndim, transposed):
    layout, kernel, window = data.draw(convolutions(ndim))
    groups, channels, out = data.draw(st.sampled_from(GROUPS))
    if backend in ON_GPU:  # The interpreter is slow.
        assume(layout.rows < 300)
    if transposed:
        layout = layout.coarsen(window["stride"])
        shape = channels, out // groups, *kernel
        p = {"weight": torch.randn(shape, dtype=torch.float64) / (channels * math.prod(kernel) / groups) ** 0.5}
        p["bias"] = torch.randn(out, dtype=torch.float64)
    else:
        p = conv_parameters(out, channels // groups, *kernel)
    if data.draw(st.booleans()):
        del p["bias"]
    function = ops.conv_transpose if transposed else ops.conv

    def run(x, **p):
        return function(x, **p, **window, groups=groups)

    statistics = ("bias",) if 1 < groups == channels and not transposed else ()
    assert_matches_reference(run, random_sparse(layout, channels), p, dtype, statistics=statistics, backend=backend)


@FAST
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
@settings(max_examples=12)
@given(data=st.data())
def test_equals_reference(backend, ndim, transposed, data):
    compare(data, backend, widest(backend), ndim, transposed)


@needs_cpu
@DTYPES
@settings(max_examples=30)
@given(data=st.data(), transposed=st.booleans())
def test_cpu_takes_its_dtypes(dtype, data, transposed):
    compare(data, "cpu", dtype, 2, transposed)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize(("groups", "channels"), [(1, 24), (1, 3), (6, 24)], ids=["pairs", "columns", "narrow groups"])
def test_more_output_rows_than_one_chunk(groups, channels, dtype):
    layout = make_layout(draw_mask("random counts", 2, (7, 7), seed=2), 8)
    assert layout.rows > 3 * 1024  # the most rows of a chunk of csrc/cpu/conv.cpp
    p = conv_parameters(24, channels // groups, 3, 3)
    run = functools.partial(ops.conv, groups=groups)
    assert_matches_reference(run, random_sparse(layout, channels), p, dtype)


@needs_cpu
@pytest.mark.parametrize(("groups", "channels"), [(1, 24), (1, 3), (6, 24)], ids=["pairs", "columns", "narrow groups"])
def test_gradient_has_the_layout_of_the_weight(groups, channels):
    x = random_sparse(make_layout(draw_mask("random counts", 2, (5, 5), seed=2), 4), channels)
    weight = conv_parameters(24, channels // groups, 3, 3)["weight"].detach()
    last = weight.to(memory_format=torch.channels_last).requires_grad_()
    for parameter in (weight.requires_grad_(), last):
        ops.conv(x, parameter, groups=groups).features.square().sum().backward()
        assert parameter.grad.stride() == parameter.stride()
    assert_close(last.grad, weight.grad)


@needs_cpu
@pytest.mark.parametrize(("groups", "channels"), [(1, 24), (1, 3), (6, 24)], ids=["pairs", "columns", "narrow groups"])
def test_same_bits_twice(groups, channels):
    layout = make_layout(draw_mask("random counts", 2, (5, 5), seed=2), 8)
    x, p = random_sparse(layout, channels, torch.float32), conv_parameters(24, channels // groups, 3, 3)
    p = {key: value.float() for key, value in p.items()}
    with threads(2):
        first, second = (outputs_and_gradients(functools.partial(ops.conv, groups=groups), x, p) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@FAST
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
def test_flops_with_all_sites_visible_are_those_of_the_dense_convolution(backend, groups, transposed):
    layout = make_layout(torch.zeros(2, 2, 1, dtype=torch.bool), 4)
    x, p = suit(backend, random_sparse(layout, 8), {"weight": conv_parameters(8, 8 // groups, 3, 3)["weight"]})
    leaves = [value.requires_grad_() for value in (x.features, *p.values())]
    arguments = None, 2, 1, 1, groups
    function = ops.conv_transpose if transposed else ops.conv
    with use_backend("reference"), FlopCounterMode(display=False) as dense:
        function(x, *p.values(), *arguments)
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        out = function(x, *p.values(), *arguments).features
        assert counter.get_total_flops() == dense.get_total_flops() > 0
        torch.autograd.grad(out.sum(), leaves)
        # Each gradient counts as much. torch counts that of a grouped weight too high.
        assert counter.get_total_flops() == 3 * dense.get_total_flops()


@pytest.mark.parametrize("weight", [(5, 3, 3, 3), (5, 4, 3), (5, 4, 3, 3, 3)], ids=name)
def test_weight_of_another_shape(weight):
    with pytest.raises(ValueError, match=r"weight is \(5, .*\): expected \(C_out, 4, k, k\)"):
        ops.conv(random_sparse(example_layout(), 4), torch.zeros(weight).double())


@pytest.mark.parametrize("stride", [0, -1, 3, 8])
def test_stride_that_does_not_divide_the_tile(stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}: it must divide the tile side, 4 sites"):
        ops.conv(random_sparse(example_layout(tile=4), 4), torch.zeros(5, 4, 3, 3).double(), stride=stride)


@pytest.mark.parametrize("padding", [-1, 3, (1, 3)], ids=name)
def test_padding_that_does_not_fit_the_kernel(padding):
    with pytest.raises(ValueError, match=r"padding is .*: expected 0 to k - 1 for each axis of a kernel \(3, 3\)"):
        ops.conv(random_sparse(example_layout(), 4), torch.zeros(5, 4, 3, 3).double(), padding=padding)


@pytest.mark.parametrize("function", [ops.conv, ops.conv_transpose])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": (1,)}, r"padding is \(1,\): expected a number, or one for each of 2 axes"),
        ({"dilation": (1, 1, 1)}, r"dilation is \(1, 1, 1\): expected a number, or one for each of 2 axes"),
        ({"dilation": 0}, r"dilation is 0: expected 1 or more"),
        ({"dilation": 2, "padding": 5}, r"padding is 5: expected 0 to dilation \* \(k - 1\) for each axis"),
        (
            {"dilation": 2**19},
            r"dilation is 524288: a kernel \(3, 3\) reaches over 1048577 sites, expected",
        ),
        ({"groups": 3}, r"groups is 3: it must divide C_in, 4 channels"),
        ({"groups": 0}, r"groups is 0: it must divide C_in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_numbers_that_do_not_fit(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(random_sparse(example_layout(), 4), torch.zeros(4, 4, 3, 3).double(), **arguments)


@pytest.mark.parametrize("function", [ops.conv, ops.conv_transpose])
def test_kernel_that_is_too_large(function):
    with pytest.raises(ValueError, match=r"kernel is \(1, 1025\): expected at most 1023 sites along an axis"):
        function(random_sparse(example_layout(), 4), torch.zeros(4, 4, 1, 1025).double())


def test_outputs_that_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"groups is 2: it must divide C_out, 5 channels"):
        ops.conv(random_sparse(example_layout(), 4), torch.zeros(5, 2, 3, 3).double(), groups=2)


@needs_cpu
@pytest.mark.parametrize(
    "run",
    [
        lambda x: ops.conv(x, torch.randn(4, 4, 3, 3, 3)),
        lambda x: ops.conv_transpose(x, torch.randn(4, 4, 3, 3, 3), padding=1),
        lambda x: ops.conv(x, torch.randn(4, 1, 3, 3, 3), stride=2, padding=1, groups=4),
        lambda x: ops.max_pool(x, 3, 2, 1),
        lambda x: ops.avg_pool(x, 3, 1, 1),
    ],
    ids=["conv", "conv_transpose", "strided depthwise conv", "max_pool", "avg_pool"],
)
def test_no_kernel_map_is_kept_on_a_cpu(run):
    x = random_sparse(example_layout(2, (2, 3, 2), tile=4), 4, torch.float32)
    x = x.with_features(x.features.requires_grad_())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        out = run(x)
    assert torch.autograd.grad(out.features.sum(), x.features)[0].any()
    assert all(value.dtype != torch.int32 for value in kept)
    assert not any("map" in str(key) for key in x.layout.tiles.tables)
