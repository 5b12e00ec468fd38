"""The processes that read images: how they start, and how they end in every case."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from sparsecnx.train.data.crops import Batch, Crops, Draw, collate

# Reading processes that are in the middle of a file get so many seconds at the end of a run.
SECONDS_TO_END = 3.0


class WorkersError(Exception):
    """Reading processes could not be started, or one died; the message says why."""


@contextmanager
def load_batches(
    crops: Crops, order: Iterable[list[Draw]], *, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """Yield the batches of these draws, which do not depend on the number of workers.

    Afterwards no reading process is left, however the run ended.

    Raises:
        WorkersError: the system starts no more processes; from the batches: one died while it sent its batch.
    """
    loader = DataLoader(
        crops,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=pin_memory,
    )
    others, batches = multiprocessing.active_children(), None
    try:
        try:
            with _signals_kept_back():
                batches = iter(loader)
        except OSError as error:
            raise WorkersError(f"{workers} processes that read images cannot be started ({error})") from error
        finally:
            processes = [process for process in multiprocessing.active_children() if process not in others]
        yield _received(batches)
    finally:
        _end(batches, processes)


def _received(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, and turn the errors of a connection to a process that died meanwhile into WorkersErrors."""
    try:
        yield from batches
    except (OSError, EOFError) as error:
        raise WorkersError(f"a process that reads images died ({type(error).__name__}: {error})") from error


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM to this thread later, and not to a new process before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(batches: Any, processes: list[Any]) -> None:
    """End the reading processes within seconds.

    torch and Python would end them by SIGTERM, which they ignore, see `leave_signals_to_parent`, and then wait for them
    for ever. So the loader asks them first, and those that are busy for too long are killed.
    """
    if not processes:
        return

    def kill() -> None:
        for process in processes:
            process.kill()

    killer = threading.Timer(SECONDS_TO_END, kill)
    killer.daemon = True
    with _default_sigchld():
        killer.start()
        try:
            if batches is not None:
                batches._shutdown_workers()  # `del batches` would do this, if no traceback held on to it
        finally:
            killer.cancel()
            kill()
            for process in processes:
                process.join()


@contextmanager
def _default_sigchld() -> Iterator[None]:
    """Keep torch from raising an error because a reading process ends."""
    # Only the main thread has a handler of torch. None is one that Python did not set and cannot set again.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGCHLD) is None:
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def leave_signals_to_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group; only the trainer answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
