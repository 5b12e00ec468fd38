"""The networks that `sparsecnx pretrain` trains: our sizes, and `timm:` with the name of a ConvNet of timm."""

from __future__ import annotations

import difflib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsecnx.common.errors import InputError
from sparsecnx.models import FCMAE, SIZES, ConvNeXtV2Encoder, SparK
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder

if TYPE_CHECKING:
    from sparsecnx.train.recipe import Recipe

PATCH_SIZE = 32
TIMM = "timm:"


def unknown_network(name: str) -> str | None:
    """Return why there is no network of this name; None where there is."""
    if name in SIZES:
        return None
    if not name.startswith(TIMM):
        return f"expected one of {', '.join(SIZES)}, or {TIMM} and a network of timm, such as {TIMM}resnet50"
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed: pip install timm"
    import timm

    wanted = name.removeprefix(TIMM)
    if timm.is_model(wanted.partition(".")[0]):
        return None
    near = difflib.get_close_matches(wanted, timm.list_models(), 3)
    return "timm has no such network" + (f"; did you mean {', '.join(TIMM + other for other in near)}?" if near else "")


def build_model(recipe: Recipe) -> MaskedAutoencoder:
    """Build the model that a recipe trains, with weights drawn from torch's global generator.

    Parameters of a network of timm that pretraining does not reach, such as a norm of its head, get `requires_grad`
    False. To find them it runs once, on the CPU, also under `torch.device("meta")`.

    Raises:
        InputError: the network does not run on visible patches, or its stride is not that of the patch.
    """
    if recipe.model in SIZES:
        size = SIZES[recipe.model]
        return _autoencoder(recipe, ConvNeXtV2Encoder(size.depths, size.dims, grn_scope=recipe.grn_scope))
    import timm

    try:
        with torch.device("cpu"):
            model = _autoencoder(recipe, timm.create_model(recipe.model.removeprefix(TIMM), num_classes=0))
            _freeze_what_is_not_trained(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise InputError(
            "model", recipe.model, f"cannot be pretrained on patches of {PATCH_SIZE} px ({error})"
        ) from error
    return model


def _autoencoder(recipe: Recipe, encoder: nn.Module) -> MaskedAutoencoder:
    kinds: dict[str, Any] = {"fcmae": FCMAE, "spark": SparK}
    return kinds[recipe.method](encoder, PATCH_SIZE, norm_pix_loss=recipe.norm_pix_loss)


def _freeze_what_is_not_trained(model: MaskedAutoencoder) -> None:
    """Turn off the gradients of parameters that get none, so that no optimizer holds them."""
    model.eval()  # keeps the statistics of batch norm
    images, mask = torch.zeros(1, model.in_chans, PATCH_SIZE, 2 * PATCH_SIZE), torch.tensor([[False, True]])
    model(images, mask=mask)[0].backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    model.train()
