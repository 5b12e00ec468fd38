"""Crops of images with their label maps to train on, and whole ones to test on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.augment import resize
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.scale import scaled
from sparsecnx.train.data.target_values import UnsupportedTarget
from sparsecnx.transfer.segment.recipe import MAPS, SegmentRecipe


class MapCrops(Crops):
    """Crops of a source whose `values` are label maps, see `Crops`."""

    recipe: SegmentRecipe

    def whole_image(self, place: int) -> Tensor:
        """Return image `place`, resized where crops are resized: its shorter side is then that of the crop."""
        entry = self.whole(place)
        sides = entry.pixels.size
        values = self._values(entry, [0] * len(sides), sides)
        if self.recipe.crop_area is not None:
            scale = min(self.recipe.size) / min(sides)
            values = resize(values, tuple(max(1, round(side * scale)) for side in sides))
        return scaled(values, entry.scale)

    def whole_map(self, place: int) -> Tensor:
        """Return the label map of image `place`, int64 `(*sides)`.

        Raises:
            UnsupportedTarget: it is not there, has classes that do not exist, or does not fit the image.
            Exception: see `Source.values`.
        """
        sides = self.whole(place).pixels.size
        value = self.targets.read(self.source.values(place), sides, self.source.turned(place))[MAPS]
        if value is None:
            raise UnsupportedTarget(f"has no {MAPS}")
        found = torch.from_numpy(value.astype(np.int64))
        try:
            self.targets.targets[MAPS].check(MAPS, found[None], (1, *found.shape))
        except ValueError as error:
            raise UnsupportedTarget(f"has {MAPS} that do not fit ({error})") from error
        return found

    def try_out(self) -> None:
        """Read the whole maps of a sample, and make crops of it, see `Crops.try_out`.

        Raises:
            InputError: a map does not fit its image, or has classes that do not exist, or as `Crops.try_out`.
        """
        self.check_maps("data")
        super().try_out()

    def check_maps(self, argument: str) -> None:
        """Raise InputError if a map of a sample does not fit its image, or has classes that do not exist.

        Args:
            argument: that the error names.
        """
        for place in self.source.sample():
            try:
                self.whole_map(place)
            except UnsupportedTarget as error:
                problem = f"holds {self.source.name(place)}, which {error}"
                hint = f"; --num-classes is {self.recipe.num_classes}, --ignore-index {self.recipe.ignore_index}"
                raise InputError(argument, self.source.root, problem + hint) from error
            except InputError:
                raise
            except Exception:  # it is skipped and named when it is read
                continue
