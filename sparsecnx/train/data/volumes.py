"""Volumes, signals and images of any channels: arrays in files, of which crops are read.

`.npy` files are mapped into memory, Zarr reads the chunks under a crop, and nibabel the part of a file `.nii`. A file
`.nii.gz` can only be read from its beginning: it is decompressed as a whole, and kept while there is room.

An array has `ndim` axes of space, and may have one of channels. That is the first or the last axis, as
`channels_last` tells.
"""

from __future__ import annotations

import importlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.common.files import not_regular
from sparsecnx.train.data.files import FileSet, multiscales
from sparsecnx.train.data.scale import as_floats
from sparsecnx.train.data.source import channels_last, too_small
from sparsecnx.train.data.statistics import describe_gaps, describe_scale, looked_at, measure
from sparsecnx.train.recipe import Recipe

# A compressed file of so many voxels takes 4 GB where its values are scaled.
MAX_VOXELS = 1_000_000_000
FORMS = {1: "(L,) or (C, L)", 2: "(H, W) or (C, H, W)", 3: "(D, H, W) or (C, D, H, W)"}
# Where these differ from those of images, by the number of dimensions.
DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"image_size": 1024},
    2: {},
    3: {"image_size": 96, "patch_size": 16, "mask_ratio": 0.75},
}


class UnsupportedVolume(ValueError):
    """A whole file of a kind that the command does not read; the message says why."""


@dataclass(frozen=True)
class Volume:
    """An array in a file, seen as `(C, *size)`.

    Attributes:
        array: it takes a tuple of slices and numbers, and returns what is there as a numpy array.
        channel: its axis of channels, or None.
        axes: the axis of `array` of each axis of space, and whether it is read backwards.
        compressed: True if every reading of a part reads the whole.
        bytes_held: of an array in memory.
        nodata: value of what has none.
    """

    array: Any
    channel: int | None
    axes: tuple[tuple[int, bool], ...]
    compressed: bool = False
    bytes_held: int = 0
    nodata: float | None = None

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else int(self.array.shape[self.channel])

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(int(self.array.shape[axis]) for axis, _ in self.axes)

    @property
    def dtype(self) -> str:
        """Return the type of the values, such as uint16; of those that NIfTI scales float32."""
        scale = getattr(self.array, "slope", 1.0), getattr(self.array, "inter", 0.0)
        return str(self.array.dtype) if scale == (1.0, 0.0) else "float32"

    def read(self, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the values of a box as float32 `(C, *size)`, NaN where one is `nodata`."""
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
        return torch.from_numpy(as_floats(values, self.nodata)).view(self.channels, *size)

    def decompressed(self) -> Volume:
        """Return the same volume in memory, in the type of the file, or in float32 where that takes less."""
        values, nodata = np.asanyarray(self.array), self.nodata
        if values.dtype.itemsize > 4:  # compared before it is rounded, and not again
            values, nodata = as_floats(values, nodata), None
        return replace(self, array=values, compressed=False, bytes_held=values.nbytes, nodata=nodata)


@dataclass(frozen=True)
class VolumeSet(FileSet):
    """Files of arrays of one number of dimensions and channels, in a fixed order.

    Attributes:
        ndim: spatial dimensions.
        channels: channels of each array.
        sizes: sides of the arrays of a sample of the files, by their names.
        dtypes: types of their values.
        unreadable: those of the sample that cannot be read, with the reasons.
    """

    ndim: int = 3
    channels: int = 1
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    dtypes: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    noun = "volume"

    def read(self, index: int, recipe: Recipe) -> Volume:
        if recipe.photographs:
            raise UnsupportedVolume("is an array: expected an image file, since the run is one on photographs")
        volume = open_volume(self.path(index), recipe.ndim, recipe.max_pixels, recipe.in_chans)
        if volume.channels != recipe.in_chans:
            problem = f"has {volume.channels} channels: expected {recipe.in_chans}, as the others"
            raise UnsupportedVolume(f"{problem}; move it elsewhere")
        if (too := too_small(volume.size, recipe)) is not None:
            raise UnsupportedVolume(too)
        volume = replace(volume, nodata=recipe.nodata)
        return volume.decompressed() if volume.compressed else volume

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if self.ndim != 2 and given.get("crop_area") is not None:
            what = "expected together with images; crops of volumes are not resized"
            raise InputError("crop_area", given["crop_area"], what)
        if given.get("normalize") == "imagenet":
            raise InputError("normalize", "imagenet", "expected another one, since the data are arrays")
        found = {"ndim": self.ndim, "in_chans": self.channels, "normalize": "zscore", "max_pixels": MAX_VOXELS}
        found |= {"crop_area": None, **DEFAULTS[self.ndim]}
        if any(given.get(field) is not None for field in ("value_range", "mean", "std")):
            found["normalize"] = "dataset"
        if given.get("normalize", found["normalize"]) != "dataset":
            return found
        return found | measure(self, {**found, **given}, self.dtypes)

    def describe(self, recipe: Recipe, given: Mapping[str, Any] | None) -> list[str]:
        lines = [looked_at(Counter(self.dtypes), self.unreadable)]
        numbers = [] if recipe.nodata is None else [recipe.nodata]
        lines += describe_gaps(self, recipe, self.dtypes, numbers)
        return [*lines, *describe_scale(recipe, given, self.seen)]

    def check(self, recipe: Recipe) -> None:
        """Raise InputError if the crop does not fit a volume of the sample, or they are not those of the recipe."""
        if (self.ndim, self.channels) != (recipe.ndim, recipe.in_chans):
            expected = f"{recipe.ndim} dimensions and {recipe.in_chans} channels, as the run was started with"
            raise InputError("data", self.root, f"{self.ndim} dimensions and {self.channels} channels: {expected}")
        for name, size in self.sizes:
            if (problem := too_small(size, recipe)) is not None:
                raise InputError("data", self.root, f"holds {name}, which {problem}")


def survey(root: str, names: tuple[str, ...], ndim: int | None, in_chans: int | None = None) -> VolumeSet:
    """Return files with their dimensions, channels and sizes, of which the headers of a sample tell."""
    files = VolumeSet(root, names)
    first: tuple[str, int, int] | None = None
    sizes: list[tuple[str, tuple[int, ...]]] = []
    dtypes: list[str] = []
    unreadable: list[tuple[str, str]] = []
    for index in files.sample():
        name = files.names[index]
        try:
            volume = open_volume(files.path(index), ndim, in_chans=in_chans)
        except UnsupportedVolume as error:
            raise InputError("data", files.root, f"holds {name}, which {error}") from error
        except MissingExtra:
            raise
        except Exception as error:  # libraries raise many kinds of errors; a run skips such files and names them
            unreadable.append((name, f"{type(error).__name__}: {error}"))
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
        dtypes.append(volume.dtype)
    ndim, channels = first[1:] if first else (ndim or 3, 1)
    return replace(
        files,
        ndim=ndim,
        channels=channels,
        sizes=tuple(sizes),
        dtypes=tuple(dtypes),
        unreadable=tuple(unreadable),
    )


def open_volume(
    path: str, ndim: int | None = None, max_voxels: int = MAX_VOXELS, in_chans: int | None = None
) -> Volume:
    """Open a file and read its header, but not its values.

    Args:
        path: `.npy`, `.nii`, `.nii.gz`, or the folder of a Zarr array or of an OME-Zarr image, of which the largest
            array counts.
        ndim: axes of space. None takes 3 for NIfTI and for 3 or 4 axes, 1 for 1 or 2 axes. Leading axes of length 1
            that are too many, such as the time of OME-Zarr, are left out.
        max_voxels: size of the largest compressed file.
        in_chans: channels that tell the axis of channels from the others; None decides by its length.

    Raises:
        UnsupportedVolume: the file has other axes, values that are no numbers, or no orientation, or is too large.
        MissingExtra: nibabel or zarr is not installed.
        Exception: whatever the library raises.
    """
    if os.path.isdir(path):
        return _seen(_open_zarr(path), ndim, in_chans)
    if os.path.exists(path) and (problem := not_regular(path)) is not None:
        raise UnsupportedVolume(f"is {problem}")
    if not path.lower().endswith(".npy"):
        return _open_nifti(path, ndim, max_voxels)
    try:
        return _seen(np.lib.format.open_memmap(path, mode="r"), ndim, in_chans)
    except ValueError as error:
        if "Python objects" not in str(error):
            raise
        raise UnsupportedVolume("holds Python objects: expected whole or floating-point numbers") from error


def _seen(array: Any, ndim: int | None, in_chans: int | None) -> Volume:
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
    channel, last = None, len(shape) - 1
    if axes > dimensions:
        try:
            channel = last if channels_last(shape[leading], shape[last], in_chans) else leading
        except ValueError as error:
            raise UnsupportedVolume(f"is an array {shape}, of {error}") from error
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


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
