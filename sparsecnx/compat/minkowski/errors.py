"""What the API raises. MinkowskiEngine asserts, Python's callers expect ValueError or TypeError: both catch these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar


class ArgumentError(AssertionError, ValueError):
    """An argument of the right kind that does not fit."""


class ArgumentTypeError(AssertionError, TypeError):
    """An argument of the wrong kind."""


class NotOffered(NotImplementedError):
    """A part of MinkowskiEngine that is not offered here; the message names what comes nearest."""


def not_offered(name: str, nearest: str) -> NotOffered:
    """The error for MinkowskiEngine's `name`; `nearest` says what to use in its place."""
    return NotOffered(f"{name} of MinkowskiEngine is not offered by sparsecnx.compat.minkowski. Nearest: {nearest}")


def insist(holds: bool, message: str) -> None:
    """Raises ArgumentError unless it holds."""
    if not holds:
        raise ArgumentError(message)


def insist_type(value: object, kinds: type | tuple[type, ...], name: str, expected: str) -> None:
    """Raises ArgumentTypeError unless the argument `name` is an instance of `kinds`."""
    if not isinstance(value, kinds):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}: expected {expected}")


def placeholder(name: str, nearest: str) -> type:
    """A class in place of a part that is not offered: it imports and serves in `isinstance`; calling it raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise not_offered(name, nearest)

    members = {"__init__": refuse, "apply": staticmethod(refuse), "__doc__": f"Not offered. Nearest: {nearest}"}
    return type(name, (), {**members, "__module__": "sparsecnx.compat.minkowski"})


# Members of MinkowskiEngine's classes that are not offered, and what comes nearest.
MEMBERS = {
    "SparseTensor": {
        "sparse": "dense(), or F and C",
        "slice": "F[x.inverse_mapping] of the tensor x that was made from coordinates",
        "cat_slice": "F[x.inverse_mapping] of the tensor x that was made from coordinates",
        "interpolate": "features_at_coordinates, at whole coordinates",
        "initialize_coordinates": "SparseTensor(features, coordinates)",
    },
    "CoordinateManager": {
        "union_map": "MinkowskiUnion, or + between tensors",
        "stride_map": "kernel_map(in_key, out_key, stride, kernel_size=stride, is_pool=True)",
        "get_kernel_map": "kernel_map",
        "get_coords_map": "kernel_map(in_key, out_key, stride, kernel_size=stride, is_pool=True)",
        "get_unique_coordinate_map_key": "the key that insert_and_map returns",
        "interpolation_map_weight": "SparseTensor.features_at_coordinates, at whole coordinates",
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


def with_missing_members(kind: Class) -> Class:
    """The class with methods in place of those that are not offered, which say so where they are called."""

    def refusing(member: str, nearest: str) -> Callable[..., Any]:
        def refuse(*_: Any, **__: Any) -> None:
            raise not_offered(f"{kind.__name__}.{member}", nearest)

        refuse.__name__, refuse.__doc__ = member, f"Not offered. Nearest: {nearest}"
        return refuse

    for member, nearest in MEMBERS[kind.__name__].items():
        setattr(kind, member, refusing(member, nearest))
    return kind
