"""Tests of files that are made to exhaust memory or time: each is refused at once, with a reason.

One child process with little memory and time reads all of them, so that a test that fails does not take the machine.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from itertools import product

import pytest
import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.torch_files import load_torch
from sparsecnx.compat import checkpoints

START = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n)R"
LEGACY = b"".join(pickle.dumps(value, 2) for value in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def number(value):
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key, stored, size, stride, legacy=False):
    """Pickle a float32 tensor as torch does: of a storage that is said to have `stored` numbers."""
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(stored) + b"N" * legacy
    arguments = b"(" + storage + b"tQ" + number(0) + numbers(*size) + numbers(*stride) + b"\x89" + ORDERED
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


KEYS = b"]" + text("0") + b"a"


def entries(*pairs):
    return START + b"}(" + b"".join(pairs) + b"u."


ONE = text("a") + tensor("0", 1, (1,), (1,))
# A list of ten times a list of ten times a list and so on: 10**11 numbers.
NESTED = b"K\x00" + b"".join(b"q%c](%se" % (i, b"h%c" % i * 10) for i in range(11)) + b"q\x0b"
DEEP_TUPLE = b")" + b"\x85" * 10**5


def archive(pickled, storages=None, **options):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as file:
            file.writestr("a/data.pkl", pickled)
            file.writestr("a/version", "3\n")
            for key, stored in (storages or {"0": bytes(4)}).items():
                file.writestr(f"a/data/{key}", stored)

    return write


def overlapping(path):
    """Write 100 records over the same 40 MB of zeros, which take 40 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(
            "a/data.pkl", entries(*(text(str(i)) + tensor(str(i), 10**7, (10**7,), (1,)) for i in range(100)))
        )
        file.writestr("a/data/0", bytes(4 * 10**7))
        for i in range(1, 100):
            record = copy.copy(file.filelist[-1])
            record.filename = record.orig_filename = f"a/data/{i}"
            file.filelist.append(record)


def twice(path):
    archive(entries(ONE))(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("A/DATA.PKL", START + b"N.")


def behind_others(path):
    archive(entries(ONE))(path)
    path.write_bytes(path.read_bytes()[:4] + path.read_bytes())


def legacy(contents, keys=KEYS, stored=1):
    return lambda path: path.write_bytes(LEGACY + contents + START + keys + b"." + struct.pack("<qf", stored, 1))


def safetensors(header, data=b"", length=None, hole=0):
    def write(path):
        declared = len(header) if length is None else length
        path.write_bytes(struct.pack("<Q", declared) + header + data)
        os.truncate(path, path.stat().st_size + hole)

    return write


HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
SAME = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
CALLS = "not a checkpoint: it calls {} as torch.save does not"
KEY = "a dict in it has a key of type {}: expected text or a number of 64 bits"
HOSTILE = {
    # too large in memory
    "overlapping.pt": (overlapping, "expands from .* kB to 4 GB: expected at most 1.07 GB; raise max_bytes"),
    "pickle.pt": (
        archive(START + b"}" * 10**7 + b"."),
        "its pickle has 10 MB: expected at most 4.19 MB, max_bytes / 256",
    ),
    "view.pt": (archive(entries(text("w") + tensor("0", 1, (10**12,), (0,)))), "expands from .* bytes to 4 TB"),
    "shared.pt": (
        archive(
            entries(*(text(str(i)) + tensor("0", 10**6, (10**6,), (1,)) for i in range(900))), {"0": bytes(4 * 10**6)}
        ),
        "expands from .* kB to 3.6 GB",
    ),
    "hole.safetensors": (safetensors(HUGE, hole=2**40), "expands from .* kB to 1.1 TB"),
    "header.safetensors": (safetensors(b"{" + b" " * 10**7 + b"}"), "its header has 10 MB: expected at most 4.19 MB"),
    "bytearray.pt": (
        archive(START + b"cbuiltins\nbytearray\n" + number(10**11) + b"\x85R."),
        CALLS.format("builtins.bytearray"),
    ),
    "hex.pt": (
        archive(START + b"c_codecs\nencode\n" + text("a") + text("hex") + b"\x86R."),
        CALLS.format("_codecs.encode"),
    ),
    "class.pt": (
        archive(START + b"ctorch\nTensor\n" + number(10**11) + b"\x85R."),
        "more than .* values, first torch.Tensor",
    ),
    "copies.pt": (
        archive(
            START
            + text("a" * 10**6)
            + b"q\x00"
            + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 1000
            + b"."
        ),
        "its pickle, with what its calls copy, has 5 MB: expected at most 4.19 MB",
    ),
    "states.pt": (
        archive(
            START
            + entries(*(text(str(i)) + b"N" for i in range(10**5)))[2:-1]
            + b"q\x00cargparse\nNamespace\nq\x01"
            + b"h\x01)\x81h\x00b" * 10**4
            + b"."
        ),
        "its pickle, with what its calls copy, has 4.* MB: expected at most 4.19 MB",
    ),
    "sparse.pt": (
        archive(
            START
            + NESTED
            + b"ctorch._utils\n_rebuild_sparse_tensor\nctorch.serialization\n_get_layout\n"
            + text("torch.sparse_coo")
            + b"\x85R"
            + b"h\x0bh\x0b"
            + numbers(3)
            + b"\x87\x86R."
        ),
        CALLS.format("torch._utils._rebuild_sparse_tensor"),
    ),
    "cases.pt": (  # torch reads one record for all of these names
        archive(
            entries(
                *(
                    text(key) + tensor(key, 10**7, (1,), (1,))
                    for key in map("".join, product("aA", "bB", "cC", "dD", "eE"))
                )
            ),
            {"abcde": bytes(4 * 10**7)},
        ),
        "expands from .* kB to 1.28 GB",
    ),
    "reads.pt": (
        archive(START + b"ctraceback\nFrameSummary\n(" + text("/dev/zero") + number(1) + text("a") + b"tR."),
        "more than .* values, first traceback.FrameSummary",
    ),
    # declared and not there
    "record.pt": (
        archive(entries(text("w") + tensor("0", 10**9, (10**9,), (1,)))),
        "truncated or damaged: its storage 0 has 4 bytes, and not 4 GB",
    ),
    "absent.pt": (
        archive(entries(text("w") + tensor("7", 1, (1,), (1,)))),
        "its storage 7 has 0 bytes, and not 4 bytes",
    ),
    "two_sizes.pt": (
        archive(entries(ONE, text("w") + tensor("0", 2, (2,), (1,))), {"0": bytes(8)}),
        r"'w' is \(2,\) with strides \(1,\) from number 0 on, in a storage of 4 bytes",
    ),
    "beyond.pt": (
        archive(entries(text("w") + tensor("0", 1, (3,), (1,)))),
        r"'w' is \(3,\) with strides \(1,\) from number 0 on, in a storage of 4 bytes",
    ),
    "legacy_beyond.pt": (legacy(entries(text("w") + tensor("0", 1, (3,), (1,), True))), r"'w' is \(3,\) with strides"),
    "legacy_short.pt": (
        legacy(entries(text("w") + tensor("0", 10**9, (10**9,), (1,), True)), stored=10**9),
        "its storage 0 has .* bytes, and not 4 GB",
    ),
    "legacy_long.pt": (
        legacy(START + b"}" * 10**7 + b"."),
        "its pickle has 4.19 MB or more, max_bytes / 256; raise max",
    ),
    "length.safetensors": (safetensors(b"{", length=10**15), "its header has 1 PB, the file 9 bytes"),
    "empty.pt": (lambda path: path.touch(), "the file is empty"),
    "empty.safetensors": (lambda path: path.touch(), "the file is empty"),
    # for ever, or down into the last of the stack
    "nested.pt": (
        archive(START + (b"}" + text("a")) * 50_000 + tensor("0", 1, (1,), (1,)) + b"s" * 50_000 + b"."),
        "holds no state dict under model or state_dict: it holds a$",
    ),
    "wrappers.pt": (archive(entries(text("module." * 10**5) + tensor("0", 1, (1,), (1,)))), "^none of its 1 entries"),
    "prefixes.pt": (
        archive(entries(*(text(f"a{i}.stages.0.0.norm.weight") + tensor("0", 1, (1,), (1,)) for i in range(5000)))),
        r"^lacks downsample_layers\.0\.0\.weight$",
    ),
    "tuple_key.pt": (archive(START + b"}" + DEEP_TUPLE + b"Ns."), KEY.format("tuple")),
    "integer_key.pt": (archive(START + b"}" + number(2**61 - 1 << 9) + b"Ns."), KEY.format("int")),
    "set.pt": (archive(START + b"cbuiltins\nset\n]" + DEEP_TUPLE + b"a\x85R."), CALLS.format("builtins.set")),
    "legacy_keys.pt": (legacy(entries(), keys=b"]" + DEEP_TUPLE + b"a"), "it has no list of storages"),
    "deep.safetensors": (safetensors(b"{" + b'"a":[' + b"[" * 10**5), "maximum recursion depth"),
    # two readers that see two files
    "twice.pt": (twice, "two of its records are called A/DATA.PKL"),
    "behind_others.pt": (behind_others, "its zip directory is not at its end"),
    "twice.safetensors": (safetensors(b"{" + SAME + b"," + SAME + b"}", bytes(4)), "its header has a twice"),
    # in the place of methods and of what a terminal shows
    "attribute.pt": (
        archive(START + ORDERED + b"}" + text("items") + b"Nsb."),
        "it sets attributes of what is no module's",
    ),
    "shadow.pt": (
        archive(START + b"ca\nDict\n)R" + text("a") + b"Ns" + b"}" + text("items") + b"Nsb."),
        "it sets attributes of what is no module's",
    ),
    "shadow_later.pt": (  # the second of two objects shows that the class is a dict
        archive(START + b"(ca\nDict\nq\x00)R}" + text("items") + b"Nsb" + b"h\x00)R" + text("a") + b"Nst."),
        "it sets attributes of what is no module's",
    ),
    "made.pt": (
        archive(START + b"ca\nmake\n)R)R."),
        "it holds an object whose class is not known without a.make",
    ),
    "many.pt": (
        archive(START + b"".join(b"ca\n%d\n" % i for i in range(201)) + b"."),
        "it holds too many objects of classes that are not torch's: expected at most 200 of them and 20000 uses",
    ),
    "often.pt": (archive(START + b"ca\nmake\nq\x00" + b"h\x00)R" * 20_000 + b"."), "it holds too many objects of"),
    "object_key.pt": (archive(START + b"ca\nDict\n)R" + DEEP_TUPLE + b"Ns."), KEY.format("tuple")),
    "escape.pt": (
        archive(entries(text("\x1b]0;a\x07\r\n\u202e") + tensor("0", 1, (1,), (1,)))),
        r": they are \\x1b\]0;a\\x07\\r\\n\\u202e \(1,\)$",
    ),
    "long.pt": (archive(entries(text("a" * 10**6) + tensor("0", 1, (1,), (1,)))), "they are a{100}.* ... a{100}.*"),
    # no file at all
    "fifo.pt": (os.mkfifo, "^a FIFO; expected a regular file$"),
    "fifo.safetensors": (os.mkfifo, "^a FIFO; expected a regular file$"),
    "device.pt": (lambda path: path.symlink_to("/dev/zero"), "^a device; expected a regular file$"),
    "loop.pt": (lambda path: path.symlink_to("loop.pt"), "^cannot be read .*Too many levels of symbolic links"),
    "folder": (lambda path: path.mkdir() or os.mkfifo(path / "model.safetensors"), "^a FIFO; expected a regular file$"),
}

READ_ALL = """
import json, resource, sys
from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat import checkpoints
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for name in sys.argv[1:]:
    print(json.dumps(name), end="", flush=True)
    try:
        checkpoints.convert(checkpoints.load(name).state_dict, "timm")
        problem = "converted"
    except CheckpointError as error:
        problem = str(error)
    print(",", json.dumps(problem), flush=True)
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Return what a process of 512 MiB says of every hostile file; the one that killed it is absent."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    folder = tmp_path_factory.mktemp("hostile")
    for name, (write, _) in HOSTILE.items():
        write(folder / name)
    command = [sys.executable, "-c", READ_ALL, *HOSTILE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = [json.loads(f"[{line}]") for line in done.stdout.splitlines() if ", " in line]
    return dict(said) | {"stderr": done.stderr}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc/self/statm")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name, problems):
    assert name in problems, problems["stderr"]
    assert re.search(HOSTILE[name][1], problems[name]), problems[name]


def test_a_file_that_expands_is_read_within_max_bytes(tmp_path):
    state = {"weight": torch.ones(10**6), "view": torch.ones(1).expand(10**6)}
    torch.save(state, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        records = {record.filename: stored.read(record) for record in stored.infolist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, contents in records.items():
            compressed.writestr(name, contents)
    with pytest.raises(CheckpointError, match=r"expands from .* kB to 8 MB: expected at most 7 MB; raise max_bytes"):
        checkpoints.load(tmp_path / "a.pt", max_bytes=7 * 10**6)
    loaded = checkpoints.load(tmp_path / "a.pt", max_bytes=8 * 10**6).state_dict
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_whatever_torch_saves_of_tensors_and_plain_values_is_read(legacy, tmp_path):
    ones = torch.ones(2, 3)
    state = {
        "parameter": torch.nn.Parameter(ones),
        "view": ones[:, 1:].T,
        "half": ones.bfloat16(),
        "empty": torch.ones(0, 5),
        "bool": ones.bool(),
        "complex": torch.ones(2, dtype=torch.cfloat).conj(),
        "coordinates": ones.to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "plain": [1, -5, 2**70, 2.5, None, True, "a", b"\xff\x00", bytearray(b"\xff"), {1, "a"}, 1j, (1, (2,)), {3: 4}],
        "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float32],
        "module": torch.nn.Linear(1, 2).state_dict(),
    }
    if not legacy:  # torch does not read these from files of the old kind itself
        state |= {"eighth": ones.to(torch.float8_e4m3fn), "unsigned": ones.to(torch.uint16)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_torch(tmp_path / "a.pt")
    assert (loaded["plain"], loaded["torch"]) == (state["plain"], state["torch"])
    for name in state.keys() - {"coordinates", "meta", "plain", "torch", "module"}:
        assert torch.equal(loaded[name].to(torch.cdouble), state[name].to(torch.cdouble))
        assert (loaded[name].dtype, loaded[name].stride()) == (state[name].dtype, state[name].stride())
    assert torch.equal(loaded["coordinates"].to_dense(), ones)
    assert loaded["meta"].is_meta
    assert loaded["module"]._metadata == state["module"]._metadata
