"""Checkpoint files of any of the formats: `.pt` and `.pth` by torch, `.safetensors`, and transformers' folders.

Nothing in a file is run: `.pt` loads with `weights_only=True`. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import json
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


class Loaded(NamedTuple):
    """A state dict, and where in its file it was.

    Attributes:
        state_dict: names and tensors, on the CPU.
        key: the part of the file that it is; None where it is the file.
        parts: the names of all parts of the file.
    """

    state_dict: dict[str, Tensor]
    key: str | None
    parts: tuple[str, ...]


def load(path: str | Path, key: str | None = None) -> Loaded:
    """Read a state dict onto the CPU.

    Args:
        path: a `.safetensors` file, a folder of transformers with `model.safetensors` in it, or a file of `torch.save`:
            a state dict, or a training checkpoint that holds one beside other things.
        key: the part of a training checkpoint that is wanted, such as `model_ema`; None is `model` or `state_dict`.

    Raises:
        CheckpointError: no such file, damaged, with more in it than tensors and plain values, or without that part.
        MissingExtra: safetensors is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FOLDER_WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"a folder without {FOLDER_WEIGHTS}; expected a file, or a folder of transformers")
    # The published code saves its command line, a Namespace, beside the model.
    tensors_alone = path.suffix == ".safetensors"
    contents: Any = _load_safetensors(path) if tensors_alone else checkpoint.load(path, [argparse.Namespace])
    if not isinstance(contents, dict):
        raise CheckpointError(f"holds one {type(contents).__name__}: expected a state dict")
    return _part(contents, key)


def _part(contents: dict[str, Any], key: str | None) -> Loaded:
    if contents and all(isinstance(value, Tensor) for value in contents.values()):
        if key is not None:
            raise CheckpointError(f"is a state dict itself: there is no part {key} in it")
        return Loaded(contents, None, ())
    parts = tuple(map(str, contents))
    wanted = MODEL_KEYS if key is None else (key,)
    found = next((name for name in wanted if isinstance(contents.get(name), dict)), None)
    if found is None:
        holds = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "") or "nothing"
        raise CheckpointError(f"holds no state dict under {' or '.join(wanted)}: it holds {holds}")
    return Loaded(contents[found], found, parts)


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
        OSError: it could not be written; what was there is as before.
        MissingExtra: safetensors is not installed.
    """
    problem = path_problem(path, conversion.format.name)
    if problem is not None:
        raise ValueError(f"path is {path}: {problem}")
    folder, path = _is_folder(path), Path(path)
    if folder:
        _require_safetensors()
        path.mkdir(parents=True, exist_ok=True)
        _save_safetensors(path / FOLDER_WEIGHTS, conversion.state_dict)
        config = json.dumps(transformers_config(conversion.architecture), indent=2)
        with checkpoint.whole(path / "config.json") as file:
            file.write(f"{config}\n".encode())
    elif path.suffix == ".safetensors":
        _save_safetensors(path, conversion.state_dict)
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


def _is_folder(path: str | Path) -> bool:
    return str(path).endswith("/") or Path(path).is_dir() or not Path(path).suffix


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


def _save_safetensors(path: Path, state_dict: dict[str, Tensor]) -> None:
    _require_safetensors()
    from safetensors.torch import save_file

    with checkpoint.whole(path) as file:
        save_file(state_dict, file.name, metadata={"format": "pt"})  # transformers refuses files that do not say so


def _require_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"safetensors does not import ({error}): pip install safetensors") from error
