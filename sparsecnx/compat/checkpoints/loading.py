"""Load the pretrained encoder into a model of ours, of timm or of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints import conversion, files, formats
from sparsecnx.compat.checkpoints.formats import Format

ENCODER = ("downsample_layers.", "stages.")


def load_encoder(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    key: str | None = None,
    max_bytes: int = files.MOST_BYTES,
) -> list[str]:
    """Load the encoder of a pretraining run into a model, all of it or nothing.

    A run of a network of timm, or an autoencoder around any other network, loads into that network by its own names.
    A ConvNeXt V2 loads into one of any of these libraries.

    Numbers that are not finite are loaded too, with a UserWarning that names the entries.

    Args:
        model: a ConvNeXt V2 with any parts beside its encoder: `ConvNeXtV2`, `ConvNeXtV2Encoder` or `FCMAE` of this
            package; `convnextv2_*` of timm, also with `features_only=True`; a `ConvNextV2Model`,
            `ConvNextV2ForImageClassification` or `ConvNextV2Backbone` of transformers; or the network that the run
            trained, with any classifier, or with `features_only=True`. Its dtypes and devices stay.
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
        state_dict, _, foreign = encoder_of(state_dict)
        if foreign:
            return _load_by_name(model, state_dict)
        if (encoder := _own_encoder(state_dict)) is not None:
            return _load_by_name(model, encoder)
        given, architecture = conversion.to_ours(state_dict, conversion.detect_format(state_dict))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    entries = _entries(model)
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


def encoder_of(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], bool]:
    """Return the encoder in the state dict of `SparK`, or of `FCMAE` around another network than ConvNeXt V2.

    Returns:
        The entries of the encoder by its own names, the names of the others, and True if it is no ConvNeXt V2 of ours.
        Any other state dict is returned as it is.
    """
    prefix = "encoder."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    foreign = not any(name.startswith("downsample_layers.") for name in encoder)
    autoencoder = "mask_tokens.0" in state_dict or ("mask_token" in state_dict and foreign)
    if not encoder or not autoencoder:
        return state_dict, [], False
    return encoder, [name for name in state_dict if not name.startswith(prefix)], foreign


def _own_encoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the entries of an encoder of ours that no format of ConvNeXt V2 holds; None for any other state dict.

    These are encoders with blocks V1, another stem or depthwise convolutions without bias, and those of `MPMAE`.
    """
    prefix = "encoder." if "encoder.downsample_layers.0.0.weight" in state_dict else ""
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if "downsample_layers.0.0.weight" not in encoder:
        return None
    blocks = all(any(part in name for name in encoder) for part in (".grn.gamma", ".dwconv.bias"))
    stem, several = "downsample_layers.0.3.weight" in encoder, any(name.startswith("decoders.") for name in state_dict)
    return encoder if several or stem or not blocks else None


def as_it_is(encoder: Mapping[str, Tensor]) -> conversion.Conversion:
    """Return the entries of a network that is no ConvNeXt V2 as a conversion to timm, which changes nothing."""
    storages: set[int] = set()
    entries = {name: conversion.own(tensor, storages) for name, tensor in encoder.items()}
    return conversion.Conversion(entries, formats.TIMM_LINEAR, formats.TIMM_LINEAR, None, [])


def _load_by_name(model: nn.Module, encoder: Mapping[str, Tensor]) -> list[str]:
    """Load the entries of an encoder into the same network, and return those of the model that keep their values."""
    entries = _entries(model)
    # `features_only=True` of timm joins the first two parts of a name with `_`.
    own = {_unwrapped(entry): entry for entry in entries}
    forms = {name: (name, name.replace(".", "_", 1), name.replace("_", ".", 1)) for name in encoder}
    places = {name: next((own[form] for form in forms[name] if form in own), None) for name in encoder}
    kept = [entry for entry in entries if entry not in set(places.values())]
    tops = {_unwrapped(entry).partition(".")[0] for entry in entries}
    features = hasattr(getattr(model, "feature_info", None), "channels")  # timm's networks without a head

    def is_head(name: str) -> bool:
        """Return whether an entry of the encoder belongs to a part that no feature extractor has."""
        return features and not {name.partition(".")[0], "_".join(name.split(".")[:2])} & tops

    kind = type(model).__name__
    for name, tensor in encoder.items():
        entry = places[name]
        if entry is None:
            if not is_head(name):
                raise CheckpointError(f"holds {name}, which the model, a {kind}, has not: expected the same network")
        elif entries[entry].shape != tensor.shape:
            shapes = f"{tuple(entries[entry].shape)}, expected {tuple(tensor.shape)}"
            raise CheckpointError(f"{entry} of the model, a {kind}, is {shapes}")
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    trained = {_unwrapped(entry).partition(".")[0] for entry in places.values() if entry is not None}
    for entry in kept:
        name = _unwrapped(entry)
        if name.partition(".")[0] in trained and not (classifiers and name.startswith(classifiers)):
            raise CheckpointError(f"lacks {name}, which the model, a {kind}, has: expected the same network")
    conversion.warn_of_not_finite({name: tensor for name, tensor in encoder.items() if tensor.is_floating_point()})
    with torch.no_grad():
        for name, entry in places.items():
            if entry is not None:
                entries[entry].copy_(encoder[name])
    return kept


def _entries(model: nn.Module) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if any(value.is_meta for value in entries.values()):
        raise CheckpointError("model is on the device meta: model.to_empty(device=...) gives it memory")
    return entries


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
    return re.sub(r"^(stem|stages)_(\d+)\.", r"\1.\2.", _unwrapped(name))


def _unwrapped(name: str) -> str:
    """Return the name of an entry without those of DDP, torch.compile and timm's wrapper of features."""
    return re.sub(r"^((module|_orig_mod|model)\.)+", "", name)


def _stage(name: str) -> int:
    """Return the stage of an entry of the encoder, by our name."""
    return int(name.split(".")[1])
