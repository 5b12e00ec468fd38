"""Large float32 products of rows and a matrix on a CPU, by the compiled operator: `sparsecnx.ops.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BOUNDS,
    assert_close,
    assert_same,
    example_layout,
    needs_cpu,
    outputs_and_gradients,
    random_sparse,
    threads,
)
from operators import CASES
from torch.func import jvp, vmap

from sparsecnx import nn, use_backend
from sparsecnx.ops.linear import LEAST_PRODUCT, linear

pytestmark = needs_cpu

# Rows, C and C_out: many rows, few and very few, sums of more than 1024 products, and a power of two.
SIZES = [(3001, 40, 72), (1500, 96, 33), (300, 64, 512), (40, 2050, 64), (5, 1100, 900), (70, 256, 1024)]


def values(rows, channels, out, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((rows, channels), (out, channels), (out,)))
    return [value.to(dtype).requires_grad_() for value in (x, weight / channels**0.5, bias)]


def results(function, leaves):
    """Return output, gradients, and the gradients of a penalty on these."""
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, out.detach().sin(), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves[:2])
    return {"output": out.detach(), **dict(enumerate([*first, *second]))}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2])
def test_values_and_gradients_of_gradients(size, count):
    assert size[0] * size[1] * size[2] >= LEAST_PRODUCT
    expected = results(F.linear, values(*size, torch.float64))
    with threads(count):
        found, again = (results(linear, values(*size)) for _ in range(2))
    assert_same(found, expected, BOUNDS[torch.float32])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("layout", ["matrix", "transposed", "strided"])
def test_any_layout_of_the_weight(layout):
    x, weight, _ = values(*SIZES[0])
    given = {
        "matrix": weight,
        "transposed": weight.t().contiguous().t(),
        "strided": torch.stack([weight] * 2, 2)[..., 0],
    }
    assert_close(linear(x, given[layout]), F.linear(x.double(), weight.double()), BOUNDS[torch.float32])


def test_backward_keeps_strided_rows_without_a_copy():
    x, weight, _ = values(*SIZES[0])
    every_second, kept = torch.stack([x.detach()] * 2, 1)[:, 0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda x: x):
        out = linear(every_second, weight)
    assert kept == [every_second.data_ptr(), weight.data_ptr()]
    assert torch.equal(*(torch.autograd.grad(y.sum(), weight)[0] for y in (out, linear(x, weight))))


def test_rows_of_several_dimensions_of_channels():
    x, weight, bias = values(*SIZES[0])
    out = linear(torch.stack([x, 2 * x], 1), weight, bias)
    assert_close(out[:, 1], F.linear(2 * x.double(), weight.double(), bias.double()), BOUNDS[torch.float32])


def test_block():
    """Its six products at the visible rows are large enough, and each has its gradient."""
    case, layout = CASES["block-keep-survival"], example_layout(3, (4, 4), tile=8)
    x, p = random_sparse(layout, 32), case.parameters(32)
    assert layout.rows * 32 * 128 >= LEAST_PRODUCT
    with use_backend("reference"):
        expected = outputs_and_gradients(case.run, x, p)
    with use_backend("cpu"):
        found = outputs_and_gradients(case.run, x.to(torch.float32), {name: value.float() for name, value in p.items()})
    assert_same(found, expected, BOUNDS[torch.float32])


def test_forward_mode_and_vmap():
    x, weight, _ = (value.detach() for value in values(*SIZES[0]))
    _, tangent = jvp(lambda x: linear(x, weight), (x,), (x.sin(),))
    assert_close(tangent, F.linear(x.sin(), weight), BOUNDS[torch.float32])
    assert_close(vmap(lambda w: linear(x, w))(weight[None])[0], F.linear(x, weight), BOUNDS[torch.float32])


def test_autocast():
    layer, x = nn.Linear(40, 72), random_sparse(example_layout(2, (4, 4), tile=8), 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_tensor_without_its_memory_is_named(name):
    given = dict(zip(("x", "weight", "bias"), values(*SIZES[0]), strict=True))
    said = rf"{name} has {given[name].numel()} elements, but its storage holds 0 bytes"
    if name != "bias":  # which no gradient reads
        out = linear(**given)
        given[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=said):
            out.sum().backward()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=said):
        linear(**given)
