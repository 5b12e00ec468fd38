"""Functions of the user, named `module:function` on the command line.

A checkpoint that names a function does not run it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

TIMM = "timm:"  # begins the names of timm's networks, which look like code


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
