"""Runs as files: the published recipes, and `config.yaml` in the folder of a run, for `--config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sparsecnx.common.files import write_atomically
from sparsecnx.train.recipe import INTERNAL, Recipe

CONFIG = "config.yaml"
PUBLISHED = files("sparsecnx.train") / "recipes"


def write_config(folder: Path, recipe: Recipe, places: Mapping[str, str | None]) -> None:
    """Write the recipe of a run into its folder, and the options that say what it reads, such as `data`.

    Raises:
        OSError: it could not be written.
    """
    values: dict[str, Any] = {name: place for name, place in places.items() if place is not None}
    for field in (field for field in fields(recipe) if field.name not in recipe.unused):
        value = getattr(recipe, field.name)
        if field.name not in INTERNAL or value != field.default:  # a run that was extended says so
            values[field.name] = list(value) if isinstance(value, tuple) else value
    write_atomically(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))
