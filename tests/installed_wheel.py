"""What `make wheel-test` asserts of a wheel installed beside another torch. Argument: its SPARSECNX_BUILD."""

from __future__ import annotations

import sys

import torch

from sparsecnx import _extension

assert _extension.loaded, _extension.why_not
if torch.version.cuda is None:
    assert _extension.cuda_why_not == "this torch is built for CPU only", _extension.cuda_why_not
elif sys.argv[1] == "cuda":
    assert _extension.cuda_loaded, _extension.cuda_why_not
    names = [f"sparsecnx_cuda::{name}" for name in _extension.CUDA_OPERATORS]
    lacking = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
    assert not lacking, f"no kernel for CUDA: {lacking}"
elif sys.argv[1] == "cpu":
    assert not _extension.cuda_loaded and f"{_extension.cuda_why_not}".startswith("not compiled"), (
        _extension.cuda_why_not
    )
print(f"{_extension.PACKAGE}, torch {torch.__version__}: GPU operators {_extension.cuda_why_not or 'loaded'}")
