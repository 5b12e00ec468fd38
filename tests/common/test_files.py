"""Tests of files that are written whole or not at all."""

import os
import pathlib
import stat

import pytest

from sparsecnx.common.files import open_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def record_syncs(monkeypatch):
    """Return a list that records inode and mode of everything forced to disk."""
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
    """Rename another file, with mode 600, over the given one, as safetensors does."""
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
        with open_atomically(tmp_path / "file") as files:
            save(files)
    finally:
        os.umask(before)
    status = (tmp_path / "file").stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert synced[0] == (status.st_ino, mode)
    assert synced[1][0] == tmp_path.stat().st_ino
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_several_files_are_renamed_once_all_are_on_disk(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"old")
    synced = record_syncs(monkeypatch)
    replace = os.replace

    def replace_on_disk(source, target):
        assert len(synced) == 2
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_on_disk)
    with open_atomically(*paths) as files:
        for file in files:
            file.write(b"new")
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]
    assert names(tmp_path) == ["a", "b"]

    monkeypatch.undo()
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError), open_atomically(*paths) as files:
        files[0].write(b"newer")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "b"]


def test_nothing_but_regular_files_is_replaced_and_no_link_is_followed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Not a regular file"), open_atomically(tmp_path / "fifo"):
        pass
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / ".linked.tmp").symlink_to("other")
    os.mkfifo(tmp_path / ".waiting.tmp")
    for name in ("linked", "waiting"):
        with open_atomically(tmp_path / name) as (file,):
            file.write(b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
    assert (tmp_path / "other").read_bytes() == b"other"
    assert names(tmp_path) == ["fifo", "linked", "other", "waiting"]
