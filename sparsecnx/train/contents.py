"""The contents of a training checkpoint, checked field by field in this one place.

A file can be damaged, edited or written by another program. Each error names the field, its value and what was
expected, such as `step is '7': expected a whole number from 1 to 8`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.common.sharded_files import LARGEST_STEP
from sparsecnx.train import checkpoint
from sparsecnx.train.code import is_code
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe, shown
from sparsecnx.train.schedule import BETAS, param_groups

# The fields that every checkpoint has. Those that came later have the values that runs had before them.
FIRST_RECIPE_FIELDS = {
    *("model", "image_size", "mask_ratio", "norm_pix_loss", "epochs", "batch_size", "grad_accum_steps", "base_lr"),
    *("weight_decay", "warmup_epochs", "clip_grad", "dtype", "seed", "epoch_repeats"),
}
# Fields by which the recipes of the commands differ.
OF_COMMANDS = ("num_classes", "architecture")


class Data(NamedTuple):
    """The images of a run, as its checkpoint records them.

    Attributes:
        folder: folder of the images; None for the photographs inside the wheels.
        images: number of image files.
        fingerprint: hash of their names.
        sizes: hash of their sizes; None in a checkpoint of an earlier version.
        contents: hash of a sample of their contents; None in a checkpoint of an earlier version.
        masks: checksum of masks that are given in a file; None for others.
        classes: names of the classes, of a run that has some.
        test: what its network is tested on; None where that is a part of the data.
        pretrained: the checkpoint that its network began with; None for random weights.
        seen: least and largest value of each channel of the sample, see `Source.seen`; None where it was not measured.
    """

    folder: str | None
    images: int
    fingerprint: str
    sizes: str | None
    contents: str | None
    masks: int | None
    classes: list[str] | None
    test: str | None
    pretrained: str | None
    seen: list[tuple[float, float]] | None


class Kind(NamedTuple):
    """Say what a run trains, which its checkpoints hold.

    Attributes:
        command: that writes them.
        recipe: class of the recipe.
        build: returns the network of a recipe.
        groups: returns AdamW's groups of parameters of a network and a recipe, see `param_groups`.
    """

    command: str
    recipe: type[Any]
    build: Callable[[Any], Any]
    groups: Callable[[Any, Any], list[dict[str, Any]]]


PRETRAINING = Kind("pretrain", Recipe, build_model, lambda model, recipe: param_groups(model, recipe.weight_decay))


class Contents(NamedTuple):
    """A checkpoint in which every field is what it should be.

    Attributes:
        model: state dict of the model that `recipe` builds, finite.
        optimizer: AdamW's state of every parameter, by its number.
        step: optimizer steps done, 1 or more.
        recipe: the recipe of the run, of the class of its kind.
        data: its images.
        processes: how many wrote it.
        ema: state dict of the moving average of the weights, empty if its recipe has none.
    """

    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    step: int
    recipe: Any
    data: Data
    processes: int
    ema: dict[str, Tensor]


def load(path: str | Path, model: str | None = None, kind: Kind = PRETRAINING) -> Contents:
    """Read a checkpoint of a run onto the CPU and check every field.

    Args:
        path: the file.
        model: what the user named as the network. Only then is a `module:factory` of the recipe called: a file alone
            runs no code.
        kind: what it must hold.

    Raises:
        CheckpointError: there is no such file, it is damaged, or a field is not what it should be.
    """
    return check(checkpoint.read(path), model, kind)


def check(state: Mapping[str, Any], model: str | None = None, kind: Kind = PRETRAINING) -> Contents:
    """Return the contents of a checkpoint, see `load`, or refuse the first wrong field.

    Raises:
        CheckpointError: names the field, its value and what was expected.
    """
    recipe = _recipe(state["recipe"], model, kind)
    data = _data(state["data"], recipe.in_chans)
    if (number := getattr(recipe, "num_classes", None)) is not None:
        named = data.classes is not None and len(data.classes) == number
        _expect("data.classes", data.classes, named, f"{number} names")
    try:
        steps_per_epoch = recipe.steps_per_epoch(data.images)
    except InputError as error:
        raise CheckpointError(f"data.images is {data.images}: too few for its recipe, whose {error}") from error
    step, last = state["step"], steps_per_epoch * recipe.epochs
    first = max(1, recipe.first_epoch * steps_per_epoch)
    _expect("step", step, _is_whole(step) and first <= step <= last, f"a whole number from {first} to {last}")
    epoch = state["epoch"]
    expected = step / steps_per_epoch
    _expect("epoch", epoch, isinstance(epoch, float) and math.isclose(epoch, expected), f"{expected!r} at step {step}")

    try:
        with torch.device("meta"):
            network = kind.build(recipe)
    except InputError as error:
        raise CheckpointError(f"recipe.{error}") from error
    entries = network.state_dict()
    for part in ("model", "ema")[: 1 if recipe.ema_decay is None else 2]:
        held: Any = state.get(part)
        _names(part, held, entries)
        for name, entry in entries.items():
            _tensor(f"{part}.{name}", held[name], tuple(entry.shape), f" in {recipe.model}", entry.dtype)
    processes = state.get("processes", 1)
    _expect("processes", processes, _is_whole(processes) and processes >= 1, "a whole number, 1 or more")
    optimizer = _optimizer(state["optimizer"], kind.groups(network, recipe), step)
    return Contents(state["model"], optimizer, step, recipe, data, processes, state.get("ema", {}))


def _recipe(saved: Any, model: str | None, kind: Kind) -> Any:
    known = {field.name for field in fields(kind.recipe)}
    if isinstance(saved, dict) and any((field in saved) != (field in known) for field in OF_COMMANDS):
        raise CheckpointError(f"recipe is of another command than sparsecnx {kind.command}")
    _names("recipe", saved, known, optional=known - FIRST_RECIPE_FIELDS)
    if is_code(name := saved["model"]) and name != model:
        raise CheckpointError(
            f"recipe.model is {shown(name)}: it names Python code, which runs only with --model {name}"
        )
    if saved.get("normalize", Recipe.normalize) != Recipe.normalize and "value_range" not in saved:
        saved = {**saved, "crop_area": None}  # earlier versions resized crops of photographs alone
    try:
        return kind.recipe(**saved)
    except InputError as error:
        raise CheckpointError(f"recipe.{error}") from error


def _data(saved: Any, channels: int) -> Data:
    later = {"sizes", "contents", "masks", "classes", "test", "pretrained", "seen"}
    _names("data", saved, set(Data._fields), optional=later)
    data = Data(**{**dict.fromkeys(later), **saved})
    _expect("data.folder", data.folder, data.folder is None or _is_path(data.folder), "the name of a folder, or None")
    _expect("data.images", data.images, _is_whole(data.images) and data.images >= 1, "a whole number, 1 or more")
    _expect("data.masks", data.masks, data.masks is None or _is_whole(data.masks), "a whole number, or None")
    names = data.classes is None or (isinstance(data.classes, list) and all(isinstance(n, str) for n in data.classes))
    _expect("data.classes", data.classes, names, "a list of names, or None")
    for field in ("test", "pretrained"):
        value = getattr(data, field)
        _expect(f"data.{field}", value, value is None or _is_path(value), "a path, or None")
    if isinstance(data.seen, list) and (not data.seen or all(type(one) is float for one in data.seen)):
        data = data._replace(seen=None)  # earlier versions measured one range over all channels
    if data.seen is not None:
        ranges = isinstance(data.seen, list) and len(data.seen) == channels and all(map(_is_range, data.seen))
        expected = f"a range of each of {channels} channels: two finite numbers, the lower one first, or two nan"
        _expect("data.seen", data.seen, ranges, expected)
    for field in ("fingerprint", "sizes", "contents"):
        value = getattr(data, field)
        known = isinstance(value, str) or (field not in saved)
        _expect(f"data.{field}", value, known, "text")
    return data


def _optimizer(saved: Any, groups: list[dict[str, Any]], step: int) -> dict[int, dict[str, Tensor]]:
    """Return AdamW's state of every parameter in `groups`, by its number."""
    _names("optimizer", saved, ("state", "param_groups"))
    found, parameters = saved["param_groups"], [parameter for group in groups for parameter in group["params"]]
    _expect(
        "optimizer.param_groups",
        found,
        isinstance(found, list) and len(found) == len(groups),
        f"a list of {len(groups)} dicts",
    )
    first = 0
    for i, (held, group) in enumerate(zip(found, groups, strict=True)):
        field, last = f"optimizer.param_groups[{i}]", first + len(group["params"]) - 1
        _expect(field, held, isinstance(held, dict), "a dict")
        # The rest, such as the learning rate, is not taken from the file.
        expected = {
            "params": list(range(first, last + 1)),
            "betas": group.get("betas", BETAS),
            "weight_decay": group["weight_decay"],
        }
        for key, value in expected.items():
            text = f"the numbers {first} to {last}" if key == "params" else str(value)
            _expect(f"{field}.{key}", held.get(key), _equal(held.get(key), value), text)
        first = last + 1

    state = saved["state"]
    _names("optimizer.state", state, range(len(parameters)))
    counted = float(min(step, LARGEST_STEP))
    for number, parameter in enumerate(parameters):
        field, held = f"optimizer.state[{number}]", state[number]
        _names(field, held, ("step", "exp_avg", "exp_avg_sq"))
        for key in ("exp_avg", "exp_avg_sq"):
            _tensor(f"{field}.{key}", held[key], tuple(parameter.shape))
        least = held["exp_avg_sq"].min().item()
        _expect(f"the minimum of {field}.exp_avg_sq", least, least >= 0, "0 or more")
        _tensor(f"{field}.step", held["step"], ())
        taken = held["step"].item()
        _expect(f"{field}.step", taken, taken == counted, str(counted))
    return dict(state)


def _names(field: str, value: Any, expected: Collection[Any], optional: Collection[str] = ()) -> None:
    """Expect a dict with these keys."""
    _expect(field, value, isinstance(value, dict), "a dict")
    unknown = next((key for key in value if key not in expected), None)
    if unknown is not None:
        raise CheckpointError(f"{field} holds {shown(unknown)}: expected no such entry")
    missing = next((key for key in expected if key not in value and key not in optional), None)
    if missing is not None:
        raise CheckpointError(f"{field} lacks {missing!r}: expected it beside {len(expected) - 1} others")


def _tensor(
    field: str, value: Any, shape: tuple[int, ...], where: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Expect a finite tensor of a shape and dtype on the CPU."""
    fits = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    _expect(field, value, fits and value.dtype == dtype and value.shape == shape, f"{_short(dtype)} {shape}{where}")
    finite = value.isfinite()
    if not finite.all():
        raise CheckpointError(f"{field} holds {value[~finite][0].item()}: expected finite numbers")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect(field: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise CheckpointError(f"{field} is {shown(value)}: expected {expected}")


def _equal(value: Any, expected: Any) -> bool:
    """Return whether a value, which may be of any type, equals a number or a series of numbers."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(_equal(v, e) for v, e in zip(value, expected, strict=True))
        )
    return isinstance(value, (int, float)) and value == expected


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_range(value: Any) -> bool:
    """Return whether a value is a pair of floats, both finite and in order, or both NaN."""
    if not (isinstance(value, tuple) and len(value) == 2 and all(type(number) is float for number in value)):
        return False
    low, high = value
    return -math.inf < low <= high < math.inf or (math.isnan(low) and math.isnan(high))


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False
