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
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.common.files import not_regular
from sparsecnx.train.recipe import MAX_PIXELS, Recipe

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

# This many files, spread evenly over the list, are looked at before a run begins.
SAMPLED_FILES = 256
SAMPLED_BYTES = 4096
# How an image is turned upright, by the value of its EXIF orientation.
ORIENTATION = ExifTags.Base.Orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Reading processes that are in the middle of a file get so many seconds at the end of a run.
SECONDS_TO_END = 3.0


class WorkersError(Exception):
    """Reading processes could not be started; the message says why."""


class UnsupportedImage(ValueError):
    """A whole image of a kind that the command does not read; the message says why."""


class Fingerprint(NamedTuple):
    """Hashes that tell one data set from another, wherever its folder is.

    Attributes:
        names: of the names and their order.
        sizes: of the sizes of all files, in bytes.
        contents: of the first, middle and last 4096 bytes of up to 256 files, spread evenly over the list.
    """

    names: str
    sizes: str
    contents: str


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

    def sample(self) -> list[int]:
        """Return the numbers of up to `SAMPLED_FILES` images, spread evenly."""
        count = min(len(self.names), SAMPLED_FILES)
        return [i * len(self.names) // count for i in range(count)]

    def fingerprint(self) -> Fingerprint:
        """Return hashes of names, sizes and a sample of the contents. A million files take about 6 seconds."""
        sizes = (str(_size(self.path(index))) for index in range(len(self.names)))
        contents = (_some_bytes(self.path(index)) for index in self.sample())
        return Fingerprint(
            _hash([os.fsencode("\n".join(self.names))]), _hash([",".join(sizes).encode()]), _hash(contents)
        )

    def refuse_unsupported(self, max_pixels: int) -> None:
        """Look at the headers of a sample, and raise InputError if an image is of a kind that cannot be trained on.

        Files that are damaged or no images are not refused here: a run skips them and names them.
        """
        for index in self.sample():
            try:
                open_image(self.path(index), max_pixels).close()
            except UnsupportedImage as error:
                raise InputError("data", self.root, f"holds {self.names[index]}, which {error}") from error
            except Exception:  # decoders raise many kinds of errors
                continue


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _size(path: str) -> int:
    """Return the size of a file in bytes, or -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _some_bytes(path: str) -> bytes:
    """Return the first, middle and last bytes of a file, or nothing if it cannot be read."""
    if not_regular(path) is not None:
        return b""
    try:
        with open(path, "rb") as file:
            size, parts = os.fstat(file.fileno()).st_size, []
            for place in (0, (size - SAMPLED_BYTES) // 2, size - SAMPLED_BYTES):
                file.seek(max(place, 0))
                parts.append(file.read(SAMPLED_BYTES))
            return b"".join(parts)
    except OSError:
        return b""


def find_images(folder: str | Path) -> ImageSet:
    """Return all image files below `folder`, in class folders or not, sorted by path.

    Links are followed. A folder that can be reached in several ways, such as by a link to its parent, is listed once.

    Raises:
        InputError: `folder` does not exist, is not a folder, holds no image file, or a folder in it cannot be listed.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        missing = "no such folder; expected images in one"
        raise InputError("data", folder, "not a folder" if os.path.exists(root) else missing)
    try:
        names = [
            Path(parent, file).relative_to(root).as_posix()
            for parent, files in _walk(root)
            for file in files
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
    except OSError as error:
        raise InputError("data", folder, f"cannot be listed ({error})") from error
    if not names:
        raise InputError("data", folder, f"holds no images; expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return ImageSet(str(root), tuple(sorted(names)), small=False)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it with its files. Links are followed, and no folder comes twice."""
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # Folders come before links to them, so that the names do not depend on the order on disk.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        yield parent, files


def _raise(error: OSError) -> None:
    raise error


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


def open_image(path: str, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open an image file and read its header, but not its pixels.

    Raises:
        UnsupportedImage: it is no regular file, has more than `max_pixels` pixels, several pages, or other channels
            than 8-bit ones. These would be cut or clipped.
        Exception: whatever the decoder raises.
    """
    if os.path.exists(path) and (problem := not_regular(path)) is not None:
        raise UnsupportedImage(f"is {problem}")
    # Pillow has a limit of its own, from 89 million pixels on. It warns of some images and refuses others.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if (problem := _unsupported(image, max_pixels)) is not None:
        image.close()
        raise UnsupportedImage(problem)
    return image


def _unsupported(image: ImageFile.ImageFile, max_pixels: int) -> str | None:
    """Return why an open image would not be read as it is, or None."""
    width, height = image.size
    if width * height > max_pixels:
        return f"has {width} x {height} pixels, more than max_pixels, {max_pixels}; a larger max_pixels lets it in"
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":  # photographs of many phones, with a preview or a depth map behind
        return f"has {pages} pages or frames: expected one image in a file"
    if _is_8_bit(image):
        return None
    return f"has channels of more than 8 bits, or signed ones (Pillow's mode {image.mode}): expected 8-bit ones"


def _is_8_bit(image: ImageFile.ImageFile) -> bool:
    """Return whether 8 bits hold the values in the file. Of 16-bit colours Pillow keeps 8 bits, and does not tell."""
    if image.mode[0] in "IF":
        return False
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        bits, formats = (tags.get(tag, ()) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
        return all(bit <= 8 for bit in bits) and all(kind == 1 for kind in formats)
    for tile in image.tile:  # the arguments of its decoder: the raw mode, and for PPM the largest value
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(argument, str) and ";16" in argument for argument in arguments):
            return False
        if image.format == "PPM" and any(isinstance(argument, int) and argument > 255 for argument in arguments):
            return False
    return True


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a file to RGB, uint8 `(3, H, W)`, upright as its EXIF orientation says. Raises as `open_image` does."""
    with open_image(path, max_pixels) as file:
        file.load()  # first, because Pillow turns TIFF upright by itself
        turn = UPRIGHT.get(_orientation(file))
        image: Image.Image = file if turn is None else file.transpose(turn)
        pixels: Tensor = v2.functional.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    return pixels


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raise many kinds of errors, and say nothing about how the image lies
        return None


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

    def __init__(self, images: ImageSet, image_size: int, max_pixels: int = MAX_PIXELS) -> None:
        self.images = images
        self.max_pixels = max_pixels
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
                pixels = read_image(self.images.path(place), self.max_pixels)
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


@contextmanager
def load_batches(
    crops: Crops, recipe: Recipe, *, start: int, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """Yield the batches of a run from number `start` on, which do not depend on the number of workers.

    Afterwards no reading process is left, however the run ended.

    Raises:
        WorkersError: the system starts no more processes.
    """
    loader = DataLoader(
        crops,
        batch_sampler=draws(recipe, len(crops.images.names), start=start),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=pin_memory,
    )
    others, batches = multiprocessing.active_children(), None
    try:
        try:
            with _signals_kept_back():
                batches = iter(loader)
        except OSError as error:
            raise WorkersError(f"{workers} processes that read images cannot be started ({error})") from error
        finally:
            processes = [process for process in multiprocessing.active_children() if process not in others]
        yield _received(batches)
    finally:
        _end(batches, processes)


def _received(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, and turn the errors of a connection to a process that died meanwhile into WorkersErrors."""
    try:
        yield from batches
    except (OSError, EOFError) as error:
        raise WorkersError(f"a process that reads images died ({type(error).__name__}: {error})") from error


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM to this thread later, and not to a new process before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(batches: Any, processes: list[Any]) -> None:
    """End the reading processes within seconds.

    torch and Python would end them by SIGTERM, which they ignore, see `leave_signals_to_parent`, and then wait for them
    for ever. So the loader asks them first, and those that are busy for too long are killed.
    """

    def kill() -> None:
        for process in processes:
            process.kill()

    killer = threading.Timer(SECONDS_TO_END, kill)
    killer.daemon = True
    with _default_sigchld():
        killer.start()
        try:
            if processes and batches is not None:
                batches._shutdown_workers()  # `del batches` would do this, if no traceback held on to it
        finally:
            killer.cancel()
            kill()
            for process in processes:
                process.join()


@contextmanager
def _default_sigchld() -> Iterator[None]:
    """Keep torch from raising an error because a reading process ends."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


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
