"""Functions of the user, named `module:function` on the command line, and networks of others.

A checkpoint that names a function does not run it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from sparsecnx.models import SIZES

TIMM = "timm:"  # begins the names of timm's networks


def is_code(name: object) -> bool:
    """Return whether a name is a Python path, `module:function`, and no network of timm."""
    return isinstance(name, str) and ":" in name and not name.startswith(TIMM)


def load_code(name: str) -> Callable[..., Any]:
    """Return the function of `module:function`. The module may lie in the current folder.

    Raises:
        TypeError: what the module holds under that name is no function.
        Exception: whatever the module raises.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{function} is a {type(found).__name__}")
    return found


def unknown_network(name: str) -> str | None:
    """Return why there is no network of this name; None where there is."""
    if name in SIZES:
        return None
    if is_code(name):
        try:
            load_code(name)
        except Exception as error:  # a module can raise anything
            return (
                f"{type(error).__name__}: {error}; expected a Python module and a function in it that builds a network"
            )
        return None
    if not name.startswith(TIMM):
        others = f"{TIMM} and a network of timm, such as {TIMM}resnet50, or module:factory"
        return f"expected one of {', '.join(SIZES)}, or {others}"
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed: pip install timm"
    import timm

    wanted = name.removeprefix(TIMM)
    if timm.is_model(wanted.partition(".")[0]):
        return None
    near = difflib.get_close_matches(wanted, timm.list_models(), 3)
    return "timm has no such network" + (f"; did you mean {', '.join(TIMM + other for other in near)}?" if near else "")
