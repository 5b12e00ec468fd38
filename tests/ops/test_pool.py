"""`ops.max_pool` and `ops.avg_pool` on tiles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    assert_close,
    assert_matches_reference,
    assert_same,
    backends,
    bound,
    boxes,
    example_layout,
    make_layout,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    suit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecnx import SparseTensor, ops, use_backend
from sparsecnx.geometry.packing import gather_rows

MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

# kernel, stride, padding as networks use them; the extent is then H / stride.
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 1, 2), (1, 2, 0), (4, 4, 0), (4, 2, 1), (1, 1, 0)]


def dense_pool(name: str, **options: object):
    """Return a function that pools the dense tensor: masked sites are -inf for the maximum, 0 for the mean."""

    def run(x: SparseTensor) -> SparseTensor:
        ndim, out = x.layout.ndim, x.layout.coarsen(options["stride"])
        pooled = MAX[ndim](x.dense(-math.inf), **options) if name == "max_pool" else AVG[ndim](x.dense(), **options)
        return x.with_features(gather_rows(pooled, out), out)

    return run


@pytest.mark.parametrize("backend", backends("max_pool", "avg_pool"))
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "avg_pool without padding"])
@settings(max_examples=10)
@given(data=st.data())
def test_is_dense_pooling_where_masked_sites_never_win_or_are_zero(backend, ndim, name, data):
    layout = data.draw(boxes(ndim, sites=(24, 8, 4), tiles=(1, 2, 4, 6, 8)))
    smallest = min(layout.shape)  # torch refuses a kernel beyond it in three dimensions.
    fitting = [one for one in WINDOWS if math.gcd(*layout.tile) % one[1] == 0 and one[0] <= smallest]
    kernel, stride, padding = data.draw(st.sampled_from(fitting))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    if name != "max_pool":
        options["count_include_pad"] = name == "avg_pool"
    operator = name.split()[0]
    x = random_sparse(layout, data.draw(st.sampled_from([1, 3, 20])))
    expected = outputs_and_gradients(dense_pool(operator, **options), x, {})
    x, _ = suit(backend, x, {})
    options["kernel"] = options.pop("kernel_size")
    with use_backend(backend):
        found = outputs_and_gradients(lambda x: getattr(ops, operator)(x, **options), x, {})
    assert_same(found, expected, bound(backend))


@pytest.mark.parametrize("backend", backends("avg_pool"))
def test_divisor_override(backend):
    x, _ = suit(backend, random_sparse(example_layout(), 3), {})
    with use_backend(backend):
        out = ops.avg_pool(x, 3, 1, 1, divisor_override=5)
        expected = ops.avg_pool(x, 3, 1, 1)
    torch.testing.assert_close(out.features * 5, expected.features * 9)


@pytest.mark.parametrize("backend", backends("max_pool", "avg_pool"))
def test_windows_that_differ_by_axis_dilated_and_beyond_the_border(backend):
    def dense(x: SparseTensor) -> SparseTensor:
        padded = F.pad(x.dense(-math.inf), (0, 0, 2, 2), value=-math.inf)  # torch pads by half of an undilated kernel
        out = x.layout.coarsen((1, 2))
        return x.with_features(gather_rows(F.max_pool2d(padded, (3, 2), (1, 2), 0, (2, 1)), out), out)

    x = random_sparse(example_layout(grid=(2, 3)), 5)
    expected = outputs_and_gradients(dense, x, {})
    x, _ = suit(backend, x, {})
    with use_backend(backend):
        found = outputs_and_gradients(lambda x: ops.max_pool(x, (3, 2), (1, 2), (2, 0), (2, 1)), x, {})
        assert_same(found, expected, bound(backend))
        # ceil_mode: the last window reaches one site beyond the border, which does not count.
        ceil = ops.avg_pool(x, 3, 2)
    pooled = F.avg_pool2d(x.dense().cpu().double(), 3, 2, ceil_mode=True)
    assert_close(ceil.features, gather_rows(pooled, x.layout.coarsen(2)), bound(backend))


@needs_cpu
@DTYPES
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_cpu_equals_reference(name, dtype):
    x = random_sparse(example_layout(), 37)
    assert_matches_reference(lambda x: getattr(ops, name)(x, 3, 2, 1), x, {}, dtype)


@pytest.mark.parametrize("backend", backends("max_pool"))
def test_a_nan_wins_and_a_window_of_nothing_is_zero(backend):
    x = random_sparse(make_layout(torch.tensor([[[False, True]]]), 4), 2, torch.float32)
    x.features[5] = torch.nan
    x, _ = suit(backend, x, {})
    with use_backend(backend):
        assert ops.max_pool(x, 4).features.isnan().all()
        beyond = ops.max_pool(x, 2, 1, 0, 4)  # Sites 0 and 4 of each axis: the second is masked, or there is none.
        assert torch.equal(beyond.features.isnan(), x.features.isnan())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 3), r"stride is \(3, 3\): it must divide the tile"),
        ((3, 1, 2), "padding is 2: expected at most half of the kernel, 3"),
        ((0,), "kernel is 0: expected 1 or more"),
        (((3, 3, 3), 1), r"kernel is \(3, 3, 3\): expected a number, or one for each of 2 axes"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    x = random_sparse(example_layout(), 2)
    for pool in (ops.max_pool, ops.avg_pool):
        with pytest.raises(ValueError, match=message):
            pool(x, *arguments)
    with pytest.raises(ValueError, match="divisor_override is 0"):
        ops.avg_pool(x, 2, divisor_override=0)
