"""Checks of a file of `torch.save` before torch reads it: what it holds, declares, and would make of it.

torch reads files with `weights_only=True`, which runs no code in them. A file of a few kilobytes can still exhaust
memory or time, or name numbers outside of itself. These checks read the directory and the pickle, never the numbers, in
time and memory that grow with the size of these two alone.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import functools
import io
import math
import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from sparsecnx.common.errors import CheckpointError

MOST_BYTES = 2**30
# Of classes and functions that torch.save does not need. torch goes through all of them at each use, for 0.1 ms.
MOST_OTHERS, MOST_USES = 200, 20_000
# Python needs up to this many bytes of memory for one byte of a pickle, a zip directory, or a header of safetensors,
# and for 4 MiB of them a few seconds. The largest published network has 0.1 MiB.
BYTES_FOR_ONE = 256
REMEDY = "raise max_bytes (--max-bytes of convert) if you trust the file"
# torch.save began its files with this number before it wrote zip files.
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ZIP = b"PK\x03\x04"


def check_description(what: str, size: int, max_bytes: int) -> None:
    """Raise CheckpointError if a part of a file that Python takes apart is too long for `max_bytes` of memory."""
    if size > max_bytes // BYTES_FOR_ONE:
        most = f"expected at most {readable(max_bytes // BYTES_FOR_ONE)}, max_bytes / {BYTES_FOR_ONE}"
        raise CheckpointError(f"its {what} has {readable(size)}: {most}; {REMEDY}")


def check_expansion(expanded: int, size: int, max_bytes: int) -> None:
    """Raise CheckpointError if what a file of `size` bytes holds takes more memory than itself and than `max_bytes`."""
    if expanded > max(size, max_bytes):
        expands = f"expands from {readable(size)} to {readable(expanded)}"
        raise CheckpointError(f"{expands}: expected at most {readable(max_bytes)}; {REMEDY}")


def check_holes(path: Path, max_bytes: int) -> None:
    """Raise CheckpointError if a file is many times larger than what the disk holds of it, and than `max_bytes`.

    Numbers compress little, on file systems that do so. Those that do not know what they hold say 0.
    """
    status = path.stat()
    on_disk = getattr(status, "st_blocks", 0) * 512
    if on_disk and status.st_size > 16 * on_disk:
        check_expansion(status.st_size, on_disk, max_bytes)


def readable(size: int) -> str:
    """Format a number of bytes, such as `6.7 GB`."""
    power = min((len(str(size)) - 1) // 3, 6)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def check_torch_file(path: Path, max_bytes: int) -> dict[str, type]:
    """Check a regular file, which `torch.load` is about to read, and which may take `max_bytes` or its size in memory.

    Returns:
        The classes and functions in it that `torch.save` does not need for tensors and plain values, in the order of
        the file, such as `pathlib.PosixPath`: with `dict` or `list` where items are put into what they make, otherwise
        `object`.

    Raises:
        CheckpointError: the file is too large in memory, or holds what `torch.save` does not write.
        Exception: it is damaged; which kind of error depends on the bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start[: len(ZIP)] == ZIP:
            return _check_zip(file, size, max_bytes)
        if start == LEGACY:
            return _check_legacy(file, size, max_bytes)
        raise ValueError("the file is empty" if size == 0 else "torch.save begins its files in another way")


def _check_zip(file: BinaryIO, size: int, max_bytes: int) -> dict[str, type]:
    check_description("zip directory", _directory_size(file, size), max_bytes)
    with zipfile.ZipFile(file) as archive:
        records: dict[bytes, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            # torch finds a record by its bytes in any case of letters, so that only these tell which one it reads.
            name = record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437").lower()
            if name in records:
                raise ValueError(f"two of its records are called {record.filename}")
            records[name] = record
        check_expansion(sum(record.file_size for record in records.values()), size, max_bytes)
        folder = next(iter(records), b"").partition(b"/")[0]
        if (description := records.get(folder + b"/data.pkl")) is None:
            raise ValueError("it has no record data.pkl")
        check_description("pickle", description.file_size, max_bytes)
        if not any(record.CRC for record in records.values()):
            del description.CRC  # torch's checksums were off, and zipfile would compare the zero
        pickled = io.BytesIO(archive.read(description))
    sizes = {name: record.file_size for name, record in records.items()}
    inspector = _Inspector(pickled, max_bytes, lambda key: sizes.get(folder + b"/data/" + key.encode().lower(), 0))
    inspector.load()
    check_expansion(max(inspector.tensor_bytes, inspector.storage_bytes), size, max_bytes)
    return inspector.others


def _directory_size(file: BinaryIO, size: int) -> int:
    """Return the bytes of a zip file's directory, which ends where the file ends.

    Other readers than torch's search for the directory. Where it lies here they agree, and so these checks are about
    what torch reads.
    """
    end = size - 22
    file.seek(max(end - 76, 0))
    tail = file.read().rjust(98)
    end64, locator64, end32 = tail[:56], tail[56:76], tail[76:]
    agree = end32[:4] == b"PK\x05\x06" and end32[-2:] == b"\0\0"
    length, start = struct.unpack("<LL", end32[12:20])
    if locator64[:4] == b"PK\x06\x07":
        end -= 76
        agree = agree and end64[:4] == b"PK\x06\x06" and locator64[8:16] == struct.pack("<Q", end)
        length, start = struct.unpack("<QQ", end64[40:])
    if not agree or start + length != end:
        raise ValueError("its zip directory is not at its end")
    return int(length)


def _check_legacy(file: BinaryIO, size: int, max_bytes: int) -> dict[str, type]:
    """Check a file of the time before zip files: five pickles (number, version, system, contents, keys) and numbers."""
    most = max_bytes // BYTES_FOR_ONE
    pickles = io.BytesIO(file.read(most))
    inspector = _Inspector(pickles, max_bytes, lambda key: size - inspector.storage_bytes)
    try:
        *_, keys = (inspector.load() for _ in range(5))
    except Exception:
        if pickles.tell() < most:
            raise
        raise CheckpointError(
            f"its pickle has {readable(most)} or more, max_bytes / {BYTES_FOR_ONE}; {REMEDY}"
        ) from None
    if type(keys) is not list or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of storages")
    check_expansion(inspector.tensor_bytes, size, max_bytes)
    return inspector.others


class _Tensor:
    """Stands for a tensor."""


class _Storage(NamedTuple):
    """Stands for numbers in the file."""

    dtype: torch.dtype
    numel: int


class _Dict(dict[Any, Any]):
    """Stands for a dict of any kind."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not _is_plain(key):
            found = f"a key of type {type(key).__name__.strip('_').lower()}"
            raise CheckpointError(f"a dict in it has {found}: expected text or a number of 64 bits")
        super().__setitem__(key, value)


class _Object(_Dict):
    """Stands for what another class or function of the file makes, and notes in `others` what is put into it."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str, others: dict[str, type]) -> None:
        super().__init__()
        self.name, self.others = name, others

    def __setitem__(self, key: Any, value: Any) -> None:
        self.others[self.name] = dict
        super().__setitem__(key, value)

    def append(self, value: Any) -> None:
        """Note that this is a list."""
        self.others[self.name] = list

    def __call__(self, *arguments: Any) -> Any:
        raise CheckpointError(f"it holds an object whose class is not known without {self.name:.200}")


def _is_plain(value: Any) -> bool:
    """Return whether a dict finds a value at once: tuples of tuples, or integers of one hash, can take it for ever."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, (str, float, type(None), _Object))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(isinstance(n, int) and 0 <= n < 2**63 for n in value)


def _is_parts(value: Any) -> bool:
    """Return whether a value holds a size at most beside tensors and numbers: torch makes tensors of nested lists."""
    nested = [part for part in value if isinstance(part, (list, tuple))]
    return len(nested) <= 1 and all(map(_is_shape, nested))


_VIEW = (_Tensor, _Storage, int, _is_shape, _is_shape)
# The functions that torch.save names: what stands for them, and the types or checks of their arguments.
_CALLS: dict[str, tuple[Any, ...]] = {
    "torch._utils._rebuild_tensor": _VIEW,
    "torch._utils._rebuild_tensor_v2": (*_VIEW, bool, dict, dict),
    "torch._utils._rebuild_tensor_v3": (*_VIEW, bool, dict, torch.dtype, dict),
    "torch._utils._rebuild_qtensor": (*_VIEW, _is_parts, bool, dict),
    "torch._utils._rebuild_parameter": (_Tensor, _Tensor, bool, dict),
    "torch._utils._rebuild_sparse_tensor": (_Tensor, torch.layout, _is_parts),
    "torch._utils._rebuild_meta_tensor_no_storage": (_Tensor, torch.dtype, _is_shape, _is_shape, bool),
    "torch.Size": (torch.Size, _is_shape),
    "torch.device": (torch.device, str, int),
    "torch.serialization._get_layout": (torch.serialization._get_layout, str),
    "collections.OrderedDict": (_Dict,),
    "collections.Counter": (_Dict, dict),
    "builtins.set": (set, lambda items: all(map(_is_plain, items))),
    "builtins.complex": (complex, float, float),
    "builtins.bytearray": (bytearray, bytes),  # of a number it makes so many bytes
    "_codecs.encode": (codecs.encode, str, ["latin1", "latin-1"].__contains__),  # hex would double what it gets
}
# torch lets classes of these modules in by itself. `traceback.FrameSummary` is one, and reads the file that it names.
# It takes no stand-in for them.
OF_TORCH = ("torch", "traceback", "builtins")
# The instructions that torch follows.
_INSTRUCTIONS = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET
    LONG_BINGET GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""
NO_STATE = "not a checkpoint: it sets attributes of what is no module's state dict"
_PythonUnpickler: Any = pickle._Unpickler  # torch's unpickler is a copy of this one, too


class _Inspector(_PythonUnpickler):
    """Reads pickles of `torch.save` with stand-ins for tensors, storages and objects.

    `size_of` returns the bytes that the file has for a storage. Afterwards, `storage_bytes` is the size of all
    storages, `tensor_bytes` that of all tensors if none shared its numbers with others, and `others` what
    `check_torch_file` returns.
    """

    def __init__(self, file: BinaryIO, max_bytes: int, size_of: Callable[[str], int]) -> None:
        super().__init__(file, encoding="utf-8")
        self.max_bytes, self.size_of = max_bytes, size_of
        self.storages: dict[str, _Storage] = {}
        self.tensor_bytes = self.storage_bytes = self.copied = 0
        self.others: dict[str, type] = {}
        self.uses = 0
        self.states: list[tuple[str, Any]] = []
        # The process lets in classes, or pairs of a class and its name in a pickle.
        allowed = torch.serialization.get_safe_globals()
        names = (str(c[1]) if isinstance(c, tuple) else f"{c.__module__}.{c.__qualname__}" for c in allowed)
        self.classes = {name for name in names if name.partition(".")[0] not in OF_TORCH}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))  # names of Python 2, as in torch
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        kind = vars(torch).get(name) if module in ("torch", "torch.storage") else None
        if isinstance(kind, (torch.dtype, torch.qscheme)):
            return kind
        if isinstance(kind, type) and name.endswith("Storage"):
            return torch.uint8 if kind is torch.UntypedStorage else torch.serialization.StorageType(name).dtype
        if full not in _CALLS and full not in self.classes:
            self.others.setdefault(full, object)
            self.count_use()
        return functools.partial(self.call, full)

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what a function makes of the arguments that `torch.save` gives to it."""
        self.count(arguments)
        if name in self.others:
            self.count_use()
            return _Object(name, self.others)
        if name in self.classes:
            return types.SimpleNamespace()
        made, *checks = _CALLS[name]
        right = (isinstance(a, c) if isinstance(c, type) else c(a) for a, c in zip(arguments, checks, strict=False))
        if len(arguments) > len(checks) or not all(right):
            raise CheckpointError(f"not a checkpoint: it calls {name} as torch.save does not")
        if _Storage in checks:
            self.check_view(*arguments)
        return made() if made is _Tensor else made(*arguments)

    def check_view(self, storage: _Storage, offset: int, size: Any, stride: Any, *others: Any) -> None:
        """Check that a tensor lies in its storage, which torch would enlarge, and count its bytes."""
        itemsize = max(part.itemsize for part in (storage.dtype, *others) if isinstance(part, torch.dtype))
        end = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        there = storage.numel * storage.dtype.itemsize
        if 0 not in size and end * itemsize > there:
            name = next((repr(entry) for entry in reversed(self.stack) if isinstance(entry, str)), "a tensor")
            view = f"{name} is {size} with strides {stride} from number {offset} on"
            raise CheckpointError(f"truncated or damaged: {view}, in a storage of {readable(there)}")
        self.tensor_bytes += math.prod(size) * itemsize

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for numbers, once they are known to be in the file."""
        _, dtype, name, _, numel, *part = pid[:6]  # torch 0.1 and 0.2 saved parts of storages
        if not isinstance(dtype, torch.dtype) or not isinstance(name, str) or not _is_shape((numel,)) or any(part):
            raise ValueError("it names a storage in an unknown way")
        if name not in self.storages:
            declared, there = numel * dtype.itemsize, self.size_of(name)
            if declared > there:
                has = f"its storage {name} has {readable(there)}, and not {readable(declared)}"
                raise CheckpointError(f"truncated or damaged: {has}")
            self.storages[name] = _Storage(dtype, numel)
            self.storage_bytes += declared
        return self.storages[name]

    def count(self, given: Any) -> None:
        """Bound what torch copies of what it gives to calls, which may be the same for all of them."""
        for parts in ((given,), given):
            self.copied += sum(len(part) for part in parts if hasattr(part, "__len__"))
            check_description("pickle, with what its calls copy,", self.copied, self.max_bytes)

    def count_use(self) -> None:
        """Bound the time that torch needs for `others`."""
        self.uses += 1
        if self.uses > MOST_USES or len(self.others) > MOST_OTHERS:
            most = f"expected at most {MOST_OTHERS} of them and {MOST_USES} uses"
            raise CheckpointError(f"it holds too many objects of classes that are not torch's: {most}")

    def load_build(self) -> None:
        """Check the state that an object gets: an attribute could take the place of a method."""
        state, target = self.stack.pop(), self.stack[-1]
        self.count(state)
        if isinstance(target, _Object):
            self.count_use()
            self.states.append((target.name, state))
            return
        metadata = isinstance(target, _Dict) and isinstance(state, _Dict) and state.keys() <= {"_metadata"}
        if not metadata and not isinstance(target, types.SimpleNamespace):
            raise CheckpointError(NO_STATE)

    def load(self) -> Any:
        """Return the contents, once all is read that decides which objects become dicts."""
        contents = super().load()
        for name, state in self.states:
            harmless = isinstance(state, _Dict) and not any(hasattr(OrderedDict, str(key)) for key in state)
            if self.others[name] is dict and not harmless:
                raise CheckpointError(NO_STATE)
        return contents

    def refuse(self) -> None:
        raise ValueError("its pickle has an instruction that torch does not follow")

    dispatch: Any = dict.fromkeys(range(256), refuse)
    dispatch |= {op: pickle._Unpickler.dispatch[op] for (op,) in map(vars(pickle).__getitem__, _INSTRUCTIONS.split())}
    dispatch |= {pickle.NEWOBJ[0]: dispatch[pickle.REDUCE[0]], pickle.BUILD[0]: load_build}
    dispatch |= {pickle.EMPTY_DICT[0]: lambda self: self.append(_Dict())}
