"""Places where torch looks for tensors among arguments without asking what they are.

One would lose gradients without a word, the others do not compile. Each asks for SparseTensors first.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import BackwardHook

from sparsecnx.functions.as_tensor import SparseImage
from sparsecnx.tensor import SparseTensor


def _apply_on_tensors(self: BackwardHook, fn: Any, args: tuple[Any, ...]) -> Any:
    """Refuse a backward hook of a module on a SparseTensor, which torch would never call."""
    if torch.is_grad_enabled() and any(isinstance(arg, (SparseTensor, SparseImage)) for arg in args):
        raise RuntimeError(
            f"{type(self.module).__name__} has a backward hook, which torch ignores on a SparseTensor: register a "
            "forward hook that calls register_hook() on the SparseTensor"
        )
    assert _apply is not None
    return _apply(self, fn, args)


def _let_tuples_compile() -> None:
    """Look into tuples too: torch.compile asks the tensors of `torch.cat([x, y])`, not of `torch.cat((x, y))`.

    Where another torch has other names for this, `fullgraph=True` raises an error at such a tuple.
    """
    try:
        from torch._dynamo.variables import torch_function as dynamo
        from torch._dynamo.variables.lists import TupleVariable

        flatten = dynamo._flatten_vts
    except (ImportError, AttributeError):
        return

    def flatten_with_tuples(variables: Iterable[Any]) -> list[Any]:
        found: list[Any] = []
        for variable in flatten(variables):
            found.extend(flatten_with_tuples(variable.items) if type(variable) is TupleVariable else [variable])
        return found

    dynamo._flatten_vts = flatten_with_tuples  # type: ignore[assignment]


def _let_operators_compile() -> None:
    """Keep the order of operands: torch.compile turns `x - tensor` and `x @ matrix` around where x is no tensor.

    And let it ask the two activations that torch does not list among its overridable functions. Where another torch has
    other names for this, these raise an error under `fullgraph=True`.
    """
    try:
        from torch._dynamo.variables import builtin, torch_function
        from torch._dynamo.variables import torch as dynamo
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.builder import SourcelessBuilder

        insert = builtin.BuiltinVariable._handle_insert_op_in_graph
        dynamo.get_overridable_functions().update((F.hardswish, F.hardsigmoid))
        tables = builtin.BUILTIN_TO_TENSOR_FN_MAP
        populate, dispatch = builtin.populate_builtin_to_tensor_fn_map, torch_function.dispatch_torch_function
        is_tensor = VariableTracker.is_tensor
    except (ImportError, AttributeError):
        return
    # torch.compile does not find the methods of these, which are written in Python, in the table of functions.
    others = {operator.pow: torch.pow, operator.floordiv: torch.floor_divide,
              operator.ipow: Tensor.pow_, operator.ifloordiv: Tensor.floor_divide_}  # fmt: skip

    def is_sparse(variable: Any) -> bool:
        return not is_tensor(variable) and variable.python_type() is SparseTensor

    def insert_in_order(self: Any, tx: Any, args: Any, *more: Any) -> Any:
        if len(args) == 2 and (is_sparse(args[0]) or (self.fn in others and is_sparse(args[1]))):
            populate()
            function = others.get(self.fn) or tables.get(self.fn)
            if function is not None:
                return dispatch(tx, SourcelessBuilder.create(tx, function), args, {})
        return insert(self, tx, args, *more)

    builtin.BuiltinVariable._handle_insert_op_in_graph = insert_in_order  # type: ignore[method-assign, assignment]


_apply = getattr(BackwardHook, "_apply_on_tensors", None)
if _apply is None:
    message = "with this torch, which was never tried, backward hooks of modules are ignored on SparseTensors"
    warnings.warn(message, stacklevel=2)
else:
    BackwardHook._apply_on_tensors = _apply_on_tensors  # type: ignore[method-assign]
_let_tuples_compile()
_let_operators_compile()
