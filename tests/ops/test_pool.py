"""`ops.max_pool` and `ops.avg_pool` on tiles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, backends, bound, example_layout, layouts, outputs_and_gradients, random_sparse, suit
from hypothesis import given
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
@given(data=st.data())
def test_is_dense_pooling_where_masked_sites_never_win_or_are_zero(backend, ndim, name, data):
    layout = data.draw(layouts(ndim, sites=(24, 8, 4)[ndim - 1], tiles=(1, 2, 4, 6, 8)))
    smallest = min(layout.shape)  # torch refuses a kernel beyond it in three dimensions.
    fitting = [one for one in WINDOWS if layout.tile[0] % one[1] == 0 and one[0] <= smallest]
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
