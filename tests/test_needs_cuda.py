"""Check that the tests of CUDA kernels fail on a GPU without those kernels, and are skipped where none were built."""

from __future__ import annotations

import pytest
from cases import without_operators


@pytest.mark.parametrize("build", [None, "auto", "cuda"])
def test_on_a_gpu_missing_operators_fail(build: str | None) -> None:
    with pytest.raises(pytest.fail.Exception, match="not compiled"):
        without_operators("not compiled", build)


@pytest.mark.parametrize("build", ["cpu", "none"])
def test_without_a_cuda_build_missing_operators_skip(build: str) -> None:
    with pytest.raises(pytest.skip.Exception, match=f"SPARSECNX_BUILD={build}: not compiled"):
        without_operators("not compiled", build)
