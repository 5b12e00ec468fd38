"""Models that are saved with the arguments that make them, to a folder or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsecnx.common.errors import MissingExtra

if TYPE_CHECKING:
    from typing_extensions import Self

    from sparsecnx.models.hub import HubModel

CLASSES: dict[str, type[Any]] = {}  # of networks, and of dataclasses that they take, by the names in config.json
NOT_COMPARED = ("training", "grad_checkpointing")  # attributes that a saved model need not keep
POSITIONAL = "*args"  # arguments without a name


class Pretrained(nn.Module):
    """A network that knows the arguments of its constructor. Subclasses need to do nothing for it.

    The folder of a model holds these arguments in `config.json`, its weights in `model.safetensors`, and its model card
    in `README.md`. huggingface_hub writes and reads it.
    """

    paper = "https://arxiv.org/abs/2301.00808"  # for the model card
    _arguments: Mapping[str, Any] = {}

    def __init_subclass__(cls, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not abstract:
            register(cls)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """Load a model from a folder that `save_pretrained` wrote, or from the hub, in evaluation mode.

        Args:
            name: the folder, or a name on the hub such as `"user/model"`.
            **options: `device` for the weights; `revision`, `token`, `cache_dir`, `force_download` and
                `local_files_only` as huggingface_hub has them; any other replaces an argument of the constructor, such
                as `drop_path_rate=0.1`.

        Raises:
            FileNotFoundError: there is no such folder or model, or it lacks a file.
            ValueError: it holds a model of another class, or arguments or weights that do not fit.
            MissingExtra: huggingface_hub or safetensors is not installed.
        """
        return _hub_model().load(name, cls, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder, which is made; a README.md that is there stays.

        Raises:
            ValueError: the constructor would not make this model again, see `config`.
            MissingExtra: huggingface_hub or safetensors is not installed.
        """
        _hub_model()(self).save(folder)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload the model to the hub and return the address of the commit.

        Args:
            name: `"user/model"`; it is made where there is none.
            **options: `private`, `token`, `branch`, `commit_message` and others of
                `huggingface_hub.PyTorchModelHubMixin.push_to_hub`.

        Raises:
            ValueError, MissingExtra: see `save_pretrained`.
        """
        return _hub_model()(self).push(name, **options)

    def config(self) -> dict[str, Any]:
        """Return the name of the class and the arguments that make this model, for `build`.

        Raises:
            ValueError: one of them is a network whose arguments are not known, has no name or is nothing that JSON
                holds; or they make another model, since layers or attributes were changed; or another class has the
                name of this one; or the model is sharded.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):
            raise ValueError(
                "model is sharded: expected a whole one; get_model_state_dict of torch collects its weights"
            )
        kind = type(self)
        if (other := CLASSES.get(kind.__name__)) is None or other.__module__ != kind.__module__:
            taken = "an abstract class" if other is None else f"{other.__module__}.{other.__name__} by its name"
            raise ValueError(f"model is a {kind.__module__}.{kind.__name__}, and config.json would mean {taken}")
        if POSITIONAL in self._arguments:
            raise ValueError(
                f"model is a {kind.__name__} that was made with *args {self._arguments[POSITIONAL]}: expected "
                "arguments by their names"
            )
        config = {"class": kind.__name__, **{name: self._argument(name) for name in self._arguments}}
        built = build(config, kind)
        expected, found = _shapes(built), _shapes(self)
        names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        settings = _settings(self)
        names += [name for name, value in _settings(built).items() if settings.get(name) != value]
        if names:
            raise ValueError(
                f"model is a {kind.__name__} that was changed after it was made, at {names[0]}: expected the layers "
                "and attributes of its constructor; save its state_dict()"
            )
        return config

    def _argument(self, name: str) -> Any:
        value = self._arguments[name]
        if not isinstance(value, type):
            plain = _plain(value)
            try:
                json.dumps(plain)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} is {value!r}: expected what JSON can hold ({error})") from error
            return plain
        module = getattr(self, name)
        if not isinstance(module, Pretrained):
            raise ValueError(
                f"{name} is a {type(module).__name__}: expected a network of sparsecnx.models, whose arguments are "
                "known; save the state_dict() of the model"
            )
        return module.config()


def register(cls: type[Any]) -> None:
    """Let config.json name a class. The first module that takes a name keeps it, and may define the class again."""
    if CLASSES.setdefault(cls.__name__, cls).__module__ == cls.__module__:
        CLASSES[cls.__name__] = cls


def build(config: Mapping[str, Any], kind: type[Any] | None = None) -> Any:
    """Return the model of a config, on the meta device: without weights.

    Args:
        config: what `Pretrained.config` returned, also after a way through JSON.
        kind: the expected class, which its name then means.

    Raises:
        ValueError: it names no known class, or the class does not take the arguments.
    """
    known = CLASSES if kind is None else {**CLASSES, kind.__name__: kind}
    name = config.get("class")
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"class is {name!r}: expected one of {', '.join(sorted(CLASSES))}")
    try:
        arguments = {key: _built(value) for key, value in config.items() if key != "class"}
        with torch.device("meta"):
            return known[name](**arguments)
    except Exception as error:  # A file can hold anything, and a constructor then fails in any way.
        raise ValueError(f"{name} cannot be made of its arguments: {error}") from error


def _plain(value: Any) -> Any:
    """Return an argument as what JSON holds. A mapping becomes pairs, whose order JSON keeps."""
    if isinstance(value, Mapping):
        return {"pairs": [[name, _plain(one)] for name, one in value.items()]}
    if CLASSES.get(type(value).__name__) is type(value):
        return {"class": type(value).__name__, **{field.name: getattr(value, field.name) for field in fields(value)}}
    return value


def _built(value: Any) -> Any:
    """Return the argument that `_plain` was given: undo it, and JSON's lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_built, value))
    if isinstance(value, Mapping):
        if "class" in value:
            return build(value)
        if set(value) != {"pairs"}:
            raise ValueError(f"an argument has the names {', '.join(map(str, value))}: expected class or pairs")
        return {name: _built(one) for name, one in value["pairs"]}
    return value


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that also notes its arguments and defaults; of a module, which is a part, only the class."""
    signature = inspect.signature(init)
    kinds = {p.kind: p.name for p in signature.parameters.values()}
    named, positional = kinds.get(inspect.Parameter.VAR_KEYWORD), kinds.get(inspect.Parameter.VAR_POSITIONAL)

    @functools.wraps(init)
    def recording(self: Pretrained, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop(named, {}) if named else {}
        if positional and (nameless := given.pop(positional)):
            given[POSITIONAL] = nameless
        noted = {name: type(value) if isinstance(value, nn.Module) else value for name, value in given.items()}
        self._arguments = noted  # The constructor of a subclass comes last and has its say.

    return recording


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _settings(model: nn.Module) -> dict[str, str]:
    """Return the classes of all modules, and their public attributes as far as JSON can hold them."""
    found = {}
    for path, module in model.named_modules():
        found[path or "its class"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in NOT_COMPARED:
                continue
            with contextlib.suppress(TypeError, ValueError):
                found[f"{path}.{name}".lstrip(".")] = json.dumps(_plain(value))
    return found


def _hub_model() -> type[HubModel]:
    try:
        from sparsecnx.models.hub import HubModel
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'sparsecnx[hub]'") from error
    return HubModel
