"""Time `sparsecnx finetune` beside a plain loop of timm with the same network, data, augmentation and batch.

    python benchmarks/finetuning.py --out benchmarks/results/finetuning-cpu.json

Both train ConvNeXt V2 from random weights on JPEG photographs of two classes, which are written first: random crops,
RandAugment, random erasing, mixup and CutMix, AdamW with layer-wise learning rates, and a moving average of the
weights. timm reads them with its own loader and transforms. Each has one process that reads. Runs take turns; a step
counts from the third on, with the wait for its data. Medians over all runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from measure import Results, say
from pretraining import WARM_UP, write_photographs
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3

RAND_AUGMENT = "rand-m9-inc1"  # the published one varies the 9, and Pillow 12 refuses some of that from timm
RATE, DECAY, LAYER_DECAY, EMA = 5e-4, 0.05, 0.9, 0.9999


def ours(folder: Path, output: Path, options: argparse.Namespace) -> list[float]:
    """Return the seconds of the steps of a run of the command."""
    given = {"data": folder, "output": output, "model": options.model, "image-size": options.image, "epochs": 1}
    given |= {"batch-size": options.batch, "workers": 1, "device": "cpu", "test-every": 0, "mixup": 0.8, "cutmix": 1.0}
    given |= {"auto-augment": RAND_AUGMENT, "layer-decay": LAYER_DECAY, "ema-decay": EMA, "drop-path-rate": 0.1}
    command = [
        sys.executable,
        "-m",
        "sparsecnx.cli",
        "finetune",
        *(f"--{name}={value}" for name, value in given.items()),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [options.batch / line["images_per_s"] for line in lines[WARM_UP:]]


def plain(folder: Path, options: argparse.Namespace) -> list[float]:
    """Return the seconds of the steps of an epoch in a plain loop of timm."""
    torch.manual_seed(0)
    loader = create_loader(
        create_dataset("", str(folder / "train"), is_training=True),
        (3, options.image, options.image),
        options.batch,
        is_training=True,
        use_prefetcher=False,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment=RAND_AUGMENT,
        interpolation="bicubic",
        num_workers=1,
        device=torch.device("cpu"),
    )
    network: Any = timm.create_model(f"convnextv2_{options.model}", num_classes=2, drop_path_rate=0.1)
    groups = param_groups_layer_decay(network, DECAY, layer_decay=LAYER_DECAY)
    for group in groups:
        group["lr"] = RATE * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    mixup, loss_of = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=2), SoftTargetCrossEntropy()
    average, seconds = ModelEmaV3(network, decay=EMA), []
    begun = time.perf_counter()
    for step, (images, classes) in enumerate(loader):
        images, target = mixup(images, classes)
        loss = loss_of(network(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, step)
        assert loss.isfinite()
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return seconds[WARM_UP:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="atto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--photographs", type=int, default=320, help="to train on, in both classes together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {"sparsecnx": [], "timm": []}
    with tempfile.TemporaryDirectory() as place:
        for part, count in (("train", options.photographs // 2), ("val", 2)):
            for kind in ("a", "b"):
                folder = Path(place, "data", part, kind)
                folder.mkdir(parents=True)
                write_photographs(folder, count)
        for turn in range(options.rounds):
            found["sparsecnx"] += ours(Path(place, "data"), Path(place, f"run-{turn}"), options)
            found["timm"] += plain(Path(place, "data"), options)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratio = medians["sparsecnx"] / medians["timm"]
    case = {"model": options.model, "batch": options.batch, "image": options.image, "threads": torch.get_num_threads()}
    steps = {f"{name}_step_s": seconds for name, seconds in medians.items()}
    Results(options.out).add(f"{options.model}-{options.image}px-batch{options.batch}", case | steps | {"ratio": ratio})
    for name, seconds in medians.items():
        say(f"{name}: {1000 * seconds:.0f} ms a step, median of {len(found[name])}")
    say(f"sparsecnx takes {ratio:.3f} of timm's time")


if __name__ == "__main__":
    main()
