"""Installing this package as MinkowskiEngine, for imports such as `from MinkowskiOps import to_sparse`."""

from __future__ import annotations

import collections.abc
import importlib
import importlib.util
import math
import sys
from types import ModuleType

PACKAGE = "sparsecnx.compat.minkowski"
# MinkowskiEngine puts its own folder on the path, so that its files are also modules of the top level.
FILES = (
    *("MinkowskiBroadcast", "MinkowskiChannelwiseConvolution", "MinkowskiCommon", "MinkowskiConvolution"),
    *("MinkowskiCoordinateManager", "MinkowskiDepthwiseConvolution", "MinkowskiInterpolation"),
    *("MinkowskiKernelGenerator", "MinkowskiNetwork", "MinkowskiNonlinearity", "MinkowskiNormalization"),
    *("MinkowskiPooling", "MinkowskiPruning", "MinkowskiSparseTensor", "MinkowskiTensor", "MinkowskiTensorField"),
    *("MinkowskiUnion", "sparse_matrix_functions"),
)
# Names of modules in MinkowskiEngine, and the modules of this package.
MODULES = {
    "MinkowskiEngine": "",
    "MinkowskiEngine.utils": ".utils",
    "MinkowskiEngine.utils.collation": ".utils",
    "MinkowskiEngine.utils.init": ".utils",
    "MinkowskiEngine.utils.coords": ".utils",
    "MinkowskiEngine.utils.quantization": ".utils",
    "MinkowskiEngine.utils.summary": ".utils",
    "MinkowskiEngine.modules": ".modules",
    "MinkowskiEngine.modules.resnet_block": ".modules",
    "MinkowskiEngine.modules.senet_block": ".modules",
    "MinkowskiOps": ".operations",
    "MinkowskiEngine.MinkowskiOps": ".operations",
    "MinkowskiFunctional": ".functional",
    "MinkowskiEngine.MinkowskiFunctional": ".functional",
    "MinkowskiEngine.diagnostics": "",
    "MinkowskiEngineBackend": "",
    "MinkowskiEngineBackend._C": "",
    **{name: "" for file in FILES for name in (file, f"MinkowskiEngine.{file}")},
}


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
    restore_torch_six()
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


def restore_torch_six() -> None:
    """Make `import torch._six` work, which torch 2.0 has removed."""
    if "torch._six" not in sys.modules and importlib.util.find_spec("torch._six") is None:
        module = ModuleType("torch._six")
        module.__dict__.update(
            container_abcs=collections.abc, string_classes=(str, bytes), int_classes=int, inf=math.inf, nan=math.nan
        )
        sys.modules["torch._six"] = module


def is_ours(module: ModuleType) -> bool:
    """Return whether a module under a name of MinkowskiEngine belongs to this package."""
    return getattr(module, "__name__", "").startswith(PACKAGE)
