"""Tests of files of `torch.save`: no code in them runs, and large ones stay on disk."""

import collections
import os
import pathlib
import pickle
import signal
import threading
import zipfile

import numpy as np
import pytest
import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.torch_files import Omitted, is_torch_file, load_torch, save_torch

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


class Settings(dict):
    """A dict with attributes."""


class Ran:
    """A class with every way to run code while it is read."""

    ran = False

    def __new__(cls, *arguments):
        cls.ran = True
        return super().__new__(cls)

    def __setstate__(self, state):
        Ran.ran = True

    def __reduce__(self):
        return Ran, (1,), {"a": 2}


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_are_omitted_and_tensors_are_not(legacy, tmp_path):
    """The objects are those of real training checkpoints: paths, numbers of NumPy, enums, dicts and lists with more."""
    settings = Settings(lr=0.1, nested=Settings(steps=(1, 2)))
    settings.note = "a"
    objects = {
        "path": pathlib.Path("runs"),
        "paths": {pathlib.Path("a"): 1},
        "number": np.float64(0.5),
        "array": np.ones(3),
        "kind": zipfile.ZipInfo,
        "enum": signal.SIGINT,
        "settings": settings,
        "queue": collections.deque([torch.ones(2)]),
        "ran": Ran(),
    }
    Ran.ran = False
    state = {"model": torch.nn.Linear(2, 3).state_dict(), **objects}
    torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    loaded = load_torch(tmp_path / "a.ckpt", omit_objects=True)
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in state["model"].items())
    assert loaded["settings"] == {"lr": 0.1, "nested": {"steps": (1, 2)}}
    assert torch.equal(loaded["queue"][0], torch.ones(2))
    assert [*loaded["paths"].values()] == [1]
    assert all(isinstance(loaded[name], Omitted) for name in ("path", "number", "array", "enum", "ran"))
    assert not Ran.ran


def test_modules_of_torch_are_omitted_too(tmp_path):
    state = {"loss": torch.nn.CrossEntropyLoss(), "slice": slice(1), "one": torch.ones(1), "frozen": frozenset([1])}
    state["counts"] = collections.defaultdict(list, a=[1])
    torch.save(state, tmp_path / "a.ckpt")
    loaded = load_torch(tmp_path / "a.ckpt", omit_objects=True)
    assert torch.equal(loaded["one"], torch.ones(1))
    assert loaded["counts"] == {"a": [1]}
    assert type(loaded["loss"]).__name__ == "torch.nn.modules.loss.CrossEntropyLoss"
    with pytest.raises(CheckpointError, match=r"plain values, first torch\.nn\.modules\.loss\.CrossEntropyLoss$"):
        load_torch(tmp_path / "a.ckpt")


@pytest.mark.parametrize("fails", [False, True])
def test_the_classes_that_the_process_lets_in_stay_as_they_were(fails, known, tmp_path):
    torch.save([Known(), Unknown()], tmp_path / "both.pt")
    before = set(torch.serialization.get_safe_globals())
    if fails:
        with pytest.raises(CheckpointError, match=r"first \S*Unknown$"):
            load_torch(tmp_path / "both.pt")
    else:
        loaded = load_torch(tmp_path / "both.pt", omit_objects=True)
        assert [type(loaded[0]), type(loaded[1]).__name__] == [Known, f"{__name__}.Unknown"]
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_do_not_take_classes_from_each_other(tmp_path, monkeypatch):
    """The second thread starts, and would end, while the first is about to read."""
    torch.save(Unknown(), tmp_path / "a.pt")
    load = torch.load
    results = []
    second = threading.Thread(target=lambda: results.append(load_torch(tmp_path / "a.pt", omit_objects=True)))

    def wait_for_the_second(*arguments, **options):
        monkeypatch.setattr(torch, "load", load)
        second.start()
        second.join(0.3)  # longer than it takes to read the file, but it has to wait for this thread
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", wait_for_the_second)
    results.append(load_torch(tmp_path / "a.pt", omit_objects=True))
    second.join(60)
    assert [type(result).__name__ for result in results] == [f"{__name__}.Unknown"] * 2
    assert not any(isinstance(allowed, tuple) for allowed in torch.serialization.get_safe_globals())


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
