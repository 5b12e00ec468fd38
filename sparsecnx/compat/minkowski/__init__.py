"""The Python API of MinkowskiEngine, for images and volumes, on the operators of sparsecnx.

    import sparsecnx.compat.minkowski as ME               # in place of `import MinkowskiEngine as ME`
    sparsecnx.compat.minkowski.install()                  # or: make every later `import MinkowskiEngine` find this
    python -m sparsecnx.compat.minkowski script.py ...    # or: run a script that way

MinkowskiEngine is not needed. Names, arguments, shapes of parameters and conventions are those of version 0.5.4, and of
the fork with `MinkowskiDepthwiseConvolution`. Parts that are not offered can be imported; calls raise `NotOffered`.
Arguments that do not fit raise `ArgumentError` or `ArgumentTypeError`, and the message names them.
"""

# ruff: noqa: F401 - the imports are the names of the API

from __future__ import annotations

from typing import Any

import torch

from sparsecnx.compat.minkowski import functional as MinkowskiFunctional
from sparsecnx.compat.minkowski import modules, utils
from sparsecnx.compat.minkowski import operations as MinkowskiOps
from sparsecnx.compat.minkowski.base import VARIANTS, MinkowskiModuleBase
from sparsecnx.compat.minkowski.convolution import (
    MinkowskiChannelwiseConvolution,
    MinkowskiConvolution,
    MinkowskiConvolutionBase,
    MinkowskiConvolutionTranspose,
    MinkowskiDepthwiseConvolution,
)
from sparsecnx.compat.minkowski.enums import (
    BroadcastMode,
    ConvolutionMode,
    CoordinateMapType,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    PoolingMode,
    RegionType,
    SparseTensorOperationMode,
    SparseTensorQuantizationMode,
)
from sparsecnx.compat.minkowski.errors import PLACEHOLDERS, ArgumentError, ArgumentTypeError, NotOffered
from sparsecnx.compat.minkowski.installation import install, installed, uninstall
from sparsecnx.compat.minkowski.kernel import KernelGenerator, convert_to_int_list
from sparsecnx.compat.minkowski.layers import (
    MinkowskiAdaptiveLogSoftmaxWithLoss,
    MinkowskiBatchNorm,
    MinkowskiLayerNorm,
    MinkowskiLinear,
    MinkowskiNonlinearityBase,
    MinkowskiSinusoidal,
    MinkowskiSyncBatchNorm,
)
from sparsecnx.compat.minkowski.manager import (
    CoordinateManager,
    CoordinateMapKey,
    clear_global_coordinate_manager,
    global_coordinate_manager,
    set_global_coordinate_manager,
    set_gpu_allocator,
    set_memory_manager_backend,
    set_sparse_tensor_operation_mode,
    sparse_tensor_operation_mode,
)
from sparsecnx.compat.minkowski.modules import MinkowskiNetwork
from sparsecnx.compat.minkowski.operations import (
    MinkowskiPruning,
    MinkowskiToDenseTensor,
    MinkowskiToFeature,
    MinkowskiToSparseTensor,
    MinkowskiUnion,
    cat,
    dense_coordinates,
    mean,
    sum,
    to_sparse,
    to_sparse_all,
    var,
)
from sparsecnx.compat.minkowski.pooling import (
    MinkowskiBroadcast,
    MinkowskiBroadcastAddition,
    MinkowskiBroadcastConcatenation,
    MinkowskiBroadcastMultiplication,
    MinkowskiGlobalPooling,
    MinkowskiInstanceNorm,
    MinkowskiStableInstanceNorm,
)
from sparsecnx.compat.minkowski.tensor import SparseTensor

__version__ = "0.5.4"  # of MinkowskiEngine; code checks it


def __getattr__(name: str) -> Any:
    if name in PLACEHOLDERS:
        return PLACEHOLDERS[name]
    raise AttributeError(f"MinkowskiEngine 0.5.4 has no {name!r}, or sparsecnx.compat.minkowski does not know it")


def is_cuda_available() -> bool:
    """Return whether torch sees a GPU."""
    return torch.cuda.is_available()


globals().update(VARIANTS)
# The public names are those of the classes and functions above, and of four modules.
_of_this_package = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__)]
__all__ = [name for name in _of_this_package if not name.startswith("_")]
__all__ += ["MinkowskiFunctional", "MinkowskiOps", "modules", "utils"]
