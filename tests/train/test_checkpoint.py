import errno
import multiprocessing
import os
import pathlib
import pickle
import resource
import signal
import stat
import threading
import zipfile

import pytest
import torch

from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointError, CheckpointFolder


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
    """The folder is as after saving `step`, and nothing else lies in it."""
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
    """The disk takes half a checkpoint and then fails."""

    def save(state, file):
        file.write(b"half")
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(torch, "save", save)


def fail_to_flush(error, monkeypatch):
    """Everything is written, and the disk says only then that it is full."""

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


def record_syncs(monkeypatch):
    """Inode and mode of everything forced to disk."""
    synced = []
    fsync = os.fsync

    def record(descriptor):
        status = os.fstat(descriptor)
        synced.append((status.st_ino, stat.S_IMODE(status.st_mode)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return synced


def save_through_the_file(files):
    files[0].write(b"whole")


def save_another_in_its_place(files):
    """As safetensors does: a file of its own, for the user alone, renamed over ours."""
    other = pathlib.Path(f"{files[0].name}.other")
    other.touch(mode=0o600)
    other.write_bytes(b"whole")
    other.rename(files[0].name)


@pytest.mark.parametrize("save", [save_through_the_file, save_another_in_its_place])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_what_is_renamed_is_on_disk_with_the_mode_of_any_new_file(save, umask, mode, tmp_path, monkeypatch):
    synced = record_syncs(monkeypatch)
    before = os.umask(umask)
    try:
        with checkpoint.whole(tmp_path / "file") as files:
            save(files)
    finally:
        os.umask(before)
    status = (tmp_path / "file").stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert synced[0] == (status.st_ino, mode)
    assert synced[1][0] == tmp_path.stat().st_ino
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_of_several_files_none_is_renamed_before_all_are_on_disk(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"old")
    synced = record_syncs(monkeypatch)
    replace = os.replace

    def replace_on_disk(source, target):
        assert len(synced) == 2
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_on_disk)
    with checkpoint.whole(*paths) as files:
        for file in files:
            file.write(b"new")
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]
    assert names(tmp_path) == ["a", "b"]

    monkeypatch.undo()
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError), checkpoint.whole(*paths) as files:
        files[0].write(b"newer")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "b"]


def in_another_process(function, *arguments):
    """Run a function in a forked process; returns its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
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
        CheckpointFolder.all = die  # first called to drop old ones
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


@pytest.mark.parametrize("legacy", [False, True])
def test_the_class_that_is_refused_is_named(legacy, tmp_path):
    torch.save({"a": pathlib.PurePosixPath("b")}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"than tensors and plain values, first pathlib\.\S*PurePosixPath$"):
        checkpoint.load(tmp_path / "a.pt")


class Known:
    """A class that the process lets in, and one that it does not."""


class Unknown:
    pass


@pytest.fixture
def known():
    with torch.serialization.safe_globals([Known]):
        yield


@pytest.mark.parametrize("fails", [False, True])
def test_the_classes_that_the_process_lets_in_stay_as_they_were(fails, known, tmp_path):
    torch.save([Known(), Unknown()], tmp_path / "both.pt")
    before = set(torch.serialization.get_safe_globals())
    if fails:
        with pytest.raises(CheckpointError, match=r"first \S*Unknown$"):
            checkpoint.load(tmp_path / "both.pt", allowed=[Known])
    else:
        assert isinstance(checkpoint.load(tmp_path / "both.pt", allowed=[Known, Unknown])[1], Unknown)
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_do_not_take_classes_from_each_other(tmp_path, monkeypatch):
    """The second thread comes, and could leave, while the first is about to read."""
    torch.save(Unknown(), tmp_path / "a.pt")
    load = torch.load
    results = []
    second = threading.Thread(target=lambda: results.append(checkpoint.load(tmp_path / "a.pt", allowed=[Unknown])))

    def wait_for_the_second(*arguments, **options):
        monkeypatch.setattr(torch, "load", load)
        second.start()
        second.join(0.3)  # longer than it takes to read the file; it has to wait for us instead
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", wait_for_the_second)
    results.append(checkpoint.load(tmp_path / "a.pt", allowed=[Unknown]))
    second.join(60)
    assert [type(result) for result in results] == [Unknown, Unknown]
    assert Unknown not in torch.serialization.get_safe_globals()


def is_mapped(tensor, path):
    """Whether a tensor's numbers are where the kernel shows the file."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        addresses, _, rest = line.partition(" ")
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return rest.endswith(str(path))
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_a_file_is_mapped_into_memory_on_demand(tmp_path):
    path = CheckpointFolder(tmp_path).save(state(1))
    assert not is_mapped(checkpoint.load(path)["model"]["weight"], path)
    assert is_mapped(checkpoint.load(path, mmap=True)["model"]["weight"], path)


def test_what_is_mapped_outlives_its_file_and_does_not_change_it(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.write(path, state(1))
    loaded, deleted = checkpoint.load(path, mmap=True), checkpoint.load(path, mmap=True)
    loaded["model"]["weight"][0] = 7
    assert checkpoint.load(path)["model"]["weight"][0] == 1
    checkpoint.write(path, loaded)  # over what it is read from
    assert checkpoint.load(path)["model"]["weight"][:2].tolist() == [7, 1]
    path.unlink()
    assert deleted["model"]["weight"].unique().tolist() == [1]


@pytest.mark.parametrize("kind", ["compressed", "legacy"])
def test_what_cannot_be_mapped_is_read(kind, tmp_path):
    path = tmp_path / "a.pt"
    if kind == "legacy":
        torch.save(state(1), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state(1), tmp_path / "stored.pt")
        with (
            zipfile.ZipFile(tmp_path / "stored.pt") as stored,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed,
        ):
            for record in stored.infolist():
                compressed.writestr(record.filename, stored.read(record))
    assert torch.equal(checkpoint.load(path, mmap=True)["model"]["weight"], state(1)["model"]["weight"])


def test_the_name_of_another_kind_does_not_matter(tmp_path):
    torch.save(state(1), tmp_path / "a.safetensors")
    assert checkpoint.load(tmp_path / "a.safetensors", mmap=True)["step"] == 1
    assert checkpoint.is_torch_file(tmp_path / "a.safetensors")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    assert not checkpoint.is_torch_file(tmp_path / "a.pt")


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
