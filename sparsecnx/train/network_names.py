"""The names of the networks that `sparsecnx pretrain` trains, see networks.py, which builds them."""

from __future__ import annotations

import difflib
import importlib.util

from sparsecnx.models import SIZES
from sparsecnx.train.code import TIMM, is_code, load_code


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
