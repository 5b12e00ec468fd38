"""Conversion between formats: recognise, check every entry against the network, rename, change layouts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.files import escape
from sparsecnx.compat.checkpoints import formats
from sparsecnx.compat.checkpoints.architecture import Architecture, infer
from sparsecnx.compat.checkpoints.formats import Format
from sparsecnx.compat.checkpoints.prefixes import prefixes_of
from sparsecnx.models.convnextv2 import STRIDE

ENCODER = ("downsample_layers.", "stages.")
MOST_ENTRIES = 10_000  # the largest published network has 400
MOST_LABELS = 2**20  # transformers lists every class by name, twice


class Conversion(NamedTuple):
    """The result of `convert`.

    Attributes:
        state_dict: in the new format; contiguous tensors that share no memory with each other. Those that need no
            change share memory with the input.
        format: the new format.
        source: the format of the input.
        architecture: the network; None if it is no ConvNeXt.
        left_out: entries of the input, by its names, that the new format has no place for: the decoder in a
            classifier, final norm and head in a masked autoencoder. Entries of the encoder are never left out.
    """

    state_dict: dict[str, Tensor]
    format: Format
    source: Format
    architecture: Architecture | None
    left_out: list[str]


def convert(
    state_dict: Mapping[str, Tensor], to: str, source: str | None = None, conv_mlp: bool | None = None
) -> Conversion:
    """Convert a state dict to another format; values and dtypes stay as they are, bit for bit.

    Numbers that are not finite stay too, with a UserWarning that names the entries.

    Args:
        state_dict: a ConvNeXt V2 in any of the formats, whole: an encoder, with or without final norm and head, or
            with a decoder. Or a ConvNeXt V1 in a format of ours or of timm, for another of these.
        to: `"fcmae"`, `"fcmae-encoder"`, `"sparsecnx"`, `"convnextv2"`, `"timm"` or `"transformers"`.
        source: format of the input; None recognises it.
        conv_mlp: with `to="timm"`, True for a model built with `conv_mlp=True`; None for what timm builds: True for
            atto to nano, False for the other sizes and any other widths.

    Raises:
        CheckpointError: the encoder has another stem or no biases, or is a V1, which `to` does not hold; or an entry
            is unknown, missing, or of a shape that the rest of the network contradicts, or is sparse, quantized or
            otherwise no plain tensor of floating-point numbers; or there are more than 10,000 entries; or the new
            format cannot express the decoder or so many classes.
        ValueError: there is no such format, or `conv_mlp` is given without timm.
    """
    _check_name("to", to)
    if conv_mlp is not None and to != "timm":
        raise ValueError(f"conv_mlp is {conv_mlp}: expected only with to='timm', not {to!r}")
    refuse_own(state_dict)
    origin = detect_format(state_dict, source)
    ours, architecture = to_ours(state_dict, origin)
    target = _target(to, architecture, conv_mlp)
    if target not in formats.OF_ANY_KERNEL and not architecture.kernels.published:
        raise CheckpointError(
            f"has {architecture.kernels}: {to} holds networks with the published kernels only; convert to one of "
            f"{', '.join(format.name for format in formats.OF_ANY_KERNEL)}"
        )
    if target not in formats.OF_BLOCKS_V1 and architecture.block == "v1":
        names = ", ".join(dict.fromkeys(format.name for format in formats.OF_BLOCKS_V1))
        raise CheckpointError(f"has blocks v1: {to} holds ConvNeXt V2 only; convert to one of {names}")
    if target is formats.FCMAE and architecture.decoder and architecture.decoder.patch_size != STRIDE:
        raise CheckpointError(
            f"its decoder predicts patches of {architecture.decoder.patch_size} pixels: decoders of fcmae predict "
            f"{STRIDE} pixels only"
        )
    if to == "transformers" and (architecture.num_classes or 0) > MOST_LABELS:
        raise CheckpointError(f"has {architecture.num_classes} classes: transformers takes {MOST_LABELS} at most")
    converted: dict[str, Tensor] = {}
    left_out = []
    storages: set[int] = set()
    for name, (their_name, tensor) in ours.items():
        place = target.to_theirs(name)
        if place is None:
            left_out.append(their_name)
            continue
        converted[place[0]] = own(place[1].theirs(tensor), storages)
    warn_of_not_finite({name: tensor for name, tensor in ours.values() if name not in left_out})
    return Conversion(converted, target, origin, architecture, left_out)


def detect_format(state_dict: Mapping[str, Tensor], among: str | None = None) -> Format:
    """Return the format that knows most of the names.

    Args:
        state_dict: names and tensors.
        among: name of the format if it is known; the choice is then between its variants.

    Raises:
        CheckpointError: no format knows any name, or an entry is empty or no dense tensor of floating-point numbers.
        ValueError: `among` is no format.
    """
    if among is not None:
        _check_name("source", among)
    if len(state_dict) > MOST_ENTRIES:
        raise CheckpointError(f"has {len(state_dict)} entries: expected at most {MOST_ENTRIES}")
    for name, tensor in state_dict.items():
        _check_entry(name, tensor)
    candidates = [format for format in formats.ALL if among in (None, format.name)]
    scores = [_score(format, state_dict) for format in candidates]
    best = max(scores)
    if best[0] == 0:
        _refuse_v1(state_dict)
        wanted = "a ConvNeXt" if among is None else among
        they_are = f"they are {_some(state_dict)}{prefixes_of(state_dict)}"
        raise CheckpointError(f"none of its {len(state_dict)} entries is one of {wanted}: {they_are}")
    return candidates[scores.index(best)]


def own_encoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the entries of an encoder of ours that no format holds; None for any other state dict."""
    encoder = _encoder(state_dict)
    return encoder if _not_in_formats(encoder) else None


def refuse_own(state_dict: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for an encoder of ours that no format holds."""
    if parts := _not_in_formats(_encoder(state_dict)):
        raise CheckpointError(
            f"has an encoder with {' and '.join(parts)}, which no format holds: sparsecnx.load_encoder loads it into a "
            "model of sparsecnx that was made with the same options"
        )


def _encoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of an encoder by the names that ours have."""
    names = {name: str(name).removeprefix("encoder.") for name in state_dict}
    return {own: state_dict[name] for name, own in names.items() if own.startswith(ENCODER)}


def _not_in_formats(encoder: Collection[str]) -> list[str]:
    """Return what an encoder of ours has that no format holds."""
    if "downsample_layers.0.0.weight" not in encoder:
        return []
    parts = {
        "a stem of 3x3 convolutions": "downsample_layers.0.3.weight" in encoder,
        "no bias of the depthwise convolutions": not any(".dwconv.bias" in name for name in encoder),
    }
    return [part for part, there in parts.items() if there]


def _refuse_v1(names: Collection[str]) -> None:
    """Raise CheckpointError for names of a ConvNeXt V1 of transformers or torchvision."""
    scale = next((name for name in names if re.search(r"\.\d+\.(layer_scale|layer_scale_parameter)$", name)), None)
    if scale is not None:
        problem = "expected a ConvNeXt V2, or V1 with the names of timm or the published code"
        raise CheckpointError(f"is a ConvNeXt V1, with the layer scale {scale} and no GRN: {problem}")


def _check_entry(name: object, tensor: object) -> None:
    """Raise CheckpointError unless an entry is a dense floating-point tensor with a name, not empty."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name} is {type(tensor).__name__}: expected a state dict, names with tensors")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise CheckpointError(f"{name} is {layout}: expected a dense tensor")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is {tensor.dtype}: expected floating-point numbers")
    if 0 in tensor.shape:
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}: expected sizes of at least 1")


def _score(format: Format, state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many names a format knows, and how many of these have dimensions that only this format has."""
    layouts = {name: place[1] for name in state_dict if (place := format.to_ours(name)) is not None}
    return len(layouts), sum(layout.ndim == state_dict[name].ndim for name, layout in layouts.items())


def to_ours(state_dict: Mapping[str, Tensor], origin: Format) -> tuple[dict[str, tuple[str, Tensor]], Architecture]:
    """Return by our names, in the order of our modules, the name in the input and the tensor in our layout."""
    places = {name: origin.to_ours(name) for name in state_dict}
    _refuse_v1(state_dict)
    if unknown := {name: state_dict[name] for name, place in places.items() if place is None}:
        raise CheckpointError(f"{origin.name} has no place for {_some(unknown)} in a ConvNeXt")
    given = {place[0]: (name, state_dict[name], place[1]) for name, place in places.items() if place is not None}
    architecture = infer({name: tensor for name, (_, tensor, _) in given.items()}, origin)
    try:
        entries = architecture.parameters()
    except (RuntimeError, ValueError) as error:  # sizes whose product no tensor can have, or a wrong number of stages
        raise CheckpointError(f"no network is a {architecture} ({error})") from error
    lacking, misshapen = {}, []
    for name, parameter in entries.items():
        their_name, layout = origin.place(name)
        expected = layout.theirs(parameter)
        if name not in given:
            lacking[their_name] = expected
        elif (shape := given[name][1].shape) != expected.shape:
            misshapen.append(f"{their_name} is {tuple(shape)}: expected {tuple(expected.shape)}")
    if superfluous := {name: tensor for ours, (name, tensor, _) in given.items() if ours not in entries}:
        depths = " ".join(map(str, architecture.depths))
        raise CheckpointError(f"a network of depths {depths} has no {_some(superfluous)}")
    if lacking:
        raise CheckpointError(f"lacks {_some(lacking)}")
    if misshapen:
        raise CheckpointError(misshapen[0] + (f", and {len(misshapen) - 1} more" if misshapen[1:] else ""))
    laid_out = {name: (given[name][0], given[name][2].ours(given[name][1])) for name in entries}
    return laid_out, architecture


def _target(to: str, architecture: Architecture, conv_mlp: bool | None) -> Format:
    """Return the variant of a format that fits the network."""
    if to == "timm":
        conv = architecture.size in formats.TIMM_CONV_SIZES if conv_mlp is None else conv_mlp
        return formats.TIMM_CONV if conv else formats.TIMM_LINEAR
    if to == "transformers":
        return formats.TRANSFORMERS_MODEL if architecture.num_classes is None else formats.TRANSFORMERS_CLASSIFIER
    return next(format for format in formats.ALL if format.name == to)


def own(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return a contiguous tensor with its own storage. Files hold storages, and safetensors refuses shared ones."""
    tensor = tensor.detach().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def warn_of_not_finite(entries: Mapping[str, Tensor]) -> None:
    """Warn the caller's caller of entries that hold an infinite number or NaN."""
    found = [name for name, tensor in entries.items() if not _is_finite(tensor.detach())]
    if found:
        names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        warnings.warn(escape(f"kept numbers that are not finite, in {names}"), stacklevel=3)


def _is_finite(numbers: Tensor) -> bool:
    if numbers.is_meta or "float4" in str(numbers.dtype):  # these have no such numbers
        return True
    return bool(torch.isfinite(numbers.float() if numbers.itemsize == 1 else numbers).all())  # not for 8 bits


def _check_name(argument: str, name: str) -> None:
    if name not in formats.NAMES:
        raise ValueError(f"{argument} is {name!r}: expected one of {', '.join(formats.NAMES)}")


def _some(entries: Mapping[str, Tensor], shown: int = 3) -> str:
    """Format a few entries with their shapes, and the number of the others."""
    names = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(entries.items())[:shown]]
    more = [f"{len(entries) - shown} more"] if len(entries) > shown else []
    return ", ".join(names + more) or "none"
