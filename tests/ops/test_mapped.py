"""`ops.mapped_depthwise_conv` and `ops.mapped_conv`: any kernel map."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BOUNDS,
    DEVICE,
    assert_close,
    assert_same,
    backends,
    device_of,
    dtypes_of,
    incoming_gradient,
    name,
    needs_cpu,
    needs_triton,
    threads,
    widest,
)
from mapped import (
    inverse,
    mapped_values,
    offsets,
    random_map,
    run_mapped,
    site_map,
    suited,
    with_gradients,
)

from sparsecnx import ops, use_backend
from sparsecnx.backends import compiled
from sparsecnx.geometry.kernel_map import MappedRows, invert_kernel_map
from sparsecnx.ops.mapped import conv_operator, depthwise_operator

OPERATORS = ("mapped_depthwise_conv", "mapped_conv")
BOTH = pytest.mark.parametrize("operator", OPERATORS)
CONV = {2: F.conv2d, 3: F.conv3d}


def on_backends(only=("reference", "cpu", "triton"), operators=OPERATORS):
    """Return a mark for these operators on each of these backends."""
    return pytest.mark.parametrize(
        ("backend", "operator"),
        [
            pytest.param(*backend.values, operator, marks=backend.marks, id=f"{backend.values[0]}-{operator}")
            for operator in operators
            for backend in backends(operator)
            if backend.values[0] in only
        ],
    )


# (kernel, stride, dilation) on sites (B, *spatial)
GEOMETRIES = [
    ((2, 9, 8), (3, 3), 1, 1),
    ((2, 9, 8), (7, 7), 1, 1),
    ((1, 9, 8), (3, 5), 1, 2),
    ((2, 8, 10), (2, 2), 2, 1),
    ((2, 8, 10), (3, 3), 2, 1),
    ((2, 9, 8), (2, 2), 1, 2),
    ((2, 5, 6, 4), (3, 3, 3), 1, 1),
    ((2, 6, 6, 4), (2, 2, 2), 2, 1),
    ((1, 6, 6, 6), (3, 3, 3), 2, 2),
]


@BOTH
@pytest.mark.parametrize(("shape", "kernel", "stride", "dilation"), GEOMETRIES, ids=name)
def test_reference_is_a_dense_convolution(operator, shape, kernel, stride, dilation):
    """Inputs and outputs may lie at any sites."""
    ndim, channels = len(kernel), 3
    present = torch.rand(shape) < 0.4
    outputs = torch.rand(shape[0], *(-(-size // stride) for size in shape[1:])) < 0.6
    values = mapped_values(operator, site_map(present, outputs, kernel, stride, dilation), int(present.sum()), channels)
    taps = offsets(kernel, dilation)
    before = [-min(tap[axis] for tap in taps) for axis in range(ndim)]
    after = [max(tap[axis] for tap in taps) + stride for axis in range(ndim)]

    def dense(features, weight, bias):
        image = features.new_zeros(*shape, channels).index_put(present.nonzero(as_tuple=True), features)
        pads = [pad for axis in reversed(range(ndim)) for pad in (before[axis], after[axis])]
        if operator == "mapped_conv":
            matrix, groups = weight.permute(2, 1, 0).reshape(-1, channels, *kernel), 1
        else:
            matrix, groups = weight.t().reshape(channels, 1, *kernel), channels
        padded = F.pad(image.movedim(-1, 1), pads)
        out = CONV[ndim](padded, matrix, bias, stride=stride, dilation=dilation, groups=groups).movedim(1, -1)
        return out[tuple(slice(0, size) for size in outputs.shape)][outputs]

    kernel_map = site_map(present, outputs, kernel, stride, dilation)
    with use_backend("reference"):
        assert_same(run_mapped(operator, values, kernel_map), with_gradients(dense, values), 1e-12)


MAPS = {  # Rows of the input, and the map.
    "7x7": (70, random_map(70, 70, 49, 0.8)),
    "scattered": (70, random_map(70, 90, 49, 0.25)),
    "fewer-out": (140, random_map(140, 67, 9, 0.6)),
    "more-out": (30, random_map(30, 131, 9, 0.9)),
    "everywhere": (66, random_map(66, 66, 4, 1.0)),
    "nowhere": (20, random_map(20, 23, 9, 0.0)),
    "one-tap": (50, random_map(50, 40, 1, 0.7)),
    "no-outputs": (20, random_map(20, 0, 9, 0.5)),
    "no-inputs": (0, random_map(0, 21, 9, 0.5)),
    "nothing": (0, random_map(0, 0, 9, 0.5)),
    "one-of-each": (1, random_map(1, 1, 5, 1.0)),
    "some-rows-of-nothing": (70, random_map(70, 70, 27, 0.7).index_fill(0, torch.arange(0, 70, 3), -1)),
    "rows-alike": (70, random_map(70, 70, 27, 0.7).index_fill(1, torch.arange(0, 27, 2), -1)),
}


def compare(operator, backend, dtype, case, channels, given, bias=True):
    """Assert that output and gradients are those of the float64 reference on the same rounded values."""
    rows_in, kernel_map = MAPS[case]
    values = suited(mapped_values(operator, kernel_map, rows_in, channels), dtype, backend, operator)
    if not bias:
        del values["bias"]
    with use_backend("reference"):
        exact = run_mapped(operator, {key: value.cpu().double() for key, value in values.items()}, kernel_map)
    with use_backend(backend):
        found = run_mapped(operator, values, kernel_map, inverse(kernel_map, rows_in) if given else None)
    assert_same(found, exact, BOUNDS[dtype])


@needs_cpu
@BOTH
@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=name)
def test_cpu_equals_reference(operator, dtype, case):
    for channels, given in ((1, True), (7, False), (40, True), (118, False)):
        compare(operator, "cpu", dtype, case, channels, given, bias=channels != 7)


@needs_triton
@BOTH
@pytest.mark.parametrize("case", [case for case in MAPS if case not in ("7x7", "rows-alike")])
def test_triton_equals_reference(operator, case):
    compare(operator, "triton", torch.float32, case, 40, given=False)


@needs_triton
@BOTH
@pytest.mark.parametrize("dtype", dtypes_of("triton"), ids=name)
def test_triton_takes_its_dtypes(operator, dtype):
    for channels, given in ((1, True), (33, False)):
        compare(operator, "triton", dtype, "fewer-out", channels, given, bias=channels != 1)


@needs_triton
@BOTH
def test_triton_takes_more_than_a_block_of_channels_and_a_range_of_rows(operator):
    kernel_map = random_map(200, 1100, 2, 0.9)
    values = suited(mapped_values(operator, kernel_map, 200, 130), torch.float32, "triton", operator)
    with use_backend("reference"):
        exact = run_mapped(operator, {key: value.cpu().double() for key, value in values.items()}, kernel_map)
    with use_backend("triton"):
        assert_same(run_mapped(operator, values, kernel_map), exact, BOUNDS[torch.float32])


@needs_cpu
@BOTH
def test_gradcheck(operator):
    kernel_map = random_map(7, 6, 5, 0.6)
    values = {key: value.requires_grad_() for key, value in mapped_values(operator, kernel_map, 7, 2, 3).items()}

    def run(*leaves):
        return getattr(ops, operator)(kernel_map=kernel_map, **dict(zip(values, leaves, strict=True)))

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, list(values.values()))


@needs_cpu
@BOTH
def test_same_bits_twice_and_nearly_the_same_with_other_threads(operator):
    kernel_map = random_map(700, 900, 9, 0.5)
    values = suited(mapped_values(operator, kernel_map, 700, 40), torch.float32, "cpu", operator)
    with threads(2), use_backend("cpu"):
        first, second = (run_mapped(operator, values, kernel_map) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for count in (1, 3):
        with threads(count), use_backend("cpu"):
            assert_same(run_mapped(operator, values, kernel_map), first, 2e-6)


@on_backends()
def test_any_memory_layout(backend, operator):
    kernel_map = random_map(30, 21, 9, 0.6)
    values = suited(mapped_values(operator, kernel_map, 30, 8), widest(backend), backend, operator)

    def spread(value):
        return torch.stack([value] * 2, -1)[..., 0]

    with use_backend(backend):
        expected = run_mapped(operator, values, kernel_map, inverse(kernel_map, 30))
        found = with_gradients(
            lambda **leaves: getattr(ops, operator)(
                kernel_map=spread(kernel_map.to(device_of(backend))),
                inverse_map=spread(inverse(kernel_map, 30).to(device_of(backend))),
                **{key: spread(value) for key, value in leaves.items()},
            ),
            values,
        )
        assert_same(found, expected, 1e-6)
        leaf = values["features"].clone().requires_grad_()
        out = getattr(ops, operator)(leaf, values["weight"], kernel_map.to(leaf.device))
        (broadcast,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)  # a gradient with strides 0
        assert_close(broadcast, torch.autograd.grad(out, leaf, torch.ones_like(out))[0], 1e-6)


@on_backends()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_reach_their_readers_alone(backend, operator, bad):
    kernel_map = random_map(30, 40, 9, 0.3)
    values = suited(mapped_values(operator, kernel_map, 30, 8), widest(backend), backend, operator)
    spoilt = values["features"].clone()
    spoilt[4] = bad
    reads = (kernel_map == 4).any(1)
    assert reads.any() and not reads.all()
    with use_backend(backend):
        clean, found = (
            getattr(ops, operator)(x, values["weight"], kernel_map.to(x.device)) for x in (values["features"], spoilt)
        )
    assert not found[reads].isfinite().any()
    assert torch.equal(found[~reads], clean[~reads])


@on_backends(("cpu", "triton"))
@pytest.mark.parametrize("given", [False, True])
def test_compiled_whole(backend, operator, given):
    """There is no graph break (fullgraph=True), and other numbers of rows are not compiled anew."""
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, operator), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows_in, rows_out in ((30, 21), (33, 25), (41, 40)):
        kernel_map = random_map(rows_in, rows_out, 4, 0.6)
        values = suited(mapped_values(operator, kernel_map, rows_in, 8), torch.float32, backend, operator)
        maps = {"kernel_map": kernel_map.to(device_of(backend))}
        if given:
            maps["inverse_map"] = inverse(kernel_map, rows_in).to(device_of(backend))
        with use_backend(backend), torch._dynamo.config.patch(error_on_recompile=rows_in > 30):
            found = with_gradients(compiled, values, **maps)
            assert_same(found, with_gradients(getattr(ops, operator), values, **maps), 1e-6)


@pytest.mark.parametrize("given", [False, True])
@on_backends(("cpu", "triton"))
def test_opcheck(backend, operator, given):
    kernel_map = random_map(20, 15, 4, 0.6).to(device_of(backend))
    values = suited(mapped_values(operator, kernel_map.cpu(), 20, 8), torch.float32, backend, operator)
    inverse_map = inverse(kernel_map.cpu(), 20).to(kernel_map) if given else None
    x, weight, bias = (value.requires_grad_() for value in values.values())
    grad = torch.randn(15, x.shape[1], device=x.device)
    namespace = torch.ops.sparsecnx if backend == "cpu" else torch.ops.sparsecnx_triton
    window: list[list[int]] = [[], []] if backend == "cpu" else []
    if operator == "mapped_depthwise_conv":
        arguments = (x, weight, bias, kernel_map, inverse_map, *window)
        torch.library.opcheck(namespace.mapped_depthwise_conv.default, arguments)
        weight_grad = namespace.mapped_depthwise_conv_weight_grad.default
        torch.library.opcheck(weight_grad, (grad, x.detach(), kernel_map, *window))
        return
    weight = weight.detach().unsqueeze(0).requires_grad_()
    grad = torch.randn(15, weight.shape[3], device=x.device)
    torch.library.opcheck(namespace.conv.default, (x, weight, bias, kernel_map, *window))
    torch.library.opcheck(namespace.conv_weight_grad.default, (grad, x.detach(), weight.detach(), kernel_map, *window))


@on_backends(("cpu", "triton"))
def test_only_the_gradients_that_are_asked_for(backend, operator, monkeypatch):
    """For the weight alone the map is not inverted and the gradient of the features not computed."""
    kernel_map = random_map(20, 15, 4, 0.6)
    values = suited(mapped_values(operator, kernel_map, 20, 8), torch.float32, backend, operator)
    with use_backend(backend):
        expected = run_mapped(operator, values, kernel_map)
        for module in [module for module in sys.modules.values() if module.__name__.startswith("sparsecnx.ops")]:
            monkeypatch.setattr(module, "invert_kernel_map", None, raising=False)
        weight = values["weight"].clone().requires_grad_()
        out = getattr(ops, operator)(values["features"], weight, kernel_map.to(weight.device), bias=values["bias"])
        (found,) = torch.autograd.grad(out, weight, incoming_gradient(out.shape).to(out))
    assert torch.equal(found, expected["weight"])


@on_backends()
def test_autocast_to_bfloat16(backend, operator):
    kernel_map = random_map(60, 50, 9, 0.6)
    values = suited(mapped_values(operator, kernel_map, 60, 16), torch.float32, backend, operator)
    leaves = {key: value.requires_grad_() for key, value in values.items()}
    with use_backend(backend), torch.autocast(DEVICE.type if backend == "triton" else "cpu", torch.bfloat16):
        out = getattr(ops, operator)(kernel_map=kernel_map.to(leaves["features"].device), **leaves)
    assert out.dtype == torch.bfloat16
    incoming = incoming_gradient(out.shape).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), incoming)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = {key: value.detach().cpu().double().requires_grad_() for key, value in leaves.items()}
    with use_backend("reference"):
        expected = getattr(ops, operator)(kernel_map=kernel_map, **exact)
    wanted = torch.autograd.grad(expected, list(exact.values()), incoming.cpu().double())
    assert_same(
        dict(zip(["output", *leaves], (out.detach(), *gradients), strict=True)),
        dict(zip(["output", *leaves], (expected.detach(), *wanted), strict=True)),
        1e-2,
    )


def test_the_rows_describe_themselves():
    rows = MappedRows(torch.zeros(6, 3), torch.zeros(5, 4, dtype=torch.int32))
    assert repr(rows) == "MappedRows(features=(6, 3), kernel_map=(5, 4), dtype=torch.float32, device=cpu)"
    assert rows.to(torch.float64).dtype == torch.float64 and rows.to(torch.float64).kernel_map is rows.kernel_map
    expected = "cpu" if compiled.loaded else "reference"
    assert depthwise_operator.choose(rows) == conv_operator.choose(rows) == expected


@pytest.mark.parametrize("rows_in", [12, 30])
def test_invert_kernel_map(rows_in):
    kernel_map = random_map(rows_in, 20, 5, 0.7)
    assert torch.equal(invert_kernel_map(kernel_map, rows_in), inverse(kernel_map, rows_in))
    assert torch.equal(invert_kernel_map(invert_kernel_map(kernel_map, rows_in), 20), kernel_map)


@pytest.mark.parametrize(
    ("backend", "operator"),
    [
        pytest.param("cpu", "mapped_depthwise_conv", marks=needs_cpu),
        pytest.param("cpu", "mapped_conv", marks=needs_cpu),
        pytest.param("triton", "mapped_depthwise_conv", marks=needs_triton),
        pytest.param("triton", "mapped_conv", marks=needs_triton),
    ],
)
def test_a_row_read_twice_through_one_tap_has_no_inverse(backend, operator):
    kernel_map = torch.tensor([[0, 1], [0, -1]], dtype=torch.int32, device=device_of(backend))
    values = suited(mapped_values(operator, kernel_map.cpu(), 3, 8), torch.float32, backend, operator)
    with use_backend(backend), pytest.raises(RuntimeError, match="read the same input row through the same tap"):
        run_mapped(operator, values, kernel_map)


@on_backends(("cpu", "reference"))
@pytest.mark.parametrize("entry", [6, -2])
def test_an_entry_that_is_no_row(backend, operator, entry):
    kernel_map = random_map(6, 200, 4, 0.6)
    kernel_map[150, 2] = entry
    values = mapped_values(operator, kernel_map, 6, 3)
    with use_backend(backend), pytest.raises(RuntimeError, match=r"kernel_map has entries from .*, expected -1 to 5"):
        getattr(ops, operator)(kernel_map=kernel_map, **values)


@needs_cpu
def test_a_gradient_refuses_an_entry_that_is_no_row():
    kernel_map = random_map(6, 200, 4, 0.6)
    kernel_map[150, 2] = 6
    x, grad = torch.randn(6, 3), torch.randn(200, 5)
    with pytest.raises(RuntimeError, match=r"kernel_map has entries from .*, expected -1 to 5"):
        torch.ops.sparsecnx.mapped_depthwise_conv_weight_grad(grad[:, :3].contiguous(), x, kernel_map, [], [])
    with pytest.raises(RuntimeError, match=r"kernel_map has entries from .*, expected -1 to 5"):
        torch.ops.sparsecnx.conv_weight_grad(grad, x, torch.randn(1, 4, 3, 5), kernel_map, [], [])


@on_backends(("triton",))
def test_a_gpu_kernel_makes_nan_of_an_entry_that_is_no_row(backend, operator):
    """Nothing waits for a check there, no memory outside is read, and the number is not silently another."""
    kernel_map = random_map(6, 20, 4, 0.6)
    values = suited(mapped_values(operator, kernel_map, 6, 8), torch.float32, backend, operator)
    for entry in (6, -2, 2**31 - 1):
        kernel_map[15, 2] = entry
        with use_backend(backend):
            out = getattr(ops, operator)(kernel_map=kernel_map.to(values["features"].device), **values)
        assert out.isnan().all(1).nonzero().flatten().tolist() == [15] and out.isnan().any(1).sum() == 1


@needs_cpu
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_an_inverse_map_that_contradicts_the_kernel_map(way):
    kernel_map = random_map(20, 15, 4, 0.6)
    right = inverse(kernel_map, 20)
    values = mapped_values("mapped_depthwise_conv", kernel_map, 20, 3)
    array = right.numpy().copy()
    taken = torch.from_numpy(array)  # A change of the array is no new version of the tensor.
    torch._dynamo.reset()
    function = ops.mapped_depthwise_conv
    if way == "compiled":
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with_gradients(function, values, kernel_map=kernel_map, inverse_map=taken)
    row, tap = (right >= 0).nonzero()[0].tolist()
    for at, entry, reads in (((row, tap), -1, 1), ((right < 0).nonzero()[0].tolist(), 3, 0)):
        array[:] = right.numpy()
        array[tuple(at)] = entry
        message = (
            rf"inverse_map contradicts kernel_map: {reads} of \d+ reads are not in it and it has {1 - reads} others"
        )
        with pytest.raises(RuntimeError, match=message if way == "eager" else "inverse_map contradicts kernel_map"):
            with_gradients(function, values, kernel_map=kernel_map, inverse_map=taken)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a failed assertion ends all later work on a GPU")
@on_backends(("triton",), ("mapped_depthwise_conv",))
def test_triton_compares_an_inverse_map_in_the_gradient(backend, operator):
    kernel_map = random_map(20, 15, 4, 0.6)
    values = suited(mapped_values(operator, kernel_map, 20, 8), torch.float32, backend, operator)
    wrong = inverse(kernel_map, 20).flip(0)
    with use_backend(backend), pytest.raises(RuntimeError, match="inverse_map contradicts kernel_map"):
        with_gradients(getattr(ops, operator), values, kernel_map=kernel_map, inverse_map=wrong)


@on_backends(("cpu", "triton", "reference"))
def test_an_inverse_map_that_nothing_reads_changes_nothing(backend, operator):
    """Without a gradient it is not compared either: comparing would cost as much as the operator."""
    kernel_map = random_map(20, 15, 4, 0.6)
    values = suited(mapped_values(operator, kernel_map, 20, 8), torch.float32, backend, operator)
    wrong = inverse(kernel_map, 20).flip(0)
    with use_backend(backend):
        expected = run_mapped(operator, values, kernel_map)
        out = getattr(ops, operator)(kernel_map=kernel_map, inverse_map=wrong, **values)
        assert torch.equal(out, expected["output"])
        if backend == "reference" or operator == "mapped_conv":
            assert_same(run_mapped(operator, values, kernel_map, wrong), expected, 1e-12)


@pytest.mark.parametrize("how", ["freed", "cut", "cut, strided"])
@on_backends(("cpu", "reference"))
def test_a_tensor_without_its_memory_is_named(backend, operator, how):
    """Plain torch would read the memory of others, or end the process."""
    kernel_map = random_map(20, 15, 4, 0.6)
    values = mapped_values(operator, kernel_map, 20, 3)
    arguments = {**values, "kernel_map": kernel_map, "inverse_map": inverse(kernel_map, 20)}
    for key in arguments:
        x = arguments[key]
        x = x.mT.contiguous().mT if how == "cut, strided" and x.ndim > 1 else x.clone()
        x.untyped_storage().resize_(0 if how == "freed" else x.untyped_storage().nbytes() - x.itemsize)
        said = pytest.raises(RuntimeError, match=rf"^{key} has {x.numel()} elements, but its storage holds")
        for autocast in (False, True):  # which casts before the operator runs
            with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast), said:
                getattr(ops, operator)(**{**arguments, key: x})


@needs_cpu
def test_a_gradient_refuses_an_inverse_map_that_contradicts_the_kernel_map():
    kernel_map = random_map(20, 15, 4, 0.6)
    x, weight = torch.randn(20, 3, requires_grad=True), torch.randn(4, 3)
    wrong = inverse(kernel_map, 20).flip(0)
    with pytest.raises(RuntimeError, match="inverse_map contradicts kernel_map"):
        torch.ops.sparsecnx.mapped_depthwise_conv(x, weight, None, kernel_map, wrong, [], [])
    out = ops.mapped_depthwise_conv(x, weight, kernel_map, wrong)
    with pytest.raises(RuntimeError, match="inverse_map contradicts kernel_map"):
        out.sum().backward()


WRONG = [
    ({"features": [[1.0]]}, TypeError, r"features is a list: expected a tensor"),
    ({"kernel_map": None}, TypeError, r"kernel_map is a NoneType: expected a tensor"),
    ({"features": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, r"features is torch.int64: expected one of"),
    ({"features": torch.zeros(6)}, ValueError, r"features is \(6,\): expected \(rows_in, C\)"),
    ({"kernel_map": torch.zeros(5, 4)}, TypeError, r"kernel_map is torch.float32: expected torch.int32"),
    ({"kernel_map": torch.zeros(5).int()}, ValueError, r"kernel_map is \(5,\): expected \(rows_out, K\)"),
    ({"kernel_map": torch.zeros(5, 4, device="meta").int()}, ValueError, r"kernel_map is on meta: features is on cpu"),
    ({"inverse_map": torch.zeros(6, 4)}, TypeError, r"inverse_map is torch.float32: expected torch.int32"),
    ({"inverse_map": torch.zeros(6).int()}, ValueError, r"inverse_map is \(6,\): expected \(rows_in, K\)"),
    ({"inverse_map": torch.zeros(5, 4).int()}, ValueError, r"inverse_map is \(5, 4\): expected .*, here \(6, 4\)"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight is \(4,\): expected \(K, C.*, here \(4, 3"),
    ({"weight": torch.zeros(3, 3, 5)}, ValueError, r"weight is \(3, 3, 5\): expected \(K, C.*, here \(4, 3"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias is \(7,\): expected \("),
    ({"bias": torch.zeros(3, device="meta")}, ValueError, r"bias is"),
    ({"dtype": torch.float16}, TypeError, r"weight is torch.float16: features is torch.float32, expected the same"),
    ({"device": "meta"}, ValueError, r"weight is on meta: features is on cpu"),
]


@BOTH
@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_does_not_fit_is_refused(operator, change, error, message):
    kernel_map = random_map(6, 5, 4, 0.6)
    values = suited(mapped_values(operator, kernel_map, 6, 3), torch.float32, "cpu", operator)
    arguments = {**values, "kernel_map": kernel_map, "inverse_map": inverse(kernel_map, 6)}
    getattr(ops, operator)(**arguments)
    if change.keys() <= {"dtype", "device"}:
        change = {"weight": arguments["weight"].to(**change)}
    with pytest.raises(error, match=message):
        getattr(ops, operator)(**{**arguments, **change})
