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
        visible: visible patches of every image; None where they differ.
        valid: bool of the shape of the images, False where a pixel has no value; None where all have one.
    """

    mask: Tensor
    visible: int | None
    valid: Tensor | None = None


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

        Random masks mask every patch without any value, where an image has others: it has nothing to show, and
        gradients of LayerNorm are huge where everything is 0. Fewer patches are then visible in some images.

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
            return Drawn(mask, None, valid)
        generator.manual_seed(mix(recipe.seed, "mask", forward_pass))
        if self.given is not None:
            chosen = torch.randint(len(self.given), (len(batch),), generator=generator)
            return Drawn(self.given[chosen[part]], None, valid)
        mask = random_mask(len(batch), recipe.grid, recipe.mask_ratio, generator=generator)[part]
        if valid is None:
            return Drawn(mask, recipe.visible)
        empty = ~patchify(valid.any(dim=1, keepdim=True), recipe.patch).any(dim=-1)
        others = torch.rand(len(batch), mask.shape[1], generator=generator)[part]
        order = (2 * empty + mask.float() * (0.5 + others / 2)).argsort(dim=1)
        mask = torch.ones_like(mask).scatter(1, order[:, : recipe.visible], False)
        mask |= empty & ~empty.all(dim=1, keepdim=True)
        alike = bool(((~mask).sum(dim=1) == recipe.visible).all())
        return Drawn(mask, recipe.visible if alike else None, valid)

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
