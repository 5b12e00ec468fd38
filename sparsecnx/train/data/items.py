"""Images in data sets that give an item by its number: of torchvision, of Hugging Face, and of Python code."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.train.code import load_code
from sparsecnx.train.data.address import Address, absolute
from sparsecnx.train.data.files import hashed
from sparsecnx.train.data.formats import Header
from sparsecnx.train.data.images import ImageFiles, Images
from sparsecnx.train.data.memory import memory_header, memory_pixels
from sparsecnx.train.data.pictures import UPRIGHT, File, UnsupportedImage, orientation
from sparsecnx.train.data.source import SAMPLED_ENTRIES, Fingerprint, Source
from sparsecnx.train.data.target_values import as_array
from sparsecnx.train.recipe import Recipe, shown
from sparsecnx.train.targets import IMAGE

SAMPLED_ITEMS = 64  # are read before a run begins
READ_TWICE = 8  # of the items of Python code
LABEL = "label"  # names the class in a dict
KINDS = (Image.Image, np.ndarray, Tensor)  # of images


class Items(Images):
    """The items of a data set with a length: an image of Pillow, an array, a tuple that begins with one or a dict.

    A dict holds the image under `image`, or no other image or array. What else it holds may be targets.

    Args:
        place: the address of the data set.
        items: it takes a number and returns an item.
    """

    def __init__(self, place: str, items: Any) -> None:
        self.root, self.items = place, items
        try:
            self.length = len(items)
        except TypeError as error:
            problem = f"a {type(items).__name__} without a length; expected a data set that gives items by their number"
            raise InputError("data", place, problem) from error
        if self.length < 1:
            raise InputError("data", place, "holds no item; expected one or more")
        self.last: tuple[int, Any] | None = None
        self.turns: dict[int, Mapping[str, int]] = {}  # of items with a picture that EXIF data turn

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"item {index}"

    def item(self, index: int) -> Any:
        """Return an item, which is not read twice for its image and its targets."""
        if self.last is None or self.last[0] != index:
            self.last = index, self._fetched(index)
        return self.last[1]

    def _fetched(self, index: int) -> Any:
        """Return an item from the data set, and note its EXIF orientations before Pillow loads and forgets them."""
        item = self.items[index]
        found = _orientations(item)
        if any(turn != UPRIGHT for turn in found.values()):
            self.turns.setdefault(index, found)
        return item

    def turned(self, index: int) -> Mapping[str, int]:
        self.item(index)
        return self.turns.get(index, {})

    def header(self, index: int) -> Header:
        return memory_header(first_image(self.item(index)), self.in_chans)

    def read(self, index: int, recipe: Recipe) -> Tensor:
        return memory_pixels(first_image(self.item(index)), recipe, self.types(recipe))

    def values(self, index: int) -> Mapping[str, Any]:
        item = self.item(index)
        return item if isinstance(item, Mapping) else super().values(index)

    def labels(self) -> list[str]:
        """Return the names of the classes of all items. They are read for it, unless the data set knows `targets`."""
        names, known = self.names_and_labels()
        found = []
        for index, label in enumerate(known):
            number = label.item() if isinstance(label, (np.ndarray, np.generic, Tensor)) and label.ndim == 0 else label
            if isinstance(number, bool) or not isinstance(number, (int, str)):
                expected = "expected a whole number or text, second in a tuple or under label in a dict"
                raise InputError("data", self.root, f"item {index} has the label {shown(number)}; {expected}")
            found.append(str(names[number]) if isinstance(number, int) and 0 <= number < len(names) else str(number))
        return found

    def names_and_labels(self) -> tuple[Sequence[str], Iterable[Any]]:
        """Return the names of the classes, empty where they have none, and the label of every item."""
        names, known = (getattr(self.items, name, None) for name in ("classes", "targets"))
        if not isinstance(known, (Sequence, np.ndarray, Tensor)) or len(known) != len(self):
            known = (label_of(self.items[index]) for index in range(len(self)))
        return names if isinstance(names, Sequence) else (), known

    def sample(self) -> list[int]:
        """Return fewer items than of files, since all of each is read."""
        return super().sample()[:: math.ceil(min(self.length, SAMPLED_ENTRIES) / SAMPLED_ITEMS)]

    def fingerprint(self) -> Fingerprint:
        """Return hashes of the number of items, and of the sizes and contents of a sample."""
        sizes = []

        def contents() -> Iterator[bytes]:
            for index in self.sample():
                part = self._bytes(index)
                sizes.append(str(len(part)))
                yield part

        of_contents = hashed(contents())
        return Fingerprint(hashed([str(self.length).encode()]), hashed([",".join(sizes).encode()]), of_contents)

    def expect_repeatable(self) -> None:
        """Read a few items twice.

        Raises:
            InputError: one differs.
        """
        for index in self.sample()[:READ_TWICE]:
            if self._bytes(index) != self._bytes(index):
                expected = "expected the same item, since a run could not be resumed; --transform takes random changes"
                raise InputError("data", self.root, f"item {index} differs when it is read again; {expected}")

    def _bytes(self, index: int) -> bytes:
        """Return what tells an item from another, nothing where it cannot be read."""
        self.last = None  # a data set may write the next item into the memory of the last one
        try:
            item = self._fetched(index)
            image = first_image(item)
        except Exception:  # data sets raise many kinds of errors
            return b""
        parts = []
        for name, value in sorted(item.items(), key=str) if isinstance(item, Mapping) else [("", image)]:
            with suppress(Exception):  # what is no number is no target
                array = as_array(value)
                if array.dtype.kind in "iufb":
                    parts.append(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        return b"".join(parts)


def _orientations(item: Any) -> dict[str, int]:
    """Return the EXIF orientations of the pictures of a dict that Pillow has not loaded: it turns TIFF upright then."""
    if not isinstance(item, Mapping):
        return {}
    found = {name: orientation(value) for name, value in item.items() if isinstance(value, Image.Image)}
    with suppress(UnsupportedImage):
        image = first_image(item)
        found[IMAGE] = orientation(image) if isinstance(image, Image.Image) else UPRIGHT
    return found


def first_image(item: Any) -> Any:
    """Return the image or array of an item: itself, the first of a tuple, or in a dict `image` or the only one.

    Raises:
        UnsupportedImage: there is none.
    """
    if isinstance(item, Mapping):
        found = [item[IMAGE]] if IMAGE in item else [value for value in item.values() if isinstance(value, KINDS)]
        if len(found) != 1 or not isinstance(found[0], KINDS):
            held, expected = ", ".join(map(str, item)), f"expected an image or array in it, under {IMAGE} or alone"
            raise UnsupportedImage(f"is a dict of {held}: {expected}")
        return found[0]
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, KINDS):
        held = f"begins with {type(image).__name__}" if image is not item else f"is {type(item).__name__}"
        raise UnsupportedImage(f"{held}: expected an image of Pillow or an array, alone or the first of a tuple")
    return image


def label_of(item: Any) -> Any:
    """Return the label of an item: the second of a tuple, or in a dict `label`; None where there is none."""
    if isinstance(item, Mapping):
        return item.get(LABEL)
    return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


class HuggingFaceItems(Items):
    """A column of arrays of a data set of Hugging Face.

    Args:
        place: the address of the data set.
        items: the data set with this column alone.
        rows: the data set with all of its columns.
        label: the column of labels; None for the only one.
    """

    values = Source.values  # it has images alone

    def __init__(self, place: str, items: Any, rows: Any, label: str | None) -> None:
        super().__init__(place, items)
        self.rows, self.label = rows, label

    def names_and_labels(self) -> tuple[Sequence[str], Iterable[Any]]:
        features = self.rows.features
        found = [name for name, kind in features.items() if hasattr(kind, "int2str")]
        if self.label is None and len(found) != 1:
            columns = ", ".join(features)
            problem = f"has {len(found)} columns of classes, of {columns}; expected label= one of its columns"
            raise InputError("data", self.root, problem)
        column = self.label or found[0]
        return getattr(features[column], "names", ()), self.rows[column]


class HuggingFaceImages(ImageFiles, HuggingFaceItems):
    """A column of images of a data set of Hugging Face, as the files that they were."""

    def name(self, index: int) -> str:
        try:
            path = self._row(index).get("path")
        except Exception:  # the row cannot be read, which is why somebody asks for its name
            path = None
        return f"item {index} ({path})" if path else f"item {index}"

    def _row(self, index: int) -> dict[str, Any]:
        (row,) = self.items[index].values()
        return row or {}

    def file(self, index: int) -> File:
        row = self._row(index)
        found: File | None = row.get("bytes") or row.get("path")
        if found is None:
            raise ValueError("the row has no image")
        return found

    def _bytes(self, index: int) -> bytes:
        row = self._row(index)
        try:
            return row.get("bytes") or Path(row.get("path") or "").read_bytes()
        except OSError:
            return b""


class EncodedImages(ImageFiles, Items):
    """Items that are the contents of image files, see `_contents`, or tuples that begin with them."""

    def file(self, index: int) -> bytes:
        item = self.items[index]
        contents: bytes = item[0] if isinstance(item, tuple) else item
        return contents

    def _bytes(self, index: int) -> bytes:
        try:
            return self.file(index)
        except OSError:
            return b""


def _contents(path: str | Path) -> bytes:
    """Load an image for a data set of torchvision as it is. Its own loader makes 8 bits and three channels of all."""
    return Path(path).read_bytes()


def open_torchvision(address: Address) -> Items:
    """Return a data set of `torchvision.datasets`: `torchvision:CIFAR10:ROOT?train=true`.

    The options are arguments of its class. Nothing is downloaded but by `download=true`.

    Raises:
        InputError: there is no such class, or it cannot be made with these arguments.
        MissingExtra: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtra(f"{address} needs torchvision, which is not installed: pip install torchvision") from error
    name, _, root = address.what.partition(":")
    kind = getattr(datasets, name) if name in datasets.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
        raise address.refuse(f"torchvision has no data set {name!r}; expected a name such as CIFAR10 or ImageNet")
    parameters = _parameters(kind)
    arguments = _arguments(address, parameters)
    if "loader" in parameters:
        arguments["loader"] = _contents
    if root:
        arguments["root"] = absolute(root)
    try:
        held = kind(**arguments)
    except Exception as error:  # data sets raise many kinds of errors
        raise address.refuse(f"cannot be opened ({type(error).__name__}: {error})") from error
    place = str(address._replace(what=f"{name}:{absolute(root)}") if root else address)
    return EncodedImages(place, held) if "loader" in parameters else Items(place, held)


def _parameters(kind: type) -> dict[str, Any]:
    """Return the names and types of the parameters of a class, those that `**kwargs` takes from its base classes."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if (made := vars(base).get("__init__")) is None:
            continue
        parameters, hints = list(inspect.signature(made).parameters.values())[1:], typing.get_type_hints(made)
        for one in parameters:
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                found.setdefault(one.name, hints.get(one.name, type(one.default)))
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


def _arguments(address: Address, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as the arguments of a class: text, numbers, and `true` or `false`."""
    plain = {name: _plain(hint) for name, hint in parameters.items() if name != "root"}
    known = {name: kind for name, kind in plain.items() if kind is not None}
    address.expect_options(*known)
    arguments: dict[str, Any] = {}
    for name, text in address.options.items():
        try:
            arguments[name] = {"true": True, "false": False}[text] if known[name] is bool else known[name](text)
        except (KeyError, ValueError) as error:
            expected = "true or false" if known[name] is bool else "a number"
            raise address.refuse(f"has the option {name}={text}; expected {expected}") from error
    return arguments


def _plain(hint: Any) -> type | None:
    """Return the type of a value that one can type, of a hint such as `Optional[str]`; None for others."""
    possible = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in (bool, int, float, str) if kind in possible), None)


def open_hugging_face(address: Address) -> Items:
    """Return a column of a data set of Hugging Face: `hf:NAME_OR_FOLDER?split=train&column=image&label=label`.

    A folder may be one of `save_to_disk`, or of files as `load_dataset` reads them.

    Raises:
        InputError: it cannot be loaded, has no such split, or not one column of images.
        MissingExtra: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"{address} needs datasets, which is not installed: pip install sparsecnx[hf]") from error
    address.expect_options("split", "column", "config", "revision", "label")
    rows = _load(datasets, address)
    column, label = _column(datasets, address, rows.features), address.options.get("label")
    if label is not None and label not in rows.features:
        raise address.refuse(f"has no column {label}; its columns are {', '.join(rows.features)}")
    kind, held = rows.features[column], rows.select_columns([column])
    folder = Path(address.what).is_dir()
    place = str(address._replace(what=absolute(address.what)) if folder else address)
    if isinstance(kind, datasets.Image):
        return HuggingFaceImages(place, held.cast_column(column, datasets.Image(decode=False)), rows, label)
    return HuggingFaceItems(place, held.with_format("numpy", dtype=np.dtype(kind.dtype)), rows, label)


def _load(datasets: Any, address: Address) -> Any:
    split = address.options.get("split")
    saved = any(Path(address.what, name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            held = datasets.load_from_disk(address.what)
        else:
            named = address.what, address.options.get("config")
            revision = address.options.get("revision")
            split = _split(address, datasets.get_dataset_split_names(*named, revision=revision))
            return datasets.load_dataset(*named, revision=revision, split=split)
    except InputError:
        raise
    except Exception as error:  # it raises many kinds of errors
        raise address.refuse(f"cannot be loaded ({type(error).__name__}: {error})") from error
    if isinstance(held, datasets.Dataset):
        if split not in (None, str(held.split)):
            raise address.refuse(f"holds the split {held.split} alone; expected split={held.split}, or none")
        return held
    return held[_split(address, list(held))]


def _split(address: Address, names: Sequence[str]) -> str:
    """Return the split that is named, or `train`, or the only one."""
    split = address.options.get("split") or ("train" if "train" in names or len(names) != 1 else names[0])
    if split not in names:
        raise address.refuse(f"has no split {split}; expected split= one of {', '.join(names)}")
    return split


def _column(datasets: Any, address: Address, features: Mapping[str, Any]) -> str:
    """Return the column of images: the one that is named, or the only one."""
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    found = [name for name, kind in features.items() if isinstance(kind, kinds)]
    wanted = address.options.get("column")
    if wanted is not None and wanted not in found:
        held = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        raise address.refuse(f"has no images in a column {wanted}; its columns are {held}")
    if wanted is None and len(found) != 1:
        held = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        problem = f"has several columns of images, {', '.join(found)}; expected column= one of them"
        raise address.refuse(problem if found else f"has no column of type Image or Array; its columns are {held}")
    return wanted or found[0]


def open_python(address: Address) -> Items:
    """Return the data set that a function of the user returns: `python:module:function`.

    Raises:
        InputError: it cannot be called, returns something without a length, or items that differ each time.
    """
    address.expect_options()
    try:
        held = load_code(address.what)()
    except Exception as error:  # code of the user can raise anything
        problem = f"{type(error).__name__}: {error}; expected module:function, which returns a data set"
        raise address.refuse(problem) from error
    if isinstance(held, torch.utils.data.IterableDataset) or not hasattr(held, "__getitem__"):
        raise address.refuse(f"returned a {type(held).__name__}; expected a data set that gives items by their number")
    source = Items(str(address), held)
    source.expect_repeatable()
    return source
