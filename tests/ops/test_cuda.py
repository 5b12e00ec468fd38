"""Test the CUDA depthwise convolution: what is fused into it, how its work is divided, its limits, wrong arguments.

These tests run on a GPU or in the emulator, beside the tests of every backend.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import (
    BOUNDS,
    DEVICE,
    assert_matches_reference,
    dispatcher,
    draw_mask,
    make_layout,
    move,
    name,
    needs_cuda,
    needs_gpu,
    place,
    random_sparse,
    relative_error,
)
from operators import conv_parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import Layout, SparseTensor, ops, use_backend
from sparsecnx.ops.depthwise_convolution import cuda
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table

pytestmark = needs_cuda

EPS = 1e-6


class Calls(TorchDispatchMode):
    """Records the names of the operators of sparsecnx_cuda that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparsecnx_cuda":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
SHAPES = [
    # tile, kernel, channels, grid
    (8, (7, 7), 96, (2, 2)),  # three slabs, all warps at work on one square
    (8, (7, 7), 500, (1, 2)),  # more slabs than a block has warps
    (8, (3, 3), 40, (2, 1)),  # a slab that is not full
    (16, (5, 5), 33, (1, 2)),  # four squares to a tile, rows that no 16 bytes fit
    (4, (7, 7), 72, (3, 2)),
    (12, (7, 7), 8, (2, 1)),  # nine squares of 4 x 4 to a tile
    (2, (7, 7), 64, (4, 5)),
    (6, (5, 5), 3, (2, 2)),
    (1, (7, 7), 160, (6, 7)),
    (1, (7, 7), 8, (16, 50)),  # sites that see further than a window holds
    (2, (7, 7), 8, (9, 40)),
    (7, (7, 7), 40, (2, 1)),
    (1, (3, 3), 1, (5, 5)),
    (5, (9, 9), 24, (2, 2)),  # sizes without kernels of their own
    (8, (3, 5), 37, (1, 2)),
    ((4, 6), (3, 3), 8, (2, 2)),  # one to three axes, and sides that differ
    ((6,), (7,), 33, (5,)),
    ((2, 3, 4), (3, 5, 3), 40, (2, 1, 2)),
    ((1, 2, 2), (3, 7, 7), 5, (3, 2, 2)),
]
EVERY_SHAPE = pytest.mark.parametrize("tile,kernel,channels,grid", SHAPES, ids=name)


class Case:
    """Holds random tensors on a geometry and the results of the reference in float64."""

    def __init__(
        self,
        tile: int | tuple[int, ...],
        kernel: tuple[int, ...],
        channels: int,
        grid: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.layout = make_layout(draw_mask("equal counts", 2, grid, seed=7), tile)
        self.tile, self.kernel, self.dtype = self.layout.tile, kernel, dtype
        x = random_sparse(self.layout, channels, dtype)
        grad = 1 + torch.randn(self.layout.rows, channels)
        residual = torch.randn(self.layout.rows, channels)
        parameters = conv_parameters(channels, 1, *kernel)
        weight, bias = parameters["weight"].to(dtype), parameters["bias"].float()
        self.x, self.grad, self.residual = x.features, grad.to(dtype), residual.to(dtype)
        self.weight, self.bias = weight, bias
        exact = [value.double().requires_grad_() for value in (x.features, weight, bias)]
        with use_backend("reference"):
            self.out = ops.depthwise_conv(SparseTensor(exact[0], self.layout), *exact[1:]).features
            self.grads = torch.autograd.grad(self.out, exact, self.grad.double())
        self.out = self.out.detach()

    def there(self, which: str) -> Tensor:
        return place(getattr(self, which), "cuda")

    @property
    def table(self) -> Tensor:
        return place(neighbour_table(self.layout, self.kernel), "cuda")

    def close(self, found: Tensor, expected: Tensor, bound: float | None = None) -> None:
        error = relative_error(found, expected)
        assert error < (bound or BOUNDS[self.dtype]), f"relative error {error:.2e}"


@DTYPES
@EVERY_SHAPE
def test_convolution_and_gradients(tile, kernel, channels, grid, dtype):
    case = Case(tile, kernel, channels, grid, dtype)
    x, weight, grad = case.there("x"), case.there("weight"), case.there("grad")
    out, rstd = cuda.convolve(x, weight, case.there("bias"), case.table, case.tile)
    case.close(out, case.out)
    assert rstd.numel() == 0
    grad_x, _ = cuda.convolve(grad, weight, None, case.table, case.tile, residual=case.there("residual"), flip=True)
    case.close(grad_x, case.grads[0] + case.residual.double())
    grad_weight, grad_bias = cuda.weight_grad(grad, x, case.table, case.tile, kernel)
    assert grad_weight.dtype == dtype and grad_bias.dtype == torch.float32
    case.close(grad_weight, case.grads[1])
    case.close(grad_bias, case.grads[2])


@DTYPES
@pytest.mark.parametrize(
    "tile,kernel,channels,grid",
    [shape for shape in SHAPES if shape[2] > 1],  # a row of one value is normalised to 0
    ids=name,
)
def test_normalised_rows(tile, kernel, channels, grid, dtype):
    case = Case(tile, kernel, channels, grid, dtype)
    found, rstd = cuda.convolve(
        case.there("x"), case.there("weight"), case.there("bias"), case.table, case.tile, normalise=EPS
    )
    scale = (case.out.var(1, unbiased=False, keepdim=True) + EPS).rsqrt()
    case.close(found, (case.out - case.out.mean(1, keepdim=True)) * scale)
    case.close(rstd, scale[:, 0])


@pytest.mark.parametrize("tile", [8, 2, 1])
def test_same_bits_in_any_order_of_threads(tile):
    case = Case(tile, (7, 7), 72, (2, 3), torch.bfloat16)
    arguments = case.there("grad"), case.there("x"), case.table, case.tile, (7, 7)
    outputs = []
    for seed in (1, 2):
        if DEVICE.type == "cpu":
            cuda_emulator.load().seed(seed)
        normalised, _ = cuda.convolve(
            case.there("x"), case.there("weight"), case.there("bias"), case.table, case.tile, normalise=EPS
        )
        outputs.append((normalised, *cuda.weight_grad(*arguments)))
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


def test_no_rows():
    layout = Layout.from_mask(torch.ones(2, 4, dtype=torch.bool), (16, 16))
    x = move(random_sparse(layout, 40, torch.bfloat16), DEVICE)
    p = {which: value.to(DEVICE) for which, value in conv_parameters(40, 1, 7, 7).items()}
    weight = p["weight"].to(torch.bfloat16).requires_grad_()
    bias = p["bias"].float().requires_grad_()
    with use_backend("cuda"):
        out = ops.depthwise_conv(x, weight, bias)
    assert out.features.shape == (0, 40)
    for grad in torch.autograd.grad(out.features.sum(), (weight, bias)):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_gpu_with_little_shared_memory(dtype, monkeypatch):
    """99 KiB a block, as on sm_86 and sm_89: fewer warps a block."""
    if DEVICE.type != "cpu":
        pytest.skip("the emulator can be any GPU, a GPU only itself")
    monkeypatch.setenv("SPARSECNX_EMULATOR_SHARED_BYTES", str(99 * 1024))
    test_normalised_rows(8, (7, 7), 160, (2, 1), dtype)
    test_convolution_and_gradients(8, (7, 7), 160, (2, 1), dtype)


@pytest.mark.parametrize(
    "tile,kernel,expected",
    [
        (8, (7, 7), ["depthwise_halo_kernel"]),
        (4, (3, 3), ["depthwise_halo_kernel"]),
        (2, (7, 7), ["depthwise_window_kernel"]),
        (1, (5, 5), ["depthwise_window_kernel"]),
        (8, (9, 9), ["depthwise_general_kernel", "normalise_rows_kernel"]),
        ((1, 8), (7, 7), ["depthwise_general_kernel", "normalise_rows_kernel"]),
    ],
)
def test_launches(tile, kernel, expected):
    """Convolution, bias and LayerNorm are one launch, a weight gradient is two."""
    if DEVICE.type != "cpu":
        pytest.skip("the emulator tells its launches")
    emulator = cuda_emulator.load()
    case = Case(tile, kernel, 40, (2, 2), torch.bfloat16)

    def names() -> list[str]:
        return [kernel.split("<")[0].split("::")[-1] for kernel in emulator.launches()]

    emulator.forget_launches()
    cuda.convolve(case.there("x"), case.there("weight"), case.there("bias"), case.table, case.tile, normalise=EPS)
    assert names() == expected
    emulator.forget_launches()
    cuda.weight_grad(case.there("grad"), case.there("x"), case.table, case.tile, kernel)
    assert names() == [expected[0].replace("_kernel", "_grad_kernel"), "add_up_ranges_kernel"]


def test_opcheck():
    case = Case(4, (7, 7), 8, (2, 2), torch.float32)
    x, weight, bias = (case.there(which).requires_grad_() for which in ("x", "weight", "bias"))
    operators = torch.ops.sparsecnx_cuda
    torch.library.opcheck(operators.depthwise_conv.default, (x, weight, bias, case.table, case.tile))
    x, weight, grad = x.detach(), weight.detach(), case.there("grad")
    fused = (x, weight, bias.detach(), case.there("residual"), case.table, case.tile, False, EPS)
    torch.library.opcheck(operators.depthwise_conv_fused.default, fused)
    torch.library.opcheck(operators.depthwise_conv_weight_grad.default, (grad, x, case.table, case.tile, (7, 7)))


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


WRONG = {
    **{
        f"{which} without memory": ({which: freed}, f"{which} has .* elements, but its storage holds 0 bytes")
        for which in ("x", "weight", "bias", "residual", "table")
    },
    "x of three dimensions": (dict(x=lambda x: x[None]), r"x must be contiguous, \(rows, channels\)"),
    "x with strides": (dict(x=lambda x: x.t().contiguous().t()), "x must be contiguous"),
    "x in float64": (dict(x=Tensor.double), "x is Double, expected float32, bfloat16 or float16"),
    "x without channels": (dict(x=lambda x: x[:, :0].contiguous()), "x has 0 channels, expected 1 to 65536"),
    "x with too many channels": (dict(x=lambda x: x[:16].repeat(1, 8193)), "x has 65544 channels, expected 1 to 65536"),
    "rows that are no tiles": (dict(x=lambda x: x[:-1]), r"x has \d+ rows, expected a multiple of the 16 sites"),
    "weight for other channels": (dict(weight=lambda w: w[:4]), "weight has 196 elements, expected 392"),
    "weight without its second axis": (dict(weight=lambda w: w[:, 0]), r"weight must be \(C, 1, \*kernel\)"),
    "weight of another dtype": (dict(weight=Tensor.half), "weight is Half, expected Float"),
    "even kernel": (dict(weight=lambda w: w[..., 1:].contiguous()), "the kernel is 7x6, expected odd sizes"),
    "bias of another dtype": (dict(bias=Tensor.half), "bias is Half, expected Float"),
    "bias of another size": (dict(bias=lambda b: b[1:].clone()), "bias has 7 elements, expected 8"),
    "residual of another size": (dict(residual=lambda r: r[1:].clone()), r"residual has \d+ elements, expected"),
    "table in int64": (dict(table=Tensor.long), "table is Long, expected Int"),
    "table of another reach": (dict(table=lambda t: t[:, :1].contiguous()), r"table has \d+ elements, expected"),
    "tile of no sites": (dict(tile=lambda _: [4, 0]), "tile is 4x0, expected 1 to 32768 sites along each axis"),
    "tile of another dimension": (dict(tile=lambda _: [4] * 3), "tile is 4x4x4 and the kernel 7x7, expected one to"),
}


@pytest.mark.parametrize("changes,message", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(changes, message):
    case = Case(4, (7, 7), 8, (2, 2), torch.float32)
    arguments = {
        **{which: getattr(case, which).to(DEVICE) for which in ("x", "weight", "bias", "residual")},
        "table": case.table,
        "tile": case.tile,
    }
    arguments |= {which: change(arguments[which]) for which, change in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.depthwise_conv_fused(**arguments, flip=False, eps=EPS)


WRONG_GRADIENTS = {
    "grad without memory": (dict(grad=freed), "grad has .* elements, but its storage holds 0 bytes"),
    "grad of another size": (dict(grad=lambda g: g[1:].clone()), r"grad has \d+ elements, expected"),
    "grad of another dtype": (dict(grad=Tensor.half), "grad is Half, expected Float"),
    "grad with strides": (dict(grad=lambda g: g.t().contiguous().t()), "grad must be contiguous"),
    "table in int64": (dict(table=Tensor.long), "table is Long, expected Int"),
    "even kernel": (dict(kernel=lambda _: [6, 7]), "the kernel is 6x7, expected odd sizes"),
    "no kernel": (dict(kernel=lambda _: [7, 0]), "the kernel is 7x0, expected odd sizes"),
}


@pytest.mark.parametrize("changes,message", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS.keys())
def test_wrong_arguments_of_the_weight_gradient_are_named(changes, message):
    case = Case(4, (7, 7), 8, (2, 2), torch.float32)
    tensors = {which: getattr(case, which).to(DEVICE) for which in ("grad", "x")}
    arguments = {**tensors, "table": case.table, "tile": case.tile, "kernel": [7, 7]}
    arguments |= {which: change(arguments[which]) for which, change in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsecnx_cuda.depthwise_conv_weight_grad(**arguments)


@pytest.mark.parametrize("tile", [8, 1])
def test_rows_that_begin_off_a_multiple_of_16_bytes(tile):
    case = Case(tile, (7, 7), 40, (2, 2), torch.bfloat16)

    def shifted(value: Tensor) -> Tensor:
        whole = torch.zeros(value.numel() + 1, dtype=value.dtype, device=DEVICE)
        whole[1:] = value.flatten().to(DEVICE)
        return whole[1:].view(value.shape)

    x, weight, grad = shifted(case.x), shifted(case.weight), shifted(case.grad)
    out, _ = cuda.convolve(x, weight, case.there("bias"), case.table, case.tile)
    case.close(out, case.out)
    grad_weight, _ = cuda.weight_grad(grad, x, case.table, case.tile, (7, 7))
    case.close(grad_weight, case.grads[1])


@pytest.mark.parametrize("tile", [8, 2])
def test_narrow_rows_are_normalised_as_they_are_rounded(tile):
    """A separate LayerNorm also reads the rounded convolution. With 3 channels the last bit can decide."""
    case = Case(tile, (5, 5), 3, (2, 2), torch.bfloat16)
    arguments = case.there("x"), case.there("weight"), case.there("bias"), case.table, case.tile
    rounded = cuda.convolve(*arguments)[0].cpu().double()
    found, rstd = cuda.convolve(*arguments, normalise=EPS)
    scale = (rounded.var(1, unbiased=False, keepdim=True) + EPS).rsqrt()
    case.close(rstd, scale[:, 0], 1e-5)
    case.close(found, (rounded - rounded.mean(1, keepdim=True)) * scale)


def test_threads_that_launch_one_kernel_with_different_memory():
    """The limit of shared memory belongs to the kernel and not to a launch."""
    case = Case(1, (7, 7), 768, (3, 3), torch.bfloat16)
    arguments = case.there("x"), case.there("weight"), case.there("bias"), case.table, case.tile
    expected = {eps: cuda.convolve(*arguments, normalise=eps)[0] for eps in (None, EPS)}

    def repeat(eps: float | None) -> bool:
        return all(torch.equal(cuda.convolve(*arguments, normalise=eps)[0], expected[eps]) for _ in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, (None, EPS) * 2))


def test_gradients_of_gradients():
    """The gradient of the input's gradient is right. A gradient that does not exist is refused and is not zero."""
    layout = make_layout(draw_mask("equal counts", 2, (2, 2), 7), 2)
    p = {which: value.to(DEVICE, torch.float32) for which, value in conv_parameters(8, 1, 3, 3).items()}
    seconds = {}
    for backend in ("reference", "cuda"):
        x = random_sparse(layout, 8, torch.float32)
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(x.features.shape, generator=generator).to(DEVICE).requires_grad_()
        weight = p["weight"].clone().requires_grad_()
        with use_backend(backend):
            out = ops.depthwise_conv(SparseTensor(features, move(x, DEVICE).layout), weight, None).features
            (first,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
            (seconds[backend],) = torch.autograd.grad(first.square().sum(), features, retain_graph=True)
            if backend == "cuda":
                (of_weight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
                with pytest.raises(NotImplementedError, match="has no second derivatives"):
                    of_weight.square().sum().backward()
    assert relative_error(seconds["cuda"], seconds["reference"]) < BOUNDS[torch.float32]
    assert seconds["cuda"].any()


def test_a_bias_alone_needs_no_weight_gradient():
    case = Case(4, (7, 7), 8, (2, 2), torch.float32)
    bias = case.there("bias").requires_grad_()
    with use_backend("cuda"), Calls() as calls:
        x = move(SparseTensor(case.x, case.layout), DEVICE)
        out = ops.depthwise_conv(x, case.weight.to(DEVICE), bias).features
        (grad,) = torch.autograd.grad(out, bias, case.grad.to(DEVICE))
    case.close(grad, case.grads[2])
    assert "depthwise_conv_weight_grad" not in calls.names


@needs_gpu
@pytest.mark.parametrize("tile", [8, 1])
def test_offsets_beyond_32_bits(tile):
    """With more than 2**31 values the last images give the same as alone. bfloat16, 4.3 GB a tensor."""
    channels, side, last = 1024, 16 // tile, 2
    batch = 2**31 // (256 * channels) + 1 + last
    mask = torch.zeros(batch, side, side, dtype=torch.bool, device=DEVICE)
    whole, alone = (Layout.from_mask(part, (16, 16)) for part in (mask, mask[:last]))
    x = torch.randn(whole.rows, channels, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(channels, 1, 7, 7, dtype=torch.bfloat16, device=DEVICE)
    with use_backend("cuda"):
        out = ops.depthwise_conv(SparseTensor(x, whole), weight).features[-alone.rows :]
        expected = ops.depthwise_conv(SparseTensor(x[-alone.rows :], alone), weight).features
    assert torch.equal(out, expected)


def test_the_dispatcher_runs_it():
    case = Case(4, (7, 7), 8, (2, 2), torch.float32)
    x = SparseTensor(case.x, case.layout)
    with use_backend("cuda"):
        assert dispatcher("depthwise_conv").choose(move(x, DEVICE)) == "cuda"
    parameters = {"weight": case.weight, "bias": case.bias}
    assert_matches_reference(ops.depthwise_conv, x, parameters, torch.float32, statistics=("bias",), backend="cuda")
