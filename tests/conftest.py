"""Fixtures and settings of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

# Without a GPU the Triton kernels run on CPU tensors in Triton's interpreter. `triton.jit` chooses it, so it is set
# before sparsecnx is imported. Processes that tests start inherit it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import cuda_emulator
from cases import NO_MINKOWSKI, without_operators

from sparsecnx.backends import cuda, dispatch

settings.register_profile(
    "sparsecnx",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sparsecnx")


class TorchRandom:
    """torch's generator, which hypothesis seeds before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()
register_random(torch_random)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def gpus_by_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch look for GPUs as by default, which the import of pytorch_lightning changes for the whole process."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: more cost time on tensors this small. Tests of threads ask for theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def forget_messages() -> Iterator[None]:
    """Let every test see the messages that come once a process."""
    dispatch._warned.clear()
    dispatch._logged.clear()
    yield
    dispatch._warned.clear()
    dispatch._logged.clear()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: runs CUDA kernels, on a GPU or else in the emulator")
    config.addinivalue_line("markers", "needs_minkowski: runs MinkowskiEngine; `make minkowski-test` installs it")


@pytest.fixture(autouse=True)
def cuda_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tests marked `needs_cuda` the operators of a GPU, or else those of the emulator."""
    if request.node.get_closest_marker("needs_cuda") is None:
        return
    if torch.cuda.is_available():
        refusal = cuda.device_refusal(torch.device("cuda"))
        if refusal is not None:
            without_operators(refusal, os.environ.get("SPARSECNX_BUILD"))
        return
    refusal = cuda_emulator.refusal()
    if refusal is not None:
        pytest.skip(refusal)
    cuda_emulator.load()
    monkeypatch.setattr(cuda, "emulated", True)


@pytest.fixture(autouse=True)
def minkowski_engine(request: pytest.FixtureRequest) -> None:
    if NO_MINKOWSKI is not None and request.node.get_closest_marker("needs_minkowski") is not None:
        pytest.skip(NO_MINKOWSKI)
