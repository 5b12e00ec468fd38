"""However a run ends, it ends at once, says why, and leaves no process behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import logged

from sparsecnx.train.checkpoint import CheckpointFolder

EXPECTED = {
    "to the end": (0, "done: "),
    "no space for a checkpoint": (1, "stopped: step 4: the checkpoint could not be saved"),
    "no space for the log": (1, "log.jsonl could not be written"),
    "folder removed": (
        1,
        "folder removed was removed, renamed or replaced while the run wrote to it, no checkpoint is left",
    ),
    "folder replaced": (1, "log.jsonl was removed, renamed or replaced while the run wrote to it"),
    "events removed": (1, "was removed, renamed or replaced while the run wrote to it"),
    "SIGINT": (130, "SIGINT: saved step 3"),
    "SIGTERM": (143, "SIGTERM: saved step 3"),
    "SystemExit": (7, ""),
    "unexpected error": (1, "ZeroDivisionError: unexpected"),
    "reader killed": (1, "stopped: step 3: a process that reads images died (DataLoader worker (pid"),
    "reader stuck": (1, "stopped: step 3: the log could not be written"),
    "no space for the terminal": (1, "stopped: step 4: standard output could not be written"),
    "two runs": (0, "the other run ended with 2"),
    "SIGKILL": (-9, ""),
    "resumed after SIGKILL": (0, "done: "),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Return how the runs of endings.py ended, by name, and the folder of their outputs."""
    place = tmp_path_factory.mktemp("endings")
    folder = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(folder / "endings.py"), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in json.loads(done.stdout.splitlines()[-1])}, place


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_ends_and_says_why(name, endings):
    ending, (code, text) = endings[0][name], EXPECTED[name]
    assert ending["code"] is not None, "it hangs"
    assert ending["code"] == code, ending["output"]
    assert text in ending["output"]
    assert not ending["left"], "a process is left"


def test_a_folder_that_is_gone_is_not_made_again(endings):
    assert not (endings[1] / "folder removed").exists()
    assert not any((endings[1] / "folder replaced").iterdir())


def test_a_second_run_is_told_who_has_the_folder(endings):
    ending = endings[0]["two runs"]
    assert (
        f"{endings[1]}/two runs: in use by process {ending['pid']} on {os.uname().nodename} since 20"
        in ending["output"]
    )
    assert [line["step"] for line in logged(endings[1] / "two runs")] == list(range(1, 9))


def test_no_lock_is_left(endings):
    for name in ("to the end", "no space for the log", "SIGTERM", "SystemExit", "resumed after SIGKILL"):
        assert not (endings[1] / name.removeprefix("resumed after ") / "run.lock").exists()


def test_a_killed_run_goes_on(endings):
    assert [line["step"] for line in logged(endings[1] / "SIGKILL")] == list(range(1, 9))
    assert CheckpointFolder(endings[1] / "SIGKILL").newest().name == "checkpoint-00000008.pt"
