"""Registration of our networks with timm, without an import of timm by `import sparsecnx`, which takes two seconds."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_timm() -> None:
    """Register our networks now if timm is imported, or else as soon as it is."""
    if "timm.models" in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Registers our networks after the first import of `timm.models`, and finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module
        return spec


def _register() -> None:
    try:
        import sparsecnx.models.timm_models  # noqa: F401
    except ImportError as error:  # Whoever imports an old timm need not want our networks in it.
        logging.getLogger("sparsecnx").info("timm cannot create our networks: it needs timm 1.0 or later (%s)", error)
