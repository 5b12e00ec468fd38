"""Checkpoint files of any of the formats: `.pt` and `.pth` by torch, `.safetensors`, and transformers' folders.

What is written is chosen by the name, what is read is recognised by its contents.

Nothing in a file is run: `.pt` loads with `weights_only=True`. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sparsecnx.compat.checkpoints.architecture import Architecture
from sparsecnx.compat.checkpoints.conversion import Conversion
from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointError
from sparsecnx.train.errors import MissingExtra

SUFFIXES = (".pt", ".pth", ".safetensors")
FOLDER_WEIGHTS = "model.safetensors"
# Where training code keeps the model beside its optimizer: this package, the published code and timm.
MODEL_KEYS = ("model", "state_dict")
# What DistributedDataParallel and torch.compile put before the names of the module that they wrap.
WRAPPERS = ("module.", "_orig_mod.")


class Loaded(NamedTuple):
    """A state dict, and where in its file it was.

    Attributes:
        state_dict: names and tensors, on the CPU.
        key: the part of the file that it is; None where it is the file.
        parts: the names of all parts of the file.
        prefix: what all names began with in the file, such as `module._orig_mod.`, and no longer do.
    """

    state_dict: dict[str, Tensor]
    key: str | None
    parts: tuple[str, ...]
    prefix: str


class PartError(CheckpointError):
    """A file without the part that is wanted.

    Attributes:
        candidates: parts that `key` could name instead, those with the most entries first.
    """

    def __init__(self, problem: str, candidates: list[str]) -> None:
        super().__init__(problem, candidates)
        self.problem = problem
        self.candidates = candidates

    def __str__(self) -> str:
        return self.problem


def load(path: str | Path, key: str | None = None) -> Loaded:
    """Read a state dict onto the CPU.

    Tensors stay in the file, mapped into memory, until they are used, where its kind allows that: so the optimizer
    beside a model costs nothing. The file may be replaced or deleted meanwhile, but not written into.

    Args:
        path: a `.safetensors` file, a folder of transformers with `model.safetensors` in it, or a file of `torch.save`:
            a state dict, or a training checkpoint that holds one beside other things.
        key: the part of a training checkpoint that is wanted, such as `model_ema`, or `model.net` for a part of a part;
            None is `model` or `state_dict`.

    Raises:
        CheckpointError: no such file, damaged, or with more in it than tensors and plain values.
        PartError: it has no such part.
        MissingExtra: safetensors is not installed.
    """
    path = Path(path)
    try:
        contents = _contents(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"holds one {type(contents).__name__}: expected a state dict")
    state_dict, key, parts = _part(contents, key)
    for name, tensor in state_dict.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise CheckpointError(f"{name} is on the device meta: expected numbers")
    state_dict, prefix = _unwrap(state_dict)
    return Loaded(state_dict, key, parts, prefix)


def _contents(path: Path) -> Any:
    if path.is_dir():
        path = path / FOLDER_WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"a folder without {FOLDER_WEIGHTS}; expected a file, or a folder of transformers")
    if _is_safetensors(path):
        return _load_safetensors(path)
    # The published code saves its command line, a Namespace, beside the model.
    return checkpoint.load(path, allowed=[argparse.Namespace], mmap=True)


def _is_safetensors(path: Path) -> bool:
    """By its contents, and where these are of neither kind by its name.

    A file of safetensors begins with the length of its header, 8 bytes, and the header, a JSON object.
    """
    if not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return True
    return path.suffix == ".safetensors" and not checkpoint.is_torch_file(path)


def _part(contents: dict[str, Any], key: str | None) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """The state dict, the key it is under, and the names of all parts of the file."""
    if contents and all(isinstance(value, Tensor) for value in contents.values()):
        if key is not None:
            raise CheckpointError(f"is a state dict itself: there is no part {key} in it")
        return contents, None, ()
    parts = tuple(map(str, contents))
    state_dicts = _state_dicts(contents)
    wanted = MODEL_KEYS if key is None else (key,)
    found = next((name for name in wanted if name in state_dicts), None)
    if found is None:
        holds = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "") or "nothing"
        candidates = sorted(state_dicts, key=lambda name: -len(state_dicts[name]))
        raise PartError(f"holds no state dict under {' or '.join(wanted)}: it holds {holds}", candidates)
    return state_dicts[found], found, parts


def _state_dicts(contents: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every part, and part of a part, that holds tensors, under its names joined by dots."""
    found: dict[str, dict[str, Any]] = {}
    opened = {id(contents)}  # a file can hold a dict that holds itself
    within = [("", contents)]
    for prefix, holder in within:
        for name, value in holder.items():
            if not isinstance(name, str) or not isinstance(value, dict):
                continue
            if any(isinstance(entry, Tensor) for entry in value.values()):
                found.setdefault(prefix + name, value)
            if id(value) not in opened:
                opened.add(id(value))
                within.append((f"{prefix}{name}.", value))
    return found


def _unwrap(state_dict: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The state dict of the module inside its wrappers, and the prefix that these gave all of its names."""
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if _all_begin_with(prefix + w, state_dict)), None):
        prefix += wrapper
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items()} if prefix else state_dict, prefix


def _all_begin_with(prefix: str, state_dict: dict[str, Any]) -> bool:
    return bool(state_dict) and all(isinstance(name, str) and name.startswith(prefix) for name in state_dict)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    _require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError("no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"truncated or damaged, or not of safetensors ({error})") from error


def save(path: str | Path, conversion: Conversion) -> None:
    """Write a converted checkpoint as the code that is to load it expects it.

    Args:
        path: the ending chooses. `.safetensors`: the state dict. `.pt`, `.pth`: `{"model": state_dict}` for the
            published code (`fcmae`, `fcmae-encoder`, `convnextv2`), otherwise the state dict. A folder, only for
            transformers, which is there already, ends in `/` or has no ending: `config.json` and
            `model.safetensors`, for `from_pretrained`.
        conversion: what `convert` returned.

    Raises:
        ValueError: another ending, or a folder for another format.
        OSError: it could not be written; what was there is as before, and a folder that was not there is not.
        MissingExtra: safetensors is not installed.
    """
    problem = path_problem(path, conversion.format.name)
    if problem is not None:
        raise ValueError(f"path is {path}: {problem}")
    folder, path = _is_folder(path), Path(path)
    if folder:
        _require_safetensors()
        config = json.dumps(transformers_config(conversion.architecture), indent=2)
        with _made(path), checkpoint.whole(path / FOLDER_WEIGHTS, path / "config.json") as (weights, description):
            _write_safetensors(weights.name, conversion.state_dict)
            description.write(f"{config}\n".encode())
    elif path.suffix == ".safetensors":
        _require_safetensors()
        with checkpoint.whole(path) as (file,):
            _write_safetensors(file.name, conversion.state_dict)
    else:
        state: dict[str, Any] = conversion.state_dict
        checkpoint.write(path, {"model": state} if conversion.format.nested else state)


def path_problem(path: str | Path, format: str) -> str | None:
    """Why a format cannot be saved there, None where it can."""
    names = f"expected a name that ends in {', '.join(SUFFIXES)}"
    if _is_folder(path):
        return None if format == "transformers" else f"a folder, which transformers alone has; {names}"
    if Path(path).suffix in SUFFIXES:
        return None
    return names + (", or a folder" if format == "transformers" else "")


def overwrites(target: str | Path, source: str | Path) -> bool:
    """Whether saving to `target` replaces the file that `load` reads for `source`, whatever names and links it has."""
    read = Path(source) / FOLDER_WEIGHTS if os.path.isdir(source) else Path(source)
    written = Path(target) / FOLDER_WEIGHTS if _is_folder(target) else Path(target)
    return os.path.exists(read) and os.path.exists(written) and read.samefile(written)


def _is_folder(path: str | Path) -> bool:
    return str(path).endswith("/") or os.path.isdir(path) or not Path(path).suffix


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, made with those it is in where they are not there, and these gone again after an error."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # never made, or somebody else put something into it
                path.rmdir()
        raise


def transformers_config(architecture: Architecture) -> dict[str, Any]:
    """What `config.json` has to say for transformers to build the network of a checkpoint.

    transformers' own default for the last LayerNorm is eps 1e-12; ConvNeXt V2 is trained with 1e-6.
    """
    config = {
        "architectures": [
            "ConvNextV2Model" if architecture.num_classes is None else "ConvNextV2ForImageClassification"
        ],
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


def _write_safetensors(name: str, state_dict: dict[str, Tensor]) -> None:
    """Write a file by its name.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state_dict, name, metadata={"format": "pt"})  # transformers refuses files that do not say so
    except SafetensorError as error:  # its own name for the file system's errors
        raise OSError(f"{name}: {error}") from error


def _require_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"safetensors does not import ({error}): pip install safetensors") from error
