"""Inputs and GPUs that the GPU backends refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import DEVICE, dispatcher, example_layout, move, needs_cuda, needs_triton, random_sparse

from sparsecnx import BackendError, SparseTensor, use_backend
from sparsecnx.backends import compiled, cuda, triton_launch

CHANNELS = 4
GPU = torch.device("cuda", 0)
Install = Callable[[str, tuple[int, int]], None]


@pytest.fixture
def x() -> SparseTensor:
    return move(random_sparse(example_layout(), CHANNELS, torch.float32), DEVICE)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Pretend to be on a GPU of some compute capability with operators built for some architectures."""

    def install(architectures: str, capability: tuple[int, int]) -> None:
        cuda._unserved.cache_clear()
        monkeypatch.setattr(compiled, "cuda_loaded", True)
        facts = {"cuda": "13.0", "cuda_architectures": architectures}
        monkeypatch.setattr(compiled, "build_info", lambda: facts)
        monkeypatch.setattr(cuda, "driver_version", lambda: (13, 0))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(triton_launch, "available", True)
        monkeypatch.setattr(triton_launch, "interpreting", False)

    yield install
    cuda._unserved.cache_clear()


@pytest.mark.parametrize("backend", [cuda, triton_launch], ids=["cuda", "triton"])
def test_what_is_asked_of_a_gpu_breaks_no_graph(backend: object, built: Install) -> None:
    """A refusal asks for compute capability and architectures while torch.compile traces an operator."""
    for capability, expected in (((9, 0), 1.0), ((7, 5), 0.0)):
        built("8.0;9.0", capability)
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def runs(value: torch.Tensor) -> torch.Tensor:
            return value + 1 if backend.device_refusal(GPU) is None else value  # type: ignore[attr-defined]

        assert runs(torch.zeros(())).item() == expected


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        ("8.0;9.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 9), (9, 0)], [(7, 5)]),
        ("9.0a 8.0", [(9, 0), (8, 6)], [(10, 0), (9, 1)]),
        ("10.0f,12.0", [(10, 0), (12, 1)], [(10, 3), (9, 0)]),
        ("", [], [(9, 0)]),
    ],
    ids=str,
)
def test_gpus_that_an_architecture_serves(
    architectures: str, served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    assert [gpu for gpu in (*served, *refused) if cuda.serves(architectures, gpu)] == served


def test_cuda_says_why_a_gpu_is_not_served(monkeypatch: pytest.MonkeyPatch, built: Install) -> None:
    built("8.0;9.0+PTX", (9, 0))
    assert cuda.device_refusal(GPU) is None
    built("8.0;9.0", (12, 0))
    reason = "CUDA operators are built for 8.0;9.0, cuda:0 has compute capability 12.0"
    assert cuda.device_refusal(GPU) == reason
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 8))
    cuda._unserved.cache_clear()
    assert cuda.device_refusal(GPU) == "CUDA operators are built with CUDA 13.0, the driver is for CUDA 12.8"
    monkeypatch.setattr(compiled, "cuda_loaded", False)
    monkeypatch.setattr(compiled, "cuda_why_not", "this torch is built for CPU only")
    assert cuda.device_refusal(GPU) == "this torch is built for CPU only"


@pytest.mark.parametrize("operator", ["convnextv2_block", "depthwise_conv"])
def test_cuda_runs_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    monkeypatch.setattr(cuda, "emulated", False)
    x = random_sparse(example_layout(), CHANNELS, torch.float32)
    message = f"backend 'cuda' cannot run {operator}: CUDA operators run on a GPU, x is on cpu"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        dispatcher(operator).choose(x)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("operator", ["convnextv2_block", "depthwise_conv"])
@pytest.mark.parametrize(("backend", "name"), [("cuda", "CUDA kernel"), ("triton", "Triton kernel")])
def test_what_gpu_kernels_do_not_take(operator: str, backend: str, name: str, x: SparseTensor) -> None:
    wrong = {
        f"{name}s take float32, bfloat16 and float16, x is torch.float64": x.to(torch.float64),
    } | {
        f"{name}s take 1 to 65536 channels, x has {channels}": x.with_features(
            x.features.new_empty(x.layout.rows, channels)
        )
        for channels in (0, 2**16 + 1)
    }
    with use_backend(backend):
        for message, value in wrong.items():
            with pytest.raises(BackendError, match=f"backend '{backend}' cannot run {operator}: {message}"):
                dispatcher(operator).choose(value)


@needs_cuda
def test_a_block_on_cuda_needs_triton_too(monkeypatch: pytest.MonkeyPatch, x: SparseTensor) -> None:
    monkeypatch.setattr(triton_launch, "available", False)
    message = "convnextv2_block: its other steps are Triton's: Triton is not installed"
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        dispatcher("convnextv2_block").choose(x)


@pytest.mark.parametrize(
    ("available", "message"),
    [(True, r"x is on cpu \(on the CPU under TRITON_INTERPRET=1"), (False, "Triton is not installed")],
    ids=["interpreter", "Triton"],
)
def test_what_triton_needs(available: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "available", available)
    monkeypatch.setattr(triton_launch, "interpreting", False)
    x = random_sparse(example_layout(), CHANNELS, torch.float32)
    with use_backend("triton"), pytest.raises(BackendError, match=f"cannot run depthwise_conv: .*{message}"):
        dispatcher("depthwise_conv").choose(x)
