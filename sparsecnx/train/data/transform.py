"""The augmentation of the user: a Python function on crops."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.code import load_code


def load_transform(name: str) -> Callable[[Tensor], Any]:
    """Return the transform of a recipe.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return load_code(name)
    except Exception as error:  # code of the user can raise anything
        problem = f"{type(error).__name__}: {error}; expected a function that takes and returns a tensor (C, *size)"
        raise InputError("transform", name, problem) from error


def transformed(transform: Callable[[Tensor], Any], crop: Tensor, seed: int) -> Tensor:
    """Return a transformed crop, which depends on the seed alone.

    The transform may draw from the generators of torch, numpy and Python, or have one of its own that
    `set_random_state` sets, as MONAI's transforms have.

    Raises:
        ValueError: it returned another shape or type, or other values that are not finite than it was given.
    """
    small, states = seed % 2**32, (np.random.get_state(), random.getstate())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(small)
            random.seed(seed)
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(small)
            found = torch.as_tensor(transform(crop)).as_subclass(Tensor)
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    found = found.to(crop.dtype) if crop.is_floating_point() else found
    if found.shape != crop.shape or found.dtype != crop.dtype:
        had, has = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (crop, found))
        raise ValueError(f"it returned {has} for {had}")
    if not found.isfinite().all() and crop.isfinite().all():
        raise ValueError("it returned values that are not finite")
    return found
