"""Test the Triton kernels, in Triton's interpreter where there is no GPU: shapes, dtypes, registration, launches.

On a GPU also streams, devices, graphs and large tensors, for the CUDA kernels too.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DEVICE,
    ON_GPU,
    TILES,
    assert_close,
    assert_matches_reference,
    assert_same,
    backends,
    boxes,
    draw_mask,
    dtypes_of,
    example_layout,
    incoming_gradient,
    layouts,
    make_layout,
    move,
    needs_cuda,
    needs_gpu,
    needs_triton,
    outputs_and_gradients,
    random_sparse,
    suit,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mapped import run_mapped_depthwise_conv
from operators import BLOCK_VECTORS, CASES, block, block_parameters, conv_parameters, in_dimensions, scaled_images
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import BackendError, Layout, SparseTensor, models, ops, use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.geometry.packing import gather_rows, scatter_rows

pytestmark = needs_triton

REGISTERED = sorted(
    name.removeprefix("sparsecnx_triton::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("sparsecnx_triton::")
)
DTYPES = pytest.mark.parametrize("dtype", dtypes_of("triton"), ids=str)

# These are the cases with kernels of 3x3: the interpreter takes seconds for what a GPU does in microseconds, and its
# time grows with the taps of a kernel. Kernels of other sizes have tests of their own.
LIGHT = dict(CASES)
for name, parameters in {
    "depthwise_conv-7x7": lambda c: conv_parameters(c, 1, 3, 3),
    "block-recompute": lambda c: block_parameters(c, 3, 3),
    "block-keep-survival": lambda c: block_parameters(c, 3, 3),
}.items():
    LIGHT[name] = dataclasses.replace(LIGHT[name], parameters=parameters)
EVERY = pytest.mark.parametrize("case", list(LIGHT))

PACKING = "packing"


def on_gpu_backends(*cases: str) -> Any:
    """Return these cases, each on Triton and where the operator has such kernels on CUDA."""
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(*backend.values, case, marks=backend.marks)
            for case in cases
            for backend in backends("gather_rows" if case == PACKING else LIGHT[case].operator)
            if backend.values[0] in ON_GPU
        ],
    )


KERNELS = [(1, 1), (5, 5), (1, 7), (7, 3), (3, 5), (9, 9), (11, 11), (3, 11), (9, 5), (1, 13)]
FEW_CHANNELS = [8, 20, 33, 40]
MANY_CHANNELS = [80, 96, 130]


def on_device(case: str, channels: int = 20, layout: Any = None) -> tuple[SparseTensor, dict[str, torch.Tensor]]:
    x = random_sparse(example_layout(3, (2, 2), tile=2) if layout is None else layout, channels)
    return suit("triton", x, LIGHT[case].parameters(channels), torch.float32)


def run_seeded(case: str) -> Callable[..., SparseTensor]:
    def run(x: SparseTensor, **p: torch.Tensor) -> SparseTensor:
        torch.manual_seed(3)
        return LIGHT[case].run(x, **p)

    return run


def assert_case_matches(
    case: str,
    layout: Any,
    channels: int,
    dtype: torch.dtype = torch.float32,
    kernel: tuple[int, ...] | None = None,
) -> None:
    run, statistics = LIGHT[case].run, LIGHT[case].statistics
    if LIGHT[case].operator == "stochastic_depth":
        run = scaled_images
    x, p = random_sparse(layout, channels), in_dimensions(LIGHT[case].parameters(channels), layout.ndim, kernel)
    assert_matches_reference(run, x, p, dtype, statistics=statistics, backend="triton")


@DTYPES
@EVERY
@settings(max_examples=4)
@given(data=st.data())
def test_triton_equals_reference(case, dtype, data):
    convolves = LIGHT[case].operator in ("convnextv2_block", "depthwise_conv")
    tiles = [tile for tile in TILES if tile % 2 == 0 or "stride" not in case]
    layout = data.draw(layouts(sites=4 if convolves else 12, tiles=tiles))
    channels = data.draw(st.sampled_from(FEW_CHANNELS if convolves else FEW_CHANNELS + MANY_CHANNELS))
    # As in test_convnextv2_block.py: what is narrower than this has no defined accuracy in bfloat16.
    narrow = channels < 32 or 0 < layout.rows < 32
    assume(not (narrow and dtype == torch.bfloat16 and LIGHT[case].operator == "convnextv2_block"))
    assert_case_matches(case, layout, channels, dtype)


@EVERY
@pytest.mark.parametrize("channels", MANY_CHANNELS)
def test_many_channels(case, channels):
    assert_case_matches(case, example_layout(2, (2, 1), tile=2), channels)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_depthwise_kernels_of_other_sizes(kernel, bias):
    x = random_sparse(make_layout(draw_mask("random counts", 1, (3, 3), seed=4), 2), 8)
    p = conv_parameters(8, 1, *kernel)
    if not bias:
        del p["bias"]
    assert_matches_reference(ops.depthwise_conv, x, p, torch.float32, statistics=("bias",), backend="triton")


@DTYPES
@pytest.mark.parametrize(
    ("tile", "grid", "kernel"),
    [
        ((2, 2, 2), (2, 1, 2), (3, 3, 3)),
        ((1, 4, 2), (1, 1, 2), (3, 7, 1)),
        ((3, 1, 2), (1, 3, 1), (1, 3, 5)),
        ((2, 2, 1), (1, 3, 1), (3, 9, 1)),  # a kernel whose lines are walked in groups
        ((4, 6), (2, 1), (3, 5)),
        ((6,), (4,), (7,)),
    ],
    ids=str,
)
def test_depthwise_convolution_along_any_axes(tile, grid, kernel, dtype):
    x = random_sparse(make_layout(draw_mask("equal counts", 1, grid, seed=1), tile), 8)
    p = conv_parameters(8, 1, *kernel)
    assert_matches_reference(ops.depthwise_conv, x, p, dtype, statistics=("bias",), backend="triton")


# The other operators have such tests on every backend: test_conv.py, test_pool.py, test_site_norm.py.
@pytest.mark.parametrize(
    "case",
    [
        "depthwise_conv-7x7",
        "grn-sample",
        "grn-batch",
        "layer_norm",
        "stochastic_depth",
        "block-keep-survival",
        "block-batch",
    ],
)
@pytest.mark.parametrize("ndim", [1, 3])
@settings(max_examples=3)
@given(data=st.data())
def test_one_and_three_dimensions(ndim, case, data):
    """Tiles have another side along each axis, and so have the kernels of the depthwise convolution and the block."""
    layout = data.draw(boxes(ndim, sites=(24, 8, 4)))
    assume(layout.tiles.count > 2)  # tiles with neighbours
    slow = ndim == 3 and case.startswith("block")  # in the interpreter
    kernel = data.draw(st.tuples(*[st.sampled_from([1, 3] if slow else [1, 3, 5, 7])] * ndim))
    channels = data.draw(st.sampled_from(FEW_CHANNELS[:2] if slow else FEW_CHANNELS))
    assert_case_matches(case, layout, channels, kernel=kernel)


@pytest.mark.parametrize(("kernel", "padding"), [((3, 1), (2, 0)), ((4, 4), 1)], ids=str)
def test_convolution_with_other_padding(kernel, padding):
    p = conv_parameters(5, 20, *kernel)
    run = functools.partial(ops.conv, padding=padding)
    assert_matches_reference(run, random_sparse(example_layout(), 20), p, torch.float32, backend="triton")


@pytest.mark.parametrize("recompute", [True, False])
def test_block_with_another_width_and_kernel(recompute):
    run, p = block(recompute=recompute, survive=True), block_parameters(20, 1, 3, hidden=36)
    x = random_sparse(example_layout(tile=2), 20)
    assert_matches_reference(run, x, p, torch.float32, statistics=BLOCK_VECTORS, backend="triton")


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_side(tile):
    x = random_sparse(make_layout(draw_mask("random counts", 1, (2, 2), seed=tile), tile), 8)
    p = conv_parameters(8, 1, 3, 3)
    assert_matches_reference(ops.depthwise_conv, x, p, torch.float32, statistics=("bias",), backend="triton")


@DTYPES
@pytest.mark.parametrize(("tile", "grid"), [(8, (2, 1)), (4, (2, 2)), (2, (3, 3)), (1, (5, 5))])
def test_the_kernel_of_the_network_at_its_tile_sides(tile, grid, dtype):
    x = random_sparse(make_layout(draw_mask("random counts", 1, grid, seed=5), tile), 40)
    p = conv_parameters(40, 1, 7, 7)
    assert_matches_reference(ops.depthwise_conv, x, p, dtype, statistics=("bias",), backend="triton")


@pytest.mark.parametrize("case", ["conv-3x3", "grn-sample", "grn-batch", "layer_norm", "block-batch"])
def test_more_rows_than_a_block(case):
    """Sums over rows go in two stages."""
    layout = make_layout(draw_mask("random counts", 4, (4, 4), seed=7), 4)
    assert layout.rows > 256
    assert_case_matches(case, layout, 8)


def finite(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.isfinite().cpu() for name, value in values.items()}


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["features", "incoming gradient"])
def test_what_is_not_finite_spreads_as_in_the_reference(where, bad, case):
    """The value is in the second image of three, far from the border of a block and of a tile."""
    layout = make_layout(torch.tensor([[[0, 1], [0, 0]], [[0, 0], [1, 0]], [[1, 0], [0, 0]]]).bool(), 2)
    row, channel = int(layout.row_splits[1]) + 5, 3
    x, p = random_sparse(layout, 8, torch.float32), {k: v.float() for k, v in LIGHT[case].parameters(8).items()}
    if where == "features":
        x = x.with_features(x.features.index_put((torch.tensor(row), torch.tensor(channel)), torch.tensor(bad)))

    def spread(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        there, q = suit(backend, x, p, dtype)
        leaves = [there.features.requires_grad_(), *(value.requires_grad_() for value in q.values())]
        run = scaled_images if LIGHT[case].operator == "stochastic_depth" else LIGHT[case].run
        with use_backend(backend):
            out = run(there, **q).features
            gradient = incoming_gradient(out.shape).to(out)
            if where == "incoming gradient":
                gradient[row % len(out), channel % out.shape[1]] = bad
            gradients = torch.autograd.grad(out, leaves, gradient)
        return finite({"output": out.detach(), **dict(zip(["gradient of x", *p], gradients, strict=True))})

    expected, found = spread("reference", torch.float64), spread("triton", torch.float32)
    for name in ("output", "gradient of x") if where == "features" else ("output",):
        if name == "output" or not case.startswith(("grn", "block")):
            assert torch.equal(found[name], expected[name]), name
    for name in expected:
        if case.startswith("conv_transpose") and name == "weight":
            continue  # Triton multiplies absent taps with zeros, which loses more taps of a lost channel.
        # The reference is dense, so it also loses what is multiplied by a masked zero.
        assert (found[name] | ~expected[name]).all(), name
    assert not all(value.all() for value in found.values())


@EVERY
def test_images_with_nothing_visible(case):
    """These are the first image, one in the middle, and the last."""
    masked = torch.tensor([[True] * 4, [False, True, False, True], [True] * 4, [False] * 4, [True] * 4])
    assert_case_matches(case, make_layout(masked.view(5, 2, 2), 2), 20)


@EVERY
def test_gradients_only_where_they_are_wanted(case):
    """Each gradient alone has the bits that it has among the others."""
    x, p = on_device(case)
    with use_backend("triton"):
        everything = outputs_and_gradients(run_seeded(case), x, p)
        for wanted in list(dict.fromkeys(["gradient of x", *list(p)[:2], *list(p)[-1:]])):
            features = x.features.detach().clone()
            values = {name: value.detach().clone() for name, value in p.items()}
            leaf = features if wanted == "gradient of x" else values[wanted]
            leaf.requires_grad_()
            out = run_seeded(case)(x.with_features(features), **values).features
            (gradient,) = torch.autograd.grad(out, leaf, incoming_gradient(out.shape).to(out))
            assert torch.equal(gradient, everything[wanted]), wanted


class Calls(TorchDispatchMode):
    """Keeps the arguments of every call of a Triton operator."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparsecnx_triton":
            self.by_name.setdefault(func._opname, []).append(args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Return the calls of every Triton operator in a forward and backward pass of all that is public."""
    torch.manual_seed(0)
    recorder = Calls()
    with use_backend("triton"), recorder:
        layout = example_layout(2, (2, 2), tile=2)
        mask = layout.tiles.mask().to(DEVICE)
        dense = torch.randn(2, 4, 4, 4, device=DEVICE, requires_grad=True)
        fill = torch.randn(4, device=DEVICE, requires_grad=True)
        SparseTensor.from_dense(dense, mask).dense(fill).sum().backward()
        for case in LIGHT:
            x, p = on_device(case, 4, layout)
            outputs_and_gradients(LIGHT[case].run, x, p)
        run_mapped_depthwise_conv("triton")
    return recorder.by_name


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, calls):
    """Schema, fake kernel, autograd and AOT dispatch hold on the arguments of a real call."""
    operator = getattr(torch.ops.sparsecnx_triton, name).default
    assert calls.get(name), "no public function led to this operator"
    distinct = {str([None if a is None else getattr(a, "shape", a) for a in args]): args for args in calls[name]}
    for args in distinct.values():

        def fresh(value, argument):
            if isinstance(value, list):
                return [fresh(entry, argument) for entry in value]
            if not isinstance(value, torch.Tensor):
                return value
            wanted = not name.endswith(("_backward", "_grad")) and value.is_floating_point()
            # The scale of an image is a constant, and so are given moments.
            wanted = wanted and "scale" not in argument.name and argument.name not in ("mean", "variance")
            return value.detach().clone().requires_grad_(wanted)

        schema = operator._schema.arguments
        torch.library.opcheck(operator, tuple(fresh(*pair) for pair in zip(args, schema, strict=False)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("case", ["depthwise_conv-7x7", "block-recompute"])
def test_compiled_by_inductor(case):
    """`torch.compile` compiles a gather, an operator, a scatter and gradients by its default backend."""
    torch._dynamo.reset()
    mask = torch.tensor([[True, False, False, True], [False, False, True, True]]).to(DEVICE)
    p = {name: value.to(DEVICE, torch.float32) for name, value in LIGHT[case].parameters(8).items()}

    def step(dense, **p):
        return LIGHT[case].run(SparseTensor.from_dense(dense, mask, visible=2), **p).dense()

    def run(function):
        dense = torch.ones(2, 8, 8, 8, device=DEVICE).cumsum(-1).requires_grad_()
        leaves = [value.clone().requires_grad_() for value in p.values()]
        out = function(dense, **dict(zip(p, leaves, strict=True)))
        gradients = torch.autograd.grad(out.sin().sum(), [dense, *leaves])
        return {"output": out.detach(), **dict(zip(["dense", *p], gradients, strict=True))}

    with use_backend("triton"):
        assert_same(run(torch.compile(step, fullgraph=True)), run(step), 1e-5)


def no_launch(kernel: Any, *_: Any) -> None:
    pytest.fail(f"{kernel} was launched")


LIBRARY = ("conv-1x1", "conv-2x2-stride2", "avg_pool-2x2-stride2", "batch_norm-frozen")  # each a call of torch


@pytest.mark.parametrize("case", [case for case in LIGHT if case not in LIBRARY])
def test_wrong_arguments_raise_before_any_launch(case):
    """All operators launch kernels, except those that are one call of the library."""
    x, p = on_device(case)
    launched = []
    with use_backend("triton"), triton_launch.observing(lambda kernel, *_: launched.append(kernel)):
        run_seeded(case)(x, **p)
    assert launched
    for name in p:
        first = p[name].ndim == 1 or case.startswith("conv_transpose")  # whose weight begins with the channels of x
        short = p[name][:-1] if first else p[name][:, :-1]
        for wrong in (short, p[name].to("meta")):
            with (
                use_backend("triton"),
                triton_launch.observing(no_launch),
                pytest.raises(ValueError, match=f"^{name} is "),
            ):
                LIGHT[case].run(x, **{**p, name: wrong})
    message = r"take float32, bfloat16 and float16, x is torch\.float64"
    with use_backend("triton"), triton_launch.observing(no_launch), pytest.raises(BackendError, match=message):
        LIGHT[case].run(x.to(torch.float64), **{name: value.double() for name, value in p.items()})


SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


class Transfers(TorchDispatchMode):
    """Names every copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
        if len(kinds) > 1:
            self.found.append(func.name())
        return out


def test_a_training_step_copies_nothing_between_host_and_gpu(monkeypatch):
    """A CUDA graph could not capture such copies. FakeTensors stand for those of a GPU, and `Transfers` sees copies."""
    monkeypatch.setattr(triton_launch, "interpreting", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = models.FCMAE(models.ConvNeXtV2Encoder(**SMALL), decoder_dim=16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, images = model.to("cuda"), torch.randn(2, 3, 64, 96, device="cuda")
        with Transfers() as transfers:
            torch.zeros(3).to("cuda")
        assert transfers.found == ["aten::_to_copy"]
        with Transfers() as transfers:
            model(images, mask_ratio=0.6)
    assert transfers.calls > 100 and not transfers.found


def training_step(
    model: models.FCMAE, optimizer: torch.optim.Optimizer, images: torch.Tensor, mask: torch.Tensor, visible: int
) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = model(images, mask=mask, visible=visible)[0]
    loss.backward()
    optimizer.step()
    return loss.detach()


def equal_masks(batch: int, count: int) -> tuple[list[torch.Tensor], int]:
    """Return masks with equally many visible patches in every image of a 2x3 grid, and their number."""
    noise = torch.rand(count, batch, 6).argsort(dim=-1)
    return [(mask >= 3).to(DEVICE) for mask in noise], 3


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LARGE_GPU = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_properties(DEVICE).total_memory < 40 * 2**30,
    reason="needs a GPU with 40 GB",
)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_cuda)])
def test_cuda_graph_of_a_training_step(backend):
    """It is captured once and replayed with other images and masks. It leaves the weights that eager steps leave."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = models.FCMAE(models.ConvNeXtV2Encoder(**SMALL, drop_path_rate=0.0), decoder_dim=16).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        images = torch.randn(6, 4, 3, 64, 96).to(DEVICE)
        masks, visible = equal_masks(4, 6)
        steps = list(zip(images, masks, strict=True))
        eager = steps[:3] if captured else steps  # before the capture, on a stream of their own
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with use_backend(backend), torch.cuda.stream(side):
            losses = [training_step(model, optimizer, *step, visible) for step in eager]
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            image, mask, graph = images[0].clone(), masks[0].clone(), torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with use_backend(backend), torch.cuda.graph(graph):
                loss = training_step(model, optimizer, image, mask, visible)
            for step in steps[3:]:
                image.copy_(step[0])
                mask.copy_(step[1])
                graph.replay()
                losses.append(loss.clone())
        torch.cuda.synchronize()
        results.append({"losses": torch.stack(losses), **{k: v.detach() for k, v in model.named_parameters()}})
    assert_same(results[1], results[0], 1e-5)


def packed(dense: torch.Tensor, mask: torch.Tensor, fill: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return geometry, gather and scatter, and their gradients."""
    leaves = [dense.clone().requires_grad_(), fill.clone().requires_grad_()]
    x = SparseTensor.from_dense(leaves[0], mask, visible=3)
    out = x.with_features(2 * x.features).dense(leaves[1])
    grad_dense, grad_fill = torch.autograd.grad(out.sin().sum(), leaves)
    tiles = x.layout.tiles
    found = {"out": out.detach(), "gradient of dense": grad_dense, "gradient of fill": grad_fill}
    return found | {
        "index": tiles.index,
        "splits": tiles.splits,
        "slots": tiles.slots(),
        "table": tiles.neighbours((2, 2)),
    }


def work(case: str) -> Callable[[torch.device], dict[str, torch.Tensor]]:
    """Return what runs a case, or packing, on fixed inputs moved to a device."""
    if case == PACKING:
        mask = equal_masks(4, 1)[0][0].view(4, 2, 3)
        inputs = torch.randn(4, 40, 8, 12, device=DEVICE), mask, torch.randn(40, device=DEVICE)
        return lambda device: packed(*(value.to(device) for value in inputs))
    x, p = on_device(case)
    run = run_seeded(case)
    return lambda device: outputs_and_gradients(
        run, move(x, device), {name: value.to(device) for name, value in p.items()}
    )


@needs_gpu
@on_gpu_backends(*LIGHT, PACKING)
def test_streams_do_not_disturb_each_other(backend, case):
    """Two streams at once, each with its own tensors, give the bits of one after the other."""
    calls = [work(case) for _ in range(2)]
    with use_backend(backend):
        expected = [call(DEVICE) for call in calls]
        torch.cuda.synchronize()
        found = []
        for call in calls:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(10_000_000)  # what is launched on another stream by mistake comes too early
                found.append(call(DEVICE))
        torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@needs_gpu
@TWO_GPUS
@on_gpu_backends(*LIGHT, PACKING)
def test_device_that_is_not_the_current_one(backend, case):
    call, second = work(case), torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    with use_backend(backend):
        expected, found = call(DEVICE), call(second)
    assert all(value.device == second for value in found.values())
    if not case.endswith("drawn"):
        assert_same(found, expected, 1e-6)


@needs_gpu
@pytest.mark.parametrize("deterministic", [False, True])
@on_gpu_backends(*LIGHT)
def test_same_bits_twice(backend, case, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    layout = make_layout(draw_mask("random counts", 16, (7, 7), seed=3), 8)
    x, p = on_device(case, 40, layout)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with use_backend(backend):
            first, second = (outputs_and_gradients(run_seeded(case), x, p) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_gpu
@LARGE_GPU
@on_gpu_backends("depthwise_conv-7x7", "layer_norm", "grn-sample")
def test_offsets_beyond_32_bits(backend, case):
    """With more than 2**31 values the last images give the same as alone. bfloat16, 4.3 GB a tensor."""
    channels, tile, grid, last = 2048, 8, (7, 7), 2
    rows = tile**2 * grid[0] * grid[1]
    batch = 2**31 // (rows * channels) + 1 + last
    whole = make_layout(torch.zeros(batch, *grid, dtype=torch.bool, device=DEVICE), tile)
    alone = make_layout(torch.zeros(last, *grid, dtype=torch.bool, device=DEVICE), tile)
    assert (whole.rows - alone.rows) * channels > 2**31
    p = {
        name: value.to(DEVICE, torch.float32 if name in LIGHT[case].statistics else torch.bfloat16)
        for name, value in LIGHT[case].parameters(channels).items()
    }
    generator = torch.Generator(DEVICE).manual_seed(1)

    def random() -> torch.Tensor:
        return torch.randn(whole.rows, channels, generator=generator, dtype=torch.bfloat16, device=DEVICE)

    features, incoming = random(), random()

    def run(layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = features[-layout.rows :].clone().requires_grad_()
        with use_backend(backend):
            out = LIGHT[case].run(SparseTensor(leaf, layout), **p).features
            (gradient,) = torch.autograd.grad(out, leaf, incoming[-layout.rows :])
        return out.detach()[-alone.rows :].clone(), gradient[-alone.rows :].clone()

    for large, small in zip(run(whole), run(alone), strict=True):
        assert_close(large, small, 1e-3)
    torch.cuda.empty_cache()


@needs_gpu
@LARGE_GPU
def test_packing_beyond_32_bits():
    """With more than 2**31 values in rows and in planes the last images give the same as alone."""
    channels, side, last = 512, 64, 2
    batch = 2**31 // (channels * side**2) + 1 + last
    whole, alone = (
        Layout.from_mask(torch.zeros(count, 8, 8, dtype=torch.bool, device=DEVICE), (side, side))
        for count in (batch, last)
    )
    images = torch.randn(batch, channels, side, side, dtype=torch.bfloat16, device=DEVICE)
    with use_backend("triton"):
        rows = gather_rows(images, whole)
        assert torch.equal(rows[-alone.rows :], gather_rows(images[-last:], alone))
        dense = scatter_rows(rows, whole, images.new_zeros(channels))
    assert torch.equal(dense[-last:], images[-last:])
    torch.cuda.empty_cache()
