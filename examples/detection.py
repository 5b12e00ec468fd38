"""Train a detector on a pretrained network, minutes on a CPU, and measure it on images that it has not seen.

    pip install 'sparsecnx[detect]' scikit-image jsonargparse
    python detection.py --checkpoint runs/mine/last.pt --kind maskrcnn
    python detection.py --kind maskrcnn  # from random weights, to compare

The images are synthesised: coins pasted on photographs. Both are in scikit-image. Its photograph of 24 coins is
segmented as in scikit-image's guide: a watershed of the gradients from markers, darker than 30 for the ground and
brighter than 150 for coins. Each region is a coin. Its pixels are cut out, enlarged or shrunk, turned, made lighter or
darker, and pasted on a crop of another photograph. They are its mask, their extent is its box; what lies under a later
coin is in neither. Coins and photographs of the test are others than those of training.
"""

import random

import numpy as np
import torch
from jsonargparse import auto_cli
from scipy import ndimage
from skimage import data, filters, measure, segmentation
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sparsecnx.models import ConvNeXtV2Encoder
from sparsecnx.transfer.detection import check_target, detector

GROUNDS = {"train": ("astronaut", "coffee", "brick", "grass", "rocket"), "test": ("chelsea", "camera", "gravel")}
SPLIT = 256  # coins left of this column train, those right of it test
Target = dict[str, Tensor]


def cut_coins() -> dict[str, list[Tensor]]:
    """Return the coins of the photograph, grey and opacity, float (2, H, W) each."""
    image = data.coins()
    markers = np.where(image < 30, 1, np.where(image > 150, 2, 0))
    coins = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
    found: dict[str, list[Tensor]] = {"train": [], "test": []}
    for region in measure.regionprops(measure.label(coins)):
        if region.area > 500:  # smaller regions are specks
            cut = np.stack([image[region.slice] / 255, region.image]).astype(np.float32)
            found["train" if region.centroid[1] < SPLIT else "test"].append(torch.from_numpy(cut))
    return found


def synthesise(coins: list[Tensor], grounds: list[Tensor], side: int, rng: random.Random) -> tuple[Tensor, Target]:
    """Return an image (3, side, side) with one to five coins, and their boxes and masks."""
    ground = rng.choice(grounds)
    top, left = (rng.randrange(extent - side + 1) for extent in ground.shape[1:])
    image = ground[:, top : top + side, left : left + side].clone()
    masks: list[Tensor] = []
    for coin in rng.choices(coins, k=rng.randint(1, 5)):
        scale = rng.uniform(0.5, 1.2)
        size = [round(extent * scale) for extent in coin.shape[1:]]
        turned = F.rotate(F.resize(coin, size), rng.uniform(0, 360), v2.InterpolationMode.BILINEAR, expand=True)
        height, width = turned.shape[1:]
        y, x = rng.randrange(side - height + 1), rng.randrange(side - width + 1)
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[y : y + height, x : x + width] = turned[1] > 0.5
        lighter = (turned[0] * rng.uniform(0.6, 1.3)).clamp(0, 1)
        image[:, mask] = lighter[turned[1] > 0.5]
        masks = [below & ~mask for below in masks] + [mask]
    kept = torch.stack([mask for mask in masks if mask.sum() > 100])
    boxes = masks_to_boxes(kept) + torch.tensor([0.0, 0, 1, 1])  # edges of pixels
    target = {"boxes": boxes, "labels": torch.ones(len(kept), dtype=torch.int64), "masks": kept}
    check_target(image, target, classes=1, masks=True)
    return image, target


def main(
    checkpoint: str | None = None,
    kind: str = "retinanet",
    steps: int = 300,
    batch: int = 4,
    side: int = 128,
    tests: int = 60,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    rng, coins = random.Random(seed), cut_coins()
    to_image = v2.Compose([v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)])
    grounds = {part: [to_image(getattr(data, name)()) for name in names] for part, names in GROUNDS.items()}
    backbone = checkpoint or ConvNeXtV2Encoder(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320))  # of size atto
    few = {"box_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 200} if kind == "maskrcnn" else {}
    model = detector(backbone, classes=1, kind=kind, out_channels=128, min_size=side, **few)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pairs = [synthesise(coins["train"], grounds["train"], side, rng) for _ in range(batch)]
        images, targets = zip(*pairs, strict=True)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()
    metric = MeanAveragePrecision(iou_type=("bbox", "segm") if kind == "maskrcnn" else "bbox")
    metric.warn_on_many_detections = False
    held_out = random.Random(10_000)  # the same images for every seed and network
    with torch.no_grad():
        for _ in range(tests):
            image, target = synthesise(coins["test"], grounds["test"], side, held_out)
            (found,) = model([image])
            if kind == "maskrcnn":
                found["masks"] = found["masks"][:, 0] > 0.5
            metric.update([found], [target])
    for name, value in metric.compute().items():
        if name.endswith(("map", "map_50")):
            print(f"{name} {value:.3f}")


if __name__ == "__main__":
    auto_cli(main)
