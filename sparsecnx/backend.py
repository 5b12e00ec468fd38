"""Which implementation of an operator runs, and why.

Every operator has a reference implementation (dense, any device, any dtype) and faster ones. `auto` takes
the fastest that can run on the input; a backend asked for by name runs or raises with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsecnx.selection import selected
from sparsecnx.tensor import SparseTensor

_warned: set[str] = set()


class BackendError(RuntimeError):
    """The backend asked for cannot run this operator on this input."""


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an operator.

    Attributes:
        function: takes the `SparseTensor` and the operator's checked arguments.
        refusal: why it cannot run on a given input, or None where it can.
    """

    function: Callable[..., Any]
    refusal: Callable[[SparseTensor], str | None]


class Operator:
    """An operator's implementations by backend name, fastest first."""

    def __init__(self, name: str, **implementations: Implementation) -> None:
        self.name = name
        self.implementations = implementations

    def __call__(self, x: SparseTensor, *args: Any) -> Any:
        return self.implementations[self.choose(x)].function(x, *args)

    def choose(self, x: SparseTensor) -> str:
        """Name of the backend that runs on `x` under the current selection.

        Raises:
            BackendError: the backend selected by `use_backend` cannot.
        """
        asked = selected()
        if asked != "auto":
            refusal = self.refusal(asked, x)
            if refusal is not None:
                raise BackendError(f"backend {asked!r} cannot run {self.name}: {refusal}")
            return asked
        for name in self.implementations:
            if self.refusal(name, x) is None:
                if name == "reference" and not torch.compiler.is_compiling():
                    self._warn_slow(x)
                return name
        raise BackendError(f"no backend can run {self.name} on {x!r}")

    def refusal(self, backend: str, x: SparseTensor) -> str | None:
        """Why `backend` cannot run this operator on `x`; None where it can."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"this version offers {', '.join(self.implementations)}"
        return implementation.refusal(x)

    def _warn_slow(self, x: SparseTensor) -> None:
        if self.name in _warned:
            return
        _warned.add(self.name)
        reasons = "; ".join(f"{name}: {self.refusal(name, x)}" for name in self.implementations if name != "reference")
        warnings.warn(
            f"{self.name} runs on the slow dense reference ({reasons}). `sparsecnx doctor` says what to do.",
            stacklevel=5,
        )


def always(_: SparseTensor) -> str | None:
    """Refusal rule of the reference implementations: none."""
    return None
