"""`ops.mapped_pool`: sum, mean and maximum under any kernel map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BOUNDS, DTYPES, assert_same, backends, device_of, incoming_gradient, needs_cpu, widest
from mapped import inverse, random_map, site_map, with_gradients

from sparsecnx import ops, use_backend

MODES = pytest.mark.parametrize("mode", ["sum", "avg", "max"])
BACKENDS = pytest.mark.parametrize("backend", backends("mapped_depthwise_conv", "mapped_max_pool"))


def pooled(features, kernel_map, mode):
    """Pool row by row."""
    rows = []
    for row in kernel_map.tolist():
        read = features[[entry for entry in row if entry >= 0]]
        empty = features.sum(0) * 0
        reduce = {"sum": lambda v: v.sum(0), "avg": lambda v: v.mean(0), "max": lambda v: v.max(0).values}[mode]
        rows.append(reduce(read) if len(read) else empty)
    return torch.stack(rows) if rows else features[:0]


CASES = {
    "half": (40, random_map(40, 30, 9, 0.5)),
    "some-rows-of-nothing": (40, random_map(40, 30, 9, 0.5).index_fill(0, torch.arange(0, 30, 4), -1)),
    "nowhere": (10, random_map(10, 7, 4, 0.0)),
    "no-outputs": (10, random_map(10, 0, 4, 0.5)),
    "no-inputs": (0, random_map(0, 7, 4, 0.5)),
}


@BACKENDS
@MODES
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_is_what_the_words_say(backend, mode, case, given):
    rows_in, kernel_map = CASES[case]
    dtype = widest(backend)
    x = {"features": torch.randn(rows_in, 8, dtype=torch.float64).to(dtype)}
    exact = with_gradients(lambda features: pooled(features, kernel_map, mode), {"features": x["features"].double()})
    x = {"features": x["features"].to(device_of(backend))}
    maps = {"kernel_map": kernel_map.to(device_of(backend))}
    if given:
        maps["inverse_map"] = inverse(kernel_map, rows_in).to(device_of(backend))
    with use_backend(backend):
        found = with_gradients(ops.mapped_pool, x, mode=mode, **maps)
    assert_same(found, exact, BOUNDS[dtype])


@MODES
def test_is_torch_pooling_where_every_site_is_there(mode):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    kernel_map = site_map(torch.ones(2, 6, 8).bool(), torch.ones(2, 3, 4).bool(), (2, 2), 2, 1)
    dense = F.max_pool2d(x, 2) if mode == "max" else F.avg_pool2d(x, 2) * (4 if mode == "sum" else 1)
    out = ops.mapped_pool(x.permute(0, 2, 3, 1).reshape(-1, 3), kernel_map, mode)
    torch.testing.assert_close(out, dense.permute(0, 2, 3, 1).reshape(-1, 3))


@needs_cpu
@MODES
@DTYPES
def test_every_dtype(mode, dtype):
    kernel_map = random_map(60, 50, 9, 0.5)
    values = {"features": torch.randn(60, 20, dtype=torch.float64).to(dtype)}
    found = with_gradients(ops.mapped_pool, values, kernel_map=kernel_map, mode=mode)
    exact = with_gradients(ops.mapped_pool, {"features": values["features"].double()}, kernel_map=kernel_map, mode=mode)
    assert_same(found, exact, BOUNDS[dtype])


def test_the_first_of_equal_maxima_gets_the_gradient():
    kernel_map = torch.tensor([[-1, 2, 0], [1, 0, -1]], dtype=torch.int32)
    features = torch.tensor([[5.0], [5.0], [5.0]], requires_grad=True)
    out = ops.mapped_pool(features, kernel_map, "max")
    (gradient,) = torch.autograd.grad(out, features, torch.tensor([[1.0], [10.0]]))
    assert gradient.flatten().tolist() == [0.0, 10.0, 1.0]


def test_a_maximum_below_zero_and_what_is_not_finite():
    features = torch.tensor([[-3.0], [-torch.inf], [torch.nan], [7.0]])
    kernel_map = torch.tensor([[0, -1], [1, -1], [2, 3], [3, 2], [1, 0], [-1, -1]], dtype=torch.int32)
    out = ops.mapped_pool(features, kernel_map, "max").flatten()
    expected = torch.tensor([-3.0, -torch.inf, torch.nan, torch.nan, -3.0, 0.0])
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_gradients_of_16_bits_are_summed_in_float32():
    kernel_map = torch.arange(512, dtype=torch.int32)[:, None].expand(-1, 512).clone()
    kernel_map = torch.where(torch.eye(512, dtype=torch.bool), 0, -1).int()  # every output reads row 0, each by its tap
    features = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    for mode in ("sum", "max"):
        (gradient,) = torch.autograd.grad(ops.mapped_pool(features, kernel_map, mode).sum(), features)
        assert (gradient == 512).all()


@needs_cpu
@MODES
def test_compiled_whole_in_any_size(mode):
    torch._dynamo.reset()
    compiled = torch.compile(ops.mapped_pool, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows_in, rows_out in ((30, 21), (33, 25)):
        values = {"features": torch.randn(rows_in, 8)}
        arguments = {"kernel_map": random_map(rows_in, rows_out, 4, 0.6), "mode": mode}
        with torch._dynamo.config.patch(error_on_recompile=rows_in > 30):
            found = with_gradients(compiled, values, **arguments)
        assert_same(found, with_gradients(ops.mapped_pool, values, **arguments), 1e-6)


@needs_cpu
@pytest.mark.parametrize("taps", [4, 300])
def test_opcheck(taps):
    kernel_map = random_map(20, 15, taps, 0.6)
    x = torch.randn(20, 8, requires_grad=True)
    operators = torch.ops.sparsecnx
    inverse_map = inverse(kernel_map, 20)
    for given in (None, inverse_map):
        torch.library.opcheck(operators.max_pool.default, (x, kernel_map, given, [], []))
    _, winner = operators.max_pool(x, kernel_map, None, [], [])
    arguments = (torch.randn(15, 8), winner, kernel_map, inverse_map, [], [])
    torch.library.opcheck(operators.max_pool_backward.default, arguments)


@MODES
def test_autocast_leaves_the_dtype_alone_and_bits_repeat(mode):
    values, kernel_map = {"features": torch.randn(300, 20)}, random_map(300, 200, 9, 0.5)
    expected = with_gradients(ops.mapped_pool, values, kernel_map=kernel_map, mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(ops.mapped_pool, values, kernel_map=kernel_map, mode=mode)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@MODES
def test_maps_of_other_rows_are_refused(mode):
    features, kernel_map = torch.randn(6, 3, requires_grad=True), random_map(6, 5, 4, 0.6)
    kernel_map[2, 1] = 6
    with pytest.raises(RuntimeError, match=r"kernel_map has entries from -1 to 6, expected -1 to 5"):
        ops.mapped_pool(features, kernel_map, mode)
    kernel_map[2, 1] = -1
    wrong = inverse(kernel_map, 6).flip(0)
    torch._dynamo.reset()
    compiled = torch.compile(ops.mapped_pool, backend="aot_eager")
    for pool in (ops.mapped_pool, compiled):
        with pytest.raises(RuntimeError, match="inverse_map contradicts kernel_map"):
            pool(features, kernel_map, mode, wrong).sum().backward()
    wrong[0, 0] = 5
    with pytest.raises(RuntimeError, match=r"inverse_map has entries from -1 to 5, expected -1 to 4"):
        ops.mapped_pool(features, kernel_map, mode, wrong).sum().backward()


@MODES
def test_a_changed_inverse_map_is_compared_again(mode):
    """Writing to `data` or to the array of a tensor is no new version of it."""
    kernel_map = torch.tensor([[0], [1]], dtype=torch.int32)
    features, inverse_map = torch.randn(2, 1, requires_grad=True), kernel_map.clone()
    out = ops.mapped_pool(features, kernel_map, mode, inverse_map)
    out.sum().backward()
    inverse_map.data[:] = kernel_map.flip(0)
    with pytest.raises(RuntimeError, match="inverse_map contradicts kernel_map"):
        ops.mapped_pool(features, kernel_map, mode, inverse_map).sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("left", [0, 4, 16])
def test_a_tensor_without_its_memory_is_named(backend, left):
    """Plain torch would read the memory of others, or end the process."""
    kernel_map = torch.arange(8, dtype=torch.int32).flip(0)[:, None].contiguous()
    given = {"features": torch.randn(8, 4), "kernel_map": kernel_map, "inverse_map": kernel_map.clone()}
    for mode in ("sum", "avg", "max"):
        for name in given:
            x = given[name].clone()
            x.untyped_storage().resize_(left)
            with use_backend(backend), pytest.raises(RuntimeError, match=rf"^{name} has .* its storage holds {left} b"):
                ops.mapped_pool(**{**given, name: x}, mode=mode)


def test_what_does_not_fit_is_refused():
    features, kernel_map = torch.zeros(6, 3), torch.zeros(5, 4).int()
    for mode in ("mean", None):
        with pytest.raises(ValueError, match=rf"mode is {mode!r}: expected 'sum', 'avg' or 'max'"):
            ops.mapped_pool(features, kernel_map, mode)
    for mode in ("sum", "avg", "max"):
        with pytest.raises(ValueError, match=r"features is \(6,\): expected \(rows_in, C\)"):
            ops.mapped_pool(features[:, 0], kernel_map, mode)
        with pytest.raises(TypeError, match=r"kernel_map is torch.int64: expected torch.int32"):
            ops.mapped_pool(features, kernel_map.long(), mode)


def test_incoming_gradients_of_any_memory_layout():
    features = torch.randn(20, 8, requires_grad=True)
    out = ops.mapped_pool(features, random_map(20, 15, 4, 0.6), "max")
    gradient = incoming_gradient(out.shape).float()
    expected = torch.autograd.grad(out, features, gradient, retain_graph=True)[0]
    spread = torch.stack([gradient] * 2, -1)[..., 0]
    assert torch.equal(torch.autograd.grad(out, features, spread)[0], expected)
