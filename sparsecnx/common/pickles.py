"""Reading of a pickle of `torch.save` with stand-ins, which shows what torch would make of it and builds nothing."""

from __future__ import annotations

import _compat_pickle
import codecs
import functools
import math
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.limits import check_description, readable

# A file may hold so many classes and functions that torch.save does not need. torch goes through all of them at each
# use, for 0.1 ms.
MOST_OTHERS, MOST_USES = 200, 20_000


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


class PickleInspector(_PythonUnpickler):
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
