"""Which implementation of an operator runs, and why.

Every operator has a reference implementation (dense, any device, any dtype) and faster ones. `auto` takes
the fastest that can run on the input; a backend asked for by name runs or raises with the reason. `Operator.explain`
says what was taken and why, and so does the logger `sparsecnx` at level INFO, once for each operator, backend, kind of
device and dtype.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsecnx.backends.selection import selected
from sparsecnx.choices import Comparison

FASTEST = "the fastest that can run"
SLOWER = "can run, slower"
ASKED_FOR = "asked for"
NOT_MEASURED = "can run, not measured"
NOT_ASKED_FOR = "can run, not asked for"
BY_NAME = "runs only where it is asked for by name"

_warned: set[str] = set()
_logged: set[tuple[str, str, str, torch.dtype]] = set()
_logger = logging.getLogger("sparsecnx")


class BackendError(RuntimeError):
    """The backend asked for cannot run this operator on this input."""


class Rows(Protocol):
    """What an operator runs on: a `SparseTensor`, or the `MappedRows` of an explicit kernel map."""

    @property
    def features(self) -> Tensor: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an operator.

    Attributes:
        function: takes the operator's `Rows` and the operator's checked arguments.
        refusal: why it cannot run on a given input, or None where it can.
        detail: how it runs on a given input, for those who ask; None where there is nothing to choose.
        compare: of a CUDA implementation, how its time compares with that of Triton on the operator's `Rows` and
            arguments, or without them on what the published models give it; None where that is never asked.
        by_name: whether it runs only where it is asked for by name; then it is not even looked for otherwise.
    """

    function: Callable[..., Any]
    refusal: Callable[[Any], str | None]
    detail: Callable[[Any], str] | None = None
    compare: Callable[..., Comparison] | None = None
    by_name: bool = False


@dataclass(frozen=True)
class Choice:
    """What an operator runs on, and why.

    Attributes:
        operator: its name.
        backend: name of the backend that runs.
        reasons: for every backend that the operator offers, fastest first, why it was taken or not.
        detail: how the backend runs it on that input; empty where it has no choice.
    """

    operator: str
    backend: str
    reasons: dict[str, str]
    detail: str = ""

    def __str__(self) -> str:
        detail = f", {self.detail}" if self.detail else ""
        others = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items() if name != self.backend)
        return f"{self.operator} runs on {self.backend}, {self.reasons[self.backend]}{detail} ({others or 'no other'})"


class Operator:
    """An operator's implementations by backend name, fastest first; CUDA and Triton change places by measurement."""

    def __init__(self, name: str, **implementations: Implementation) -> None:
        self.name = name
        self.implementations = implementations

    def __call__(self, x: Rows, *args: Any) -> Any:
        return self.implementations[self.choose(x, *args)].function(x, *args)

    def choose(self, x: Rows, *args: Any) -> str:
        """Name of the backend that runs on `x` and the operator's arguments under the current selection. Without
        arguments: on those that the published models give.

        Raises:
            BackendError: the backend selected by `use_backend` cannot.
        """
        name, _ = self._first(x, args)
        if not torch.compiler.is_compiling():
            if name == "reference" and selected() == "auto":
                self._warn_slow(x)
            if _logger.isEnabledFor(logging.INFO):
                self._log(x, args, name)
        return name

    def explain(self, x: Rows, *args: Any) -> Choice:
        """The backend that `choose` takes, and why each of them is taken or not.

        Raises:
            BackendError: the backend selected by `use_backend` cannot.
        """
        taken, comparison = self._first(x, args)
        automatic = selected() == "auto"
        fastest = FASTEST if comparison is None else comparison.reason
        cuda = SLOWER if comparison is None or comparison.measured else NOT_MEASURED
        reasons = {}
        for name in self.implementations:
            if name == taken:
                reasons[name] = fastest if automatic else ASKED_FOR
            elif self.implementations[name].by_name:
                reasons[name] = BY_NAME
            else:
                can = cuda if name == "cuda" else SLOWER
                reasons[name] = self.refusal(name, x) or (can if automatic else NOT_ASKED_FOR)
        detail = self.implementations[taken].detail
        return Choice(self.name, taken, reasons, "" if detail is None else detail(x))

    def refusal(self, backend: str, x: Rows) -> str | None:
        """Why `backend` cannot run this operator on `x`; None where it can."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"this version offers {', '.join(self.implementations)}"
        return implementation.refusal(x)

    def _first(self, x: Rows, args: tuple[Any, ...]) -> tuple[str, Comparison | None]:
        """The backend that is taken, and the measurement that decided where one was asked."""
        asked = selected()
        if asked != "auto":
            refusal = self.refusal(asked, x)
            if refusal is not None:
                raise BackendError(f"backend {asked!r} cannot run {self.name}: {refusal}")
            return asked, None
        for name in self._automatic():
            if self.refusal(name, x) is None:
                comparison = self._compare(x, args) if name == "triton" else None
                return (name if comparison is None else comparison.backend), comparison
        raise BackendError(f"no backend can run {self.name} on {x!r}")

    def _automatic(self) -> list[str]:
        """The backends among which `auto` chooses."""
        return [name for name, implementation in self.implementations.items() if not implementation.by_name]

    def _compare(self, x: Rows, args: tuple[Any, ...]) -> Comparison | None:
        """CUDA beside Triton; None where CUDA cannot run."""
        cuda = self.implementations.get("cuda")
        if cuda is None or cuda.compare is None or cuda.refusal(x) is not None:
            return None
        return cuda.compare(x, *args)

    def _log(self, x: Rows, args: tuple[Any, ...], name: str) -> None:
        kind = (self.name, name, x.device.type, x.dtype)
        if kind not in _logged:
            _logged.add(kind)
            _logger.info("%s on %s: %s", str(x.dtype).removeprefix("torch."), x.device, self.explain(x, *args))

    def _warn_slow(self, x: Rows) -> None:
        if self.name in _warned:
            return
        _warned.add(self.name)
        reasons = "; ".join(f"{name}: {self.refusal(name, x)}" for name in self._automatic() if name != "reference")
        warnings.warn(
            f"{self.name} runs on the slow dense reference ({reasons}). `sparsecnx doctor` says what to do.",
            stacklevel=5,
        )


def always(_: Rows) -> str | None:
    """Refusal rule of the reference implementations: none."""
    return None
