"""Register operators with torch: schema, fake kernel and gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_libraries: dict[str, torch.library.Library] = {}


class Saved(SimpleNamespace):
    """The saved arguments of a forward call by name, and these facts about the call, for its gradient.

    Attributes:
        outputs: the operator's outputs except the first.
        shapes: shapes of all tensors among the arguments, by name.
        needs: names of the arguments whose gradients are asked for.
    """

    outputs: tuple[Tensor, ...]
    shapes: dict[str, torch.Size]
    needs: set[str]


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    function: Callable[..., Any] | None = None,
    saves: Collection[str] = (),
    backward: Callable[[Any, Tensor], dict[str, Tensor | None]] | None = None,
    strided: bool = False,
) -> Any:
    """Register `name`, "namespace::operator", and return `torch.ops.namespace.operator`.

    Only the first output is differentiable; the others are what the gradient needs, and are saved for it. An operator
    without `backward` raises where its gradient is asked for.

    Args:
        fake: takes the operator's arguments, and returns empty tensors of the shapes and dtypes of its outputs. It
            gives the arguments their names where there is no `function`.
        function: the operator in Python with annotated arguments, from which the schema is made. None for an operator
            of the compiled library, whose schema is in csrc/library.cpp.
        saves: names of the arguments that `backward` reads.
        backward: takes `Saved` and the gradient of the first output, contiguous unless `strided`. It returns gradients
            by argument name: an argument that is not named has none, and shapes may differ from the argument's.
        strided: whether `backward` takes a gradient of any strides.
    """
    namespace, _, short = name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]
    if function is not None:
        library.define(short + torch.library.infer_schema(function, mutates_args=()))
        library.impl(short, function, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, namespace), short)
    torch.library.register_fake(name, fake, lib=library)

    if backward is None:
        torch.library.register_autograd(name, _no_gradient(name), lib=library)
        return operator

    arguments, formula = list(inspect.signature(function or fake).parameters), backward

    class Differentiable(torch.autograd.Function):
        """The operator below autograd, and its gradient.

        `torch.library.register_autograd` would do, but fills in default arguments: on a CPU the block with its 17
        arguments took 149 us forward and backward with it, 100 us without (benchmarks/overhead.py, 2026-11-28).
        """

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = below_autograd(*inputs)
            extra = output[1:] if isinstance(output, tuple) else ()
            given = dict(zip(arguments, inputs, strict=True))
            ctx.names = [key for key in saves if isinstance(given[key], Tensor)]
            ctx.constants = {key: given[key] for key in saves if key not in ctx.names}
            ctx.shapes = {key: value.shape for key, value in given.items() if isinstance(value, Tensor)}
            ctx.mark_non_differentiable(*extra)
            ctx.set_materialize_grads(False)  # These would be zeros in the shapes of outputs that nobody reads.
            ctx.save_for_backward(*(given[key] for key in ctx.names), *extra)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            grad, tensors = grads[0], ctx.saved_tensors
            if grad is None:
                return (None,) * len(arguments)
            saved = Saved(
                **ctx.constants,
                **dict(zip(ctx.names, tensors, strict=False)),
                outputs=tensors[len(ctx.names) :],
                shapes=ctx.shapes,
                needs={key for key, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed},
            )
            grad = grad if strided else grad.contiguous()
            # Without gradients of gradients the operators that the formula calls need no autograd of their own.
            once = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            with torch._C._AutoDispatchBelowAutograd() if once else nullcontext():
                found = formula(saved, grad)
            return tuple(
                _reshaped(found.get(key), ctx.shapes[key]) if key in saved.needs else None for key in arguments
            )

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.default(*inputs)

    def autograd(*inputs: Any) -> Any:
        differentiable = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return Differentiable.apply(*inputs) if differentiable else below_autograd(*inputs)

    library.impl(short, autograd, "Autograd")
    return operator


def _reshaped(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
    return grad if grad is None or grad.shape == shape else grad.reshape(shape)


def _no_gradient(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            f"torch.ops.{name.replace('::', '.')} has no gradient (it is one already, or part of one): "
            "use_backend('reference') has gradients of gradients"
        )

    return refuse
