"""The machine code of the CUDA kernels: that it loads, spills nothing, is as wide and as resident as designed; and that
benchmarks/cubin_resources.py, which says so, can say otherwise. No GPU takes part."""

from __future__ import annotations

import importlib
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import DEVICE, name, needs_cuda
from cuda_emulator import Launch
from torch import Tensor

from sparsecnx import Layout, SparseTensor, use_backend
from sparsecnx.backends import compiled
from sparsecnx.ops.depthwise_convolution.geometry import neighbour_table

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
OPERATORS = re.findall(r'm\.impl\("(\w+)"', (CUDA / "implement.h").read_text())


def nvcc() -> str | None:
    """The one that setup.py takes."""
    return runpy.run_path(str(ROOT / "csrc/find_nvcc.py"))["find_nvcc"]()


def newer_sources(library: Path) -> list[str]:
    """Names of the files in csrc/cuda that were changed since it was built."""
    built = library.stat().st_mtime
    return sorted(path.name for path in CUDA.iterdir() if path.stat().st_mtime > built)


pytestmark = [
    pytest.mark.skipif(
        not compiled.cuda_loaded and nvcc() is None,
        reason=f"needs the GPU operators or nvcc to compile them: {compiled.cuda_why_not}",
    ),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
]


@pytest.fixture(scope="module")
def cubins() -> Any:
    """The benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("cubin_resources")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def tool(cubins: Any) -> None:
    try:
        cubins.find_tool("cuobjdump")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(cubins: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that is loaded; compiled for this test where none is, or where a source is newer."""
    if compiled.cuda_loaded:
        found = cubins.find_library()
        if not newer_sources(found):
            return found
        advice = "build it anew, SPARSECNX_BUILD=cuda pip install -e ."
        assert nvcc() is not None, f"{found} is older than {', '.join(newer_sources(found))}: {advice}"
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    environment = {**os.environ, "SPARSECNX_BUILD": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return cubins.find_library(folder / "sparsecnx")


@pytest.fixture(scope="module")
def kernels(cubins: Any, tool: None, library: Path) -> list[Any]:
    return cubins.read(library)


def test_a_library_older_than_a_source_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CUDA", tmp_path)
    source, library = tmp_path / "a.cu", tmp_path / "a.so"
    source.touch()
    library.touch()
    os.utime(source, (1, 1))
    assert newer_sources(library) == []
    os.utime(library, (0, 0))
    assert newer_sources(library) == ["a.cu"]


def test_it_gives_every_operator_a_kernel_for_the_gpu(library: Path) -> None:
    if not compiled.cuda_loaded:
        torch.ops.load_library(str(library))
    missing = [
        name
        for name in OPERATORS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsecnx_cuda::{name}", "CUDA")
    ]
    assert OPERATORS
    assert missing == []


def test_every_kernel_of_the_sources_is_there_on_every_architecture(kernels: list[Any]) -> None:
    sources = "".join(path.read_text() for path in sorted(CUDA.glob("*.cu*")))
    written = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(", sources))
    assert len(written) == sources.count("__global__ void")
    arches = {kernel.arch for kernel in kernels}
    assert arches
    for arch in arches:
        assert {kernel.name.partition("<")[0] for kernel in kernels if kernel.arch == arch} == written


def test_no_kernel_breaks_a_rule(cubins: Any, kernels: list[Any]) -> None:
    """No spills, room for the blocks it was designed for, 16 bytes at a time where rows allow it."""
    broken = [f"{kernel.name} sm_{kernel.arch}: {rule}" for kernel in kernels for rule in cubins.judge(kernel)]
    assert broken == []


def test_the_rules_are_about_something(cubins: Any, kernels: list[Any]) -> None:
    assert {kernel.name.partition("<")[0] for kernel in kernels if cubins.packs(kernel.name)} >= {
        "apply_kernel",
        "copy_kernel",
        "gather_kernel",
        "scatter_kernel",
        "depthwise_halo_kernel",
        "depthwise_window_kernel",
    }
    assert all(kernel.threads for kernel in kernels)
    assert any(kernel.blocks > 1 for kernel in kernels)


needs_emulator = pytest.mark.skipif(DEVICE.type == "cuda", reason="launches are seen in the emulator, not on a GPU")


@needs_cuda
@needs_emulator
def test_the_emulator_has_the_same_kernels(cubins: Any, kernels: list[Any]) -> None:
    assert {cubins.short(name) for name in cuda_emulator.load().kernels()} == {kernel.name for kernel in kernels}


def run_as_tiny(operators: Callable[[Tensor, Tensor, Tensor, Layout], None], dtype: torch.dtype) -> list[Launch]:
    """Launches of operators on rows, weight and bias of each stage of Tiny."""
    emulator = cuda_emulator.load()
    emulator.forget_launches()
    for tile, channels in ((8, 96), (4, 192), (2, 384), (1, 768)):
        layout = Layout.from_mask(torch.zeros(1, 1, 2, dtype=torch.bool), (tile, 2 * tile))
        x = torch.randn(layout.rows, channels, dtype=dtype)
        operators(x, torch.randn(channels, 1, 7, 7, dtype=dtype), torch.randn(channels), layout)
    return emulator.launches()


# Bytes of shared memory that a block may use: of an H200, an A100, and the smallest of any GPU since.
SHARED = {90: 227 * 1024, 80: 163 * 1024, 86: 99 * 1024}
of_devices = pytest.mark.parametrize("arch", SHARED, ids=lambda arch: f"sm_{arch}")
of_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)


# Blocks of four warps that are to be on a multiprocessor together, so that one that waits for its rows has others
# beside it: on sm_90, on sm_80.
TOGETHER = {
    "depthwise_halo_kernel": (3, 3),
    "depthwise_halo_grad_kernel": (3, 2),
    "depthwise_window_kernel": (3, 2),
    "depthwise_window_grad_kernel": (3, 2),
}
TOGETHER_FLOAT32 = {
    "depthwise_halo_kernel": (2, 1),
    "depthwise_halo_grad_kernel": (1, 1),
    "depthwise_window_kernel": (3, 2),
    "depthwise_window_grad_kernel": (3, 2),
}


@needs_cuda
@needs_emulator
@of_devices
@of_dtypes
def test_blocks_of_a_convolution_fit_on_a_multiprocessor_together(
    cubins: Any, kernels: list[Any], monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype
) -> None:
    """By registers, and by the dynamic shared memory that the emulator sees."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> None:
        cuda, table = torch.ops.sparsecnx_cuda, neighbour_table(layout, (7, 7))
        cuda.depthwise_conv(x, weight, bias, table, layout.tile)
        cuda.depthwise_conv_weight_grad(x, x, table, layout.tile, 7, 7)

    monkeypatch.setenv("SPARSECNX_EMULATOR_SHARED_BYTES", str(SHARED[arch]))
    launches = run_as_tiny(convolve, dtype)
    convolving = {launch: cubins.short(launch.kernel) for launch in launches if "depthwise" in launch.kernel}
    assert {kernel.partition("<")[0] for kernel in convolving.values()} >= TOGETHER.keys()
    assert all(launch.shared_bytes <= SHARED[arch] for launch in launches)
    by_name = {kernel.name: kernel for kernel in kernels if kernel.arch == arch}
    if not by_name:
        return  # nothing is compiled for the smallest: that all was launched is enough
    meant = TOGETHER_FLOAT32 if dtype == torch.float32 else TOGETHER
    few = {}
    for launch, kernel in convolving.items():
        family = kernel.partition("<")[0]
        if family not in meant:
            continue
        fit = by_name[kernel].resident_as(math.prod(launch.block), launch.shared_bytes)
        assert math.prod(launch.block) == 128, launch
        if fit < meant[family][0 if arch == 90 else 1]:
            few[kernel] = (fit, by_name[kernel].registers, launch.shared_bytes)
    assert few == {}


@needs_cuda
@needs_emulator
@of_devices
@of_dtypes
def test_launches_leave_room_for_the_blocks_that_are_meant(
    cubins: Any, kernels: list[Any], monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype
) -> None:
    """As `__launch_bounds__` says: one where rows are normalised, in which as many warps work as registers allow."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> None:
        cuda, table, tile = torch.ops.sparsecnx_cuda, neighbour_table(layout, (7, 7)), layout.tile
        cuda.depthwise_conv_fused(x, weight, bias, None, table, tile, False, 1e-6)
        _, energy = cuda.grn(x, bias, bias, layout.row_splits, 1e-6)
        cuda.grn_backward(x, x, bias, layout.row_splits, energy, 1e-6)
        rows = SparseTensor(x, layout)
        with use_backend("cuda"):
            SparseTensor.from_dense(rows.dense(x[0]), layout.tiles.mask())

    monkeypatch.setenv("SPARSECNX_EMULATOR_SHARED_BYTES", str(SHARED[arch]))
    launches = run_as_tiny(run, dtype)
    assert {cubins.short(launch.kernel).partition("<")[0] for launch in launches} >= {
        "depthwise_halo_kernel",
        "depthwise_window_kernel",
        "apply_kernel",
        "apply_backward_kernel",
        "gather_kernel",
        "scatter_kernel",
    }
    by_name = {kernel.name: kernel for kernel in kernels if kernel.arch == arch}
    for launch in launches if by_name else ():
        kernel = by_name[cubins.short(launch.kernel)]
        assert math.prod(launch.block) <= kernel.threads, launch
        fit = kernel.resident_as(math.prod(launch.block), launch.shared_bytes)
        assert fit >= max(1, kernel.blocks), (launch, fit, kernel.blocks)


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills_kernel(const float* x, float* out) {
  float at[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) at[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
  for (int n = 0; n < 1000; ++n) {
#pragma unroll
    for (int i = 0; i < 96; ++i) at[i] = fmaf(at[(i + 1) % 96], at[i], at[(i + 5) % 96]);
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[threadIdx.x + 1024 * i] = at[i];
}
template <class T, int N>
__global__ void copy_kernel(const T* x, T* out) {
  for (int i = 0; i < N; ++i) out[threadIdx.x * N + i] = x[threadIdx.x * N + i];
}
template __global__ void copy_kernel<unsigned int, 1>(const unsigned int*, unsigned int*);
template __global__ void copy_kernel<uint4, 1>(const uint4*, uint4*);
"""


def test_kernels_that_break_the_rules_are_found(cubins: Any, tool: None, tmp_path: Path) -> None:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("needs nvcc")
    source, built = tmp_path / "spills.cu", tmp_path / "spills.o"
    source.write_text(SPILLING)
    architecture = "-gencode=arch=compute_90,code=[sm_90,compute_90]"
    subprocess.run([compiler, architecture, "-c", str(source), "-o", str(built)], check=True, capture_output=True)
    by_name = {kernel.name: kernel for kernel in cubins.read(built)}
    spilling, narrow, wide = (
        by_name[name] for name in ("spills_kernel", "copy_kernel<32 bits, 1>", "copy_kernel<uint4, 1>")
    )
    assert (spilling.threads, spilling.blocks, spilling.arch, spilling.registers) == (1024, 2, 90, 32)
    assert spilling.spills > 0
    assert any(rule.startswith("spills: ") for rule in cubins.judge(spilling))
    assert 0 < spilling.loop_ffma < spilling.loop < spilling.instructions
    assert (narrow.loads, narrow.stores, wide.loads, wide.stores) == ({4: 1}, {4: 1}, {16: 1}, {16: 1})
    assert [rule.partition(":")[0] for rule in cubins.judge(narrow)] == ["wide", "wide"]
    assert cubins.judge(wide) == []
    assert cubins.main(["--library", str(built)]) == 1


def test_registers_and_threads_decide_how_many_blocks_fit(cubins: Any) -> None:
    kernel = cubins.Kernel("some_kernel", 90, registers=80, stack=0, shared=0, threads=256, blocks=3)
    assert (kernel.resident, kernel.occupancy) == (3, 0.375)
    assert [kernel.resident_as(256, size * 1024) for size in (75, 76, 113, 114, 228)] == [3, 2, 2, 1, 0]
    assert kernel.resident_as(128, 0) == 6
    assert cubins.judge(kernel) == []
    kernel.registers = 81
    assert cubins.judge(kernel) == ["occupancy: 2 blocks of 256 threads with 81 registers fit, designed for 3"]


def test_loads_from_shared_memory_are_held_against_multiply_adds(cubins: Any) -> None:
    for ffma, lds, broken in ((800, 100, 0), (799, 100, 1), (0, 0, 1)):
        kernel = cubins.Kernel("depthwise_halo_grad_kernel<bf16, 7, 8>", 90, 80, 0, 0, loads={16: 1})
        kernel.loop_ffma, kernel.loop_lds = ffma, lds
        assert sum(rule.startswith("reuse: ") for rule in cubins.judge(kernel)) == broken


def test_the_hot_loop_is_the_smallest_with_half_of_the_multiply_adds(cubins: Any) -> None:
    code = [
        (0, "FFMA", "R0, R0, R0, R0"),
        (16, "MOV", "R1, R2"),  # the outer loop
        (32, "FFMA", "R0, R0, R0, R0"),  # the inner loop
        (48, "FFMA.FTZ", "R0, R0, R0, R0"),
        (64, "BRA", "0x20"),
        (80, "BRA", "0x10"),
        (96, "EXIT", ""),
        (112, "BRA", "0x70"),
    ]
    assert [address for address, *_ in cubins.hot_loop(code)] == [32, 48, 64]
    assert [address for address, *_ in cubins.hot_loop([*code[:2], code[6]])] == [0, 16, 96]
