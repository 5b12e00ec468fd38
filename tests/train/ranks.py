"""Run by test_processes.py: calls the command in forked processes that find each other as those of torchrun do.

    python ranks.py CASES.json      a list of [number of processes, arguments, a step and a process to kill or None]

Prints a list in JSON: exit codes and output of each. Forking saves importing torch again in every process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback

import torch
from small_runs import use_tiny_models

from sparsecnx import cli
from sparsecnx.train.loop import Trainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_rank(rank: int, world: int, port: int, arguments: list[str], kill: list[int] | None, output: str) -> None:
    """Run the command as one of several processes, and end as the system ends one."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    step = Trainer.train_step

    def step_or_die(trainer: Trainer, *others: object) -> object:
        if kill is not None and (trainer.step, rank) == (kill[0], kill[1]):
            os.kill(os.getpid(), kill[2])
        return step(trainer, *others)

    Trainer.train_step = step_or_die
    code = 1
    try:
        code = cli.main(["pretrain", *(argument.replace("-RANK", f"-{rank}") for argument in arguments)])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(world: int, arguments: list[str], kill: list[int] | None) -> dict[str, list]:
    """Return exit codes and output of all processes."""
    port, processes = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            processes.append(os.fork())
            if processes[-1] == 0:
                be_rank(rank, world, port, arguments, kill, f"{folder}/{rank}")
        signal.alarm(100)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        return {"codes": codes, "output": [open(f"{folder}/{rank}").read() for rank in range(world)]}


use_tiny_models()
torch.set_num_threads(1)
with open(sys.argv[1]) as file:
    cases = json.load(file)
print(json.dumps([run(*case) for case in cases]), flush=True)
