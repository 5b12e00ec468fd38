"""Installing this package as MinkowskiEngine, for imports such as `from MinkowskiOps import to_sparse`.

`main` runs a script that way.
"""

from __future__ import annotations

import argparse
import collections.abc
import importlib
import importlib.util
import math
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = "sparsecnx.compat.minkowski"
# MinkowskiEngine puts its own folder on the path, so that its files are also modules of the top level.
FILES = """
    MinkowskiBroadcast MinkowskiChannelwiseConvolution MinkowskiCommon MinkowskiConvolution MinkowskiCoordinateManager
    MinkowskiDepthwiseConvolution MinkowskiInterpolation MinkowskiKernelGenerator MinkowskiNetwork MinkowskiNonlinearity
    MinkowskiNormalization MinkowskiPooling MinkowskiPruning MinkowskiSparseTensor MinkowskiTensor MinkowskiTensorField
    MinkowskiUnion sparse_matrix_functions
"""
TOP_LEVEL = {"MinkowskiOps": ".operations", "MinkowskiFunctional": ".functional", **dict.fromkeys(FILES.split(), "")}
# Names of modules in MinkowskiEngine, and the modules of this package.
MODULES = {
    **{name: "" for name in ("MinkowskiEngine", "MinkowskiEngine.diagnostics")},
    **{name: "" for name in ("MinkowskiEngineBackend", "MinkowskiEngineBackend._C")},
    **{f"MinkowskiEngine.modules{file}": ".modules" for file in ("", ".resnet_block", ".senet_block")},
    **{
        f"MinkowskiEngine.utils{file}": ".utils"
        for file in ("", ".collation", ".init", ".coords", ".quantization", ".summary")
    },
    **{package + file: module for file, module in TOP_LEVEL.items() for package in ("", "MinkowskiEngine.")},
}
USAGE = f"usage: python -m {PACKAGE} (SCRIPT | -m MODULE) [ARGUMENTS...]"


def install() -> None:
    """Make imports of MinkowskiEngine in this process find this package.

    Imports of `torch._six`, which old code has, find what torch 1 had there.

    Raises:
        RuntimeError: MinkowskiEngine itself is imported already, and code may hold its classes.
    """
    for name in MODULES:
        found = sys.modules.get(name)
        if found is not None and not is_ours(found):
            raise RuntimeError(
                f"{name} is imported already, from {getattr(found, '__file__', None)}: call install() before the first "
                "import of MinkowskiEngine"
            )
    if "torch._six" not in sys.modules and importlib.util.find_spec("torch._six") is None:
        six = sys.modules["torch._six"] = ModuleType("torch._six")
        names = {"container_abcs": collections.abc, "string_classes": (str, bytes), "int_classes": int}
        six.__dict__.update(names, inf=math.inf, nan=math.nan)
    for name, module in MODULES.items():
        sys.modules[name] = importlib.import_module(PACKAGE + module)
    for name in MODULES:  # `import MinkowskiEngine.utils.init as init` looks for an attribute
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(sys.modules[parent], child):
            setattr(sys.modules[parent], child, sys.modules[name])


def uninstall() -> None:
    """Undo `install`, so that later imports find MinkowskiEngine itself."""
    for name in MODULES:
        if name in sys.modules and is_ours(sys.modules[name]):
            del sys.modules[name]


def installed() -> bool:
    """Return whether imports of MinkowskiEngine find this package."""
    return "MinkowskiEngine" in sys.modules and is_ours(sys.modules["MinkowskiEngine"])


def is_ours(module: ModuleType) -> bool:
    """Return whether a module under a name of MinkowskiEngine belongs to this package."""
    return getattr(module, "__name__", "").startswith(PACKAGE)


def main(argv: list[str]) -> int:
    """Run the script or module of a command line as `__main__`, and return its exit code."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\nRuns code for MinkowskiEngine without MinkowskiEngine.")
        return 0
    as_module = argv[:1] == ["-m"]
    arguments = argv[1:] if as_module else argv
    if not arguments or not (as_module or Path(arguments[0]).is_file()):
        problem = f"\nSCRIPT is {arguments[0]}: there is no such file" if arguments else ""
        print(USAGE + problem, file=sys.stderr)
        return 2
    sys.argv = Arguments(arguments)
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))  # as python does for a script
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


class Arguments(list[str]):
    """A `sys.argv` that installs the package as MinkowskiEngine, and lets old scripts load their own checkpoints.

    multiprocessing sends `sys.argv` to a process that it spawns, which unpickles it before it imports the script.
    """

    def __init__(self, values: Iterable[str]) -> None:
        super().__init__(values)
        install()
        torch.serialization.add_safe_globals([argparse.Namespace])  # they hold one beside the weights

    def __reduce__(self) -> tuple[Any, ...]:
        return Arguments, (list(self),)
