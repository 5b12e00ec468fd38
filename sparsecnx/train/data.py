"""Image files, and the batches of crops that a run trains on.

Every random choice is a function of the seed and of its place in the run. A run that was stopped therefore goes on
exactly as it would have, with any number of workers:

    order of an epoch    (seed, epoch)
    crop and flip        (seed, epoch, position in the epoch)
    mask                 (seed, forward pass), drawn in loop.py
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.train.recipe import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# These are the photographs (no drawings, no masks) inside the wheels, colourful ones first.
PHOTOGRAPHS = {
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
    "skimage": """
        data/astronaut.png data/chelsea.png data/coffee.png data/rocket.jpg data/motorcycle_left.png
        data/motorcycle_right.png data/hubble_deep_field.jpg data/ihc.png data/retina.jpg data/camera.png
        data/coins.png data/brick.png data/grass.png data/gravel.png data/moon.png data/page.png
        data/text.png data/cell.png data/clock_motion.png data/microaneurysms.png""",
}
# An epoch shows each of the 22 photographs this often, so that it has a few hundred images.
PHOTOGRAPH_REPEATS = 20


class ImageSet(NamedTuple):
    """Image files, in a fixed order.

    Attributes:
        root: folder that `names` are relative to.
        names: paths below `root`, with forward slashes.
        small: True if the decoded images are kept in memory.
    """

    root: str
    names: tuple[str, ...]
    small: bool

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def fingerprint(self) -> str:
        """Return a hash of the names and their order, which does not depend on the place of the folder."""
        return hashlib.blake2b(os.fsencode("\n".join(self.names)), digest_size=16).hexdigest()


def find_images(folder: str | Path) -> ImageSet:
    """Return all image files below `folder`, in class folders or not, sorted by path.

    Links are followed. A folder that can be reached in several ways, such as by a link to its parent, is listed once.

    Raises:
        InputError: `folder` does not exist, is not a folder, or holds no image file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError("data", folder, "not a folder" if root.exists() else "no such folder; expected images in one")
    names = [
        Path(parent, file).relative_to(root).as_posix()
        for parent, files in _walk(root)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS)
    ]
    if not names:
        raise InputError("data", folder, f"holds no images; expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return ImageSet(str(root), tuple(sorted(names)), small=False)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it with its files. Links are followed, and no folder comes twice."""
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # Folders come before links to them, so that the names do not depend on the order on disk.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        yield parent, files


def wheel_photographs() -> ImageSet:
    """Return the photographs inside the installed scikit-image and scikit-learn. Nothing is downloaded.

    Raises:
        MissingExtra: neither is installed.
    """
    paths = []
    for package, files in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths += [Path(spec.origin).parent / file for file in files.split()]
    present = [path for path in paths if path.is_file()]
    if not present:
        raise MissingExtra("scikit-image and scikit-learn not installed: pip install sparsecnx[train]")
    root = Path(os.path.commonpath([path.parent for path in present]))
    return ImageSet(str(root), tuple(p.relative_to(root).as_posix() for p in present), small=True)


def read_image(path: str) -> Tensor:
    """Decode a file to RGB, uint8 `(3, H, W)`. Raises whatever the decoder raises."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # grey of 0 to 65535, which Pillow's own conversion clips to 255
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    return pixels


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images `(B, 3, H, W)` as float32, normalised by ImageNet's mean and standard deviation."""
    return v2.functional.normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed from several numbers or words; similar inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draw(NamedTuple):
    """One sample to make: the number of the image, and the seed of its crop and flip."""

    image: int
    seed: int


class Batch(NamedTuple):
    """One batch of crops.

    Attributes:
        images: uint8 `(B, 3, S, S)`; empty if `problem` is set.
        unreadable: the files that were skipped, and why.
        problem: the reason why there is no batch. A worker that raised it would send a traceback in words instead.
    """

    images: Tensor
    unreadable: dict[str, str]
    problem: InputError | None = None


class Crops(Dataset[Any]):
    """Augmented crops of an image set, indexed by `Draw`; equal draws give equal crops.

    The next readable file takes the place of an unreadable one, so that batches stay full.
    """

    def __init__(self, images: ImageSet, image_size: int) -> None:
        self.images = images
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.decoded: dict[int, Tensor] = {}

    def __getitem__(self, draw: Draw) -> tuple[Tensor, dict[str, str]] | InputError:
        try:
            pixels, unreadable = self.read(draw.image)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from torch's CPU generator
            torch.default_generator.manual_seed(draw.seed)
            return self.augment(pixels), unreadable

    def read(self, index: int) -> tuple[Tensor, dict[str, str]]:
        """Return image `index`, or the first readable one after it, and the files that were skipped with the reasons.

        Raises:
            InputError: no file can be read.
        """
        unreadable: dict[str, str] = {}
        for place in range(index, index + len(self.images.names)):
            place %= len(self.images.names)
            if place in self.decoded:
                return self.decoded[place], unreadable
            try:
                pixels = read_image(self.images.path(place))
            except Exception as error:  # decoders raise many kinds of errors, and none may end a long run
                unreadable[self.images.names[place]] = f"{type(error).__name__}: {error}"
                continue
            if self.images.small:
                self.decoded[place] = pixels
            return pixels, unreadable
        name, reason = next(iter(unreadable.items()))
        problem = f"none of its {len(unreadable)} image files can be read, first {name} ({reason})"
        raise InputError("data", self.images.root, problem)


def draws(recipe: Recipe, images: int, *, start: int = 0) -> Iterator[list[Draw]]:
    """Yield the draws of every batch of a run, from batch `start` to the end of the last epoch.

    An epoch shows each image `epoch_repeats` times, shuffled.
    """
    batches_per_epoch = recipe.steps_per_epoch(images) * recipe.grad_accum_steps
    for number in range(start, recipe.epochs * batches_per_epoch):
        epoch, batch = divmod(number, batches_per_epoch)
        if batch == 0 or number == start:
            generator = torch.Generator().manual_seed(mix(recipe.seed, "order", epoch))
            order = (torch.randperm(images * recipe.epoch_repeats, generator=generator) % images).tolist()
        positions = range(batch * recipe.batch_size, (batch + 1) * recipe.batch_size)
        yield [Draw(order[position], mix(recipe.seed, "crop", epoch, position)) for position in positions]


def load_batches(crops: Crops, recipe: Recipe, *, start: int, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Return the batches of a run from number `start` on, which do not depend on the number of workers."""
    return DataLoader(
        crops,
        batch_sampler=draws(recipe, len(crops.images.names), start=start),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=pin_memory,
    )


def collate(samples: list[tuple[Tensor, dict[str, str]] | InputError]) -> Batch:
    """Stack the crops of a batch and join the unreadable files."""
    images: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample, InputError):
            return Batch(torch.empty(0), {}, sample)
        images.append(sample[0])
        unreadable |= sample[1]
    return Batch(torch.stack(images), unreadable)


def leave_signals_to_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group; only the trainer answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
