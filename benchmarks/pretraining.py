"""Time `sparsecnx pretrain` itself, in one process and in several, with the share of a step that waits for data.

    python benchmarks/pretraining.py --out benchmarks/results/pretraining-cpu.json

Every run is the command with a recipe of the same steps on JPEG photographs, which it writes first: 640 of 500 x 375
pixels, the average size of ImageNet's, cut from the photographs inside the wheels. A run of n processes divides the
threads between them, and each reads with one more process. The runs take turns. A step counts from the third on. The
median over all runs of what `log.jsonl` says:

    images_per_s    of all processes
    step_s          seconds of a step
    wait_share      the share of a step that its slowest process waited for data
    read_share      the share of all threads' time that reading takes: of a batch, read alone by one process
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Results, say
from PIL import Image

from sparsecnx.train.data.augment import random_box, resize
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.images import wheel_photographs
from sparsecnx.train.recipe import Recipe

PHOTOGRAPHS, HEIGHT, WIDTH = 640, 375, 500
WARM_UP = 2


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEG photographs of the average size in ImageNet."""
    source = wheel_photographs()
    torch.manual_seed(0)
    for number in range(count):
        pixels = source.read(number % len(source), Recipe())
        (top, left), (height, width) = random_box(pixels.shape[1:], (HEIGHT, WIDTH), 0.3, (1, 1))
        crop = resize(pixels[:, top : top + height, left : left + width], (HEIGHT, WIDTH))
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.jpg", quality=90)


def run(processes: int, threads: int, folder: Path, output: Path, recipe: Sequence[str]) -> list[dict[str, Any]]:
    """Return the log of a run, without its first steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = ["-m", "sparsecnx.cli", "pretrain", "--data", str(folder), "--output", str(output), *recipe]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads // processes)}
    subprocess.run([sys.executable, *launcher, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return lines[WARM_UP:]


def reading_time(folder: Path, recipe: Recipe, rounds: int) -> float:
    """Return the median seconds in which one process reads and crops a batch."""
    crops, seconds = Crops(find_source(str(folder)), recipe), []
    for start in range(0, rounds * recipe.batch_size, recipe.batch_size):
        begun = time.perf_counter()
        for number in range(start, start + recipe.batch_size):
            crops[Draw(number % len(crops.source), number)]
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def summary(records: Sequence[dict[str, Any]], batch: int) -> dict[str, float]:
    """Return the medians over the steps of all runs."""
    seconds = [batch / record["images_per_s"] for record in records]
    waits = [max(record["each_wait_s"]) / second for record, second in zip(records, seconds, strict=True)]
    speeds = [record["images_per_s"] for record in records]
    found = {"images_per_s": speeds, "step_s": seconds, "wait_share": waits}
    return {name: statistics.median(values) for name, values in found.items()} | {"steps": len(records)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all processes together")
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    numbers = {"model": options.model, "image-size": options.image, "batch-size": options.batch, "epochs": 1}
    recipe = [f"--{name}={value}" for name, value in (numbers | {"workers": 1, "device": "cpu"}).items()]
    records: dict[int, list[dict[str, Any]]] = {count: [] for count in options.processes}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photographs")
        folder.mkdir()
        write_photographs(folder, options.photographs)
        read_s = reading_time(folder, Recipe(image_size=options.image, batch_size=options.batch), options.rounds)
        for turn in range(options.rounds):
            for count in options.processes:
                output = Path(place, f"{count}-{turn}")
                records[count] += run(count, options.threads, folder, output, recipe)
    results = Results(options.out)
    for count in options.processes:
        found = summary(records[count], options.batch)
        found["read_share"] = read_s / (options.threads * found["step_s"])
        case = {"model": options.model, "batch": options.batch, "image": options.image, "processes": count}
        name = f"{options.model}-{options.image}px-batch{options.batch}-{count}of{options.threads}"
        results.add(name, case | {"threads": options.threads, **found})
        figures = f"{found['images_per_s']:6.1f} images/s, {1000 * found['step_s']:6.0f} ms a step"
        shares = f"{100 * found['wait_share']:.1f} % of it waiting for data, {100 * found['read_share']:.1f} % reading"
        say(f"{count} processes: {figures}, {shares}")


if __name__ == "__main__":
    main()
