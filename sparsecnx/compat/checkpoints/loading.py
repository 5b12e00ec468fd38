"""Load the pretrained encoder into a model of ours, of timm or of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat.checkpoints import conversion, files, formats
from sparsecnx.compat.checkpoints.conversion import ENCODER, own_encoder
from sparsecnx.compat.checkpoints.formats import Layout
from sparsecnx.compat.checkpoints.prefixes import find_network

PART = "pass the part of the model that should be loaded"


def load_encoder(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    key: str | None = None,
    max_bytes: int = files.MOST_BYTES,
    prefix: str | None = None,
) -> list[str]:
    """Load the encoder of a pretraining run into a model, all of it or nothing.

    A run of a network of timm, or an autoencoder around any other network, loads into that network by its own names.
    A ConvNeXt loads into one of any of these libraries, a V1 not into one of transformers. The weights that timm has of
    any other network load into that network of timm, without its classifier.

    Numbers that are not finite are loaded too, with a UserWarning that names the entries. Another UserWarning says
    where the layers of the model have other epsilons than the run had.

    Args:
        model: a ConvNeXt, or a module that holds one: `ConvNeXtV2`, `ConvNeXtV2Encoder` or `FCMAE` of this package;
            `convnextv2_*` of timm, or `convnext_*` for blocks V1, also with `features_only=True`; a `ConvNextV2Model`,
            `ConvNextV2ForImageClassification` or `ConvNextV2Backbone` of transformers; or the network that the run
            trained, with any classifier, or with `features_only=True`. Its dtypes and devices stay.
        checkpoint: a checkpoint of a run, such as `runs/mine/last.pt`, a file or folder in any format that
            `sparsecnx convert` reads, or its contents: a state dict, or a dict that holds one.
        key: part of the checkpoint that holds the weights, see `load`.
        max_bytes: the most that the file may take in memory if that is more than it has, see `load`.
        prefix: what stands before the names of the network in the checkpoint; None finds it, see `load`.

    Returns:
        The entries of the model that keep their values, such as a new classifier.

    Raises:
        TypeError: `model` is no module.
        CheckpointError: the checkpoint cannot be read, is no ConvNeXt, or holds two; the model is none, holds two,
            or has no memory; or its depths, widths or channels are others than those of the checkpoint. The model is
            not changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a module, and the checkpoint after it")
    name = "checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    try:
        if isinstance(checkpoint, Mapping):
            loaded = files.find_state_dict(dict(checkpoint), key, prefix)
        else:
            loaded = files.load(checkpoint, key, max_bytes, prefix)
        encoder = own_encoder(loaded.state_dict) or _of_timm(model, loaded.state_dict)
        if loaded.foreign or encoder is not None:
            kept = _load_by_name(model, loaded.state_dict if encoder is None else encoder)
            _warn_of_epsilons(model, kept, loaded.epsilons)
            return kept
        given, architecture = conversion.to_ours(loaded.state_dict, conversion.detect_format(loaded.state_dict))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    entries = _entries(model)
    ours = _places(model, entries)
    # A network that extracts features may end before the last stage.
    wanted = {place[0] for place in ours.values()}
    stages = {_stage(entry) for entry in wanted}
    different = wanted ^ {entry for entry in given if entry.startswith(ENCODER) and _stage(entry) in stages}
    if different:
        raise CheckpointError(f"{name} is a {architecture}: the model has other stages or blocks ({min(different)})")
    values = {entry: layout.theirs(given[name_of][1]) for entry, (name_of, layout) in ours.items()}
    for entry, tensor in values.items():
        if entries[entry].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is a {architecture}: {entry} of the model is {tuple(entries[entry].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    conversion.warn_of_not_finite({given[name_of][0]: given[name_of][1] for name_of, _ in ours.values()})
    with torch.no_grad():
        for entry, tensor in values.items():
            entries[entry].copy_(tensor)
    kept = [entry for entry in entries if entry not in values]
    _warn_of_epsilons(model, kept, loaded.epsilons)
    return kept


def as_it_is(encoder: Mapping[str, Tensor]) -> conversion.Conversion:
    """Return the entries of a network that is no ConvNeXt as a conversion to timm, which changes nothing.

    Raises:
        CheckpointError: it is an encoder of ours, whose names timm does not know.
    """
    conversion.refuse_own(encoder)
    storages: set[int] = set()
    entries = {name: conversion.own(tensor, storages) for name, tensor in encoder.items()}
    return conversion.Conversion(entries, formats.TIMM_LINEAR, formats.TIMM_LINEAR, None, [])


def _of_timm(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the entries of a state dict for the same network of timm, without classifier; None for others."""
    if not hasattr(model, "pretrained_cfg") or find_network(list(state_dict)) is not None:
        return None
    classifiers = _classifiers(model)
    body = {name: tensor for name, tensor in state_dict.items() if not name.startswith(classifiers)}
    return body if {name for name in _entries(model) if not name.startswith(classifiers)} == body.keys() else None


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of the classifier of a network of timm begin with."""
    found = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((found,) if isinstance(found, str) else found))


def _load_by_name(model: nn.Module, encoder: Mapping[str, Tensor]) -> list[str]:
    """Load the entries of an encoder into the same network, and return those of the model that keep their values."""
    entries = _entries(model)
    # `features_only=True` of timm joins the first two parts of a name with `_`.
    forms = {name: (name, name.replace(".", "_", 1), name.replace("_", ".", 1)) for name in encoder}
    prefix = _prefix(model, entries, forms)
    own = {entry[len(prefix) :]: entry for entry in entries if entry.startswith(prefix)}
    places = {name: next((own[form] for form in forms[name] if form in own), None) for name in encoder}
    kept = [entry for entry in entries if entry not in set(places.values())]
    tops = {name.partition(".")[0] for name in own}
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
    classifiers = _classifiers(model)
    trained = {entry[len(prefix) :].partition(".")[0] for entry in places.values() if entry is not None}
    for name, entry in own.items():
        if entry not in kept:
            continue
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


def _places(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, tuple[str, Layout]]:
    """Return our name and the layout of every entry of the encoder in a model."""
    network = find_network([name for name, value in entries.items() if value.is_floating_point()], choice=PART)
    if network is None or network.foreign:
        raise CheckpointError(
            f"model is a {type(model).__name__}: expected a ConvNeXt of this package, timm or transformers, "
            "or a module that holds one"
        )
    format = conversion.detect_format({name: entries[entry] for name, entry in network.entries.items()})
    places = {entry: format.to_ours(name) for name, entry in network.entries.items()}
    return {entry: place for entry, place in places.items() if place is not None and place[0].startswith(ENCODER)}


def _warn_of_epsilons(model: nn.Module, kept: Collection[str], trained: Mapping[str, float]) -> None:
    """Warn the caller's caller of the first layer with loaded weights that has another epsilon than in training."""
    for path, layer in model.named_modules():
        field = "grn_eps" if path.endswith("grn") else "norm_eps" if isinstance(layer, nn.LayerNorm) else ""
        eps, expected = getattr(layer, "eps", None), trained.get(field)
        loaded = any(f"{path}.{name}" not in kept for name, _ in layer.named_parameters(recurse=False))
        if loaded and None not in (eps, expected) and eps != expected:
            warnings.warn(f"the run had {field} {expected:g}, {path} of the model has {eps:g}", stacklevel=3)
            return


def _prefix(model: nn.Module, entries: Mapping[str, Tensor], forms: Mapping[str, tuple[str, ...]]) -> str:
    """Return what stands before names in a model, each in one of its forms: the prefix that most of them have there."""
    first = next(iter(forms.values()))
    found = {entry[: -len(form)]: None for entry in entries for form in first if f".{entry}".endswith(f".{form}")}
    counts = {
        prefix: sum(any(prefix + form in entries for form in some) for some in forms.values())
        for prefix in sorted(found, key=len)
    }
    whole = [prefix for prefix, count in counts.items() if count == len(forms)]
    if whole[1:]:
        raise CheckpointError(f"model is a {type(model).__name__} with several such networks, {whole}: {PART}")
    return max(counts, key=counts.__getitem__, default="")


def _stage(name: str) -> int:
    """Return the stage of an entry of the encoder, by our name."""
    return int(name.split(".")[1])
