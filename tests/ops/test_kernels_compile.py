"""Check the machine code of every GPU kernel, without a GPU: no register spills, and shared memory within limits.

The test compiles what a ConvNeXt V2 tiny launches on one architecture. `python tests/ops/test_kernels_compile.py`
compiles all published sizes for all architectures, which takes ten minutes: run it when a kernel or its constants
change.

The Triton kernels that the operators launch at the sizes of published models are compiled ahead of time, in a process
without Triton's interpreter, which conftest.py asks for: this file is run as a script. The CUDA kernels are those in
the library that the install has compiled; tests/test_emulator.py checks the shared memory that their launches ask for.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecnx import Layout, SparseTensor, TileSet, ops, random_mask, use_backend
from sparsecnx.backends import compiled, triton_launch
from sparsecnx.models import SIZES
from sparsecnx.ops.depthwise_convolution.neighbours import neighbour_table

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that a block may have
LIBRARIES = sorted((ROOT / "sparsecnx").glob("_C_cuda.*so"))
DECODER_CHANNELS = 512
# These are compiled: dtype, model size, stages (5 is the decoder), architectures. Most sizes share their machine code.
# float32 is compiled where shared memory is scarcest.
TESTED = [("bfloat16", "tiny", (1, 2, 3, 4), (90,))]
ALL = [
    *(("bfloat16", size, (1, 2, 3, 4), tuple(SHARED)) for size in SIZES),
    ("bfloat16", "base", (5,), tuple(SHARED)),
    ("float32", "atto", (1,), (80,)),
]
# And so are the depthwise convolutions of these tiles and kernels: dtype, tile, kernel, architectures.
CONVOLUTIONS = [
    ("float32", (2, 2, 2), (1, 7, 7), (100,)),
    ("float32", (4, 4, 4), (5, 5, 5), (80,)),
    ("float16", (8, 8, 8), (3, 3, 3), (90,)),
    ("float16", (4,), (7,), (90,)),
]


def programs(channels: int, tile: int, ratio: float, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yield every operator, forward and backward, on one stage of images of 224 pixels."""
    mask = random_mask(16, (7, 7), ratio).view(16, 7, 7)  # 16 images: rows in multiples of 16, as in larger batches
    visible = int((~mask[0]).sum())
    layout = Layout.from_mask(mask, (7 * tile, 7 * tile), visible)
    hidden = 4 * channels

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def vector(size: int = channels) -> Tensor:
        return leaf(size, dtype=torch.float32)

    def program(forward: Callable[..., Any], *leaves: Any) -> Callable[[], object]:
        inputs = [value.features if isinstance(value, SparseTensor) else value for value in leaves]

        def run() -> None:
            out = forward(*leaves)
            out = out.features if isinstance(out, SparseTensor) else out
            torch.autograd.grad(out, inputs, torch.zeros_like(out))

        return run

    def block(x: SparseTensor, recompute: bool, survival: Tensor | None = None) -> Callable[[], object]:
        def forward(x: SparseTensor, *parameters: Tensor) -> SparseTensor:
            return ops.convnextv2_block(x, ops.BlockParameters(*parameters), survival, recompute=recompute)

        c, kernel = x.features.shape[1], [7] * x.layout.ndim
        first = [leaf(c, 1, *kernel), vector(c), vector(c), vector(c), leaf(4 * c, c)]
        second = [vector(4 * c), vector(4 * c), vector(4 * c), leaf(c, 4 * c), vector(c)]
        return program(forward, x, *first, *second)

    def rows(width: int = channels) -> SparseTensor:
        return SparseTensor(leaf(layout.rows, width), layout)

    kernel_map = torch.arange(layout.rows, dtype=torch.int32)[:, None].repeat(1, 49)  # its own inverse
    for bias in ([], [vector()]):
        yield program(ops.depthwise_conv, rows(), leaf(channels, 1, 7, 7), *bias)
        yield program(
            lambda x, w, *bias: ops.mapped_depthwise_conv(x, w, kernel_map, kernel_map, *bias),
            leaf(layout.rows, channels),
            leaf(49, channels),
            *bias,
        )
    yield program(ops.conv, rows(), leaf(channels, channels, 3, 3), vector())
    for width in (4, 8):
        grouped = functools.partial(ops.conv, groups=channels // width)
        yield program(grouped, rows(), leaf(channels, width, 3, 3), vector())
    yield program(ops.layer_norm, rows(), vector(), vector())
    for scope in ("sample", "batch"):
        yield program(lambda *x, scope=scope: ops.grn(*x, scope), rows(hidden), vector(hidden), vector(hidden))
    for activation in ("relu", "gelu"):
        norm = {"training": True, "activation": activation}
        yield program(lambda x, *p, norm=norm: ops.batch_norm(x, None, None, *p, **norm), rows(), vector(), vector())
    yield program(lambda x: ops.instance_norm(x), rows())
    yield program(lambda x: ops.max_pool(x, 3, 1, 1), rows())
    yield program(lambda x: ops.avg_pool(x, 3, 1, 1), rows())
    yield program(lambda x: ops.stochastic_depth(x, 0.1), rows())
    yield program(lambda x: SparseTensor.from_dense(x, mask, visible), leaf(16, channels, 7 * tile, 7 * tile))
    yield program(lambda x, fill: x.dense(fill), rows(), leaf(channels))
    for recompute in (False, True):
        for survival in (None, torch.ones(16)):
            yield block(rows(), recompute, survival)
    cells = random_mask(2, (2, 3, 3), ratio).view(2, 2, 3, 3)
    cubes = Layout(TileSet.from_mask(cells, (2, 3, 3)), tile)
    volumes = SparseTensor(leaf(cubes.rows, 64), cubes)  # of the same width at every size of model
    yield program(ops.depthwise_conv, volumes, leaf(64, 1, 3, 3, 3), vector(64))
    if tile == 8:
        yield program(lambda x: SparseTensor.from_dense(x, mask, visible), leaf(16, 3, 224, 224))  # images
        yield block(volumes, recompute=True)
        thin = leaf(2, channels, 8, 24, 24)  # tiles of 4x8x8
        yield program(lambda x, fill: SparseTensor.from_dense(x, cells).dense(fill), thin, leaf(channels))


def convolutions(tile: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yield the depthwise convolution of 64 channels: forward, also normalised as in the block, and its gradients."""
    from sparsecnx.ops.depthwise_convolution.triton_kernels import convolve, weight_grad

    visible = torch.zeros(16, *[1] * len(tile), dtype=torch.bool)
    layout = Layout(TileSet.from_mask(visible, tuple(visible.shape[1:])), tile)
    x, weight = torch.zeros(layout.rows, 64, dtype=dtype), torch.zeros(64, 1, *kernel, dtype=dtype)
    table, bias = neighbour_table(layout, kernel), torch.zeros(64)
    yield lambda: convolve(x, weight, bias, table, tile)
    yield lambda: convolve(x, weight, bias, table, tile, normalise=1e-6)
    yield lambda: convolve(x, weight, None, table, tile, flip=True)
    yield lambda: weight_grad(x, x, table, tile, kernel)


def main(selections: list[Any], others: list[Any]) -> None:
    """Compile what the programs launch, each specialisation once, and print as JSON what each kernel needs."""
    # Triton is imported here, because kernels are compiled and not interpreted only in this process.
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import create_function_from_signature

    def configurations(kernel: Any, arguments: dict[str, Any]) -> Iterator[Any]:
        """Yield the function under the decorators of a kernel, with its arguments in every configuration that fits."""
        if isinstance(kernel, Autotuner):
            for config in triton_launch.fitting(kernel, arguments):
                yield kernel.fn, {**arguments, **config.all_kwargs()}
        else:
            yield kernel, arguments

    sources: dict[str, Any] = {}
    arches: tuple[int, ...] = ()

    def observe(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        for function, chosen in configurations(kernel, arguments):
            for arch in arches:
                target = GPUTarget("cuda", arch, 32)
                backend = make_backend(target)
                bind = create_function_from_signature(function.signature, function.params, backend)
                bound, types, rest = bind(**chosen)
                _, signature, constants, attributes = function._pack_args(backend, dict(chosen), bound, types, rest)
                flags = {name: value for name, value in chosen.items() if name not in bound}
                key = f"{function.fn.__name__} sm_{arch} {signature} {constants} {attributes} {flags}"
                sources[key] = (ASTSource(function, signature, constants, attributes), target, flags)

    for dtype, size, stages, arches in selections:  # noqa: B007 - `observe` reads arches
        for stage in stages:
            place = (SIZES[size].dims[stage - 1], 2 ** (4 - stage), 0.6) if stage < 5 else (DECODER_CHANNELS, 1, 0.0)
            with use_backend("triton"):
                for run in programs(*place, getattr(torch, dtype)):
                    with triton_launch.observing(observe):
                        run()
    for dtype, tile, kernel, arches in others:  # noqa: B007 - `observe` reads arches
        for run in convolutions(tile, kernel, getattr(torch, dtype)):
            with triton_launch.observing(observe):
                run()
    found = []
    for key, (source, target, flags) in sources.items():
        kernel = triton_compile(source, target, flags)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            ((registers, stack),) = resource_usage(knobs.nvidia.cuobjdump.path, Path(file.name)).values()
        needs = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
        found.append({"kernel": key, "arch": target.arch, **needs})
    print(json.dumps(found))


def resource_usage(cuobjdump: str, binary: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Return registers of every kernel, by architecture and name, and bytes of local memory, where registers spill."""
    command = [cuobjdump, "--dump-resource-usage", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch, name = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*(arch = |Function )(\w+)", line):
            arch, name = (match[2], name) if match[1] == "arch = " else (arch, match[2])
        elif sizes := re.findall(r"(?:REG|STACK|LOCAL):(\d+)", line):
            registers, *local = map(int, sizes)
            found[arch, name] = registers, sum(local)
    return found


def check(selections: list[Any], others: list[Any]) -> None:
    """Compile the kernels of these selections, and expect all that there are, without spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps([selections, others])]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    text = "".join(path.read_text() for path in (ROOT / "sparsecnx").rglob("triton_*.py"))
    kernels = set(re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", text))
    for arch in selections[0][-1]:
        assert {one["kernel"].split()[0] for one in found if one["arch"] == arch} == kernels, "every kernel is launched"
    assert [one for one in found if one["stack"] or one["shared"] > SHARED[one["arch"]]] == []


@pytest.mark.skipif(not triton_launch.available, reason="needs Triton")
def test_triton_kernels() -> None:
    check(TESTED, CONVOLUTIONS)


@pytest.mark.skipif(not triton_launch.available, reason="needs Triton, which brings cuobjdump")
@pytest.mark.skipif(not LIBRARIES, reason=f"needs the GPU operators: {compiled.cuda_why_not}")
def test_cuda_kernels() -> None:
    from triton import knobs

    usage = resource_usage(knobs.nvidia.cuobjdump.path, LIBRARIES[0])
    assert usage
    assert {kernel: stack for kernel, (_, stack) in usage.items() if stack} == {}


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*json.loads(sys.argv[1]))
    else:
        check(ALL, CONVOLUTIONS)
