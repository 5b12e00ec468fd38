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
from sparsecnx.train.recipe import Recipe


def checked_transform(recipe: Recipe) -> Callable[[Tensor], Any]:
    """Return the transform of a recipe, after it was tried.

    Raises:
        InputError: it cannot be loaded or called, or returns something else than a crop.
    """
    try:
        transform = load_code(str(recipe.transform))
        transformed(transform, torch.rand(recipe.in_chans, *recipe.size, generator=torch.Generator()), recipe.seed)
    except Exception as error:  # code of the user can raise anything
        problem = f"{type(error).__name__}: {error}; expected a function that takes and returns a tensor (C, *size)"
        raise InputError("transform", recipe.transform, problem) from error
    return transform


def transformed(transform: Callable[[Tensor], Any], crop: Tensor, seed: int) -> Tensor:
    """Return a transformed crop, which depends on the seed alone.

    The transform may draw from the generators of torch, numpy and Python, or have one of its own that
    `set_random_state` sets, as MONAI's transforms have.

    Raises:
        ValueError: it returned another shape, or values that are not finite.
    """
    small, states = seed % 2**32, (np.random.get_state(), random.getstate())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(small)
            random.seed(seed)
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(small)
            found = torch.as_tensor(transform(crop)).as_subclass(Tensor).float()
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    if found.shape != crop.shape or not found.isfinite().all():
        raise ValueError(f"it returned {tuple(found.shape)} for {tuple(crop.shape)}, or values that are not finite")
    return found
