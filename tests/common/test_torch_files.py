"""Tests of files of `torch.save`: no code in them runs, and large ones stay on disk."""

import os
import pathlib
import pickle
import threading
import zipfile

import pytest
import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.torch_files import is_torch_file, load_torch, save_torch

STATE = {"weight": torch.full((20_000,), 1.0), "step": 1}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_class_that_is_refused_is_named(legacy, tmp_path):
    torch.save({"a": pathlib.PurePosixPath("b")}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"than tensors and plain values, first pathlib\.\S*PurePosixPath$"):
        load_torch(tmp_path / "a.pt")


class Known:
    """A class that the process allows in files."""


class Unknown:
    """A class that it does not allow."""


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
            load_torch(tmp_path / "both.pt", allowed=[Known])
    else:
        assert isinstance(load_torch(tmp_path / "both.pt", allowed=[Known, Unknown])[1], Unknown)
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_do_not_take_classes_from_each_other(tmp_path, monkeypatch):
    """The second thread starts, and would end, while the first is about to read."""
    torch.save(Unknown(), tmp_path / "a.pt")
    load = torch.load
    results = []
    second = threading.Thread(target=lambda: results.append(load_torch(tmp_path / "a.pt", allowed=[Unknown])))

    def wait_for_the_second(*arguments, **options):
        monkeypatch.setattr(torch, "load", load)
        second.start()
        second.join(0.3)  # longer than it takes to read the file, but it has to wait for this thread
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", wait_for_the_second)
    results.append(load_torch(tmp_path / "a.pt", allowed=[Unknown]))
    second.join(60)
    assert [type(result) for result in results] == [Unknown, Unknown]
    assert Unknown not in torch.serialization.get_safe_globals()


def is_mapped(tensor, path):
    """Return whether the numbers of a tensor lie where the kernel has mapped the file."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        addresses, _, rest = line.partition(" ")
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return rest.endswith(str(path))
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_a_file_is_mapped_into_memory_on_demand(tmp_path):
    path = tmp_path / "a.pt"
    save_torch(path, STATE)
    assert not is_mapped(load_torch(path)["weight"], path)
    assert is_mapped(load_torch(path, mmap=True)["weight"], path)


def test_what_is_mapped_outlives_its_file_and_does_not_change_it(tmp_path):
    path = tmp_path / "a.pt"
    save_torch(path, STATE)
    loaded, deleted = load_torch(path, mmap=True), load_torch(path, mmap=True)
    loaded["weight"][0] = 7
    assert load_torch(path)["weight"][0] == 1
    save_torch(path, loaded)  # over the file that it is read from
    assert load_torch(path)["weight"][:2].tolist() == [7, 1]
    path.unlink()
    assert deleted["weight"].unique().tolist() == [1]


@pytest.mark.parametrize("kind", ["compressed", "legacy"])
def test_what_cannot_be_mapped_is_read(kind, tmp_path):
    path = tmp_path / "a.pt"
    if kind == "legacy":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(STATE, tmp_path / "stored.pt")
        with (
            zipfile.ZipFile(tmp_path / "stored.pt") as stored,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed,
        ):
            for record in stored.infolist():
                compressed.writestr(record.filename, stored.read(record))
    assert torch.equal(load_torch(path, mmap=True)["weight"], STATE["weight"])


def test_the_name_of_another_kind_does_not_matter(tmp_path):
    torch.save(STATE, tmp_path / "a.safetensors")
    assert load_torch(tmp_path / "a.safetensors", mmap=True)["step"] == 1
    assert is_torch_file(tmp_path / "a.safetensors")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    assert not is_torch_file(tmp_path / "a.pt")


def test_the_start_of_a_file_tells_its_kind_as_for_torch(tmp_path):
    """A damaged zip file at the end, which others would take the file for, is not looked into."""
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a", b"numbers")
    path.write_bytes(path.read_bytes().replace(b"numbers", b"damaged"))
    assert torch.equal(load_torch(path)["weight"], STATE["weight"])
