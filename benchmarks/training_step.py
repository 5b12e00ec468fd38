"""Time a whole pretraining step: forward, loss, backward, fused AdamW; FCMAE and a ViT's MAE.

    python benchmarks/training_step.py --device cuda --dtype bfloat16 --size tiny base --batch 64 --out steps.json

Variants, with float32 weights, under autocast where --dtype is not float32:

    sparse        FCMAE (`sparsecnx.models.FCMAE`)
    sparse_graph  the same, the whole step as a CUDA graph, on a GPU
    dense         FCMAE with the encoder computed densely, times the mask, in channels_last, through torch.compile; with
                  --by-block block by block, which compiles faster
    vit           transformers' ViTMAEForPreTraining, ViT-B/16, mask ratio 0.75, scaled_dot_product_attention, eager

One batch of random images and one mask serve all steps: loading data and drawing masks are not timed. First the loss
of `sparse` and `dense` is compared with the dense model's in float32, on the same weights. On a GPU, `peak_bytes` is
the peak of a step beyond weights, images and optimizer state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import encoder
import measure
import torch
from measure import Mismatch, Results, say
from torch import Tensor

from sparsecnx import random_mask
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import FCMAE, create_fcmae
from sparsecnx.train.recipe import BETAS

VARIANTS = ("sparse", "sparse_graph", "dense", "vit")
LEARNING_RATE = 1.5e-4
VIT_RATIO = 0.75


class Step:
    """A step of the recipe's optimizer on `loss()`.

    Attributes:
        reset: drops the gradients.
    """

    def __init__(self, model: torch.nn.Module, loss: Callable[[], Tensor], graph: bool = False) -> None:
        self.model, self.loss = model, loss
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [  # weight decay on matrices and kernels alone, as in the recipe
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, fused=True, capturable=graph)

    def reset(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()


def fcmae_step(case: dict[str, Any], variant: str, by_block: bool) -> Step:
    """Build a step of FCMAE, its loss checked.

    Raises:
        Mismatch: the loss is not the dense model's.
    """
    torch.manual_seed(0)
    device = torch.device(case["device"])
    model = create_fcmae(case["size"])
    encoder.randomize(model.encoder)
    model.to(device)
    side = case["image"] // model.patch_size
    visible = visible_count(side * side, case["ratio"])
    mask = random_mask(case["batch"], (side, side), case["ratio"], generator=torch.Generator().manual_seed(0)).to(
        device
    )
    images = random_images(case).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = dense_loss(model, encoder.masked_encoder, images, mask)
    if variant == "dense":
        model.to(memory_format=torch.channels_last)
        encode = encoder.compiled_encoder(model.encoder, by_block)

    def loss() -> Tensor:
        with measure.autocast(case["device"], case["dtype"]):
            if variant == "dense":
                return dense_loss(model, encode, images, mask, case["dtype"])
            return model(images, mask=mask, visible=visible)[0]

    found, limit = loss(), measure.TOLERANCE[case["dtype"]]
    if not (error := measure.relative_error(found, expected)) <= limit:
        raise Mismatch(f"the loss of {variant} is off by {error:.1e}, at most {limit:g} is expected")
    return Step(model, loss, graph=variant == "sparse_graph")


def dense_loss(
    model: FCMAE, encode: Callable[..., Tensor], images: Tensor, mask: Tensor, dtype: str = "float32"
) -> Tensor:
    """Return the loss with the encoder computed densely: what `FCMAE` does with a SparseTensor."""
    grid_mask = mask.view(-1, *model.grid(images))
    # Images in the dtype of autocast bring the mask, and so all features, to it.
    encoded = encode(model.encoder, images.to(getattr(torch, dtype)), grid_mask)
    x = torch.where(~grid_mask[:, None], model.proj(encoded), model.mask_token)
    loss: Tensor = model.reconstruction_loss(images, model.pred(model.decoder(x)), mask)
    return loss


def vit_step(case: dict[str, Any]) -> Step:
    """Build a step of ViTMAEForPreTraining, whose default configuration is ViT-B/16's."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(image_size=case["image"], mask_ratio=VIT_RATIO, norm_pix_loss=True)
    model = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa").to(case["device"])
    images = random_images(case)

    def loss() -> Tensor:
        with measure.autocast(case["device"], case["dtype"]):
            value: Tensor = model(images).loss
        return value

    return Step(model, loss)


def random_images(case: dict[str, Any]) -> Tensor:
    """Return the batch, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(case["batch"], 3, case["image"], case["image"], generator=generator).to(case["device"])


def measured(step: Step, case: dict[str, Any], graph: bool, repeats: int) -> dict[str, Any]:
    """Return milliseconds and images per second of a step, and its peak memory on a GPU."""
    device = torch.device(case["device"])
    run, reset = step, step.reset
    for _ in range(measure.WARM_UP):
        reset()
        run()
    reset()
    found: dict[str, Any] = {}
    if device.type == "cuda":
        found["peak_bytes"] = measure.peak_bytes(run, device)
    call: measure.Call = run
    if graph:
        call, reset = measure.captured(run, step.reset, device), measure.nothing
    ms = measure.interleaved({"step": call}, repeats, device, before=reset)["step"]
    return {"ms": ms, "images_per_s": round(1e3 * case["batch"] / ms["median"], 1), **found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = measure.options(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="by default all that can run")
    parser.add_argument("--by-block", action="store_true", help="compile the dense encoder block by block")
    options = measure.check_options(parser, parser.parse_args(arguments))
    torch.set_num_threads(options.threads)
    on_gpu = torch.device(options.device).type == "cuda"
    variants = options.variants or [name for name in VARIANTS if on_gpu or name != "sparse_graph"]
    results, rows, failed = Results(options.out), [], False
    for size in options.size:
        settings = {"size": size, "batch": options.batch[0], "image": options.image[0], "ratio": options.ratio[0]}
        case = {**settings, "dtype": options.dtype, "device": options.device}
        key = "{size}-mask{ratio:g}-batch{batch}-{image}px-{dtype}-{device}".format(**case)
        found: dict[str, Any] = {}
        for name in variants:
            say(f"{key}: {name}")
            try:
                step = vit_step(case) if name == "vit" else fcmae_step(case, name, options.by_block)
                found[name] = measured(step, case, name == "sparse_graph", options.repeats)
            except (Mismatch, ImportError, torch.OutOfMemoryError) as error:
                say(f"  not timed: {error}")
                failed = True
                continue
            rows.append([key, name, found[name]["ms"]["median"], found[name]["images_per_s"]])
            results.add(key, {**case, "variants": found})
    measure.print_table(["case", "variant", "ms", "images/s"], rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
