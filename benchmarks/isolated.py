"""Calls in processes of their own, so that one that crashes, hangs or runs out of memory takes nothing with it.

A kernel that reads where it must not leaves its process's CUDA context unusable, and memory that one measurement
keeps is missing in the next. Processes are forked from one that has imported everything and has never touched
the GPU: a start costs a second rather than the ten of importing torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

context = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Task:
    """A call, by a name to report it under.

    Attributes:
        name: unique among the tasks of a run.
        function, arguments: what to call; what it returns must pickle.
        seconds: its process is ended after that long.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    seconds: float = float("inf")


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a value, or with an error in words.

    Attributes:
        status: `done`, `failed` (it raised, or its process died), `timeout` or `skipped` (no time to start it).
        value: what the call returned, where it is done.
        error: otherwise why not; the last line is the reason, the rest a traceback.
    """

    task: Task
    status: str
    seconds: float = 0.0
    value: Any = None
    error: str = ""


def outcomes(tasks: Sequence[Task], jobs: int = 1, deadline: float = float("inf")) -> Iterator[Outcome]:
    """Run tasks in their order, `jobs` at a time, each in a process of its own; yield each as it ends.

    Args:
        tasks: what to run.
        jobs: processes at a time: 1 where something is timed.
        deadline: in `time.monotonic()`: no task starts after it, those that run then are ended.
    """
    waiting = list(tasks)
    running: dict[Connection, tuple[Task, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                task = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_call, args=(task, sender))
                process.start()
                sender.close()
                running[receiver] = (task, process, time.monotonic())
            if not running:
                break
            ends = {end: min(begin + task.seconds, deadline) for end, (task, _, begin) in running.items()}
            patience = max(0.0, min(min(ends.values()) - time.monotonic(), 3600.0))
            answered = wait(list(running), timeout=patience)
            ready = [end for end in running if end in answered]
            late = [end for end, at in ends.items() if end not in ready and time.monotonic() >= at]
            for end in [*ready, *late]:
                task, process, begin = running.pop(end)
                yield _ended(task, process, end, time.monotonic() - begin, late=end in late)
        for task in waiting:
            yield Outcome(task, "skipped", error="no time was left to start it")
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.join()


def _ended(task: Task, process: Any, end: Connection, seconds: float, late: bool) -> Outcome:
    """The outcome of a task whose process has answered, died, or is out of time."""
    status, value, error = "failed", None, ""
    if late:
        status, error = "timeout", f"ended after {seconds:.0f} s"
        process.kill()
    else:
        try:
            status, value, error = end.recv()
        except EOFError:
            error = ""
    process.join()
    if status == "failed" and not error:
        code = process.exitcode
        error = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'} and said nothing"
    end.close()
    return Outcome(task, status, round(seconds, 2), value, error)


def _call(task: Task, sender: Connection) -> None:
    """In the new process: call, send what came of it, and leave without running anybody's exit handlers."""
    try:
        answer = ("done", task.function(*task.arguments), "")
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        answer = ("failed", None, f"{text.strip()}\n{reason(error)}")
    try:
        sender.send(answer)
        sender.close()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def reason(error: BaseException) -> str:
    """An error on one line: its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def last_line(text: str) -> str:
    """The reason at the end of an `Outcome.error`."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
