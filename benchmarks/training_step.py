"""Time a whole pretraining step: forward, loss, backward, fused AdamW; FCMAE and a ViT's MAE.

    python benchmarks/training_step.py --device cuda --dtype bfloat16 --size tiny base --batch 64 --out steps.json

Variants, with float32 weights, under autocast where --dtype is not float32:

    sparse        FCMAE (`sparsecnx.models.FCMAE`)
    sparse_graph  the same, the whole step as a CUDA graph, on a GPU
    dense         FCMAE with the encoder computed densely, times the mask, in channels_last, through torch.compile; with
                  --by-block block by block, which compiles faster
    vit           transformers' ViTMAEForPreTraining, ViT-B/16, mask ratio 0.75, scaled_dot_product_attention, eager

As in `sparsecnx pretrain`, the process keeps the memory that it frees on a CPU. One batch of random images and one mask
serve all steps: loading data and drawing masks are not timed. First the loss of `sparse` and `dense` is compared with
the dense model's in float32, on the same weights. On a GPU, `peak_bytes` is the peak of a step beyond weights, images
and optimizer state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import encoder
import measure
import torch
from measure import Case, Mismatch, Results, say
from torch import Tensor

from sparsecnx.common.memory import keep_freed_memory
from sparsecnx.models import FCMAE, create_fcmae
from sparsecnx.train.schedule import BETAS, param_groups

VARIANTS = ("sparse", "sparse_graph", "dense", "vit")
LEARNING_RATE = 1.5e-4
VIT_RATIO = 0.75


def fcmae(case: Case, variant: str, by_block: bool) -> tuple[FCMAE, Callable[[], Tensor]]:
    """Return a model and the function that computes its loss, which has been checked.

    Raises:
        Mismatch: the loss is not the dense model's.
    """
    torch.manual_seed(0)
    model = create_fcmae(case.size)
    encoder.randomize(model.encoder)
    model.to(case.device)
    mask, images = case.mask(), case.images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = dense_loss(model, encoder.masked_encoder, images, mask)
    if variant == "dense":
        model.to(memory_format=torch.channels_last)
        encode = encoder.compiled_encoder(model.encoder, by_block)

    def loss() -> Tensor:
        with measure.autocast(case.device, case.dtype):
            if variant == "dense":
                return dense_loss(model, encode, images, mask, case.dtype)
            return model(images, mask=mask, visible=case.visible)[0]

    error, limit = measure.relative_error(loss(), expected), measure.TOLERANCE[case.dtype]
    if not error <= limit:
        raise Mismatch(f"the loss of {variant} is off by {error:.1e}, at most {limit:g} is expected")
    return model, loss


def dense_loss(
    model: FCMAE, encode: Callable[..., Tensor], images: Tensor, mask: Tensor, dtype: str = "float32"
) -> Tensor:
    """Return the loss with the encoder computed densely: what `FCMAE` does with a SparseTensor."""
    # Images in the dtype of autocast bring the mask, and so all features, to it.
    encoded = encode(model.encoder, images.to(getattr(torch, dtype)), mask)
    x = torch.where(~mask[:, None], model.proj(encoded), model.mask_token)
    return model.reconstruction_loss(images, model.pred(model.decoder(x)), mask.flatten(1))


def vit(case: Case) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """Return ViTMAEForPreTraining, whose default configuration is ViT-B/16's, and the function of its loss."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(image_size=case.image, mask_ratio=VIT_RATIO, norm_pix_loss=True)
    model = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa").to(case.device)
    images = case.images()

    def loss() -> Tensor:
        with measure.autocast(case.device, case.dtype):
            return model(images).loss

    return model, loss


def measured(case: Case, variant: str, by_block: bool, repeats: int) -> dict[str, Any]:
    """Return milliseconds and images per second of a step of a variant, and its peak memory on a GPU."""
    device, graph = torch.device(case.device), variant == "sparse_graph"
    model, loss = vit(case) if variant == "vit" else fcmae(case, variant, by_block)
    groups = param_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, fused=True, capturable=graph)

    def step() -> None:
        loss().backward()
        optimizer.step()

    def reset() -> None:
        model.zero_grad(set_to_none=True)

    for _ in range(measure.WARM_UP):
        reset()
        step()
    reset()
    memory = {"peak_bytes": measure.peak_bytes(step, device)} if device.type == "cuda" else {}
    calls = {"step": measure.captured(step, reset, device) if graph else step}
    ms = measure.interleaved(calls, repeats, device, before=measure.nothing if graph else reset)["step"]
    return {"ms": ms, "images_per_s": round(1e3 * case.batch / ms["median"], 1), **memory}


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.parse(measure.parser(__doc__, VARIANTS), arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    results, rows, failed = Results(options.out), [], False
    for case in measure.cases(options):
        found: dict[str, Any] = {}
        for name in options.variants:
            say(f"{case.key}: {name}")
            try:
                found[name] = measured(case, name, options.by_block, options.repeats)
            except (Mismatch, ImportError, torch.OutOfMemoryError) as error:
                say(f"  not timed: {error}")
                failed = True
                continue
            rows.append([case.key, name, found[name]["ms"]["median"], found[name]["images_per_s"]])
            results.add(case.key, {**asdict(case), "variants": found})
    measure.print_table(["case", "variant", "ms", "images/s"], rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
