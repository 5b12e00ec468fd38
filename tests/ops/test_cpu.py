"""The compiled operators, `torch.ops.sparsecnx.*`: registration, instruction sets, number formats, wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_close, example_layout, needs_cpu, outputs_and_gradients, random_sparse
from mapped import run_mapped_depthwise_conv
from operators import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import SparseTensor, ops, use_backend

pytestmark = needs_cpu

REGISTERED = sorted(
    name.removeprefix("sparsecnx::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("sparsecnx::") and name != "sparsecnx::cpu_isa"
)
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]  # each has all of the one before


class Calls(TorchDispatchMode):
    """Keep the arguments of every call of a compiled operator."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparsecnx":
            self.by_name.setdefault(func._opname, []).append(args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Return the calls of every compiled operator in a forward and backward pass of all that is public."""
    torch.manual_seed(0)
    recorder = Calls()
    with use_backend("cpu"), recorder:
        layout = example_layout(2, (2, 2), tile=2)
        mask = layout.tiles.mask()
        layout.kernel_map((3, 3), (1, 1), (1, 1), (1, 1))
        dense = torch.randn(2, 4, 4, 4, requires_grad=True)
        fill = torch.randn(4, requires_grad=True)
        SparseTensor.from_dense(dense, mask).dense(fill).sum().backward()
        for case in CASES.values():
            p = {name: value.float() for name, value in case.parameters(4).items()}
            outputs_and_gradients(case.run, random_sparse(layout, 4, torch.float32), p)
        run_mapped_depthwise_conv("cpu")
        large = random_sparse(example_layout(2, (4, 4), tile=8), 64, torch.float32)  # Small products are torch's own.
        weight = torch.randn(64, 64, 1, 1, requires_grad=True)
        ops.conv(large, weight, torch.randn(64)).features.sum().backward()
    return recorder.by_name


def test_operators_are_registered():
    assert "depthwise_conv" in REGISTERED and "convnextv2_block_backward" in REGISTERED


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, calls):
    """Schema, fake kernel, autograd and AOT dispatch hold on the arguments of a real call."""
    operator = getattr(torch.ops.sparsecnx, name).default
    with_autograd = not name.endswith(("_backward", "_weight_grad", "_input_grad"))
    assert calls[name], "no public function led to this operator"
    distinct = {str([None if a is None else getattr(a, "shape", a) for a in args]): args for args in calls[name]}
    for args in distinct.values():

        def fresh(value):
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach().clone().requires_grad_(with_autograd and value.is_floating_point())

        # The scale of an image is a constant, and so are given moments and what else the tables hold.
        arguments = [fresh(value) for value in args]
        for position, argument in enumerate(operator._schema.arguments):
            if argument.name in ("scale", "row_scale", "mean", "variance") and arguments[position] is not None:
                arguments[position].requires_grad_(False)
        torch.library.opcheck(operator, tuple(arguments))


# This runs in a process of its own, since the instruction set is chosen once. It prints the set, and the largest error
# of outputs and gradients by dtype and case.
SCRIPT = """
import json
import torch
from cases import BOUNDS, draw_mask, make_layout, outputs_and_gradients, random_sparse, relative_error
from mapped import mapped_values, random_map, run_mapped, suited
from operators import CASES, conv_parameters
from sparsecnx import ops, use_backend

def run(case):
    def run(x, **p):
        torch.manual_seed(3)
        return case.run(x, **p)
    return run

torch.set_num_threads(1)
errors = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    wide = torch.promote_types(dtype, torch.float32)
    for name, case in CASES.items():
        for channels, tile in ((37, 4), (32, 2)):
            torch.manual_seed(channels)
            x = random_sparse(make_layout(draw_mask("equal counts", 2, (3, 2), 3), tile), channels, dtype)
            p = {k: v.to(wide if k in case.statistics else dtype) for k, v in case.parameters(channels).items()}
            with use_backend("reference"):
                exact = {k: v.double() for k, v in p.items()}
                expected = outputs_and_gradients(run(case), x.to(torch.float64), exact, dtype)
            with use_backend("cpu"):
                found = outputs_and_gradients(run(case), x, p)
            worst = max(relative_error(found[k], expected[k]) for k in expected)
            key = f"{name} {dtype}"
            errors[key] = max(errors.get(key, 0), worst / BOUNDS[dtype])
    # In three dimensions: the first slides, the second is listed.
    for tile, kernel in (((2, 4, 8), (3, 5, 7)), ((3, 1, 2), (7, 1, 3))):
        x = random_sparse(make_layout(draw_mask("equal counts", 1, (2, 2, 2), 3), tile), 37, dtype)
        p = {k: v.to(wide if k == "bias" else dtype) for k, v in conv_parameters(37, 1, *kernel).items()}
        with use_backend("reference"):
            exact = {k: v.double() for k, v in p.items()}
            expected = outputs_and_gradients(ops.depthwise_conv, x.to(torch.float64), exact, dtype)
        with use_backend("cpu"):
            found = outputs_and_gradients(ops.depthwise_conv, x, p)
        worst = max(relative_error(found[k], expected[k]) for k in expected)
        errors[f"depthwise_conv {dtype} {tile}"] = worst / BOUNDS[dtype]
    for channels, density in ((37, 0.3), (100, 0.8)):
        name = "mapped_depthwise_conv"
        kernel_map = random_map(90, 70, 9, density)
        values = suited(mapped_values(name, kernel_map, 90, channels), dtype, "cpu", name)
        with use_backend("reference"):
            expected = run_mapped(name, {k: v.double() for k, v in values.items()}, kernel_map)
        with use_backend("cpu"):
            found = run_mapped(name, values, kernel_map)
        worst = max(relative_error(found[k], expected[k]) for k in expected)
        errors[f"{name} {dtype} {density}"] = worst / BOUNDS[dtype]

def products(dtype, factor):
    '''Every 16-bit number times a factor, by the compiled operator and by torch.'''
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    splits = torch.tensor([0, len(x)])
    found = torch.ops.sparsecnx.scale_rows(x, torch.tensor([factor]), splits)
    return found, (x.float() * factor).to(dtype)

wrong = []
for dtype in (torch.float16, torch.bfloat16):
    for factor in (1.0, 1.001, 0.3, 2.0**-9, 3000.0):
        found, expected = products(dtype, factor)
        same = (found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())
        if not same.all():
            wrong.append(f"{dtype} times {factor}: {(~same).sum().item()} differ")

print(json.dumps({"isa": torch.ops.sparsecnx.cpu_isa(), "errors": errors, "wrong": wrong}))
"""


def run_with(isa: str) -> dict[str, Any]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "SPARSECNX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_reference(isa):
    result = run_with(isa)
    asked = INSTRUCTION_SETS.index(isa)
    if "SPARSECNX_CPU_ISA" in os.environ:
        assert result["isa"] in INSTRUCTION_SETS[: asked + 1]
    else:
        machine = INSTRUCTION_SETS.index(torch.ops.sparsecnx.cpu_isa())
        assert result["isa"] == INSTRUCTION_SETS[min(machine, asked)]
    # Errors are fractions of the bound of the dtype.
    assert {key: error for key, error in result["errors"].items() if not error < 1} == {}
    assert result["wrong"] == []


def test_bfloat16_rounds_like_torch():
    x = random_sparse(example_layout(), 40)
    low = x.to(torch.bfloat16)
    weight = torch.randn(40, 1, 1, 1).bfloat16()  # a 1x1 depthwise kernel: one product, rounded once
    with use_backend("cpu"):
        out = ops.depthwise_conv(low, weight).features
    assert torch.equal(out, low.features * weight.flatten())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("depthwise_conv", {"x": lambda x: x.t()}, "x must be a contiguous CPU tensor"),
        ("depthwise_conv", {"x": lambda x: x[None]}, "x must be"),
        (
            "depthwise_conv",
            {"x": lambda x: x[:-1].contiguous()},
            "x has 15 rows, expected a multiple of the tile's 4 sites",
        ),
        ("depthwise_conv", {"weight": lambda w: w.double()}, "weight is Double, expected Float"),
        ("depthwise_conv", {"weight": lambda w: w[:-1].contiguous()}, "weight must be"),
        ("depthwise_conv", {"table": lambda t: t[:, :-1].contiguous()}, "table has .* elements, expected"),
        ("depthwise_conv", {"table": lambda t: t.long()}, "table is Long, expected Int"),
        ("conv", {"kernel_map": lambda m: m.int()}, "kernel_map is Int, expected Long"),
        ("conv", {"weight": lambda w: w[:, :, :-1].contiguous()}, r"weight is \(1, 9, 3, 5\), expected \(groups, K"),
        ("grn", {"gamma": lambda g: g[:-1].contiguous()}, "gamma has 3 elements, expected 4"),
        ("grn", {"splits": lambda s: s[:-1].contiguous()}, "splits must ascend from 0 to the number of rows"),
        ("layer_norm", {"weight": lambda w: w.double()}, "weight is Double, expected Float"),
        ("scale_rows", {"splits": lambda s: s.flip(0)}, "splits must ascend from 0 to the number of rows"),
        ("convnextv2_block", {"pwconv2_weight": lambda w: w.bfloat16()}, "pwconv2_weight is BFloat16, expected Float"),
        ("convnextv2_block", {"splits": lambda s: s.int()}, "splits is Int, expected Long"),
        ("convnextv2_block", {"table": lambda t: t.flip(0)}, "table has neighbours from .* for the tiles of a group"),
    ],
)
def test_compiled_operators_check_what_they_read(name, change, message, calls):
    operator = getattr(torch.ops.sparsecnx, name).default
    args = {argument.name: value for argument, value in zip(operator._schema.arguments, calls[name][0], strict=False)}
    operator(**args)
    args |= {key: change[key](args[key]) for key in change}
    with pytest.raises(RuntimeError, match=f"sparsecnx: {message}"):
        operator(**args)


E = torch.empty
BOUNDLESS = {
    "gather_tiles, a tile whose square overflows": (
        lambda o: o.gather_tiles(E(1, 1, 0, 0), E(0, dtype=torch.long), (2**32, 2**32)),
        "tile is 4294967296, expected 1 to 32768",
    ),
    "scatter_tiles, images without an end": (
        lambda o: o.scatter_tiles(E(0, 1), E(1), E(0, dtype=torch.long), 2**31, (2**31, 2**31), (1, 1)),
        r"the sizes of the images multiply to 2\^63 or more",
    ),
    "scatter_tiles, a negative size": (
        lambda o: o.scatter_tiles(E(0, 1), E(1), E(0, dtype=torch.long), 1, (-4, 4), (1, 1)),
        r"the images are \(1, 1, -4, 4\), expected no negative size",
    ),
    "kernel_map, a grid without an end": (
        lambda o: o.kernel_map(E(0, dtype=torch.long), [2**31] * 3, [0, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1]),
        r"the sizes of the grid multiply to 2\^63 or more",
    ),
    "kernel_map, a stride that does not divide the tile": (
        lambda o: o.kernel_map(E(0, dtype=torch.long), [1, 2], [1, 6, 3, 4, 1, 1]),
        "stride is 4, expected a divisor of the tile's 6 sites",
    ),
    "kernel_map, an axis that is missing": (
        lambda o: o.kernel_map(E(0, dtype=torch.long), [1, 2, 2], [0, 6, 6, 3, 2, 2, 1, 1, 1, 1]),
        "window has 10 entries, expected inverse, and tile",
    ),
    "conv, channels without memory": (
        lambda o: o.conv(E(0, 2**60), E(1, 1, 2**60, 0), None, E(0, 1).int(), [], []),
        "weight has 0 elements, expected at least one, and memory of its own for each",
    ),
    "conv, taps without memory": (
        lambda o: o.conv(E(0, 4), E(1, 2**60, 4, 0), None, E(0, 2**60).int(), [], []),
        "weight has 0 elements, expected at least one, and memory of its own for each",
    ),
    "layer_norm, rows without memory": (
        lambda o: o.layer_norm(E(2**60, 0), E(0), E(0), 1e-6),
        "x has 0 channels, expected 1 to 1048576",
    ),
    "depthwise_conv, a tile without rows": (
        lambda o: o.depthwise_conv(E(0, 4), E(4, 1, 7, 7), None, E(0).int(), [50_000, 50_000]),
        "tile is 50000, expected 1 to 32768",
    ),
    "depthwise_conv_weight_grad, a kernel without memory": (
        lambda o: o.depthwise_conv_weight_grad(E(0, 4), E(0, 4), E(0).int(), [2, 2], [2**31 - 1, 7]),
        "kernel is 2147483647, expected 1 to 1023",
    ),
}


@pytest.mark.parametrize(("call", "message"), BOUNDLESS.values(), ids=BOUNDLESS.keys())
def test_sizes_that_no_memory_bounds_are_refused_first(call, message):
    with pytest.raises(RuntimeError, match=f"sparsecnx: {message}"):
        call(torch.ops.sparsecnx)


def test_sizes_of_nothing_take_no_memory():
    """The largest tile, without rows: lists of its sites would be 13 GB."""
    o, none = torch.ops.sparsecnx, E(0).int()
    assert o.depthwise_conv(E(0, 4), E(4, 1, 7, 7), None, none, [2**15, 2**15]).shape == (0, 4)
    assert not o.depthwise_conv_weight_grad(E(0, 4), E(0, 4), none, [2**15, 2**15], [7, 7]).any()
    assert o.gather_tiles(E(1, 0, 2**15, 2**15), torch.tensor([0]), (2**15, 2**15)).shape == (2**30, 0)
    assert o.scatter_tiles(E(0, 1), E(1), none.long(), 2**40, (0, 0), (1, 1)).shape == (2**40, 1, 0, 0)


def test_tensors_of_two_devices_give_an_error_not_a_meta_tensor():
    for arguments in (
        {"x": E(4, 3), "weight": E(3, device="meta"), "bias": E(3), "eps": 1e-6},
        {"x": E(4, 3, device="meta"), "weight": E(3), "bias": E(3, device="meta"), "eps": 1e-6},
    ):
        with pytest.raises(ValueError, match=r"expected tensors on one device, got x on .*, weight on .*, bias on"):
            torch.ops.sparsecnx.layer_norm(**arguments)
    assert torch.ops.sparsecnx.scale_rows(*(E(*size, device="meta") for size in ((4, 3), (1,), (2,)))).shape == (4, 3)


def test_scales_have_no_gradient_and_say_so(calls):
    for name, scale in (("scale_rows", "scale"), ("convnextv2_block", "row_scale")):
        operator = getattr(torch.ops.sparsecnx, name).default
        names = [argument.name for argument in operator._schema.arguments]
        arguments = next(
            found for args in calls[name] if (found := dict(zip(names, args, strict=True)))[scale] is not None
        )
        out = operator(**{**arguments, scale: arguments[scale].detach().clone().requires_grad_()})
        with pytest.raises(NotImplementedError, match=rf"has no gradient of '{scale}'"):
            (out[0] if isinstance(out, tuple) else out).sum().backward()


def test_cpu_gradients_do_not_depend_on_what_else_is_wanted():
    x = random_sparse(example_layout(), 4, torch.float32)
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    with use_backend("cpu"):
        alone = torch.autograd.grad(ops.depthwise_conv(x, weight).features.sum(), weight)[0]
        features = x.features.clone().requires_grad_()
        both = torch.autograd.grad(
            ops.depthwise_conv(x.with_features(features), weight).features.sum(), [weight, features]
        )
    assert_close(both[0], alone, 1e-7)
