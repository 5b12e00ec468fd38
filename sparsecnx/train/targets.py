"""The targets of a recipe: what its YAML says of each, as the classes of `sparsecnx.models`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from sparsecnx.common.errors import InputError
from sparsecnx.models import ClassificationTarget, ClassMapTarget, ImageTarget, RegressionTarget
from sparsecnx.models.targets import PixelTarget, Target

IMAGE = "image"  # names the input itself
NAME = re.compile(r"[\w -]{1,200}")  # names are keys of the logs, and MLflow takes no others
TYPES: dict[str, Any] = {
    "image": ImageTarget,
    "class_map": ClassMapTarget,
    "regression": RegressionTarget,
    "classification": ClassificationTarget,
}


def read_targets(described: Mapping[str, Any]) -> dict[str, Target]:
    """Return the targets of a recipe, see `Recipe.targets`.

    Raises:
        InputError: one has no such type or no such values, or a name that a log could refuse.
    """
    return {name: _target(name, values) for name, values in described.items()}


def _target(name: Any, values: Any) -> Target:
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise InputError("targets", repr(name), "expected a name of 1 to 200 letters, digits, spaces, _ and -")
    form = f"expected a type, {', '.join(TYPES)}, such as {{type: image, channels: 3}}"
    kind = values.get("type") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError("targets", f"{name}: {values}", form)
    kind = TYPES[kind]
    known = {field.name: field for field in fields(kind)}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key != "type"}
    needed = {key for key, field in known.items() if field.default is MISSING}
    if unknown := sorted(map(str, set(given) - set(known))):
        raise InputError("targets", f"{name}: {unknown[0]}", f"expected one of type, {', '.join(known)}")
    if missing := sorted(needed - set(given)):
        raise InputError("targets", f"{name}: {dict(values)}", f"expected {missing[0]} too")
    for key, value in given.items():
        expected = str(known[key].type)
        fits = {
            "int": type(value) is int,
            "float": type(value) in (int, float),
            "bool": type(value) is bool,
            "str": isinstance(value, str),
        }.get(expected, value is None or all(type(side) is int and side > 0 for side in _sides(value)))
        if not fits:
            raise InputError("targets", f"{name}: {key} is {value!r}", f"expected {expected}")
    try:
        target: Target = kind(**given)
        return target
    except ValueError as error:
        raise InputError("targets", name, str(error)) from error


def _sides(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def patch_of(target: Target, patch: tuple[int, ...]) -> tuple[int, ...]:
    """Return the pixels per patch of a target, for inputs with patches of `patch`."""
    side = target.patch_size if isinstance(target, PixelTarget) else None
    if side is None:
        return patch
    return side if isinstance(side, tuple) else (side,) * len(patch)
