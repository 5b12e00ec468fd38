"""Load the pretrained encoder into a model of ours, of timm or of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints import conversion, files
from sparsecnx.compat.checkpoints.formats import Format

ENCODER = ("downsample_layers.", "stages.")


def load_encoder(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    key: str | None = None,
    max_bytes: int = files.MOST_BYTES,
) -> list[str]:
    """Load the encoder of a pretraining run into a model, all of it or nothing.

    Numbers that are not finite are loaded too, with a UserWarning that names the entries.

    Args:
        model: a ConvNeXt V2 with any parts beside its encoder: `ConvNeXtV2`, `ConvNeXtV2Encoder` or `FCMAE` of this
            package; `convnextv2_*` of timm, also with `features_only=True`; a `ConvNextV2Model`,
            `ConvNextV2ForImageClassification` or `ConvNextV2Backbone` of transformers. Its dtypes and devices stay.
        checkpoint: a checkpoint of a run, such as `runs/mine/last.pt`, a file or folder in any format that
            `sparsecnx convert` reads, or its contents: a state dict, or a dict that holds one.
        key: part of the checkpoint that holds the weights, see `load`.
        max_bytes: the most that the file may take in memory if that is more than it has, see `load`.

    Returns:
        The entries of the model that keep their values, such as a new classifier.

    Raises:
        TypeError: `model` is no module.
        CheckpointError: the checkpoint cannot be read or is no ConvNeXt V2; the model is none, or has no memory; or its
            depths, widths or channels are others than those of the checkpoint. The model is not changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a module, and the checkpoint after it")
    name = "checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    try:
        if isinstance(checkpoint, Mapping):
            state_dict = files.find_state_dict(dict(checkpoint), key).state_dict
        else:
            state_dict = files.load(checkpoint, key, max_bytes).state_dict
        given, architecture = conversion.to_ours(state_dict, conversion.detect_format(state_dict))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    entries = model.state_dict(keep_vars=True)
    if any(value.is_meta for value in entries.values()):
        raise CheckpointError("model is on the device meta: model.to_empty(device=...) gives it memory")
    target = _format(model, entries)
    ours = {}
    for entry in entries:
        place = target.to_ours(_plain(entry))
        if place is not None and place[0].startswith(ENCODER):
            ours[entry] = place
    # A network that extracts features may end before the last stage.
    wanted = {place[0] for place in ours.values()}
    stages = {_stage(entry) for entry in wanted}
    different = wanted ^ {entry for entry in given if entry.startswith(ENCODER) and _stage(entry) in stages}
    if different:
        raise CheckpointError(f"{name} is a {architecture}: the model has other stages or blocks ({min(different)})")
    loaded = {entry: layout.theirs(given[name_of][1]) for entry, (name_of, layout) in ours.items()}
    for entry, tensor in loaded.items():
        if entries[entry].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is a {architecture}: {entry} of the model is {tuple(entries[entry].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    conversion.warn_of_not_finite({given[name_of][0]: given[name_of][1] for name_of, _ in ours.values()})
    with torch.no_grad():
        for entry, tensor in loaded.items():
            entries[entry].copy_(tensor)
    return [entry for entry in entries if entry not in loaded]


def _format(model: nn.Module, entries: Mapping[str, Tensor]) -> Format:
    """Return the format of a model's own names."""
    floating = {_plain(name): value for name, value in entries.items() if value.is_floating_point()}
    try:
        return conversion.detect_format(floating)
    except CheckpointError as error:
        raise CheckpointError(
            f"model is a {type(model).__name__}: expected a ConvNeXt V2 of this package, timm or transformers, "
            "or the part of a network that is one"
        ) from error


def _plain(name: str) -> str:
    """Return the name of an entry without wrappers. `features_only=True` of timm joins the first two parts with `_`."""
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
    return re.sub(r"^(stem|stages)_(\d+)\.", r"\1.\2.", name)


def _stage(name: str) -> int:
    """Return the stage of an entry of the encoder, by our name."""
    return int(name.split(".")[1])
