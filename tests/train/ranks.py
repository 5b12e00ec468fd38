"""Run by test_processes.py: calls the command in forked processes that find each other as those of torchrun do.

Reads JSON, a line for each test: the environment to add, and a list of [number of processes, arguments, a step and a
process to kill or None, whether torchrun restarts it]; the last two may be left out. Prints a list for each, also in
JSON: exit codes and output. Forking saves importing torch again in every process.
All processes are of one group, which the first of them leads, so that one signal ends them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable

# All that the forked processes import, so that they need not.
import matplotlib.backends.backend_agg  # noqa: F401
import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from small_runs import use_tiny_models
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import sparsecnx.train.command
import sparsecnx.transfer.start  # noqa: F401
from sparsecnx import cli
from sparsecnx.train.loop import Trainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_to(output: str) -> None:
    """Let this process and those that it forks print into a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def pretrain(rank: int, arguments: list[str], kill: list[int] | None) -> int:
    """Run the command; send this process a signal at a step where `kill` is (step, rank, signal)."""
    step = Trainer.train_step

    def step_or_die(trainer: Trainer, *others: object) -> object:
        if kill is not None and (trainer.step, rank) == (kill[0], kill[1]):
            os.kill(os.getpid(), kill[2])
        return step(trainer, *others)

    Trainer.train_step = step_or_die
    named = arguments if arguments[0] == "finetune" else ["pretrain", *arguments]
    return cli.main([argument.replace("-RANK", f"-{rank}") for argument in named])


def be_rank(rank: int, world: int, port: int, arguments: list[str], kill: list[int] | None) -> int:
    """Run the command as one of several processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    return pretrain(rank, arguments, kill)


def once(arguments: list[str], kill: list[int]) -> None:
    """Run the command as a process that torchrun started. The signal comes at the first attempt alone."""
    pretrain(int(os.environ["RANK"]), arguments, kill if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None)


def be_torchrun(world: int, arguments: list[str], kill: list[int]) -> int:
    """Do what `torchrun --standalone --max-restarts 1` does, but fork the processes."""
    nodes, place = {"min_nodes": 1, "max_nodes": 1}, {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(**nodes, nproc_per_node=world, max_restarts=1, start_method="fork", **place)
    elastic_launch(config, once)(arguments, kill)
    return 0


def forked(output: str, function: Callable[..., int], *arguments: object) -> int:
    """Call a function in a new process, which ends as the system ends one; return its number."""
    process = os.fork()
    if process == 0:
        write_to(output)
        code = 1
        try:
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return process


def run(world: int, arguments: list[str], kill: list[int] | None = None, restarts: bool = False) -> dict[str, list]:
    """Return exit codes and output of all processes; those of torchrun where it `restarts` them."""
    with tempfile.TemporaryDirectory() as folder:
        if restarts:
            processes = [forked(f"{folder}/0", be_torchrun, world, arguments, kill)]
        else:
            port = free_port()
            ranks = [(rank, world, port, arguments, kill) for rank in range(world)]
            processes = [forked(f"{folder}/{place[0]}", be_rank, *place) for place in ranks]
        signal.alarm(500)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        signal.alarm(0)
        return {"codes": codes, "output": [open(f"{folder}/{i}").read() for i in range(len(processes))]}


signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # a case hangs: end all of its processes
use_tiny_models()
torch.set_num_threads(1)
before = dict(os.environ)
for line in sys.stdin:
    environment, cases = json.loads(line)
    os.environ.update(environment)
    print(json.dumps([run(*case) for case in cases]), flush=True)
    for name in environment:
        del os.environ[name]
    os.environ.update(before)
os._exit(0)  # Leaving Python in order takes seconds.
