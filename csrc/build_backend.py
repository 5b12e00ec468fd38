"""The build backend that pyproject.toml names: setuptools, and torch where the environment has none.

pip builds in an isolated environment, which hides the torch that is installed. setup.py finds that torch nevertheless
(`installed_packages`), so it is asked for only where there is none: a second torch would cost a download of gigabytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import site
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_TORCH = "2.11"


def installed_packages() -> list[str]:
    """Return the folders of this interpreter's packages, which build isolation hides from `sys.path`."""
    in_venv = sys.prefix != sys.base_prefix
    return site.getsitepackages() + ([] if in_venv else [site.getusersitepackages()])


def torch_version() -> str | None:
    """Return the version of the installed torch; None if there is none."""
    found = importlib.metadata.distributions(name="torch", path=installed_packages())
    return next((torch.version for torch in found), None)


def missing_torch() -> list[str]:
    """Return what has to be installed so that setup.py can compile."""
    unneeded = os.environ.get("SPARSECNX_BUILD") == "none" or torch_version() is not None
    return [] if unneeded else [f"torch>={OLDEST_TORCH}"]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_torch()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_torch()]
