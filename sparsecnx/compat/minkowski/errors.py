"""Errors of the API, and the parts of MinkowskiEngine that are not offered.

MinkowskiEngine asserts, Python raises ValueError or TypeError: `except` clauses for both work. Parts that are not
offered can be imported, and raise when they are called; the error names an alternative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar


class ArgumentError(AssertionError, ValueError):
    """An argument has the right type and a value that does not fit."""


class ArgumentTypeError(AssertionError, TypeError):
    """An argument has the wrong type."""


class NotOffered(NotImplementedError):
    """A part of MinkowskiEngine is not offered here; the message names the nearest alternative."""


def not_offered(name: str, nearest: str) -> NotOffered:
    """Return the error for the part `name` of MinkowskiEngine; `nearest` says what to use instead."""
    return NotOffered(f"{name} of MinkowskiEngine is not offered by sparsecnx.compat.minkowski. Nearest: {nearest}")


def require(holds: bool, message: str) -> None:
    """Raise ArgumentError unless `holds`."""
    if not holds:
        raise ArgumentError(message)


def require_type(value: object, kinds: type | tuple[type, ...], name: str, expected: str) -> None:
    """Raise ArgumentTypeError unless the argument `name` is an instance of `kinds`."""
    if not isinstance(value, kinds):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}: expected {expected}")


QUANTIZED = "SparseTensor(features, coordinates, quantization_mode=SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE)"
AT_COORDINATES = "SparseTensor.features_at_coordinates, at whole coordinates"
INVERSE_MAPPING = "F[x.inverse_mapping] of the tensor x that was made from coordinates"
KERNEL_MAP = "kernel_map(in_key, out_key, stride, kernel_size=stride, is_pool=True)"

# Names of the package and their nearest alternatives.
NEAREST = {
    "TensorField": QUANTIZED,
    "MinkowskiInterpolation": AT_COORDINATES,
    "MinkowskiInterpolationFunction": AT_COORDINATES,
    "MinkowskiGenerativeConvolutionTranspose": "MinkowskiConvolutionTranspose, with the argument `coordinates`",
    "MinkowskiPoolingTranspose": "MinkowskiConvolutionTranspose",
    "MinkowskiConvolutionFunction": "MinkowskiConvolution, or sparsecnx.ops.mapped_conv",
    "MinkowskiConvolutionTransposeFunction": "MinkowskiConvolutionTranspose, or sparsecnx.ops.mapped_conv",
    "MinkowskiDepthwiseConvolutionFunction": "MinkowskiDepthwiseConvolution, or sparsecnx.ops.mapped_depthwise_conv",
    "MinkowskiLocalPoolingFunction": "MinkowskiMaxPooling and the other pooling layers, or sparsecnx.ops.mapped_pool",
    "MinkowskiLocalPoolingTransposeFunction": "MinkowskiConvolutionTranspose",
    "MinkowskiGlobalPoolingFunction": "MinkowskiGlobalPooling",
    "MinkowskiDirectMaxPoolingFunction": "MinkowskiMaxPooling, or sparsecnx.ops.mapped_pool",
    "MinkowskiBroadcastFunction": "MinkowskiBroadcastAddition, MinkowskiBroadcastMultiplication",
    "MinkowskiInstanceNormFunction": "MinkowskiInstanceNorm",
    "MinkowskiPruningFunction": "MinkowskiPruning",
    "MinkowskiUnionFunction": "MinkowskiUnion",
    "MinkowskiSPMMFunction": "torch.sparse.mm",
    "MinkowskiSPMMAverageFunction": "torch.sparse.mm",
    "spmm": "torch.sparse.mm",
    "KernelRegion": "KernelGenerator",
    "CoordsManager": "CoordinateManager",
    "get_gpu_memory_info": "torch.cuda.mem_get_info",
    "print_diagnostics": "the command `sparsecnx doctor`",
    "convert_region_type": "KernelGenerator",
    "get_kernel_volume": "KernelGenerator(...).kernel_volume",
    "convert_to_int_tensor": "convert_to_int_list",
    "cuda_version": "torch.version.cuda",
    "cudart_version": "torch.version.cuda",
}

# Members of classes and their nearest alternatives.
MEMBERS = {
    "SparseTensor": {
        "sparse": "dense(), or F and C",
        "slice": INVERSE_MAPPING,
        "cat_slice": INVERSE_MAPPING,
        "interpolate": "features_at_coordinates, at whole coordinates",
        "initialize_coordinates": "SparseTensor(features, coordinates)",
    },
    "CoordinateManager": {
        "union_map": "MinkowskiUnion, or + between tensors",
        "stride_map": KERNEL_MAP,
        "get_kernel_map": "kernel_map",
        "get_coords_map": KERNEL_MAP,
        "get_unique_coordinate_map_key": "the key that insert_and_map returns",
        "interpolation_map_weight": AT_COORDINATES,
        "insert_field": "insert_and_map",
        "get_coordinate_field": "get_coordinates",
        "field_to_sparse_insert_and_map": "insert_and_map",
        "field_to_sparse_map": "SparseTensor.inverse_mapping",
        "field_to_sparse_keys": "SparseTensor.coordinate_map_key",
        "get_field_to_sparse_map": "SparseTensor.inverse_mapping",
        "exists_field_to_sparse": "exists",
        "origin_field": "origin",
        "origin_field_map": "origin_map",
    },
    "CoordinateMapKey": {"set_key": "CoordinateMapKey(tensor_stride, string_id)"},
    "KernelGenerator": {"get_kernel": "offsets"},
}

Class = TypeVar("Class", bound=type)


def refusing(name: str, nearest: str) -> Callable[..., Any]:
    """Return a function that raises NotOffered."""

    def refuse(*_: Any, **__: Any) -> None:
        raise not_offered(name, nearest)

    refuse.__name__, refuse.__doc__ = name.rpartition(".")[2], f"Not offered. Nearest: {nearest}"
    return refuse


def with_missing_members(kind: Class) -> Class:
    """Add methods that raise NotOffered, in place of those that are not offered, to a class."""
    for member, nearest in MEMBERS[kind.__name__].items():
        setattr(kind, member, refusing(f"{kind.__name__}.{member}", nearest))
    return kind


def _placeholder(name: str, nearest: str) -> type:
    """Return a class that can be imported and used in `isinstance`, and raises NotOffered when called."""
    refuse = refusing(name, nearest)
    members = {"__init__": refuse, "apply": staticmethod(refuse), "__doc__": refuse.__doc__}
    return type(name, (), {**members, "__module__": "sparsecnx.compat.minkowski"})


PLACEHOLDERS = {name: _placeholder(name, nearest) for name, nearest in NEAREST.items()}
