"""Checks of a file of `torch.save` before torch reads it: what it holds, declares, and would make of it.

torch reads files with `weights_only=True`, which runs no code in them. A file of a few kilobytes can still exhaust
memory or time, or name numbers outside of itself. These checks read the directory and the pickle, never the numbers, in
time and memory that grow with the size of these two alone.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from sparsecnx.common.errors import CheckpointError

MOST_BYTES = 2**30
# Python needs up to this many bytes of memory for one byte of a pickle, a zip directory, or a header of safetensors,
# and for 4 MiB of them a few seconds. The largest published network has 0.1 MiB.
BYTES_FOR_ONE = 256
REMEDY = "raise max_bytes (--max-bytes of convert) if you trust the file"
# torch.save began its files with this number before it wrote zip files.
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ZIP = b"PK\x03\x04"

_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_REBUILT_ON_STORAGE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_REBUILT = ("_rebuild_parameter", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage")
# torch lets classes of these modules in by itself. `traceback.FrameSummary` is one, and reads the file that it names.
_OF_TORCH = ("torch", "traceback", "builtins")
_CALLED = {
    *(f"torch._utils.{name}" for name in (*_REBUILT_ON_STORAGE, *_REBUILT)),
    *(
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "collections.Counter",
    ),
    *("builtins.set", "builtins.complex", "builtins.bytearray", "_codecs.encode"),
}


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


def check_torch_file(path: Path, max_bytes: int) -> None:
    """Check a file of `torch.save`, which `torch.load` is about to read.

    Args:
        path: a regular file.
        max_bytes: the most that its contents may take in memory, if that is more than the file has.

    Raises:
        CheckpointError: the file is too large in memory, or holds what `torch.save` does not write.
        Exception: it is damaged; which kind of error depends on the bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start[: len(ZIP)] == ZIP:
            _check_zip(file, size, max_bytes)
        elif start == LEGACY:
            _check_legacy(file, size, max_bytes)
        else:
            raise ValueError("the file is empty" if size == 0 else "torch.save begins its files in another way")


def _check_zip(file: BinaryIO, size: int, max_bytes: int) -> None:
    check_description("zip directory", _directory_size(file, size), max_bytes)
    with zipfile.ZipFile(file) as archive:
        records: dict[bytes, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"its record {record.filename} is compressed by a method that torch does not read")
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
        sizes = {name: record.file_size for name, record in records.items()}
        if not any(record.CRC for record in records.values()):
            del description.CRC  # torch's checksums were off, and zipfile would compare the zero
        with archive.open(description) as stream:
            pickled = stream.read(description.file_size)
    pickles = Pickles(
        io.BytesIO(pickled),
        max_bytes // BYTES_FOR_ONE,
        lambda key: sizes.get(folder + b"/data/" + key.encode().lower()),
    )
    pickles.check()
    check_expansion(pickles.tensor_bytes, size, max_bytes)


def _directory_size(file: BinaryIO, size: int) -> int:
    """Return the bytes of a zip file's directory, which ends where the file ends.

    Other readers than torch's search for the directory. Where it lies here they agree, and so these checks are about
    what torch reads.
    """
    end = size - 22
    file.seek(max(end - 76, 0))
    tail = file.read().rjust(98)
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise ValueError("its zip directory is not at its end")
    length, start = struct.unpack("<LL", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":  # the locator of a zip64 record
        end -= 76
        length, start = struct.unpack("<QQ", tail[40:56])
        if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[-34:-26])[0] != end:
            raise ValueError("its zip64 directory is not at its end")
    if start + length != end:
        raise ValueError("its zip directory is not at its end")
    return int(length)


def _check_legacy(file: BinaryIO, size: int, max_bytes: int) -> None:
    """Check a file of the time before zip files: five pickles (number, version, system, contents, keys) and numbers."""
    pickles = Pickles(file, max_bytes // BYTES_FOR_ONE)
    for _ in range(4):
        pickles.check()
    keys = pickles.check()
    if not isinstance(keys, _List) or not keys.plain:
        raise ValueError("it has no list of storages")
    if pickles.storage_bytes > size:
        declared = f"its tensors have {readable(pickles.storage_bytes)}, the file {readable(size)}"
        raise CheckpointError(f"truncated or damaged: {declared}")
    check_expansion(pickles.tensor_bytes, size, max_bytes)


class _Global(NamedTuple):
    """A class or function."""

    name: str


class _Storage(NamedTuple):
    """Numbers in the file: `numel` of `itemsize` bytes."""

    itemsize: int
    numel: int


class _Dict:
    """A dict of any kind; `attributes` is True as long as an OrderedDict may take its items as attributes."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes = True


class _List:
    """A list; `plain` is True as long as it holds text and numbers only."""

    __slots__ = ("plain",)

    def __init__(self) -> None:
        self.plain = True


class _Object(NamedTuple):
    """Anything else that is made, such as a tensor, by the function or class that made it."""

    name: str


class Pickles:
    """Pickles of `torch.save`, followed without making the objects that they describe.

    Text, numbers and tuples on the stack are real, everything else stands for an object. The instructions are those of
    torch's `weights_only` unpickler, which refuses all others.

    Args:
        file: the pickles, one after another.
        most: bytes that they may have.
        size_of: returns the bytes of the record of a storage, or None if there is none; None for a file that has its
            numbers after the pickles.

    Attributes:
        tensor_bytes: the size of all tensors together if none shared its numbers with others.
        storage_bytes: the size of all storages.
    """

    def __init__(self, file: BinaryIO, most: int, size_of: Callable[[str], int | None] | None = None) -> None:
        self.file, self.left, self.size_of = file, most, size_of
        self.storages: dict[str, _Storage] = {}
        self.tensor_bytes = self.storage_bytes = 0
        names = map(_name, torch.serialization.get_safe_globals())
        self.classes = {name for name in names if name.partition(".")[0] not in _OF_TORCH}

    def read(self, count: int) -> bytes:
        data = self.file.read(min(count, self.left + 1))
        if len(data) > self.left:
            raise CheckpointError(f"its pickle is too long: {REMEDY}")
        if len(data) < count:
            raise EOFError("its pickle ends early")
        self.left -= count
        return data

    def line(self) -> str:
        line = self.file.readline(1000)
        self.left -= len(line)
        return line[:-1].decode()

    def check(self) -> Any:
        """Follow one pickle to its end, and return what it describes.

        Raises:
            CheckpointError: it holds or does what `torch.save` does not write.
            Exception: it is damaged.
        """
        stack: list[Any] = []
        below: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            op = self.read(1)
            if op == pickle.BINGET:
                stack.append(memo[self.read(1)[0]])
            elif op == pickle.LONG_BINGET:
                stack.append(memo[self.unpack("<I")])
            elif op == pickle.BINPUT:
                memo[self.read(1)[0]] = stack[-1]
            elif op == pickle.LONG_BINPUT:
                memo[self.unpack("<I")] = stack[-1]
            elif op == pickle.BINUNICODE:
                stack.append(str(self.read(self.unpack("<I")), "utf-8", "surrogatepass"))
            elif op == pickle.SHORT_BINSTRING:
                stack.append(self.read(self.read(1)[0]).decode())
            elif op == pickle.BININT:
                stack.append(self.unpack("<i"))
            elif op == pickle.BININT1:
                stack.append(self.read(1)[0])
            elif op == pickle.BININT2:
                stack.append(self.unpack("<H"))
            elif op == pickle.LONG1:
                stack.append(int.from_bytes(self.read(self.read(1)[0]), "little", signed=True))
            elif op == pickle.BINFLOAT:
                stack.append(self.unpack(">d"))
            elif op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op == pickle.EMPTY_DICT:
                stack.append(_Dict())
            elif op == pickle.EMPTY_LIST:
                stack.append(_List())
            elif op == pickle.MARK:
                below.append(stack)
                stack = []
            elif op == pickle.TUPLE:
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            elif op in _TUPLES:
                if len(stack) < _TUPLES[op]:
                    raise ValueError("its pickle is damaged")
                stack[-_TUPLES[op] :] = [tuple(stack[-_TUPLES[op] :])]
            elif op == pickle.SETITEM:
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            elif op == pickle.SETITEMS:
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            elif op == pickle.APPEND:
                item = stack.pop()
                _append(stack[-1], [item])
            elif op == pickle.APPENDS:
                items, stack = stack, below.pop()
                _append(stack[-1], items)
            elif op == pickle.GLOBAL:
                stack.append(self.find(f"{self.line()}.{self.line()}".replace("__builtin__.", "builtins.")))
            elif op in (pickle.REDUCE, pickle.NEWOBJ):
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments, stack))
            elif op == pickle.BUILD:
                self.build(stack.pop(), stack[-1])
            elif op == pickle.BINPERSID:
                stack.append(self.storage(stack.pop()))
            elif op == pickle.PROTO:
                self.read(1)
            elif op == pickle.STOP:
                return stack.pop()
            else:
                raise ValueError(f"its pickle has the instruction {op!r}")

    def unpack(self, format: str) -> Any:
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def find(self, name: str) -> _Global:
        """Return a class or function that a file may hold."""
        module, _, attribute = name.rpartition(".")
        known = name in _CALLED or name in self.classes
        if not known and module in ("torch", "torch.storage") and attribute.isidentifier():
            known = isinstance(vars(torch).get(attribute), (torch.dtype, torch.qscheme)) or "Storage" in attribute
        if not known:
            raise CheckpointError(f"not a checkpoint: it holds more than tensors and plain values, first {name}")
        return _Global(name)

    def call(self, function: Any, arguments: Any, stack: list[Any]) -> Any:
        """Return what a function makes of arguments that `torch.save` gives to it."""
        name = function.name if isinstance(function, _Global) else ""
        short = name.removeprefix("torch._utils.")
        right = isinstance(arguments, tuple)
        made: Any = _Object(name)
        if name in self.classes:
            pass
        elif name == "collections.OrderedDict":
            right, made = right and not arguments, _Dict()
        elif name == "collections.Counter":
            right, made = right and all(isinstance(argument, _Dict) for argument in arguments), _Dict()
        elif name == "builtins.set":
            right = right and all(isinstance(argument, _List) and argument.plain for argument in arguments)
        elif name == "torch.Size":
            made = arguments[0]
            right = len(arguments) == 1 and isinstance(made, tuple) and all(map(_is_size, made))
        elif name == "builtins.bytearray":  # of a number it makes so many bytes
            right = right and all(argument == _Object("_codecs.encode") for argument in arguments)
        elif name == "_codecs.encode":  # into hex it doubles what it gets, also of its own
            right = len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1")
        elif name in ("builtins.complex", "torch.device", "torch.serialization._get_layout"):
            right = right and all(map(_is_plain, arguments))
        elif short in _REBUILT_ON_STORAGE:
            storage, offset, size, stride = arguments[:4]
            dtype = _dtype(arguments[6]) if short == "_rebuild_tensor_v3" else None
            self.view(storage, offset, size, stride, dtype, stack)
        elif short not in _REBUILT:
            right = False
        if not right:
            raise CheckpointError(f"not a checkpoint: it calls {name or 'what is no function'} as torch.save does not")
        return made

    def view(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None, stack: list[Any]
    ) -> None:
        """Check that a tensor lies in its storage, and count its bytes."""
        name = next((repr(entry) for entry in reversed(stack) if isinstance(entry, str)), "a tensor")
        shapes = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 64
        if not shapes or not isinstance(storage, _Storage) or not all(map(_is_size, (offset, *size, *stride))):
            raise ValueError(f"{name} has no numbers, size and strides")
        itemsize = storage.itemsize if dtype is None else dtype.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        there = storage.numel * storage.itemsize
        if 0 not in size and (last + 1) * itemsize > there:
            declared = (
                f"{name} is {size} with strides {stride} from number {offset} on, in a storage of {readable(there)}"
            )
            raise CheckpointError(f"truncated or damaged: {declared}")
        self.tensor_bytes += math.prod(size) * itemsize

    def build(self, state: Any, target: Any) -> None:
        """Check the state that an object gets: an attribute could take the place of a method."""
        metadata = isinstance(target, _Dict) and isinstance(state, _Dict) and state.attributes
        if not metadata and not (isinstance(target, _Object) and target.name in self.classes):
            raise CheckpointError("not a checkpoint: it sets attributes of what is no module's state dict")

    def storage(self, key: Any) -> _Storage:
        """Return the numbers that a pickle names, once they are known to be in the file."""
        length = 5 if self.size_of else 6
        if not isinstance(key, tuple) or len(key) != length or not all(map(_is_plain, (key[0], key[2], key[3]))):
            raise ValueError("it names a storage in an unknown way")
        kind, name, numel = key[1], key[2], key[4]
        if key[0] != "storage" or not isinstance(kind, _Global) or not isinstance(name, str) or not _is_size(numel):
            raise ValueError("it names a storage in an unknown way")
        if length == 6 and key[5] is not None:  # a part of a storage, which torch 0.1 and 0.2 saved
            raise CheckpointError("not a checkpoint: it has parts of storages, which no torch since 0.4 writes")
        found = _Storage(_itemsize(kind.name), numel)
        size = found.itemsize * numel
        if name not in self.storages:
            self.storage_bytes += size
        if self.storages.setdefault(name, found) != found:
            raise CheckpointError(f"truncated or damaged: its storage {name} has two sizes")
        if self.size_of is not None and (there := self.size_of(name) or 0) < size:
            raise CheckpointError(
                f"truncated or damaged: its storage {name} has {readable(there)}, and not {readable(size)}"
            )
        return found


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, _Dict) or len(items) % 2:
        raise ValueError("its pickle is damaged")
    for key in items[::2]:
        # A tuple of tuples can take for ever to be found in a dict, and so can equal hashes of large integers.
        if not _is_plain(key):
            raise CheckpointError(f"a dict in it has a key of type {_kind(key)}: expected text or a number of 64 bits")
        target.attributes = target.attributes and key == "_metadata"


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, _List):
        target.plain = target.plain and all(map(_is_plain, items))
    elif not isinstance(target, _Object):
        raise ValueError("its pickle is damaged")


def _is_plain(value: Any) -> bool:
    """Return whether a value is text or a number of 64 bits, which a dict finds at once."""
    return isinstance(value, (str, float, type(None))) or (isinstance(value, int) and abs(value) < 2**63)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _kind(value: Any) -> str:
    return value.name if isinstance(value, (_Global, _Object)) else type(value).__name__.strip("_").lower()


def _dtype(value: Any) -> torch.dtype:
    dtype = getattr(torch, value.name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


@functools.cache
def _itemsize(storage: str) -> int:
    """Return the bytes of a number in a storage, such as 4 for `torch.FloatStorage`."""
    name = storage.rpartition(".")[2]
    if name == "UntypedStorage":
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch deprecates these classes, and saves them
        return int(getattr(torch, name).dtype.itemsize)


def _name(allowed: Any) -> str:
    """Return the name in a pickle of a class or function that this process lets in."""
    return str(allowed[1]) if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"
