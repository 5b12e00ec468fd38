"""Commands whose options are the fields of a recipe and of the options of a run, from arguments or YAML.

sparsecnx pretrain --config tiny --data FOLDER --output runs/tiny
sparsecnx pretrain --config runs/tiny/config.yaml --output runs/again
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import SUPPRESS, ActionYesNo, ArgumentParser

from sparsecnx.common.errors import InputError
from sparsecnx.train.config import PUBLISHED
from sparsecnx.train.options import Options
from sparsecnx.train.recipe import DEFAULTS, INTERNAL, Recipe

DESCRIPTION = (
    "Pretrain a ConvNet on images or volumes with the published recipe of FCMAE or SparK. Ctrl-C and SIGTERM save a "
    "checkpoint and exit with 130 and 143; --resume goes on from it with the same losses. Under torchrun all processes "
    "train one network."
)


class Command(NamedTuple):
    """A command whose options are the fields of two dataclasses.

    Attributes:
        name: of the command.
        description: for its help.
        options: dataclass of what a run reads and writes and where it computes.
        recipe: dataclass of what decides its losses.
        published: folder of the published recipes.
        hidden: fields that are no options.
    """

    name: str
    description: str
    options: type[Any]
    recipe: type[Any]
    published: Any
    hidden: Collection[str] = ()


PRETRAIN = Command("pretrain", DESCRIPTION, Options, Recipe, PUBLISHED)


def parse(arguments: Sequence[str], command: Command = PRETRAIN) -> tuple[Any, dict[str, Any]]:
    """Return the options of a run, and the fields of its recipe that the user gave, in arguments or in a file.

    Raises:
        InputError: an argument is unknown, or of another type; or a configuration cannot be read.
    """
    parser, typed = build_parser(command), _with_paths(arguments, command.published)
    try:
        found = parser.parse_args(typed, defaults=False)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise _named(error, parser) from error
    given = {name: value for name, value in found.items() if name != "config"}
    for name in given:
        if given[name] is None and name not in _optional(command.recipe) | _optional(command.options):
            raise InputError(name, "null", "expected a value")
    options = command.options(**{f.name: given[f.name] for f in fields(command.options) if f.name in given})
    return options, {f.name: given[f.name] for f in fields(command.recipe) if f.name in given}


def build_parser(command: Command = PRETRAIN) -> ArgumentParser:
    """Return the parser of a command, with an option for every field of its dataclasses."""
    parser = ArgumentParser(
        prog=f"sparsecnx {command.name}",
        description=command.description,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
        formatter_class=argparse.HelpFormatter,
    )
    known = ", ".join(sorted(path.name.removesuffix(".yaml") for path in command.published.iterdir()))
    parser.add_argument("--config", action="config", help=f"YAML file of options, or a published recipe: {known}")
    _add_fields(parser.add_argument_group("run (the losses do not depend on it)"), command.options, command.hidden)
    _add_fields(parser.add_argument_group("recipe (defaults as published)"), command.recipe, command.hidden)
    return parser


def _add_fields(group: Any, kind: type, hidden: Collection[str]) -> None:
    """Add an option for every field of a dataclass, with the help of its docstring. Absent ones have no value."""
    types = get_type_hints(kind)
    told_of = [entry for base in reversed(kind.__mro__) for entry in parse_docstring(base.__doc__ or "").params]
    texts = {entry.arg_name: re.sub(r'[`"]', "", entry.description or "").rstrip(".") for entry in told_of}
    for field in [field for field in fields(kind) if field.name not in hidden]:
        told = f"{texts[field.name]} (default: {_default(field)})"
        options: dict[str, Any] = {"default": SUPPRESS, "help": SUPPRESS if field.name in INTERNAL else told}
        kind_of, metavar = KINDS.get(str(field.type), (types[field.name], _metavar(str(field.type))))
        if kind_of is bool:
            options |= {"action": ActionYesNo(no_prefix="no-")}
        else:
            options |= {"type": kind_of, "metavar": metavar}
        if field.name == "resume":
            options |= {"nargs": "?", "const": "newest", "type": str}
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _default(field: Field[Any]) -> str:
    """Return a default in words, with those of the methods that have another."""
    words = {"None": "none", "True": "yes", "False": "no"}
    others = [f"{name} {values[field.name]:g}" for name, values in DEFAULTS.items() if field.name in values]
    return ", ".join([words.get(str(field.default), str(field.default)), *others])


def _metavar(kind: str) -> str:
    return {"int": "N", "float": "X"}.get(kind.removesuffix(" | None"), "NAME")


def _sides(value: Any) -> int | tuple[int, ...]:
    """Read `224`, `192x320`, `96x96x96` or a list."""
    text = str(value)
    if re.fullmatch(r"[\[(]?\d+(\s*[x,]\s*\d+){0,2}[\])]?", text) is None:
        form = "a side such as 224, 192x320 for height and width, or 96x96x96 for volumes"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {form}")
    sides = tuple(map(int, re.findall(r"\d+", text)))
    return sides[0] if len(sides) == 1 else sides


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Read `0.5`, `0.5,0.4,0.4` or a list; null is None."""
    if value is None or value == "null":
        return None
    try:
        return tuple(float(part) for part in str(value).strip("[]() ").split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value}: expected numbers, such as 0.5 or 0.485,0.456,0.406") from error


# Options of these types are read by a function of their own, and the help calls their values so.
KINDS: dict[str, tuple[Any, str]] = {
    "int | tuple[int, ...]": (_sides, "PIXELS"),
    "tuple[float, ...] | None": (_numbers, "X,..."),
    "tuple[float, float] | None": (_numbers, "LOW,HIGH"),
}


def _with_paths(arguments: Sequence[str], published: Any) -> list[str]:
    """Return the arguments with the path of a published recipe in place of its name."""
    found = [
        part for typed in arguments for part in (typed.split("=", 1) if typed.startswith("--config=") else [typed])
    ]
    for i, name in enumerate(found[1:], 1):
        if found[i - 1] == "--config" and not Path(name).exists() and (published / f"{name}.yaml").is_file():
            found[i] = str(published / f"{name}.yaml")
        if found[i - 1] == "--config" and Path(found[i]).is_file():
            _expect_keys_once(found[i])
    return found


def _expect_keys_once(path: str) -> None:
    """Raise InputError if a YAML file has an option twice, of which the last one would win in silence."""
    try:
        with open(path) as file:
            node = yaml.compose(file)
    except (OSError, UnicodeError, yaml.YAMLError):
        return  # the parser says what is wrong with it
    nodes = [node]
    while nodes:
        one = nodes.pop()
        pairs = one.value if isinstance(one, yaml.MappingNode) else []
        keys = Counter(str(key.value).replace("-", "_") for key, _ in pairs)
        for name in [name for name, count in keys.items() if count > 1][:1]:
            raise InputError("config", path, f"has {name} twice; expected each option once")
        nodes += [value for _, value in pairs]


def _optional(kind: type) -> set[str]:
    """Return the fields that may be None."""
    return {field.name for field in fields(kind) if str(field.type).endswith("| None")}


def _named(error: Exception, parser: ArgumentParser) -> InputError:
    """Return an error of jsonargparse as one of ours, in one line that names the argument."""
    text = str(error)
    known = [option for action in parser._actions if action.help != SUPPRESS for option in action.option_strings]
    if unknown := re.search(r"unrecognized arguments: (\S+)|Option '(\w+)' is not accepted", text):
        name = (unknown[1] or f"--{unknown[2].replace('_', '-')}").partition("=")[0]
        names = [option.removeprefix("--") for option in known if option.startswith("--")]
        ends = [other for other in names if other.endswith(name.removeprefix("-"))]  # --lr is --base-lr
        near = ends or difflib.get_close_matches(name.removeprefix("--"), names, 1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        return InputError(name.removeprefix("--").replace("-", "_"), "unknown", f"expected an option of --help{hint}")
    key = re.search(r'Parser key "(\w+)"|argument --([\w-]+)', text)
    value = re.search(r"(?:Given value|Got value): (.*)", text)
    kinds = re.search(r"Expected an? <class '(\w+)'>", text)
    if key is None:
        return InputError("config", "unreadable", " ".join(text.split()))
    name = (key[1] or key[2]).replace("-", "_")
    if value is None or kinds is None:
        return InputError(name, "not valid", " ".join(text.partition(": ")[2].split()))
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list"}
    return InputError(name, value[1], f"expected {words.get(kinds[1], kinds[1])}")
