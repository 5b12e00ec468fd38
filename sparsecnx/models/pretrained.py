"""Models that are saved with the arguments that make them, to a folder or the Hugging Face hub."""

from __future__ import annotations

import functools
import inspect
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


class Pretrained(nn.Module):
    """A network that knows the arguments of its constructor. Subclasses need to do nothing for it.

    The folder of a model holds these arguments in `config.json`, its weights in `model.safetensors`, and its model card
    in `README.md`. huggingface_hub writes and reads it.
    """

    paper = "https://arxiv.org/abs/2301.00808"  # for the model card
    _arguments: Mapping[str, Any] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        CLASSES[cls.__name__] = cls
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
            ValueError: one of them is a network whose arguments are not known, or they make other parameters, since
                layers were replaced or removed; or the model is sharded.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):
            raise ValueError(
                "model is sharded: expected a whole one; get_model_state_dict of torch collects its weights"
            )
        config = {"class": type(self).__name__, **{name: self._argument(name) for name in self._arguments}}
        expected, found = _shapes(build(config)), _shapes(self)
        if expected != found:
            names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
            raise ValueError(
                f"model is a {type(self).__name__} that was changed after it was made, at {names[0]}: expected the "
                "layers of its constructor; save its state_dict()"
            )
        return config

    def _argument(self, name: str) -> Any:
        value = self._arguments[name]
        if not isinstance(value, type):
            return _plain(value)
        module = getattr(self, name)
        if not isinstance(module, Pretrained):
            raise ValueError(
                f"{name} is a {type(module).__name__}: expected a network of sparsecnx.models, whose arguments are "
                "known; save the state_dict() of the model"
            )
        return module.config()


def build(config: Mapping[str, Any]) -> Any:
    """Return the model of a config, on the meta device: without weights.

    Raises:
        TypeError, ValueError: it names no known class, or the class does not take the arguments.
    """
    arguments = {name: _built(value) for name, value in config.items()}
    name = arguments.pop("class", None)
    if name not in CLASSES:
        raise ValueError(f"class is {name!r}: expected one of {', '.join(sorted(CLASSES))}")
    with torch.device("meta"):
        return CLASSES[name](**arguments)


def _plain(value: Any) -> Any:
    """Return an argument as what JSON holds. A mapping becomes pairs, whose order JSON keeps."""
    if isinstance(value, Mapping):
        return {"pairs": [[name, _plain(one)] for name, one in value.items()]}
    if type(value).__name__ in CLASSES:
        return {"class": type(value).__name__, **{field.name: getattr(value, field.name) for field in fields(value)}}
    return value


def _built(value: Any) -> Any:
    """Return the argument that `_plain` was given: undoes it, and JSON's lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_built, value))
    if isinstance(value, Mapping):
        return build(value) if "class" in value else {name: _built(one) for name, one in value["pairs"]}
    return value


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that also notes its arguments and defaults; of a module, which is a part, only the class."""
    parameters = list(inspect.signature(init).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(init)
    def recording(self: Pretrained, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        noted = {name: type(value) if isinstance(value, nn.Module) else value for name, value in given.items()}
        self._arguments = {**defaults, **noted}  # The constructor of a subclass comes last and has its say.

    return recording


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _hub_model() -> type[HubModel]:
    try:
        from sparsecnx.models.hub import HubModel
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'sparsecnx[hub]'") from error
    return HubModel
