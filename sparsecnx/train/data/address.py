"""The forms of `--data` beside a folder: `torchvision:CLASS:ROOT?split=train`, `hf:NAME`, `wds:PATTERN`, `python:CODE`.

An address is one line of text that a checkpoint keeps, so that a resumed run finds its data again.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from sparsecnx.common.errors import InputError

KINDS = ("torchvision", "hf", "wds", "python")
WRITING = ("cache", "cache_gb", "download")  # options that choose where to write
# Options are behind the last question mark. One without a name and an equals sign behind it is part of the name.
OPTIONS = re.compile(r"^(?P<what>.*)\?(?P<options>\w+=[^?]*)$", re.DOTALL)


class Address(NamedTuple):
    """The parts of an address.

    Attributes:
        kind: one of `KINDS`.
        what: what lies between the kind and the options.
        options: the options, as they were typed.
    """

    kind: str
    what: str
    options: dict[str, str]

    def __str__(self) -> str:
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kind}:{self.what}{'?' if options else ''}{options}"

    def refuse(self, problem: str) -> InputError:
        """Return an error about the address."""
        return InputError("data", self, problem)

    def expect_options(self, *known: str) -> None:
        """Raise InputError where an option has another name than these."""
        for name in self.options:
            if name not in known:
                expected = f"expected {', '.join(known)}" if known else "expected none"
                raise self.refuse(f"has the option {name}; {expected}")


def parse(data: str) -> Address | None:
    """Return the parts of an address; None for the name of a folder.

    Raises:
        InputError: it is incomplete, or an option is written in another way than `name=value`.
    """
    kind, colon, rest = data.partition(":")
    if not colon or kind not in KINDS:
        return None
    found = OPTIONS.match(rest)
    what, given = (found["what"], found["options"].split("&")) if found else (rest, [])
    address = Address(kind, what, {})
    if not what:
        raise InputError("data", data, "names nothing; expected a name behind the colon")
    for option in given:
        name, equals, value = option.partition("=")
        if not (equals and name and value) or name in address.options:
            problem = f"has the option {option!r}; expected name=value, each name once, joined by &"
            raise InputError("data", data, problem)
        address.options[name] = value
    return address


def absolute(path: str) -> str:
    """Return the absolute form of a path on this disk; of an address elsewhere and of a list of braces the same."""
    return path if "://" in path or path.startswith("{") else os.path.abspath(path)


def runs_code(data: str | None) -> bool:
    """Return whether opening an address runs Python code of the user."""
    return data is not None and data.startswith("python:")


def trusted(saved: str | None, given: str | None, option: str, argument: str, path: object) -> str | None:
    """Return the address that the user gave, or that of a checkpoint, which alone runs no code and writes nowhere.

    Args:
        saved: what the file says.
        given: what the user said; None for nothing.
        option: of the command that names it.
        argument: what an error blames.
        path: the file.

    Raises:
        InputError: the file names Python code.
    """
    if given is not None:
        return given
    where = of_checkpoint(saved)
    if runs_code(where):
        raise InputError(argument, path, f"its data are Python code, {where}, which runs only with --{option} {where}")
    return where


def of_checkpoint(data: str | None) -> str | None:
    """Return an address that a checkpoint holds without the options that choose where to write. A user alone does."""
    address = None if data is None else parse(data)
    if address is None:
        return data
    options = {name: value for name, value in address.options.items() if name not in WRITING}
    return str(address._replace(options=options))
