"""Kill pretraining runs at random moments until they are complete, and compare them with runs that nobody killed.

    python benchmarks/kills.py --kills 200 --out benchmarks/results/kills-cpu.json

A run of a small network goes on with `--resume auto` after every kill, by SIGKILL to one of its processes at a moment
that is drawn between 0 and `--longest` seconds after its start, until it is complete; then the next one starts. After
every kill, every checkpoint in the folder must be whole. A complete run must have logged every step once, with the
numbers of the run that nobody killed, bit for bit. Runs of one process, of two, and of two that shard take turns.

The processes are forked from one that has imported torch, so that a start takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Mismatch, Results, say
from PIL import Image

from sparsecnx import cli
from sparsecnx.models import SIZES
from sparsecnx.models.convnextv2 import Size
from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointFolder

STEPS = 32
ENDED: dict[int, int] = {}  # exit codes of all processes
KINDS = {"1 process": (1, []), "2 processes": (2, []), "2 processes, sharded": (2, ["--shard"])}


def write_images(folder: Path) -> None:
    folder.mkdir()
    for i in range(16):
        Image.linear_gradient("L").rotate(20 * i).resize((70, 80)).save(folder / f"{i}.png")


def arguments(place: Path, output: Path, more: Sequence[str]) -> list[str]:
    files = ["--data", str(place / "images"), "--output", str(output), "--resume", "auto", "--device", "cpu"]
    numbers = {
        "epochs": STEPS // 4,
        "batch-size": 4,
        "image-size": 64,
        "workers": 1,
        "base-lr": 0.05,
        "decoder-dim": 16,
    }
    return ["pretrain", *files, *(f"--{name}={number}" for name, number in numbers.items()), *more]


def start(world: int, command: Sequence[str]) -> list[int]:
    """Fork the processes of a run, each in a session of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ENDED.clear()
    processes = []
    for rank in range(world):
        processes.append(os.fork())
        if processes[-1] == 0:
            os.setsid()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            code = 1
            try:
                code = cli.main(command)
            finally:
                os._exit(code)
    return processes


def wait(processes: Sequence[int], until: float) -> list[int] | None:
    """Return the exit codes of processes, or None if some still run at a moment. Readers that are left end too."""
    codes = ENDED
    while left := set(processes) - set(codes):
        for process in left:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        if set(processes) - set(codes):
            if time.monotonic() > until:
                return None
            time.sleep(0.002)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    return [codes[process] for process in processes]


def end_others(processes: Sequence[int], output: Path) -> None:
    """Expect that the others end by themselves, or by SIGTERM of torchrun where they had not begun to train."""
    steps = len(output.joinpath("log.jsonl").read_bytes()) if output.joinpath("log.jsonl").exists() else 0
    if wait(processes, time.monotonic() + 30) is None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        if wait(processes, time.monotonic() + 60) is None or started(output, steps):
            raise Mismatch("a process waits for one that was killed")


def started(output: Path, before: int) -> bool:
    """Return whether a run logged a step since its log had so many bytes."""
    log = output / "log.jsonl"
    return log.exists() and log.stat().st_size > before


def logged(output: Path) -> list[dict[str, Any]]:
    """Return the log of a run without its times."""
    text = (output / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a kill can cut the last one
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in lines]


def expect_whole_checkpoints(output: Path, before: int) -> int:
    """Read every checkpoint of a run, and return the step of the newest, which is none before an earlier newest."""
    newest = 0
    for path in CheckpointFolder(output).all():
        newest = checkpoint.read(path)["step"]
    if newest < before:
        raise Mismatch(f"{output}: the newest checkpoint is of step {newest}, and there was one of step {before}")
    return newest


def main(argv: Sequence[str] | None = None) -> int:
    """Kill runs, and write how often and at which steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--longest", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    SIZES["atto"] = Size((1, 1, 1, 1), (8, 8, 16, 16))
    draw, kills, complete = random.Random(options.seed), dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    steps: dict[str, list[int]] = {kind: [] for kind in KINDS}  # logged when each kill fell
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place / "images")
        expected = {}
        for kind, (world, more) in KINDS.items():
            codes = wait(start(world, arguments(place, place / kind, more)), time.monotonic() + 600)
            if codes != [0] * world:
                raise Mismatch(f"{kind}: the run that nobody kills ended with {codes}")
            expected[kind] = logged(place / kind)
        while sum(kills.values()) < options.kills:
            kind = min(KINDS, key=lambda kind: kills[kind])
            (world, more), output, newest = KINDS[kind], place / "killed", 0
            shutil.rmtree(output, ignore_errors=True)
            while True:
                processes = start(world, arguments(place, output, more))
                codes = wait(processes, time.monotonic() + draw.uniform(0, options.longest))
                if codes is not None:
                    break
                with contextlib.suppress(ProcessLookupError):  # one that ended before the others
                    os.kill(draw.choice(processes), signal.SIGKILL)
                kills[kind] += 1
                end_others(processes, output)
                newest = expect_whole_checkpoints(output, newest)
                steps[kind].append(len(logged(output)) if (output / "log.jsonl").exists() else 0)
            if codes != [0] * world or logged(output) != expected[kind]:
                raise Mismatch(f"{kind}: ended with {codes}, other steps than the run that nobody killed")
            complete[kind] += 1
            say(f"{kind}: {kills[kind]} kills, {complete[kind]} runs complete")
    results = Results(options.out)
    for kind in KINDS:
        case = {"kills": kills[kind], "complete_runs": complete[kind], "steps_of_a_run": STEPS, "differing_steps": 0}
        results.add(kind, case | {"steps_at_kills": steps[kind]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
