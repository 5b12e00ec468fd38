"""Places where torch looks for tensors among arguments without asking what they are.

Two would lose gradients without a word, the others do not compile. Each asks for SparseTensors first.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules import batchnorm
from torch.utils.hooks import BackwardHook

from sparsecnx.functions.as_tensor import SparseImage
from sparsecnx.functions.table import like
from sparsecnx.tensor import SparseTensor

_apply = BackwardHook._apply_on_tensors
_sync_batch_norm = batchnorm.sync_batch_norm


def _apply_on_tensors(self: BackwardHook, fn: Any, args: tuple[Any, ...]) -> Any:
    """Refuse a backward hook of a module on a SparseTensor, which torch would never call."""
    if torch.is_grad_enabled() and any(isinstance(arg, (SparseTensor, SparseImage)) for arg in args):
        raise RuntimeError(
            f"{type(self.module).__name__} has a backward hook, which torch ignores on a SparseTensor: register a "
            "forward hook that calls register_hook() on the SparseTensor"
        )
    return _apply(self, fn, args)


def _synchronised(input: Any, *args: Any) -> Any:
    """Normalise the rows of all ranks: torch's function takes `(rows, C)`, and ranks with other numbers of rows."""
    if isinstance(input, SparseTensor):
        return like(input, _sync_batch_norm.apply(input.features, *args))
    return _sync_batch_norm.apply(input, *args)


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

    And let it ask the two activations that torch does not list among its overridable functions.
    """
    try:
        from torch._dynamo.variables import builtin, torch_function
        from torch._dynamo.variables import torch as dynamo
        from torch._dynamo.variables.builder import SourcelessBuilder

        insert = builtin.BuiltinVariable._handle_insert_op_in_graph
        dynamo.get_overridable_functions().update((F.hardswish, F.hardsigmoid))
        tables = builtin.BUILTIN_TO_TENSOR_FN_MAP
        populate, dispatch = builtin.populate_builtin_to_tensor_fn_map, torch_function.dispatch_torch_function
    except (ImportError, AttributeError):
        return

    def insert_in_order(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if len(args) == 2 and not args[0].is_tensor() and torch_function.has_torch_function(args[0]):
            populate()
            if self.fn in tables:
                return dispatch(tx, SourcelessBuilder.create(tx, tables[self.fn]), args, kwargs)
        return insert(self, tx, args, kwargs)

    builtin.BuiltinVariable._handle_insert_op_in_graph = insert_in_order  # type: ignore[method-assign]


BackwardHook._apply_on_tensors = _apply_on_tensors  # type: ignore[method-assign]
batchnorm.sync_batch_norm = SimpleNamespace(apply=_synchronised)  # type: ignore[assignment, misc]
_let_tuples_compile()
_let_operators_compile()
