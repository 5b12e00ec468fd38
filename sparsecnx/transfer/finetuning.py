"""Fine-tuning: crops with labels and their augmentation, and what the training loop of loop.py then trains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.order import mix
from sparsecnx.train.data.source import Source
from sparsecnx.train.learner import Inputs, Learner, Pass
from sparsecnx.transfer.classifier import FINETUNING
from sparsecnx.transfer.evaluate import Scores, predictions
from sparsecnx.transfer.recipe import FinetuneRecipe
from sparsecnx.transfer.trainer import Transfer

CLASS = "class"  # names the labels of a batch
# timm's policies mix with this grey, and move by this share of the side, as its own training does.
GREY = (124, 116, 104)
MOVED = 0.45
ATTEMPTS = 10  # at a change that Pillow takes


class LabelledCrops(Crops):
    """Crops of labelled images, with RandAugment where the recipe asks for it."""

    def __init__(self, source: Source, recipe: FinetuneRecipe, classes: NDArray[Any]) -> None:
        super().__init__(source, recipe)
        self.classes, self.augment = classes, _rand_augment(recipe)

    def crop(self, place: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        crop, _ = super().crop(place, seed)
        if self.augment is not None:
            crop = torch.from_numpy(np.array(self._augmented(crop, seed))).permute(2, 0, 1)
        return crop, {CLASS: torch.tensor(self.classes[place])}

    def _augmented(self, crop: Tensor, seed: int) -> Image.Image:
        """Return a crop as RandAugment changes it. Pillow 12 refuses 0 bits, which timm draws at times."""
        picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
        for attempt in range(ATTEMPTS):
            with seeded(mix(seed, "augment", attempt)), suppress(ValueError):
                changed: Image.Image = self.augment(picture)
                return changed
        return picture


class Classifying(Learner):
    """The classifier of a run, see `Learner`."""

    kind = FINETUNING

    def __init__(self, recipe: FinetuneRecipe, *others: Any) -> None:
        super().__init__(recipe, *others)
        self.mixup: Any = None
        self.erase: Any = None
        if recipe.mixup or recipe.cutmix:
            from timm.data import Mixup

            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=recipe.num_classes,
            )
        if recipe.random_erasing:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(recipe.random_erasing, mode="pixel", max_count=1, device=str(self.device))

    def inputs(self, one: Pass) -> Inputs:
        """Move a pass to the device, normalise its images, erase boxes of them and mix them."""
        images, target = self.normalized(one.images).nan_to_num(0), self.moved(one.targets[CLASS])
        with seeded(one.seed):
            if self.device.type == "cuda":
                torch.cuda.manual_seed(one.seed)
            if self.erase is not None and images.ndim == 4:
                images = self.erase(images)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
        return Inputs(images, {"target": target}, one.seed)

    def network_losses(self, one: Inputs, counts: Tensor | None) -> list[Tensor]:
        logits = self.forward(one.images).float()
        target, smoothing = one.given["target"], 0.0 if self.mixup is not None else self.recipe.label_smoothing
        return [torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)]

    def share(self, one: Inputs) -> Tensor:
        return torch.ones(1, device=self.device)  # every image has a class

    def depends_on_processes(self) -> list[str]:
        mixed = ["mixup of the images of a process"] if self.mixup is not None else []
        erased = ["random erasing of each process"] if self.erase is not None else []
        return [*super().depends_on_processes(), *mixed, *erased]


class Finetuning(Transfer):
    """A run of `sparsecnx finetune`, see `Transfer`."""

    recipe: FinetuneRecipe
    learns = Classifying

    def read(self) -> Crops:
        r, world = self.recipe, self.processes.world
        if (r.mixup or r.cutmix) and r.batch_size // world % 2:
            expected = f"expected an even number for each of the {world} processes, since mixup takes images in pairs"
            raise InputError("batch_size", r.batch_size, expected)
        return LabelledCrops(self.source, self.recipe, self.trained.classes)

    def test(self, network: Any) -> tuple[dict[str, float], dict[str, str]]:
        scores = self._tested(network)
        return scores.overall(), scores.skipped

    def _tested(self, network: Any) -> Scores:
        """Test in all processes: each a part of the images, or all of them where they hold parts of the network."""
        rank, world = (0, 1) if self.options.shard else (self.processes.rank, self.processes.world)
        part = self.tested.part(np.arange(rank, len(self.tested.classes), world))
        found = predictions(network, part, self.recipe, self.learner.device, self.workers)
        scores = Scores.joined([found] if self.options.shard else self.processes.gathered(found))
        if not len(scores.classes):
            first = next(iter(scores.skipped.items()))
            raise TrainingStopped(f"none of the images to test on can be read, such as {first}, {self.last_good()}")
        return scores

    def describe_task(self) -> tuple[str, str, list[str]]:
        r = self.recipe
        decay = f"layer decay {r.layer_decay:g} by {r.layer_decay_type}" if r.layer_decay < 1 else "no layer decay"
        names = ", ".join(self.trained.names[:10]) + (", ..." if len(self.trained.names) > 10 else "")
        kinds = {
            "RandAugment": r.auto_augment,
            "random erasing": r.random_erasing if r.ndim == 2 else 0,
            "mixup": r.mixup,
        }
        kinds |= {"CutMix": r.cutmix, "label smoothing": r.label_smoothing, "stochastic depth": r.drop_path_rate}
        used = ", ".join(f"{name} {value}" for name, value in kinds.items() if value) or "none"
        return (
            decay,
            f"of {r.pixels} px",
            [
                f"{len(self.trained.names)} classes: {names}; {len(self.tested.classes)} images to test on",
                f"augmentation: {used}",
            ],
        )


def _rand_augment(recipe: FinetuneRecipe) -> Any:
    if recipe.auto_augment is None:
        return None
    from timm.data.auto_augment import rand_augment_transform

    moved = int(min(recipe.size) * MOVED)
    given = {"translate_const": moved, "img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
    try:
        return rand_augment_transform(recipe.auto_augment, given)
    except Exception as error:  # timm asserts, and raises what a wrong number or name makes
        expected = "expected RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1"
        raise InputError("auto_augment", recipe.auto_augment, expected) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm's augmentation draws from, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
