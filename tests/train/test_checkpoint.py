import errno
import multiprocessing
import os
import resource
import signal
import zipfile

import pytest
import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat import checkpoints
from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointFolder


def state(step):
    return {
        "model": {"weight": torch.full((20_000,), float(step))},
        "optimizer": {},
        "step": step,
        "epoch": step / 10,
        "recipe": {"model": "atto"},
        "data": {"folder": None},
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds_step(folder, step):
    """Check that the folder holds the checkpoint of `step`, the link, and nothing else."""
    assert names(folder) == [f"checkpoint-{step:08d}.pt", "last.pt"]
    loaded = checkpoint.read(folder / "last.pt")
    assert loaded["step"] == step
    assert torch.equal(loaded["model"]["weight"], state(step)["model"]["weight"])


def test_the_newest_are_kept_and_last_points_at_the_newest(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (5, 90, 100):
        folder.save(state(step))
    assert names(tmp_path) == ["checkpoint-00000090.pt", "checkpoint-00000100.pt", "last.pt"]
    assert folder.newest() == tmp_path / "checkpoint-00000100.pt"
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 100


def test_no_checkpoint_yet(tmp_path):
    assert CheckpointFolder(tmp_path / "missing").newest() is None


def fail_to_write(error, monkeypatch):
    """Make the disk fail after half a checkpoint."""

    def save(state, file):
        file.write(b"half")
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(torch, "save", save)


def fail_to_flush(error, monkeypatch):
    """Make the disk fail after everything is written."""

    def fsync(descriptor):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fail", [fail_to_write, fail_to_flush])
def test_a_full_disk_leaves_the_last_good_checkpoint(fail, tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1))
    fail(errno.ENOSPC, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        folder.save(state(2))
    assert_holds_step(tmp_path, 1)


def in_another_process(function, *arguments):
    """Run a function in a forked process and return its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    process.kill()  # it may hang
    return process.exitcode


def save_past_the_file_size_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        CheckpointFolder(path, keep=1).save(state(2))
    except OSError as error:
        os._exit(42 if "File too large" in str(error) else 43)


def test_a_write_that_the_kernel_refuses_leaves_the_last_good_checkpoint(tmp_path):
    CheckpointFolder(tmp_path, keep=1).save(state(1))
    assert in_another_process(save_past_the_file_size_limit, tmp_path) == 42
    assert_holds_step(tmp_path, 1)


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(path, where):
    if where == "half written":
        torch.save = lambda state, file: (file.write(b"half"), file.flush(), die())
    elif where == "before the rename":
        os.replace = die
    else:
        CheckpointFolder.all = die  # its first call is to drop old ones
    CheckpointFolder(path, keep=1).save(state(2))


@pytest.mark.parametrize("where", ["half written", "before the rename"])
def test_a_kill_while_saving_leaves_the_last_good_checkpoint(where, tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1))
    assert in_another_process(save_and_die, tmp_path, where) == -signal.SIGKILL
    assert ".checkpoint-00000002.pt.tmp" in names(tmp_path)
    assert folder.newest() == tmp_path / "checkpoint-00000001.pt"
    folder.drop_leftovers()
    assert_holds_step(tmp_path, 1)


def test_a_kill_after_saving_leaves_both(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1))
    assert in_another_process(save_and_die, tmp_path, "after") == -signal.SIGKILL
    assert [path.name for path in folder.all()] == ["checkpoint-00000001.pt", "checkpoint-00000002.pt"]
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(part, tmp_path):
    path = CheckpointFolder(tmp_path).save(state(1))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/1"])
@pytest.mark.parametrize("load", [checkpoint.read, checkpoints.load])
def test_a_flipped_bit_is_noticed_by_everything_that_reads_it(record, load, tmp_path):
    path = CheckpointFolder(tmp_path).save({**state(1), "optimizer": {"exp_avg": torch.rand(300)}})
    with zipfile.ZipFile(path) as archive:
        whole = archive.read(f"archive/{record}")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.find(whole) + len(whole) // 2] ^= 0b1000
    path.write_bytes(damaged)
    problem = "truncated or damaged: the checksum of its record" if record != "data.pkl" else "truncated or damaged"
    with pytest.raises(CheckpointError, match=rf"{problem}.*archive/{record}"):
        load(path)


def test_other_files_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match="lacks data, epoch, optimizer, recipe, step"):
        checkpoint.read(tmp_path / "published.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        checkpoint.read(tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.read(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="a folder"):
        checkpoint.read(tmp_path)
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(CheckpointError, match="a FIFO; expected a regular file"):
        checkpoint.read(tmp_path / "fifo.pt")
    with pytest.raises(CheckpointError, match="a device; expected a regular file"):
        checkpoint.read("/dev/zero")


@pytest.mark.parametrize(
    "garbage",
    [b"}" * 9, b"a", b"0", b"G1", b"J", b"cos\nsystem\n", b"\x80\x02" + bytes(range(256)), b"# notes\n"],
    ids=repr,
)
def test_garbage_is_refused_and_not_called_code(garbage, tmp_path):
    (tmp_path / "last.pt").write_bytes(garbage)
    with pytest.raises(CheckpointError, match="truncated or damaged, or not a checkpoint") as error:
        checkpoint.read(tmp_path / "last.pt")
    assert "more than tensors" not in str(error.value)
    assert "weights_only" not in str(error.value)
