"""The networks that `sparsecnx pretrain` trains: our sizes, `timm:` and a ConvNet of timm, and `module:factory`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsecnx.common.errors import InputError
from sparsecnx.models import FCMAE, MPMAE, SIZES, ConvNeXtV2Encoder, SparK
from sparsecnx.models.masked_encoder import MaskedEncoder
from sparsecnx.train.code import TIMM, load_code
from sparsecnx.train.recipe import Recipe

# The halvings of our networks after the stem. Their last three are these, the stem has the others.
DOWNSAMPLINGS = 3


def build_model(recipe: Recipe) -> MaskedEncoder:
    """Build the model that a recipe trains, with weights drawn from torch's global generator.

    Parameters of a network of timm, or of a factory, that pretraining does not reach, such as a norm of its head, get
    `requires_grad` False. To find them it runs once, on the CPU, also under `torch.device("meta")`.

    Raises:
        InputError: the network does not run on visible patches, its stride is not that of the patch, or it is for other
            channels or dimensions than the data.
    """
    try:
        if recipe.model in SIZES:
            return _autoencoder(recipe, ConvNeXtV2Encoder(**encoder_options(recipe)))
        with torch.device("cpu"):
            model = _autoencoder(recipe, foreign_encoder(recipe))
            _freeze_what_is_not_trained(model, recipe)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        patch = "x".join(map(str, recipe.patch)) if isinstance(recipe.patch_size, tuple) else recipe.patch_size
        problem = f"cannot be pretrained on patches of {patch} px ({error})"
        if recipe.method == "spark" and "below_tile" in problem:
            problem += "; --below-tile dense lets it go on dense below the patch"
        raise InputError("model", recipe.model, problem) from error
    return model


def encoder_options(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of a `ConvNeXtV2Encoder` whose stride is the patch, at most 32 on an axis.

    A patch of 32 has the published stem of 4 and three halvings. A smaller one has a smaller stem; below 8 the first
    downsamplings do not halve that axis, as those of networks for volumes with few slices.
    """
    size = SIZES[recipe.model]
    halvings = [min(patch, 32).bit_length() - 1 for patch in recipe.patch]
    stem = tuple(1 << max(n - DOWNSAMPLINGS, 0) for n in halvings)
    strides = tuple(tuple(2 if n >= DOWNSAMPLINGS - i else 1 for n in halvings) for i in range(DOWNSAMPLINGS))
    return {
        "depths": size.depths,
        "dims": size.dims,
        "in_chans": recipe.in_chans,
        "grn_scope": recipe.grn_scope,
        "ndim": recipe.ndim,
        "stem": stem,
        "strides": strides,
        "stem_type": recipe.stem_type,
        "block": recipe.block,
        "norm_eps": recipe.norm_eps,
        "grn_eps": recipe.grn_eps,
        "dwconv_bias": recipe.dwconv_bias,
    }


def foreign_encoder(recipe: Recipe, **options: Any) -> nn.Module:
    """Return a network of timm or of a factory, for the channels and dimensions of the data.

    Args:
        recipe: it names the network.
        **options: further arguments of a network of timm.

    Raises:
        ValueError: it is for other channels or dimensions.
    """
    if recipe.model.startswith(TIMM):
        import timm

        options = {"num_classes": 0, **options}
        network: nn.Module = timm.create_model(recipe.model.removeprefix(TIMM), in_chans=recipe.in_chans, **options)
    else:
        network = load_code(recipe.model)()
    first: Any = next((module for module in network.modules() if isinstance(module, _ConvNd)), None)
    if first is not None:
        dimensions, channels = first.weight.ndim - 2, getattr(network, "in_chans", first.in_channels)
        if (dimensions, channels) != (recipe.ndim, recipe.in_chans):
            raise ValueError(
                f"it takes {channels} channels and {dimensions} dimensions, the data have {recipe.in_chans} channels "
                f"and {recipe.ndim} dimensions"
            )
    return network


def _autoencoder(recipe: Recipe, encoder: nn.Module) -> MaskedEncoder:
    options: dict[str, Any] = {"patch_size": recipe.patch_size}
    for field in ("decoder_dim", "decoder_depth"):
        if getattr(recipe, field) is not None:
            options[field] = getattr(recipe, field)
    if recipe.targets is not None:
        return MPMAE(encoder, recipe.predicted, uncertainty=recipe.uncertainty, **options)
    options |= {"norm_pix_loss": recipe.norm_pix_loss, "loss_on": recipe.loss_on}
    if recipe.method == "spark":
        return SparK(encoder, below_tile=recipe.below_tile, **options)
    return FCMAE(encoder, **options)


def _freeze_what_is_not_trained(model: MaskedEncoder, recipe: Recipe) -> None:
    """Turn off the gradients of parameters that pretraining does not reach."""
    # Two patches on every axis, or as many as two sites of the last map need. Every other one is visible.
    strides = (model.stride,) * recipe.ndim if isinstance(model.stride, int) else model.stride
    grid = [2 * max(stride // patch, 1) for stride, patch in zip(strides, recipe.patch, strict=True)]
    images = torch.zeros(1, model.in_chans, *(cells * patch for cells, patch in zip(grid, recipe.patch, strict=True)))
    mask = (torch.arange(math.prod(grid)) % 2 == 0).view(1, -1)
    given = [dict.fromkeys(model.targets)] if isinstance(model, MPMAE) else []
    freeze_what_is_not_trained(model, lambda: model(images, *given, mask=mask)[0])


def freeze_what_is_not_trained(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Turn off the gradients of parameters that get none from a loss, so that no optimizer holds them.

    Args:
        model: it is left in training mode.
        loss: calls the model.
    """
    model.eval()  # keeps the statistics of batch norm
    loss().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    model.train()
