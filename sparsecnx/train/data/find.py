"""The source of a run: what lies below a folder, named files, or the photographs inside the wheels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.files import ENDINGS, FileSet, find_files
from sparsecnx.train.data.images import Images, ImageSet, wheel_photographs, with_pages
from sparsecnx.train.data.opening import open_source
from sparsecnx.train.data.source import Source
from sparsecnx.train.data.volumes import VolumeSet, survey


def find_source(
    data: str | None,
    ndim: int | None = None,
    photographs: bool | None = None,
    pages: str | None = None,
    in_chans: int | None = None,
) -> Source:
    """Return what a run reads.

    Args:
        data: a folder, or an address, see address.py; None for the photographs inside the wheels.
        ndim: spatial dimensions of arrays; None decides by their axes, see `open_volume`.
        photographs: True for images alone, False for arrays alone; None for what is there.
        pages: what several pages of a TIFF are, see `Recipe.pages`.
        in_chans: channels, which tell the axis of channels of arrays from the others; None decides by their length.

    Raises:
        InputError, MissingExtra: as `find_data`, `open_source` and `wheel_photographs` raise them.
    """
    source = None if data is None else open_source(data)
    if source is not None:
        if pages == "images":
            raise InputError("pages", pages, "expected channels, or a folder of files, whose pages can be images")
        if isinstance(source, Images):
            source.in_chans = in_chans
        return source
    files = wheel_photographs() if data is None else find_data(data, ndim, photographs, in_chans)
    return with_pages(files, pages) if isinstance(files, ImageSet) else files


def named_files(paths: Sequence[str]) -> FileSet:
    """Return files that a user names.

    Raises:
        InputError: they are images and arrays.
    """
    arrays = [os.path.isdir(path) or path.lower().endswith(ENDINGS["volumes"]) for path in paths]
    if len(set(arrays)) > 1:
        one, other = paths[arrays.index(False)], paths[arrays.index(True)]
        raise InputError("images", one, f"an image beside an array, {other}; expected one kind of them")
    return (VolumeSet if arrays[0] else ImageSet)("", tuple(paths))


def find_data(
    folder: str | Path, ndim: int | None = None, photographs: bool | None = None, in_chans: int | None = None
) -> FileSet:
    """Return the images or the volumes below a folder.

    Args:
        folder: see `find_files`.
        ndim: spatial dimensions of arrays; None decides by their axes, see `open_volume`.
        photographs: True for images alone, False for volumes alone; None for what is there.
        in_chans: see `find_source`.

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
        return ImageSet(str(Path(folder)), images, others=found["others"])
    if not volumes:
        endings = ", ".join(ending for kind in ENDINGS.values() for ending in kind)
        what = {True: "images", False: "volumes", None: "images and no volumes"}[photographs]
        raise InputError("data", folder, f"holds no {what}; expected files ending in {endings}, or Zarr arrays")
    return survey(str(Path(folder)), volumes, ndim, in_chans)
