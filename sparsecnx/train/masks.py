"""The masks of a run: random ones, ones given in a file, or those of a function of the user.

The masks of forward pass `n` are drawn for the whole batch from the seed and `n`, and each process takes its part, so
that they do not depend on the number of processes. A function is called with the images of its process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.common.files import not_regular
from sparsecnx.geometry.mask_reading import read_mask
from sparsecnx.geometry.masks import random_mask
from sparsecnx.models.patches import patchify
from sparsecnx.train.code import is_code, load_code
from sparsecnx.train.data.order import mix
from sparsecnx.train.data.scale import normalize
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe


class Drawn(NamedTuple):
    """The masks of one forward pass.

    Attributes:
        mask: bool `(B, L)`, True = masked.
        valid: bool of the shape of the images, False where a pixel has no value; None where all have one.
        visible: visible patches of every image; None where they differ.
    """

    mask: Tensor
    valid: Tensor | None
    visible: int | None = None


class Masks:
    """Draw the masks of every forward pass of a run, see `Recipe.masks`.

    Raises:
        InputError: the file cannot be read, or its masks do not fit the patches; or the function cannot be called, or
            returns no masks. `draw` raises it too, for masks of the function that mask nothing or everything.

    Attributes:
        checksum: of the masks in a file, which a checkpoint keeps; None for others.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        self.given = self.checksum = None
        self.function: Callable[..., Any] | None = None
        if recipe.masks is None:
            return
        if is_code(recipe.masks):
            self._try_function(recipe.masks)
        else:
            self.given = _read(recipe)
            self.checksum = zlib.crc32(self.given.numpy().tobytes())

    def draw(
        self, images: Tensor, forward_pass: int, valid: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Drawn:
        """Return the masks for a process's part of a batch.

        Patches without any value are masked, where an image has others: they have nothing to show, and gradients of
        LayerNorm are huge where all of a network's input is 0. Random masks mask their ratio of the other patches.

        Args:
            images: of the part, `(B, C, *size)`, as they were read, see `Batch`.
            forward_pass: its number.
            valid: where the images have values, see `Drawn`.
            device: a function of the user is called with normalised images on it.
        """
        recipe, batch = self.recipe, range(self.recipe.batch_size)
        part, generator = list(self.processes.part(batch)), torch.Generator()
        if self.function is not None:
            generator.manual_seed(mix(recipe.seed, "mask", forward_pass, self.processes.rank))
            mask = self._of_function(normalize(images.to(device), recipe), generator)
            _check(recipe, mask)
            return Drawn(*without_empty(mask.cpu(), valid, recipe.patch))
        generator.manual_seed(mix(recipe.seed, "mask", forward_pass))
        if self.given is not None:
            chosen = torch.randint(len(self.given), (len(batch),), generator=generator)
            return Drawn(*without_empty(self.given[chosen[part]], valid, recipe.patch))
        mask = random_mask(len(batch), recipe.grid, recipe.mask_ratio, generator=generator)[part]
        if valid is None:
            return Drawn(mask, None, recipe.visible)
        empty = empty_patches(valid, recipe.patch)
        others = torch.rand(len(batch), mask.shape[1], generator=generator)[part]
        rank = (2 * empty + mask.float() * (0.5 + others / 2)).argsort(dim=1).argsort(dim=1)
        filled = (~empty).sum(dim=1)
        kept = (filled * (1 - recipe.mask_ratio)).long().clamp(min=1)
        kept[filled == 0] = recipe.visible
        mask = rank >= kept[:, None]
        return Drawn(mask, valid, recipe.visible if bool((kept == recipe.visible).all()) else None)

    def _of_function(self, images: Tensor, generator: torch.Generator) -> Tensor:
        assert self.function is not None
        with self._named_errors():
            mask = torch.as_tensor(self.function(images, generator), device=images.device)
            return read_mask(mask, tuple(images.shape[2:]), len(images), name="images", grid=self.recipe.grid).flatten(
                1
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # code of the user can raise anything
            form = "expected a function of images (B, C, *size) and a generator that returns masks (B, patches)"
            raise InputError("masks", self.recipe.masks, f"{type(error).__name__}: {error}; {form}") from error

    def _try_function(self, name: str) -> None:
        """Call the function once, before a run begins, with noise. What it masks there does not matter."""
        with self._named_errors():
            self.function = load_code(name)
        generator = torch.Generator().manual_seed(0)
        self._of_function(torch.randn(2, self.recipe.in_chans, *self.recipe.size, generator=generator), generator)


def empty_patches(valid: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Return which patches of images have no value at all, bool `(B, L)`, see `Drawn`."""
    return ~patchify(valid.any(dim=1, keepdim=True), patch).any(dim=-1)


def without_empty(mask: Tensor, valid: Tensor | None, patch: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Return masks that hide patches without any value too, and where the images have values that count.

    An image of which no patch with a value is visible keeps its mask, and none of its values counts.
    """
    if valid is None:
        return mask, None
    hidden = mask | empty_patches(valid, patch)
    nothing = hidden.all(dim=1)
    shown = ~nothing.view(-1, *(1,) * (valid.ndim - 1))
    return torch.where(nothing[:, None], mask, hidden), valid & shown


def _read(recipe: Recipe) -> Tensor:
    """Return the masks in a file as bool `(N, L)`."""
    path, cells = str(recipe.masks), math.prod(recipe.grid)
    if (problem := not_regular(path)) is not None:
        raise InputError("masks", path, f"{problem}; expected an array in a .npy file, or module:function")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises many kinds of errors for damaged files
        raise InputError("masks", path, f"cannot be read ({error}); expected an array in a .npy file") from error
    ones = np.isin(array, (0, 1)).all() if array.dtype.kind in "biuf" else False
    grids = {(cells,), recipe.grid}
    fits = any(array.shape[-len(grid) :] == grid and array.ndim - len(grid) in (0, 1) for grid in grids)
    if not ones or not fits or array.size == 0:
        grid = " x ".join(map(str, recipe.grid))
        form = f"an array (N, {cells}) or (N, {grid}) of 0 and 1, 1 = masked, or one mask without N"
        raise InputError("masks", path, f"an array {array.shape} of {array.dtype}; expected {form}")
    masks = torch.from_numpy(array.astype(bool)).view(-1, cells)
    _check(recipe, masks)
    return masks


def _check(recipe: Recipe, masks: Tensor) -> None:
    """Refuse masks that leave an image without a visible patch, or without a masked one."""
    counts = masks.sum(1)
    for number in ((counts == 0) | (counts == masks.shape[1])).nonzero().flatten().tolist()[:1]:
        what = "masks nothing" if counts[number] == 0 else "masks everything"
        problem = f"mask {number} {what}; expected a masked and a visible patch in each"
        raise InputError("masks", recipe.masks, problem)
