"""Checkpoint files of any format: `.pt` and `.pth` of torch, `.safetensors`, and folders of transformers.

The name chooses the kind of file to write; the contents tell the kind of file to read. Reading runs no code in a file,
and files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sparsecnx.common.errors import CheckpointError, MissingExtra
from sparsecnx.common.files import not_regular, open_atomically
from sparsecnx.common.limits import MOST_BYTES, check_description, check_holes, readable
from sparsecnx.common.sharded_files import is_sharded, read_sharded
from sparsecnx.common.torch_files import Omitted, is_torch_file, load_torch, save_torch
from sparsecnx.compat.checkpoints.architecture import Architecture
from sparsecnx.compat.checkpoints.conversion import Conversion
from sparsecnx.compat.checkpoints.prefixes import Network, find_network, with_end
from sparsecnx.models.convnextv2 import SIZES

SUFFIXES = (".pt", ".pth", ".safetensors")
FOLDER_WEIGHTS = "model.safetensors"
# Training code keeps the model under these names: this package, the published code and timm.
MODEL_KEYS = ("model", "state_dict")
DEEPEST = 8  # parts within parts of a file that are looked into
MOST_CANDIDATES = 8


class Loaded(NamedTuple):
    """The state dict of a network, and its place in the file.

    Attributes:
        state_dict: names and tensors, on the CPU.
        key: the part of the file that held it; None if it was the whole file.
        parts: the names of all parts of the file.
        prefix: removed from the names, such as `module._orig_mod.`.
        beside: names of the entries that lie beside the network, which are left out.
        foreign: True if it is the encoder of a run of ours that is no ConvNeXt of ours, by its own names.
        epsilons: `norm_eps` and `grn_eps` of a run of a network of ours; none of any other file.
    """

    state_dict: dict[str, Tensor]
    key: str | None
    parts: tuple[str, ...]
    prefix: str
    beside: list[str]
    foreign: bool
    epsilons: dict[str, float]


class PartError(CheckpointError):
    """A file does not have the wanted part.

    Attributes:
        candidates: parts that `key` could name instead, those with the most entries first.
    """

    def __init__(self, problem: str, candidates: Sequence[str] = ()) -> None:
        super().__init__(problem)
        self.candidates = candidates


def load(path: str | Path, key: str | None = None, max_bytes: int = MOST_BYTES, prefix: str | None = None) -> Loaded:
    """Read the state dict of a network onto the CPU.

    A ConvNeXt is found wherever its names stand, after any prefix and beside other entries. Where none is found, the
    state dict is returned as it is.

    Tensors are mapped into memory and read when they are used, if the kind of file allows it, so that the optimizer
    beside a model costs nothing. The file may be replaced or deleted meanwhile, but not written into.

    Args:
        path: a `.safetensors` file, a folder of transformers with `model.safetensors` in it, or a file of `torch.save`:
            a state dict, or a training checkpoint that holds one beside other things; or the folder of a sharded
            checkpoint of `sparsecnx pretrain`.
        key: the wanted part of a training checkpoint, such as `model_ema`, or `model.net` for a part of a part; None is
            `model` or `state_dict`.
        max_bytes: the most that a file may take in memory if that is more than it has: one that is compressed, has
            holes, or holds tensors that share their numbers. Its description of the tensors may have a 256th of that.
        prefix: what stands before the names of the network, such as `teacher`, or the first part of it; None finds it.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is larger than `max_bytes` in memory, it is no state
            dict, no name begins with `prefix`, or it holds two networks; the message has the prefixes.
        PartError: it has no such part.
        MissingExtra: safetensors is not installed.
        ValueError: `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: expected 1 or more")
    path = Path(path)
    try:
        contents = _contents(path, max_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error})") from error
    return find_state_dict(contents, key, prefix)


def find_state_dict(contents: Any, key: str | None = None, prefix: str | None = None) -> Loaded:
    """Return the state dict in the contents of a file; arguments and errors are those of `load`."""
    if not isinstance(contents, dict):
        raise CheckpointError(f"holds one {type(contents).__name__}: expected a state dict")
    state_dict, key, parts = _part(contents, key)
    names = [name for name in state_dict if isinstance(name, str)]
    network = find_network(names, prefix)
    if network is None:
        start = with_end(prefix or "")
        network = Network(start, {name[len(start) :]: name for name in names if name.startswith(start)}, False)
    for name in network.entries.values():
        if isinstance(state_dict[name], Tensor) and state_dict[name].is_meta:
            raise CheckpointError(f"{name} is on the device meta: expected numbers")
    within = set(network.entries.values())
    beside = [str(name) for name in state_dict if name not in within]
    entries = {own: state_dict[name] for own, name in network.entries.items()}
    return Loaded(entries, key, parts, network.prefix, beside, network.foreign, _epsilons(contents.get("recipe")))


def _epsilons(recipe: Any) -> dict[str, float]:
    """Return the epsilons in the recipe of a checkpoint, if it is of a network of ours."""
    if not isinstance(recipe, dict) or recipe.get("model") not in tuple(SIZES):
        return {}
    return {name: recipe[name] for name in ("norm_eps", "grn_eps") if isinstance(recipe.get(name), float)}


def _contents(path: Path, max_bytes: int) -> Any:
    if is_sharded(path):
        return read_sharded(path)
    if path.is_dir():
        path = path / FOLDER_WEIGHTS
        if not path.exists():
            raise CheckpointError(f"a folder without {FOLDER_WEIGHTS}; expected a file, or a folder of transformers")
    if (problem := not_regular(path)) is not None:
        raise CheckpointError(problem)
    if not _is_safetensors(path):
        # Training code saves its command line, paths, and other objects beside the model.
        return load_torch(path, omit_objects=True, mmap=True, max_bytes=max_bytes)
    safetensors = _import_safetensors()
    check_holes(path, max_bytes)
    try:
        _check_header(path, max_bytes)
        return safetensors.torch.load_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own errors, and those of Python and torch
        raise CheckpointError(f"truncated or damaged, or not of safetensors ({error})") from error


def _is_safetensors(path: Path) -> bool:
    """Tell the kind of a file by its contents, or by its name if the contents are of neither kind.

    A file of safetensors begins with the length of its header, 8 bytes, and the header, a JSON object.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return True
    return path.suffix == ".safetensors" and not is_torch_file(path)


def _check_header(path: Path, max_bytes: int) -> None:
    """Check what safetensors does not: the length of the header before it is read, and names that come twice."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size == 0:
            raise ValueError("the file is empty")
        if length > size - 8:
            raise ValueError(f"its header has {readable(length)}, the file {readable(size)}")
        check_description("header", length, max_bytes)
        header = file.read(length)
    json.loads(header, object_pairs_hook=_names_once)


def _names_once(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"its header has {name} twice")
        names.add(name)


def _part(contents: dict[str, Any], key: str | None) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """Return the state dict, its key, and the names of all parts of the file."""
    if contents and all(isinstance(value, Tensor) for value in contents.values()):
        if key is not None:
            raise CheckpointError(f"is a state dict itself: there is no part {key} in it")
        return contents, None, ()
    parts = tuple(map(str, contents))
    state_dicts = _state_dicts(contents)
    wanted = MODEL_KEYS if key is None else (key,)
    for name in wanted:
        for path, state_dict in state_dicts:
            if sum(map(len, path)) + len(path) - 1 == len(name) and ".".join(path) == name:
                return state_dict, name, parts
    holds = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "") or "nothing"
    largest = sorted(state_dicts, key=lambda part: -len(part[1]))[:MOST_CANDIDATES]
    candidates = list(dict.fromkeys(".".join(path) for path, _ in largest))
    objects = [name for name in wanted if isinstance(contents.get(name), Omitted)]
    if objects:
        kind = type(contents[objects[0]]).__name__
        raise PartError(f"holds a whole {kind} under {objects[0]}: expected its state dict", candidates)
    raise PartError(f"holds no state dict under {' or '.join(wanted)}: it holds {holds}", candidates)


def _state_dicts(contents: dict[str, Any]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Return every part, part of a part and so on that holds tensors, with the names that lead to it."""
    found = []
    opened = {id(contents)}  # a file can hold a dict that holds itself, or one dict under many names
    holds_tensors: dict[int, bool] = {}
    within: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), contents)]
    for path, holder in within:
        for name, value in holder.items():
            if not isinstance(name, str) or not isinstance(value, dict):
                continue
            if id(value) not in holds_tensors:
                holds_tensors[id(value)] = any(isinstance(entry, Tensor) for entry in value.values())
            if holds_tensors[id(value)]:
                found.append(((*path, name), value))
            if id(value) not in opened and len(path) + 1 < DEEPEST:
                opened.add(id(value))
                within.append(((*path, name), value))
    return found


def save(path: str | Path, conversion: Conversion) -> None:
    """Write a converted checkpoint in the form that its library loads.

    Args:
        path: the ending chooses the kind. `.safetensors`: the state dict. `.pt`, `.pth`: `{"model": state_dict}` for
            the published code (`fcmae`, `fcmae-encoder`, `convnextv2`), otherwise the state dict. A folder, for
            transformers only: `config.json` and `model.safetensors`, for `from_pretrained`. A path is a folder if it
            exists as one, ends in `/`, or has no ending.
        conversion: the result of `convert`.

    Raises:
        ValueError: the ending is another one, or a folder is given for another format.
        OSError: it could not be written; files and folders are as before.
        MissingExtra: safetensors is not installed.
    """
    problem = path_problem(path, conversion.format.name)
    if problem is not None:
        raise ValueError(f"path is {path}: {problem}")
    folder, path = _is_folder(path), Path(path)
    state: dict[str, Any] = conversion.state_dict
    if not folder and path.suffix != ".safetensors":
        return save_torch(path, {"model": state} if conversion.format.nested else state)
    library = _import_safetensors()
    with contextlib.ExitStack() as stack:
        if folder and conversion.architecture is not None:
            stack.enter_context(_made(path))
            weights, description = stack.enter_context(open_atomically(path / FOLDER_WEIGHTS, path / "config.json"))
            description.write(f"{json.dumps(transformers_config(conversion.architecture), indent=2)}\n".encode())
        else:
            (weights,) = stack.enter_context(open_atomically(path))
        try:
            library.torch.save_file(state, weights.name, {"format": "pt"})  # without this transformers refuses the file
        except library.SafetensorError as error:  # its name for errors of the file system
            raise OSError(f"{weights.name}: {error}") from error


def path_problem(path: str | Path, format: str) -> str | None:
    """Return why `path` cannot take a format, or None if it can."""
    names = f"expected a name that ends in {', '.join(SUFFIXES)}"
    if _is_folder(path):
        return None if format == "transformers" else f"a folder, which only transformers takes; {names}"
    if Path(path).suffix in SUFFIXES:
        return None
    return names + (", or a folder" if format == "transformers" else "")


def overwrites(target: str | Path, source: str | Path) -> bool:
    """Return whether saving to `target` replaces the file that `load` reads for `source`, under any name or link."""
    read = Path(source) / FOLDER_WEIGHTS if os.path.isdir(source) else Path(source)
    written = Path(target) / FOLDER_WEIGHTS if _is_folder(target) else Path(target)
    return os.path.exists(read) and os.path.exists(written) and read.samefile(written)


def is_inside(target: str | Path, source: str | Path) -> bool:
    """Return whether `target` would lie in the folder of a sharded checkpoint `source`."""
    sharded = os.path.isdir(source) and is_sharded(Path(source))
    return sharded and Path(target).resolve().is_relative_to(Path(source).resolve())


def _is_folder(path: str | Path) -> bool:
    return str(path).endswith("/") or os.path.isdir(path) or not Path(path).suffix


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents, and remove those that were missing after an error."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # it was not made, or somebody else put something into it
                path.rmdir()
        raise


def transformers_config(architecture: Architecture) -> dict[str, Any]:
    """Return the `config.json` from which transformers builds the network of a checkpoint.

    The last LayerNorm has eps 1e-12 by default in transformers; ConvNeXt V2 is trained with 1e-6.
    """
    kind = "ConvNextV2Model" if architecture.num_classes is None else "ConvNextV2ForImageClassification"
    config = {
        "architectures": [kind],
        "model_type": "convnextv2",
        "depths": list(architecture.depths),
        "hidden_sizes": list(architecture.dims),
        "num_stages": len(architecture.depths),
        "num_channels": architecture.in_chans,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    }
    if architecture.num_classes is not None:
        labels = {str(i): f"LABEL_{i}" for i in range(architecture.num_classes)}
        config["id2label"] = labels
        config["label2id"] = {label: int(i) for i, label in labels.items()}
    return config


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtra(f"safetensors does not import ({error}): pip install safetensors") from error
    return safetensors
