"""The multi-pretext masked autoencoder, MP-MAE (arXiv 2405.02771): one image in, several targets out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsecnx.models.convnextv2 import init_weights
from sparsecnx.models.decoder import decoder_blocks, every_site, to_grid
from sparsecnx.models.encoders import stages_of
from sparsecnx.models.masked_encoder import MaskedEncoder
from sparsecnx.models.targets import PixelTarget, Target
from sparsecnx.nn import LayerNorm
from sparsecnx.nn.layers import CONVOLUTIONS, axis_sizes
from sparsecnx.tensor import SparseTensor


class MPMAEOutput(NamedTuple):
    """The output of `MPMAE`.

    Attributes:
        loss: the total loss, a scalar.
        losses: the loss of each target by its name, without its weight, 0 if the batch holds no value of it.
        predictions: that of each target by its name: of pixels `(B, prod(patch) * channels, *grid)`, the pixels of each
            patch in the order (row, column, channel or class); of labels `(B, values or classes)`.
        mask: bool `(B, L)`, True = masked.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    predictions: dict[str, Tensor]
    mask: Tensor


class MPMAE(MaskedEncoder):
    """An encoder on the visible patches of one image, and a decoder for each target.

    Each decoder is that of `FCMAE`. Labels of an image take its features after LayerNorm, averaged over all sites, to a
    Linear. The image itself is a target like any other, if it is to be reconstructed.

    Args:
        encoder: see `FCMAE`.
        targets: what is predicted, by name.
        patch_size: pixels per patch side, see `FCMAE`.
        decoder_depth: blocks of each decoder.
        decoder_dim: channels of each decoder.
        uncertainty: False adds up the losses times the weights of the targets. True learns a log variance s of each
            loss L, `log_vars`, and adds up `exp(-s) L + s` (arXiv 1705.07115, as in MP-MAE's code); the weights must be
            1, and a target without a value in the batch adds nothing.

    Raises:
        TypeError, ValueError: the encoder has no feature maps of images, `patch_size` does not fit its stride, or a
            target has a name that no module can have, a patch of other dimensions or, with `uncertainty`, a weight.
    """

    paper = "https://arxiv.org/abs/2405.02771"

    def __init__(
        self,
        encoder: nn.Module,
        targets: Mapping[str, Target],
        patch_size: int | Sequence[int] | None = None,
        *,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        uncertainty: bool = False,
    ) -> None:
        stages = stages_of(encoder, patch_size)
        super().__init__(encoder, stages, patch_size)
        self.targets = check_targets(targets, uncertainty)
        self.patches = {
            name: axis_sizes("patch_size", target.patch_size, self.ndim)
            for name, target in self.targets.items()
            if isinstance(target, PixelTarget) and target.patch_size is not None
        }
        self._needs_masked = all(isinstance(t, PixelTarget) and t.loss_on == "masked" for t in self.targets.values())
        self._sites = tuple(p // step for p, step in zip(self.patch, stages.strides[-1], strict=True))
        conv = CONVOLUTIONS[self.ndim]
        self.proj = conv(stages.channels[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, *(1,) * self.ndim))
        self.decoders, self.preds = nn.ModuleDict(), nn.ModuleDict()
        for name, target in self.targets.items():
            self.decoders[name] = decoder_blocks(encoder, decoder_depth, decoder_dim, self.ndim)
            outputs = target.outputs(self._patch_of(name))
            self.preds[name] = (
                conv(decoder_dim, outputs, self._sites, stride=self._sites)
                if isinstance(target, PixelTarget)
                else LabelPredictor(decoder_dim, outputs)
            )
        self.log_vars = nn.Parameter(torch.zeros(len(self.targets))) if uncertainty else None
        for module in (self.proj, self.decoders, self.preds):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for backward, see `ConvNeXtV2Encoder.set_grad_checkpointing`."""
        super().set_grad_checkpointing(enable)
        decoder: Any
        for decoder in self.decoders.values():
            decoder.grad_checkpointing = enable

    def forward(
        self,
        images: Tensor,
        targets: Mapping[str, Tensor | None],
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        visible: int | None = None,
        counts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MPMAEOutput:
        """Mask and encode images, and predict the targets.

        Args:
            images, mask_ratio, mask, visible, generator: see `MaskedAutoencoder.forward`.
            targets: the values of each target, by name, see the classes of the targets; None where the batch has none.
            counts: what the errors of each target are divided by, instead of `counts(targets, mask)`, such as the mean
                of these over all processes that train together.
            valid: bool of the shape of `images`, or `(B, 1, *spatial)`; False = the pixel has no value and enters the
                network as 0.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        self._check(images, targets)
        x, mask = self.mask_images(images, mask_ratio, mask, valid=valid, visible=visible, generator=generator)
        predictions = self.predict(x)
        errors = self.summed_errors(targets, predictions, mask)
        if counts is not None:
            errors = {name: (errors[name][0], count) for name, count in zip(self.targets, counts, strict=True)}
        loss, losses = self.total_loss(errors)
        return MPMAEOutput(loss, losses, predictions, mask)

    def predict(self, x: SparseTensor) -> dict[str, Tensor]:
        """Return the predictions of each target, see `MPMAEOutput`, from the visible pixels."""
        encoded = self._stages.maps(self.encoder, x, last=1)[0]
        features = every_site(encoded, self.proj, self.mask_token, self._sites)
        predictions = {}
        for name, decoder in self.decoders.items():
            found = self.preds[name](decoder(features))
            predictions[name] = to_grid(found) if isinstance(found, SparseTensor) else found
        return predictions

    def counts(self, targets: Mapping[str, Tensor | None], mask: Tensor) -> Tensor:
        """Return the number of patches or images of each target whose errors count, float32 `(targets,)`.

        Args:
            targets: see `forward`.
            mask: bool `(B, L)`, True = masked.
        """
        counts = [
            mask.new_zeros((), dtype=torch.float32)
            if (value := targets[name]) is None
            else target.counted(value, mask, self._patch_of(name)).sum().float()
            for name, target in self.targets.items()
        ]
        return torch.stack(counts)

    def summed_errors(
        self, targets: Mapping[str, Tensor | None], predictions: Mapping[str, Tensor], mask: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each target the sum of its errors, and the number of patches or images that they are of.

        Args:
            targets: see `forward`.
            predictions, mask: as `forward` returns them.
        """
        return {
            name: (0 * predictions[name].sum(), mask.new_zeros((), dtype=torch.long))
            if (value := targets[name]) is None
            else target.summed_error(value, predictions[name], mask, self._patch_of(name))
            for name, target in self.targets.items()
        }

    def total_loss(self, errors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss, and that of each target, from `summed_errors`.

        Processes that hold different numbers of patches first add up sums and counts, or give `counts` to `forward`.
        """
        losses = {name: total / count.clamp(min=1e-6) for name, (total, count) in errors.items()}
        if self.log_vars is None:
            terms = [self.targets[name].weight * loss for name, loss in losses.items()]
        else:
            terms = [
                (torch.exp(-s) * losses[name] + s) * (errors[name][1] > 0)
                for name, s in zip(self.targets, self.log_vars, strict=True)
            ]
        return torch.stack(terms).sum(), losses

    def _patch_of(self, name: str) -> tuple[int, ...]:
        return self.patches.get(name, self.patch)

    def _check(self, images: Tensor, targets: Mapping[str, Tensor | None]) -> None:
        """Raise TypeError or ValueError unless the targets fit the images."""
        grid = self.grid(images)
        if not isinstance(targets, Mapping) or set(targets) != set(self.targets):
            given = ", ".join(sorted(targets)) if isinstance(targets, Mapping) else f"a {type(targets).__name__}"
            raise ValueError(f"targets is {given}: expected a value for each of {', '.join(sorted(self.targets))}")
        for name, target in self.targets.items():
            if (value := targets[name]) is not None:
                sides = [cells * p for cells, p in zip(grid, self._patch_of(name), strict=True)]
                target.check(f"targets[{name!r}]", value, (images.shape[0], *sides))


class LabelPredictor(nn.Module):
    """LayerNorm of every site, mean over the sites of an image, Linear.

    Args:
        dim: channels of the features.
        outputs: values of an image.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.linear = nn.Linear(dim, outputs)

    def forward(self, x: SparseTensor) -> Tensor:
        """Return `(B, outputs)` for a SparseTensor without a mask."""
        return self.linear(self.norm(x.features).unflatten(0, (x.shape[0], -1)).mean(dim=1))


def check_targets(targets: Mapping[str, Target], uncertainty: bool) -> dict[str, Target]:
    """Return the targets of an `MPMAE`.

    Raises:
        TypeError, ValueError: there is none, one has a name that no module can have, or a weight beside `uncertainty`.
    """
    if not targets:
        raise ValueError(f"targets is {targets}: expected one or more")
    taken = nn.ModuleDict()
    for name, target in targets.items():
        if not isinstance(target, Target):
            raise TypeError(f"targets[{name!r}] is a {type(target).__name__}: expected a target, such as ImageTarget")
        if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
            expected = "expected text without a dot that is no attribute of a torch.nn.ModuleDict"
            raise ValueError(f"targets has the name {name!r}: {expected}")
        if uncertainty and target.weight != 1:
            raise ValueError(f"weight of {name} is {target.weight}: expected 1, since uncertainty learns the weights")
    return dict(targets)
