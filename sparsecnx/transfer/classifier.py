"""Classifiers on pretrained networks, and the learning rates of their layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.common.errors import InputError
from sparsecnx.models import SIZES, ConvNeXtV2
from sparsecnx.models.convnextv2 import ConvNeXtV2Encoder, init_weights
from sparsecnx.models.encoders import stages_of
from sparsecnx.train.code import TIMM
from sparsecnx.train.contents import Kind
from sparsecnx.train.networks import encoder_options, foreign_encoder
from sparsecnx.transfer.recipe import FinetuneRecipe, TransferRecipe

BETAS = (0.9, 0.999)
GROUPS = 12  # layers of the decay by groups
BLOCKS_OF_A_GROUP = 3
PARAMETER = re.compile(r"(?:encoder\.)?(downsample_layers|stages)\.(\d+)\.(\d+)")


class PooledClassifier(nn.Module):
    """Mean over the sites of the last map of any encoder, LayerNorm, Linear.

    Args:
        encoder: see `stages_of`.
        num_classes: outputs.
        head_init_scale: factor on the initial weights of the Linear.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, head_init_scale: float = 1.0) -> None:
        super().__init__()
        self._stages = stages_of(encoder)
        self.encoder = encoder
        self.norm = nn.LayerNorm(self._stages.channels[-1])
        self.head = nn.Linear(self._stages.channels[-1], num_classes)
        init_weights(self.head)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of images `(B, C, *spatial)`."""
        last: Any = self._stages.maps(self.encoder, images, last=1)[0]  # type: ignore[arg-type]
        return self.head(self.norm(last.flatten(2).mean(2)))


def build_classifier(recipe: FinetuneRecipe) -> nn.Module:
    """Build the classifier that a recipe trains, with weights drawn from torch's global generator.

    Raises:
        InputError: there is no such network for these data.
    """
    if recipe.model in SIZES:
        options = {**encoder_options(recipe), "drop_path_rate": recipe.drop_path_rate}
        return ConvNeXtV2(recipe.num_classes, recipe.head_init_scale, **options)
    try:
        if recipe.model.startswith(TIMM):
            rate = {"drop_path_rate": recipe.drop_path_rate} if recipe.drop_path_rate else {}
            return foreign_encoder(recipe, num_classes=recipe.num_classes, **rate)
        with torch.device("cpu"):
            encoder = foreign_encoder(recipe)
            model = PooledClassifier(encoder, recipe.num_classes, recipe.head_init_scale)
            _freeze_what_is_not_trained(model, torch.zeros(1, recipe.in_chans, *recipe.size))
            return model
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise InputError("model", recipe.model, f"cannot be fine-tuned ({error})") from error


def _freeze_what_is_not_trained(model: nn.Module, images: Tensor) -> None:
    """Turn off the gradients of parameters that get none, such as a head that the encoder has but does not call."""
    model.eval()  # keeps the statistics of batch norm
    model(images).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    model.train()


def layer_groups(model: nn.Module, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    """Return AdamW's groups: of each layer the parameters that decay, and the biases and vectors, which do not.

    The factor of a layer on the learning rate is `lr_scale`.

    Raises:
        InputError: the network has no layers that can be told apart.
    """
    return grouped(model, _layers(model, recipe), recipe)


def grouped(model: nn.Module, layers: Mapping[str, int], recipe: TransferRecipe) -> list[dict[str, Any]]:
    """Return the groups of `layer_groups` of a model whose parameters are in these layers, by name."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(side > 1 for side in parameter.shape) <= 1 or name.endswith("bias") or name in undecayed
        scale = recipe.layer_decay ** (max(layers.values()) - layers[name])
        group = {"params": [], "weight_decay": 0.0 if vector else recipe.weight_decay, "lr_scale": scale}
        groups.setdefault((layers[name], vector), group | {"betas": BETAS})["params"].append(parameter)
    return list(groups.values())


def _layers(model: Any, recipe: FinetuneRecipe) -> dict[str, int]:
    """Return the number of the layer of every parameter, that of the head the largest."""
    own = model.encoder if isinstance(model, PooledClassifier) else model
    return layers_of(model, own, recipe)


def layers_of(model: Any, own: nn.Module, recipe: TransferRecipe) -> dict[str, int]:
    """Return the number of the layer of every parameter of a network.

    Args:
        model: the network, or what adds a head to it.
        own: the network.
        recipe: says how layers are counted.

    Raises:
        InputError: it has no layers that can be told apart.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(own, ConvNeXtV2Encoder):
        stages: Any = own.stages
        depths = [len(stage) for stage in stages]
        return {name: layer_of(name, depths, recipe.layer_decay_type) for name in names}
    if recipe.layer_decay == 1:
        return dict.fromkeys(names, 0)
    if not hasattr(model, "group_matcher"):
        expected = "expected 1, since the network does not say what its layers are"
        raise InputError("layer_decay", recipe.layer_decay, expected)
    from timm.models import group_parameters

    found: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {name: found[name] for name in names}


def layer_of(name: str, depths: list[int], kind: str) -> int:
    """Return the layer of a parameter of a ConvNeXt, as the published fine-tuning counts them.

    Args:
        name: of the parameter.
        depths: blocks of each stage.
        kind: `"single"`: the blocks are the layers 1 to sum(depths), a downsampling is in that of the block behind it.
            `"group"`: the stem is layer 0, the first two stages 1 and 2, three blocks of the third are one from 3 on,
            and the fourth is 12. What is neither is in the layer behind the last.
    """
    found = PARAMETER.match(name)
    last = GROUPS if kind == "group" else sum(depths)
    if found is None:
        return last + 1
    part, stage, block = found[1], int(found[2]), int(found[3])
    if kind == "single":
        return sum(depths[:stage]) + 1 + (block if part == "stages" else 0)
    if stage == 0:
        return 0 if part == "downsample_layers" else 1
    if stage == 1:
        return 2
    if stage == 2:
        return 3 + (block // BLOCKS_OF_A_GROUP if part == "stages" else 0)
    return GROUPS


FINETUNING = Kind("finetune", FinetuneRecipe, build_classifier, layer_groups)
