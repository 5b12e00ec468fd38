"""The classifier of ConvNeXt V2, with the methods of timm's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecnx.models.convnextv2 import ConvNeXtV2Encoder, init_weights
from sparsecnx.tensor import SparseTensor


class ConvNeXtV2(ConvNeXtV2Encoder):
    """The classifier: stages, mean over space, LayerNorm, Linear. It has the methods of timm's models.

    Args:
        num_classes: outputs of the head; 0 leaves out its Linear.
        head_init_scale: factor on the initial head weights.
        drop_rate: dropout before the Linear of the head.
        global_pool: `"avg"`, or `""` for a head that runs at every site.
        **encoder: arguments of `ConvNeXtV2Encoder`.

    Raises:
        ValueError: `global_pool` is another one.
    """

    head: nn.Module
    global_pool: str

    def __init__(
        self,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **encoder: Any,
    ) -> None:
        super().__init__(**encoder)
        self.drop_rate = drop_rate
        self.head_hidden_size = self.num_features
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=self.block_options["norm_eps"])
        self.reset_classifier(num_classes, global_pool)
        with torch.no_grad():
            for weight in self.head.parameters():  # the bias is 0
                weight.mul_(head_init_scale)

    def forward(self, images: Tensor | SparseTensor) -> Tensor:  # type: ignore[override]
        """Return logits `(B, num_classes)` for images `(B, in_chans, *spatial)` or for their visible pixels."""
        return self.forward_head(self.forward_features(images))

    def forward_features(
        self, images: Tensor | SparseTensor, mask: Tensor | None = None, visible: int | None = None
    ) -> Any:
        """Return the output of the last stage alone, as timm's classifiers do; `ConvNeXtV2Encoder` has the arguments.

        `forward_intermediates` returns those of all stages.
        """
        return self._outputs(images, mask, visible)[-1]

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Return logits for the output of the last stage; with `pre_logits` the features that the Linear takes."""
        pooled = self.global_pool == "avg"
        y = x.mean(dim=tuple(range(2, 2 + self.ndim))) if pooled else x.movedim(1, -1)
        y = nn.functional.dropout(self.norm(y), self.drop_rate, self.training)
        if not pre_logits:
            y = self.head(y)
        return y if pooled else y.movedim(-1, 1)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, a Linear, or an Identity if `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: outputs; 0 leaves it out.
            global_pool: as in the constructor; None keeps the present one.
        """
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool is {global_pool!r}: expected 'avg' or ''")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self._arguments = {**self._arguments, "num_classes": num_classes, "global_pool": self.global_pool}
        where = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=where.device, dtype=where.dtype)
            init_weights(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and with `prune_norm` and `prune_head` parts of the head.

        Without its last stages a network loses its norm and head in any case.
        """
        stages = len(self.stages)
        taken = super().prune_intermediate_layers(indices)
        cut = len(self.stages) < stages
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        self.head_hidden_size = self.num_features
        return taken
