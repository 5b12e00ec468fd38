"""Volumes, signals and images of any channels: arrays in files, of which crops are read.

`.npy` files are mapped into memory, Zarr reads the chunks under a crop, and nibabel the part of a file `.nii`. A file
`.nii.gz` can only be read from its beginning: it is decompressed as a whole, and kept while there is room.

An array has `ndim` axes of space, and may have one of channels. That is the first or the last axis, whichever is
shorter, and of two equal ones the first.
"""

from __future__ import annotations

import importlib
import math
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.common.files import not_regular
from sparsecnx.train.code import load_code
from sparsecnx.train.data.crops import Crops
from sparsecnx.train.data.files import ENDINGS, FileSet, find_files, multiscales
from sparsecnx.train.data.images import ImageSet
from sparsecnx.train.recipe import Recipe

# A compressed file of so many voxels takes 4 GB where its values are scaled.
MAX_VOXELS = 1_000_000_000
# Statistics are of the whole array up to this many values. Of a larger one they are of 16 parts, spread evenly over
# its first axis, that have as many: 128 MB in float32.
SAMPLED_VALUES = 2**25
PARTS = 16
PERCENTILES = (0.5, 99.5)
# Decompressed volumes that a reading process keeps take this much memory at most, but for the one in use.
CACHED_BYTES = 2**30
# Axes of a crop `(C, *size)` along which it is mirrored, by the number of dimensions.
MIRRORED = {1: (), 2: (-1,), 3: (-3, -2, -1)}
FORMS = {1: "(L,) or (C, L)", 2: "(H, W) or (C, H, W)", 3: "(D, H, W) or (C, D, H, W)"}
# Where these differ from those of images, by the number of dimensions.
DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"image_size": 1024},
    2: {},
    3: {"image_size": 96, "patch_size": 16, "mask_ratio": 0.75},
}


class UnsupportedVolume(ValueError):
    """A whole file of a kind that the command does not read; the message says why."""


class Scale(NamedTuple):
    """How the values of a volume are normalised: `(x - shift) / scale`, clipped to 0 and 1 or not."""

    shift: Tensor
    scale: Tensor
    clip: bool


@dataclass(frozen=True)
class Volume:
    """An array in a file, seen as `(C, *size)`.

    Attributes:
        array: it takes a tuple of slices and numbers, and returns what is there as a numpy array.
        channel: its axis of channels, or None.
        axes: the axis of `array` of each axis of space, and whether it is read backwards.
        compressed: True if every reading of a part reads the whole.
    """

    array: Any
    channel: int | None
    axes: tuple[tuple[int, bool], ...]
    compressed: bool = False

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else int(self.array.shape[self.channel])

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(int(self.array.shape[axis]) for axis, _ in self.axes)

    def read(self, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the values of a box as float32 `(C, *size)`."""
        index: list[int | slice] = [0] * len(self.array.shape)
        for (axis, backwards), first, side in zip(self.axes, start, size, strict=True):
            first = self.array.shape[axis] - first - side if backwards else first
            index[axis] = slice(first, first + side)
        channel = [] if self.channel is None else [self.channel]
        if channel:
            index[channel[0]] = slice(None)
        values = np.asarray(self.array[tuple(index)])
        order = [*channel, *(axis for axis, _ in self.axes)]
        values = values.transpose([sorted(order).index(axis) for axis in order])
        values = np.flip(values, tuple(i for i, (_, backwards) in enumerate(self.axes, len(channel)) if backwards))
        with np.errstate(over="ignore"):  # infinity is named by `read_finite`
            return torch.from_numpy(np.array(values, np.float32)).view(self.channels, *size)

    def decompressed(self) -> Volume:
        """Return the same volume in memory, in the type of the file, or in float32 where that is scaled."""
        values = np.asanyarray(self.array)
        return replace(self, array=values.astype(np.float32) if values.dtype.itemsize > 4 else values, compressed=False)


@dataclass(frozen=True)
class VolumeSet(FileSet):
    """Files of arrays of one number of dimensions and channels, in a fixed order.

    Attributes:
        ndim: spatial dimensions.
        channels: channels of each array.
        sizes: sides of the arrays of a sample of the files, by their names.
    """

    ndim: int = 3
    channels: int = 1
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    noun = "volume"

    def defaults(self) -> dict[str, Any]:
        """Return the fields of a recipe that follow from the data, and defaults that differ from those of images."""
        found = {"ndim": self.ndim, "in_chans": self.channels, "normalize": "zscore", "max_pixels": MAX_VOXELS}
        return found | DEFAULTS[self.ndim]

    def refuse_unsupported(self, recipe: Recipe) -> None:
        """Raise InputError if the crop does not fit a volume of the sample, or they are not those of the recipe."""
        if (self.ndim, self.channels) != (recipe.ndim, recipe.in_chans):
            expected = f"{recipe.ndim} dimensions and {recipe.in_chans} channels, as the run was started with"
            raise InputError("data", self.root, f"{self.ndim} dimensions and {self.channels} channels: {expected}")
        for name, size in self.sizes:
            if (problem := too_small(size, recipe.size)) is not None:
                raise InputError("data", self.root, f"holds {name}, which {problem}")


def too_small(size: Sequence[int], crop: Sequence[int]) -> str | None:
    """Return why a volume of a size has no crop of another size, or None."""
    if all(side >= part for side, part in zip(size, crop, strict=True)):
        return None
    remedy = "a smaller --image-size takes it in; or pad it, or move it elsewhere"
    if len(size) == 3 and 1 in size:
        remedy = "it has one slice, and is an image: --image-size HEIGHTxWIDTH trains on images, from arrays (C, H, W)"
    return f"is {_by(size)}, smaller than the crop of {_by(crop)}; {remedy}"


def find_data(folder: str | Path, ndim: int | None = None, photographs: bool | None = None) -> ImageSet | VolumeSet:
    """Return the images or the volumes below a folder.

    Args:
        folder: see `find_files`.
        ndim: spatial dimensions of arrays; None decides by their axes, see `open_volume`.
        photographs: True for images alone, False for volumes alone; None for what is there.

    Raises:
        InputError: the folder cannot be listed, holds neither or both, or its volumes differ in dimensions or channels
            or are of a kind that is not read.
        MissingExtra: a library that reads the files is not installed.
    """
    found = find_files(folder)
    images, volumes = found["images"] * (photographs is not False), found["volumes"] * (not photographs)
    if images and volumes:
        both = f"holds images, such as {images[0]}, and volumes, such as {volumes[0]}"
        raise InputError("data", folder, f"{both}; expected one kind of them, move the other to another folder")
    if images:
        return ImageSet(str(Path(folder)), images)
    if not volumes:
        endings = ", ".join(ending for kind in ENDINGS.values() for ending in kind)
        what = {True: "images", False: "volumes", None: "images and no volumes"}[photographs]
        raise InputError("data", folder, f"holds no {what}; expected files ending in {endings}, or Zarr arrays")
    return _survey(VolumeSet(str(Path(folder)), volumes), ndim)


def _survey(files: VolumeSet, ndim: int | None) -> VolumeSet:
    """Return the files with their dimensions, channels and sizes, of which the headers of a sample tell."""
    first: tuple[str, int, int] | None = None
    sizes: list[tuple[str, tuple[int, ...]]] = []
    for index in files.sample():
        name = files.names[index]
        try:
            volume = open_volume(files.path(index), ndim)
        except UnsupportedVolume as error:
            raise InputError("data", files.root, f"holds {name}, which {error}") from error
        except MissingExtra:
            raise
        except Exception:  # libraries raise many kinds of errors; a run skips such files and names them
            continue
        this = (name, len(volume.axes), volume.channels)
        first = first or this
        if this[1:] != first[1:]:
            told = (f"{name} of {n} dimensions and {channels} channels" for name, n, channels in (first, this))
            remedy = "expected the same in all; move the others to folders of their own"
            if this[1] != first[1]:
                remedy += ", or give --image-size as many sides as there are dimensions"
            raise InputError("data", files.root, f"holds {' and '.join(told)}; {remedy}")
        sizes.append((name, volume.size))
    ndim, channels = first[1:] if first else (ndim or 3, 1)
    return replace(files, ndim=ndim, channels=channels, sizes=tuple(sizes))


def open_volume(path: str, ndim: int | None = None, max_voxels: int = MAX_VOXELS) -> Volume:
    """Open a file and read its header, but not its values.

    Args:
        path: `.npy`, `.nii`, `.nii.gz`, or the folder of a Zarr array or of an OME-Zarr image, of which the largest
            array counts.
        ndim: axes of space. None takes 3 for NIfTI and for 3 or 4 axes, 1 for 1 or 2 axes. Leading axes of length 1
            that are too many, such as the time of OME-Zarr, are left out.
        max_voxels: size of the largest compressed file.

    Raises:
        UnsupportedVolume: the file has other axes, values that are no numbers, or no orientation, or is too large.
        MissingExtra: nibabel or zarr is not installed.
        Exception: whatever the library raises.
    """
    if os.path.isdir(path):
        return _seen(_open_zarr(path), ndim)
    if os.path.exists(path) and (problem := not_regular(path)) is not None:
        raise UnsupportedVolume(f"is {problem}")
    if not path.lower().endswith(".npy"):
        return _open_nifti(path, ndim, max_voxels)
    try:
        return _seen(np.lib.format.open_memmap(path, mode="r"), ndim)
    except ValueError as error:
        if "Python objects" not in str(error):
            raise
        raise UnsupportedVolume("holds Python objects: expected whole or floating-point numbers") from error


def _seen(array: Any, ndim: int | None) -> Volume:
    """Return a plain array as a volume."""
    _expect_numbers(array.dtype)
    shape = tuple(array.shape)
    most, leading = (3 if ndim is None else ndim) + 1, 0
    while len(shape) - leading > most and shape[leading] == 1:
        leading += 1
    axes = len(shape) - leading
    dimensions = {1: 1, 2: 1, 3: 3, 4: 3}.get(axes) if ndim is None else ndim
    if dimensions is None or axes not in (dimensions, dimensions + 1) or 0 in shape:
        remedy = "" if ndim is None else f" for --image-size of {ndim} sides"
        form = f"{FORMS[1]}, {FORMS[3]}" if ndim is None else FORMS[ndim]
        raise UnsupportedVolume(f"is an array {shape}: expected {form}{remedy}; save each volume of a series by itself")
    last = len(shape) - 1
    channel = None if axes == dimensions else leading if shape[leading] <= shape[last] else last
    return Volume(array, channel, tuple((axis, False) for axis in range(leading, len(shape)) if axis != channel))


def _open_zarr(path: str) -> Any:
    zarr = _library("zarr", path)
    node = zarr.open(path, mode="r")
    largest = None if hasattr(node, "shape") else multiscales(dict(node.attrs))
    return node if largest is None else node[largest]


def _open_nifti(path: str, ndim: int | None, max_voxels: int) -> Volume:
    """Return a NIfTI file whose axes run to the right, to the front and up (RAS+), as nibabel's canonical images."""
    nibabel = _library("nibabel", path)
    image = nibabel.load(path)
    shape = tuple(image.shape)
    if ndim not in (None, 3):
        raise UnsupportedVolume(f"is NIfTI, of 3 dimensions: expected arrays {FORMS[ndim]} for --image-size")
    if len(shape) < 3 or 0 in shape:
        raise UnsupportedVolume(f"has the sides {_by(shape)}: expected three, none of them 0")
    if any(side != 1 for side in shape[3:]):
        remedy = "save each volume by itself (nibabel.four_to_three), or channels as an array (C, D, H, W) in .npy"
        raise UnsupportedVolume(f"is {len(shape)}-D, {_by(shape)}: a time series or several channels; {remedy}")
    _expect_numbers(image.dataobj.dtype)
    codes = [int(image.header[f"{form}_code"]) for form in ("qform", "sform")]
    finite = np.isfinite(image.affine).all()
    orientation = nibabel.io_orientation(image.affine if finite else np.zeros((4, 4)))
    if codes == [0, 0] or np.isnan(orientation).any():
        what = "no affine (qform_code and sform_code are 0)" if codes == [0, 0] else "an affine without inverse"
        what = what if finite else "an affine with values that are not finite"
        remedy = "set it (nibabel.Nifti1Image(data, affine)), or save the array as .npy"
        raise UnsupportedVolume(f"has {what}, so that nobody knows how its axes lie; {remedy}")
    compressed = path.lower().endswith(".gz")
    if compressed and math.prod(shape) > max_voxels:
        remedy = "a larger one lets it in, and decompressed as .nii it is read in parts"
        raise UnsupportedVolume(f"has {_by(shape)} voxels, more than --max-pixels, {max_voxels}; {remedy}")
    axes = tuple((axis, orientation[axis, 1] < 0) for axis in np.argsort(orientation[:, 0]).tolist())
    return Volume(image.dataobj, None, axes, compressed)


def _library(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"{os.path.basename(path)} needs {name}, which is not installed"
        raise MissingExtra(f"{problem}: pip install sparsecnx[volumes]") from error


def _expect_numbers(dtype: Any) -> None:
    if dtype.kind not in "biuf":
        expected = "expected whole or floating-point numbers, such as parts of a complex one as channels"
        raise UnsupportedVolume(f"holds values of type {dtype}: {expected}")


def scale_of(volume: Volume, normalize: str) -> Scale:
    """Return how a volume is normalised, see `Recipe.normalize`.

    Raises:
        UnsupportedVolume: values are not finite, or a channel is constant.
    """
    ones = (volume.channels, *(1,) * len(volume.size))
    if normalize == "none":
        return Scale(torch.zeros(ones), torch.ones(ones), False)
    values = _sample(volume).flatten(1).numpy()
    if normalize == "zscore":
        low, high = values.mean(1, dtype=np.float64), values.std(1, dtype=np.float64)
    else:
        low, high = np.percentile(values, PERCENTILES, axis=1)
        high = high - low
    constant = values.min(1) == values.max(1)
    for channel in np.flatnonzero(constant | ~(high > 0)).tolist():
        where = f" in channel {channel}" if volume.channels > 1 else ""
        if constant[channel]:
            problem = f"is constant{where}, {values[channel, 0]:g}: it cannot be normalised; move it elsewhere"
        else:
            problem = f"has equal percentiles {PERCENTILES}{where}, {low[channel]:g}; --normalize zscore takes it"
        raise UnsupportedVolume(problem)
    shift, scale = (torch.from_numpy(part).float().view(ones) for part in (low, high))
    return Scale(shift, scale, normalize == "percentiles")


def _sample(volume: Volume) -> Tensor:
    """Return the values of a volume, or of parts of a large one, `(C, *)`; refuse some that are not finite."""
    size = volume.size
    thickness = max(SAMPLED_VALUES // (PARTS * volume.channels * math.prod(size[1:])), 1)
    starts = [0]
    if thickness * PARTS >= size[0]:
        thickness = size[0]
    else:
        starts = [i * (size[0] - thickness) // (PARTS - 1) for i in range(PARTS)]
    parts = [read_finite(volume, (start, *(0,) * len(size[1:])), (thickness, *size[1:])) for start in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def read_finite(volume: Volume, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the values of a box as float32 `(C, *size)`.

    Raises:
        UnsupportedVolume: one is not finite in float32.
    """
    values = volume.read(start, size)
    finite = values.isfinite()
    if not finite.all():
        channel, *place = (~finite).nonzero()[0].tolist()
        voxel = tuple(first + i for first, i in zip(start, place, strict=True))
        problem = f"holds {values[~finite][0].item()} in channel {channel} at {voxel}"
        raise UnsupportedVolume(f"{problem}: expected finite values; numpy.nan_to_num replaces them")
    return values


class VolumeCrops(Crops):
    """Normalised crops of volumes, float32 `(C, *size)`, indexed by `Draw`; equal draws give equal crops."""

    def __init__(self, images: FileSet, recipe: Recipe) -> None:
        super().__init__(images, recipe.size, recipe.max_pixels)
        self.recipe = recipe
        self.transform = None if recipe.transform is None else _checked_transform(recipe)
        self.scales: dict[int, Scale] = {}
        self.cached: OrderedDict[int, Volume] = OrderedDict()

    def crop(self, place: int, seed: int) -> Tensor:
        """Return a random box of volume `place`, mirrored at random along the axes in `MIRRORED`, and transformed."""
        volume, scale = self.whole(place)
        generator = torch.Generator().manual_seed(seed)
        rooms = [side - part + 1 for side, part in zip(volume.size, self.size, strict=True)]
        start = [int(torch.randint(room, (1,), generator=generator)) for room in rooms]
        mirrored = [axis for axis in MIRRORED[len(rooms)] if torch.rand(1, generator=generator) < 0.5]
        crop = normalized(volume, scale, start, self.size).flip(mirrored)
        return crop if self.transform is None else transformed(self.transform, crop, seed)

    def central(self, place: int) -> Tensor:
        """Return the centre of volume `place`."""
        volume, scale = self.whole(place)
        start = [(side - part) // 2 for side, part in zip(volume.size, self.size, strict=True)]
        return normalized(volume, scale, start, self.size)

    def whole(self, place: int) -> tuple[Volume, Scale]:
        """Return volume `place`, and how it is normalised. The statistics are computed once in each process."""
        volume = self._open(place)
        if place not in self.scales:
            self.scales[place] = scale_of(volume, self.recipe.normalize)
        return volume, self.scales[place]

    def _open(self, place: int) -> Volume:
        if place in self.cached:
            self.cached.move_to_end(place)
            return self.cached[place]
        recipe = self.recipe
        volume = open_volume(self.images.path(place), recipe.ndim, self.max_pixels)
        if volume.channels != recipe.in_chans:
            problem = f"has {volume.channels} channels: expected {recipe.in_chans}, as the others"
            raise UnsupportedVolume(f"{problem}; move it elsewhere")
        if (too := too_small(volume.size, recipe.size)) is not None:
            raise UnsupportedVolume(too)
        if volume.compressed:
            volume = volume.decompressed()
            self.cached[place] = volume
            while len(self.cached) > 1 and sum(held.array.nbytes for held in self.cached.values()) > CACHED_BYTES:
                self.cached.popitem(last=False)
        return volume


def _checked_transform(recipe: Recipe) -> Callable[[Tensor], Any]:
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


def normalized(volume: Volume, scale: Scale, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the normalised values of a box, float32 `(C, *size)`."""
    values = (read_finite(volume, start, size) - scale.shift) / scale.scale
    return values.clamp(0, 1) if scale.clip else values


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
