"""Run by test_endings.py: trains once for every way to end, each time in a process that ends as the command does.

Prints a list in JSON: name, exit code and output of each, and whether a process is left.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from small_runs import train, use_tiny_models

from sparsecnx import cli
from sparsecnx.train.callbacks import Callback, LogError
from sparsecnx.train.data import loader
from sparsecnx.train.log import JsonLines, RunLog, TensorBoard

SECONDS = 240  # a run takes one; on a busy disk it waits long for its files to be safe, and it does not hang


def part(log: RunLog, kind: type[Callback]) -> Any:
    """Return the callback of a kind."""
    return next(callback for callback in log.callbacks if isinstance(callback, kind))


def limit_files(log: RunLog, size: int) -> None:
    """Let the kernel refuse to write past `size` bytes of a file, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_the_log(log: RunLog) -> None:
    lines = part(log, JsonLines)
    lines.file.write(json.dumps({"step": 3, "padding": "." * 300_000}) + "\n")
    limit_files(log, os.path.getsize(lines.path) + 10)


def stop_a_reader(log: RunLog) -> None:
    """Make a reading process deaf, as a file server that does not answer does."""
    loader.SECONDS_TO_END = 0.2
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    raise LogError("the log could not be written")


def remove_the_folder(log: RunLog) -> None:
    shutil.rmtree(log.run.folder)


def replace_the_folder(log: RunLog) -> None:
    remove_the_folder(log)
    log.run.folder.mkdir()


def kill_a_reader(log: RunLog) -> None:
    multiprocessing.active_children()[0].kill()
    time.sleep(SECONDS)  # torch raises its error as soon as the process is gone


def start_another_run(log: RunLog) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(cli.main(sys.argv))
    print("the other run ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def fail(error: BaseException) -> None:
    raise error


def kill(number: int) -> Callable[[RunLog], None]:
    return lambda log: os.kill(os.getpid(), number)


# These happen when step 3 of 8 is logged. The first checkpoint is due after step 4.
AT_STEP_3: dict[str, Callable[[RunLog], None]] = {
    "to the end": lambda log: None,
    "no space for a checkpoint": lambda log: limit_files(log, 200_000),
    "no space for the log": fill_the_log,
    "folder removed": remove_the_folder,
    "folder replaced": replace_the_folder,
    "events removed": lambda log: part(log, TensorBoard).path.unlink(),
    "SIGINT": kill(signal.SIGINT),
    "SIGTERM": kill(signal.SIGTERM),
    "SystemExit": lambda log: fail(SystemExit(7)),
    "unexpected error": lambda log: fail(ZeroDivisionError("unexpected")),
    "reader killed": kill_a_reader,
    "reader stuck": stop_a_reader,
    "no space for the terminal": lambda log: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "two runs": start_another_run,
    "SIGKILL": kill(signal.SIGKILL),
    "resumed after SIGKILL": lambda log: None,
}


def write_images(folder: Path) -> None:
    folder.mkdir()
    for i in range(8):
        Image.linear_gradient("L").rotate(45 * i).resize((70, 80)).save(folder / f"{i}.png")


def arguments(place: Path, name: str) -> list[str]:
    output = place / name.removeprefix("resumed after ")
    files = ["--data", str(place / "photos"), "--output", str(output), "--resume", "auto"]
    numbers = {"epochs": 2, "batch-size": 2, "image-size": 64, "workers": 2, "draw-every": 0}
    return ["pretrain", *files, "--device", "cpu", *(f"--{name}={number}" for name, number in numbers.items())]


def wait(pid: int) -> int | None:
    """Return the exit code of a process, or None for one that hangs, which is killed."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def any_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def prepare(name: str) -> None:
    """Let a run do at step 3 what `AT_STEP_3` says."""
    write = RunLog.write

    def write_and_act(log: RunLog, record: object) -> None:
        write(log, record)
        if record.step == 3:
            AT_STEP_3[name](log)

    RunLog.write = write_and_act


def end(arguments: list[str]) -> None:
    """Run the command and end as Python does, but for freeing every object, which takes a second."""
    try:
        code = cli.main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    os._exit(code)


place = Path(sys.argv[1])
use_tiny_models()
torch.set_num_threads(1)
write_images(place / "photos")
train(place / "photos", place / "first")  # imports once, and not in every process, what the first run imports
results = []
for name in AT_STEP_3:
    sys.argv = arguments(place, name)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(place / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare(name)
        end(sys.argv)
    code = wait(pid)
    # Only a run that was killed outright leaves its readers, which end by themselves within seconds.
    left = name != "SIGKILL" and any_left(pid)
    results.append({"name": name, "pid": pid, "code": code, "output": (place / "output").read_text(), "left": left})
print(json.dumps(results), flush=True)
