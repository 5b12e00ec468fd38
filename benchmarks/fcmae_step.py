"""A whole pretraining step on a GPU: forward, loss, backward, fused AdamW; FCMAE and a ViT's MAE.

    python benchmarks/fcmae_step.py --out fcmae.json

Five variants, by autocast with float32 weights, each in a process of its own (see steps.py):

    vit           transformers' ViTMAEForPreTraining, ViT-B/16, mask ratio 0.75, scaled_dot_product_attention.
                  Where transformers is not installed: `vit_torch`, the same arithmetic out of torch.nn
    sparse        FCMAE (`sparsecnx.models.FCMAE`)
    sparse_graph  the same, the whole step as a CUDA graph
    dense         FCMAE with the encoder computed densely, times the mask, in channels_last; every block,
                  downsampling layer and the decoder with the loss through torch.compile
    vit_compiled  vit through torch.compile

One batch of random images and one mask serve all steps: loading data and drawing masks are not timed. Losses of
sparse and dense are held against the dense model's in float32 on the same weights, images and mask; those of the
others have to be finite (`agrees`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import encoder
import steps
import torch
from encoder_step import bytes_per_image
from steps import Runner, Step, Variant
from torch import Tensor, nn

from sparsecnx import random_mask
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import FCMAE, SIZES, create_fcmae, masked_dense
from sparsecnx.train.recipe import BETAS

CHECKED = 4  # images whose loss is compared
LEARNING_RATE = 1.5e-4
VIT_RATIO = 0.75
NAMES = ("vit", "sparse", "sparse_graph", "dense", "vit_compiled")


class Work:
    """Model, images and mask of a case at a batch size, the same in every process."""

    def __init__(self, case: dict[str, Any], batch: int) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, torch.device(case["device"])
        torch.backends.cudnn.allow_tf32 = False  # what is checked against is float32
        with self.device:
            self.model = create_fcmae(case["size"])
        encoder.randomize(self.model.encoder)
        side = case["image"] // self.model.patch_size
        self.visible = visible_count(side * side, case["ratio"])
        mask = random_mask(batch, (side, side), case["ratio"], generator=torch.Generator().manual_seed(0))
        self.mask = mask.to(self.device)
        self.images = random_images(case, batch)

    def sparse_loss(self, images: Tensor, mask: Tensor) -> Tensor:
        with steps.autocast(self.case["device"], self.case["dtype"]):
            loss: Tensor = self.model(images, mask=mask, visible=self.visible)[0]
        return loss


def random_images(case: dict[str, Any], batch: int) -> Tensor:
    """The batch, channels_last: the first images the same at every batch size."""
    generator = torch.Generator(case["device"]).manual_seed(0)
    shape = (batch, 3, case["image"], case["image"])
    images = torch.randn(shape, generator=generator, device=case["device"])
    return images.to(memory_format=torch.channels_last)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], images: Tensor, check: Callable[[], dict[str, Any]], graph: bool
) -> Step:
    """A step of the recipe's optimizer on `loss()`."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE, betas=BETAS, fused=True, capturable=graph)

    def run() -> None:
        loss().backward()
        optimizer.step()

    return Step(run, steps.dropping(model), [images, *model.parameters()], check)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels alone, as in the recipe."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sparse(case: dict[str, Any], graph: bool, batch: int) -> Step:
    """FCMAE."""
    work = Work(case, batch)
    last: list[Tensor] = []

    def loss() -> Tensor:
        value = work.sparse_loss(work.images, work.mask)
        last[:] = [value.detach()]
        return value

    def check() -> dict[str, Any]:
        if graph:
            return {"loss": float(last[0]), "agrees": bool(last[0].isfinite())}
        return compared(work, lambda images, mask: work.sparse_loss(images, mask))

    return training_step(work.model, loss, work.images, check, graph)


def dense(case: dict[str, Any], batch: int) -> Step:
    """FCMAE computed densely, compiled block by block."""
    work = Work(case, batch)
    model = work.model.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    steps.compile_blocks(model.encoder, case)
    tail = steps.compiled(decode, case)
    low = getattr(torch, case["dtype"])

    def loss(images: Tensor, mask: Tensor) -> Tensor:
        with steps.autocast(case["device"], case["dtype"]):
            # Images in the low precision bring the mask, and with it the hidden layers, to it.
            encoded = masked_dense.forward_features(model.encoder, images.to(low), grid_mask(model, mask, images))[-1]
            return tail(model, encoded, images, mask)

    def check() -> dict[str, Any]:
        with torch.compiler.set_stance("force_eager"):
            return compared(work, loss)

    return training_step(model, lambda: loss(work.images, work.mask), work.images, check, graph=False)


def decode(model: FCMAE, encoded: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Loss from the last stage `(B, C, gh, gw)`, what `FCMAE` does with a SparseTensor."""
    visible = ~grid_mask(model, mask, images)[:, None]
    x = torch.where(visible, model.proj(encoded), model.mask_token)
    return model.reconstruction_loss(images, model.pred(model.decoder(x)), mask)


def grid_mask(model: FCMAE, mask: Tensor, images: Tensor) -> Tensor:
    """Mask `(B, L)` as `(B, gh, gw)`."""
    return mask.view(-1, *model.grid(images))


def compared(work: Work, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """Relative error of a loss on the first images against the dense model's in float32."""
    images, mask, model = work.images[:CHECKED], work.mask[:CHECKED], work.model
    with torch.no_grad():
        found = loss(images, mask)
        with torch.compiler.set_stance("force_eager"):
            encoded = masked_dense.forward_features(model.encoder, images, grid_mask(model, mask, images))[-1]
            expected = decode(model, encoded, images, mask)
    error = encoder.relative_error(found, expected.float())
    return {"errors": {"loss": error}, "agrees": error <= encoder.TOLERANCE[work.case["dtype"]]}


def vit(case: dict[str, Any], compile_it: bool, batch: int) -> Step:
    """The MAE of a ViT-B/16."""
    torch.manual_seed(0)
    model = (transformers_vit if steps.installed("transformers") else TorchMAE)(case["image"])
    model.to(case["device"])
    if compile_it:
        model.compile(dynamic=False, backend=case["compiler"])
    images = random_images(case, batch).contiguous()
    last: list[Tensor] = []

    def loss() -> Tensor:
        with steps.autocast(case["device"], case["dtype"]):
            out = model(images)
        value: Tensor = out if isinstance(out, Tensor) else out.loss
        last[:] = [value.detach()]
        return value

    return training_step(
        model, loss, images, lambda: {"loss": float(last[0]), "agrees": bool(last[0].isfinite())}, False
    )


def transformers_vit(image: int) -> nn.Module:
    """ViTMAEForPreTraining at its defaults, which are ViT-B/16's."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(image_size=image, mask_ratio=VIT_RATIO, norm_pix_loss=True)
    return ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")


class TorchMAE(nn.Module):
    """The arithmetic of a ViT's MAE (arXiv 2111.06377) out of torch.nn: what a step costs, not a model to train.

    Args:
        image, patch: pixels a side.
        dim, depth, heads: of the encoder, ViT-B's by default; those of the decoder are the paper's.
    """

    def __init__(
        self,
        image: int,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.patch, cells = patch, (image // patch) ** 2
        self.kept = int(cells * (1 - VIT_RATIO))
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, cells, dim), requires_grad=False)
        self.encoder = transformer(dim, depth, heads)
        self.to_decoder = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(1, 1 + cells, decoder_dim), requires_grad=False)
        self.decoder = transformer(decoder_dim, decoder_depth, decoder_heads)
        self.pred = nn.Linear(decoder_dim, 3 * patch * patch)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to the loss over a random choice of masked patches."""
        patches = nn.functional.pixel_unshuffle(images, self.patch).flatten(2).mT
        batch, cells, _ = patches.shape
        order = torch.rand(batch, cells, device=images.device).argsort(dim=1)
        kept, restore = order[:, : self.kept, None], order.argsort(dim=1)[:, :, None]
        x = self.embed(patches) + self.position
        x = x.gather(1, kept.expand(-1, -1, x.shape[-1]))
        x = self.to_decoder(self.encoder(torch.cat([self.cls.to(x.dtype).expand(batch, -1, -1), x], dim=1)))
        blank = self.mask_token.to(x.dtype).expand(batch, cells - self.kept, -1)
        sites = torch.cat([x[:, 1:], blank], dim=1).gather(1, restore.expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], sites], dim=1) + self.decoder_position
        pred = self.pred(self.decoder(x))[:, 1:]
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        error = (pred - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)
        masked = restore[:, :, 0] >= self.kept
        return (error * masked).sum() / masked.sum()


def transformer(dim: int, depth: int, heads: int) -> nn.Module:
    """Pre-norm layers with a final norm."""
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)


def variants(case: dict[str, Any]) -> dict[str, Variant]:
    """All variants of a case, by the names of `NAMES`."""
    library = "vit" if steps.installed("transformers") else "vit_torch"
    vit_case = {**case, "size": "vit-b16", "ratio": VIT_RATIO}
    return {
        "vit": Variant(library, vit_case, functools.partial(vit, vit_case, False)),
        "sparse": Variant("sparse", case, functools.partial(sparse, case, False)),
        "sparse_graph": Variant("sparse_graph", case, functools.partial(sparse, case, True), graph=True),
        "dense": Variant("dense", case, functools.partial(dense, case)),
        "vit_compiled": Variant(f"{library}_compiled", vit_case, functools.partial(vit, vit_case, True)),
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = steps.arguments("Time a pretraining step: FCMAE sparse and dense, and a ViT's MAE.", list(SIZES))
    parser.add_argument("--variants", nargs="+", choices=NAMES, help="by default all that the device can run")
    options = steps.parsed(parser, given)
    device = steps.facts(options.device)
    names = options.variants or [name for name in NAMES if name != "sparse_graph" or device["name"] != "cpu"]
    runner = Runner(options.out, options.deadline, options.repeat_seconds, options.limit)
    for index, size in enumerate(options.size):
        case = steps.settings(options, size)
        per_image = bytes_per_image(size, options.image, options.dtype)
        batches = steps.batches_to_try(options.batch, per_image, device["memory_bytes"])
        found = variants(case)
        for name in ("vit", "dense", "sparse", "sparse_graph"):
            if name not in names or (name == "vit" and index):
                continue
            tried = sorted(options.batch, reverse=True) if name == "vit" else batches
            fits = runner.measure(found[name], tried)
            if name == "dense" and fits is not None:
                batches = [fits]
    if "vit_compiled" in names:
        runner.measure(variants(steps.settings(options, options.size[0]))["vit_compiled"], sorted(options.batch)[::-1])
    return int(runner.failed)


if __name__ == "__main__":
    sys.exit(main())
