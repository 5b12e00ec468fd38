"""Checks an installed wheel beside another torch, for `make wheel-test`. Argument: its SPARSECNX_BUILD."""

from __future__ import annotations

import sys

import torch

from sparsecnx.backends import compiled

assert compiled.loaded, compiled.why_not
if torch.version.cuda is None:
    assert compiled.cuda_why_not == "this torch is built for CPU only", compiled.cuda_why_not
elif sys.argv[1] == "cuda":
    assert compiled.cuda_loaded, compiled.cuda_why_not
    names = [f"sparsecnx_cuda::{name}" for name in compiled.CUDA_OPERATORS]
    lacking = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
    assert not lacking, f"no kernel for CUDA: {lacking}"
elif sys.argv[1] == "cpu":
    assert not compiled.cuda_loaded and f"{compiled.cuda_why_not}".startswith("not compiled"), compiled.cuda_why_not
print(f"{compiled.PACKAGE}, torch {torch.__version__}: GPU operators {compiled.cuda_why_not or 'loaded'}")
