"""The one dispatcher: it chooses the backend that runs an operator, and says why.

Every backend answers one question about an input, `refusal(x)`: None, or why it cannot run. Under `auto` the first
backend that does not refuse runs; a backend asked for by name runs or raises with its refusal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparsecnx.backends.selection import selected

FASTEST = "the fastest that can run"
SLOWER = "can run, slower"
ASKED_FOR = "asked for"
NOT_ASKED_FOR = "can run, not asked for"

_warned: set[str] = set()
_logged: set[tuple[str, str, str, torch.dtype]] = set()
_logger = logging.getLogger("sparsecnx")


class BackendError(RuntimeError):
    """The backend asked for cannot run this operator on this input."""


class Rows(Protocol):
    """The input of an operator: a `Tensor`, a `SparseTensor`, or the `MappedRows` of an explicit kernel map."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an operator.

    Attributes:
        function: takes the operator's input and its checked arguments.
        refusal: returns why it cannot run on a given input, or None where it can. By default it always can.
        detail: returns how it runs on a given input, for `sparsecnx doctor --explain`; None where there is no choice.
    """

    function: Callable[..., Any]
    refusal: Callable[[Any], str | None] = lambda _: None
    detail: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Choice:
    """The backend that an operator runs on, and why.

    Attributes:
        operator: name of the operator.
        backend: name of the backend that runs.
        reasons: for every backend that the operator offers, fastest first, why it was taken or not.
        detail: how the backend runs it on that input; empty where it has no choice.
    """

    operator: str
    backend: str
    reasons: dict[str, str]
    detail: str = ""


class Operator:
    """An operator's implementations by backend name, in the fixed order in which `auto` tries them.

    Args:
        name: name of the operator.
        strict: whether a backend asked for by name raises where it refuses. An operator that only moves values gives
            the same bits on every backend: it goes on to the next one instead, and its reference is no slow one.
        **implementations: one for each backend name, fastest first. The last one is the slow
            reference, which refuses nothing.
    """

    def __init__(self, name: str, *, strict: bool = True, **implementations: Implementation) -> None:
        self.name = name
        self.strict = strict
        self.implementations = implementations
        self._slowest = next(reversed(implementations))

    def __call__(self, x: Rows, *args: Any) -> Any:
        return self.implementations[self.choose(x)].function(x, *args)

    def choose(self, x: Rows) -> str:
        """Return the name of the backend that runs on `x` under the current selection.

        Raises:
            BackendError: the backend selected by `use_backend` offers this operator, but refuses `x`.
        """
        name = self._first(x)
        if not torch.compiler.is_compiling():
            if self.strict and name == self._slowest and len(self.implementations) > 1 and selected() != name:
                self._warn_slow(x)
            if _logger.isEnabledFor(logging.INFO):
                self._log(x, name)
        return name

    def explain(self, x: Rows) -> Choice:
        """Return the backend that `choose` takes, and why each of them is taken or not.

        Raises:
            BackendError: as `choose`.
        """
        taken = self._first(x)
        by_name = selected() == taken
        reasons = {}
        for name in self.implementations:
            if name == taken:
                reasons[name] = ASKED_FOR if by_name else FASTEST
            else:
                reasons[name] = self.refusal(name, x) or (NOT_ASKED_FOR if by_name else SLOWER)
        detail = self.implementations[taken].detail
        return Choice(self.name, taken, reasons, "" if detail is None else detail(x))

    def refusal(self, backend: str, x: Rows) -> str | None:
        """Return why `backend` cannot run this operator on `x`; None where it can."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"this version offers {', '.join(self.implementations)}"
        return implementation.refusal(x)

    def _first(self, x: Rows) -> str:
        asked = selected()
        if asked in self.implementations:
            refusal = self.implementations[asked].refusal(x)
            if refusal is None:
                return asked
            if self.strict:
                raise BackendError(f"backend {asked!r} cannot run {self.name}: {refusal}")
        for name, implementation in self.implementations.items():
            if implementation.refusal(x) is None:
                return name
        raise BackendError(f"no backend can run {self.name} on {x!r}")

    def _log(self, x: Rows, name: str) -> None:
        kind = (self.name, name, x.device.type, x.dtype)
        if kind not in _logged:
            _logged.add(kind)
            _logger.info("%s runs on %s (%s on %s)", self.name, name, str(x.dtype).removeprefix("torch."), x.device)

    def _warn_slow(self, x: Rows) -> None:
        if self.name in _warned:
            return
        _warned.add(self.name)
        reasons = [f"    {name}: {self.refusal(name, x)}" for name in self.implementations if name != self._slowest]
        first = f"{self.name} runs on the slow dense reference. `sparsecnx doctor` says what to do."
        warnings.warn("\n".join([first, *reasons]), stacklevel=5)
