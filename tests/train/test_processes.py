"""Several processes train one network as one process does, and a run outlives the death of one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import logged, train

from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointFolder

HERE = Path(__file__).parent
# The command with small networks, in as many processes as torchrun starts.
COMMAND = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from small_runs import use_tiny_models
use_tiny_models()
from sparsecnx.cli import main
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


def start(script: Path, arguments: dict, world: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Start a run under torchrun, in a session of its own."""
    script.write_text(COMMAND.format(here=str(HERE)))
    numbers = [f"--{name}={value}" for name, value in arguments.items()]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *launcher, str(script), "--device", "cpu", "--workers", "0", *numbers]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **options)


def finish(run: subprocess.Popen) -> str:
    """Wait for a run and return what it printed."""
    try:
        return run.communicate(timeout=120)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def together(tmp_path: Path, name: str, photos: Path, **more) -> str:
    """Train with two processes to the end, and return what they printed."""
    small = {"image-size": 64, "epochs": 2, "batch-size": 2, "base-lr": 0.05}
    world = more.pop("world", 2)
    run = start(tmp_path / "run.py", {"data": photos, "output": tmp_path / name, **small, **more}, world)
    out = finish(run)
    assert run.returncode == more.get("code", 0), out
    return out


def expect_close(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"shard": "", "ema-decay": 0.9}, {"grad-accum-steps": 2, "clip-grad": 0.1}])
def test_two_processes_have_the_losses_of_one(options, photos, tmp_path, capfd):
    recipe = {name.replace("-", "_"): value for name, value in options.items() if name != "shard"}
    train(photos, tmp_path / "one", **recipe)
    out = together(tmp_path, "two", photos, **options)
    assert "2 processes with 1 of the 2 images of a batch each" in out
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    expect_close(two, one)
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert all(len(line["each_images_per_s"]) == 2 and len(line["each_wait_s"]) == 2 for line in lines)
    saved, expected = (checkpoint.read(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert saved["processes"] == 2
    for part in ("model", "ema") if "ema-decay" in options else ("model",):
        for name, value in expected[part].items():
            torch.testing.assert_close(saved[part][name], value, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_with_other_processes_and_says_so(photos, tmp_path, capsys):
    """From one process to two sharded ones, and from their folder to one process."""
    train(photos, tmp_path / "run")
    expected = logged(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-00000008.pt").unlink()
    out = finish(start(tmp_path / "run.py", {"output": tmp_path / "run", "resume": "auto", "shard": "", "keep": 9}))
    assert "2 processes go on from checkpoint-00000004.pt of 1: the same images and masks" in out
    expect_close(logged(tmp_path / "run"), expected)
    newest = CheckpointFolder(tmp_path / "run").newest()
    assert newest.is_dir() and newest.name == "checkpoint-00000008.pt"
    capsys.readouterr()
    assert train(None, tmp_path / "longer", resume=str(newest), options={"extend": 1}) == 0
    assert "1 processes go on from checkpoint-00000008.pt of 2" in capsys.readouterr().out


def test_a_sharded_checkpoint_that_is_damaged_is_refused(photos, tmp_path):
    together(tmp_path, "run", photos, shard="", epochs=1)
    folder = tmp_path / "run" / "checkpoint-00000004.pt"
    part = next(folder.glob("shard-00002-*"))
    whole = bytearray(part.read_bytes())
    whole[-1] ^= 1
    part.write_bytes(whole)
    with pytest.raises(checkpoint.CheckpointError, match=r"shard-00002-\S+ is missing or damaged"):
        checkpoint.read(folder)


def kill_at_step(step: int, log: Path, run: subprocess.Popen, number: int) -> None:
    """Kill one of the two training processes as soon as a step is logged."""
    until = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert time.monotonic() < until and run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[number]), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_restarted_and_the_run_goes_on(rank, photos, tmp_path):
    train(photos, tmp_path / "one", epochs=6)
    small = {"image-size": 64, "epochs": 6, "batch-size": 2, "base-lr": 0.05, "resume": "auto"}
    run = start(tmp_path / "run.py", {"data": photos, "output": tmp_path / "run", **small}, restarts=1)
    kill_at_step(6, tmp_path / "run" / "log.jsonl", run, rank)
    out = finish(run)
    assert run.returncode == 0, out
    assert "going on from step" in out
    expect_close(logged(tmp_path / "run"), logged(tmp_path / "one"))


def test_sigterm_to_one_process_saves_for_all(photos, tmp_path):
    small = {"image-size": 64, "epochs": 1000, "batch-size": 2, "base-lr": 0.05}
    run = start(tmp_path / "run.py", {"data": photos, "output": tmp_path / "run", **small})
    log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < until and run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    out = finish(run)
    assert "SIGTERM: saved step" in out
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == len(logged(tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch-size": 3}, "--batch-size is 3: expected a multiple of the 2 processes"),
        ({"model": "giant"}, "--model is giant: expected one of"),
        ({"data": "/nowhere"}, "--data is /nowhere: no such folder"),
    ],
)
def test_errors_are_said_once_before_anything_is_written(more, message, photos, tmp_path):
    arguments = {"data": photos, "output": tmp_path / "run", "image-size": 64, "batch-size": 2} | more
    run = start(tmp_path / "run.py", arguments)
    out = finish(run)
    assert run.returncode != 0
    assert out.count(message) == 1, out
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_data_are_refused(photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (80, 80)).save(other / "a.png")
    script = tmp_path / "run.py"
    run = start(script, {"output": tmp_path / "run", "image-size": 64, "batch-size": 2, "epoch-repeats": 8})
    run.kill()
    text = script.read_text()
    choose = f'sys.argv += ["--data", {str(photos)!r} if os.environ["RANK"] == "0" else {str(other)!r}]\n'
    script.write_text(text.replace("sys.exit", f"import os\n{choose}sys.exit"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    small = ["--device=cpu", "--workers=0", f"--output={tmp_path / 'run'}", "--image-size=64", "--batch-size=2"]
    done = subprocess.run([*launcher, *small, "--epoch-repeats=8"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "process 1 sees 1 images, others than process 0, 8; expected the same on every machine" in done.stderr


def test_given_masks_are_drawn_from_a_file(photos, tmp_path):
    masks = np.array([[1, 0, 0, 1], [0, 1, 1, 1]], np.uint8)
    np.save(tmp_path / "masks.npy", masks)
    train(photos, tmp_path / "one", masks=str(tmp_path / "masks.npy"))
    together(tmp_path, "two", photos, masks=tmp_path / "masks.npy")
    expect_close(logged(tmp_path / "two"), logged(tmp_path / "one"))
