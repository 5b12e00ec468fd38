"""Register operators with torch: schema, fake kernel and gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

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
    public: str | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Register `name`, "namespace::operator", and return `torch.ops.namespace.operator`.

    Only the first output is differentiable; the others are what the gradient needs, and are saved for it. What an
    operator cannot differentiate raises NotImplementedError, which names `public` and the remedy, and is never left
    out: the gradient of an operator without `backward`, that of an argument which `backward` leaves out, and
    forward-mode derivatives (`torch.func.jvp`, dual tensors). First gradients are also those of `torch.func`, and
    `torch.vmap` calls the operator once for each sample.

    Args:
        fake: takes the operator's arguments, and returns empty tensors of the shapes and dtypes of its outputs. It
            gives the arguments their names where there is no `function`.
        function: the operator in Python with annotated arguments, from which the schema is made. None for an operator
            of the compiled library, whose schema is in csrc/library.cpp.
        saves: names of the arguments that `backward` reads.
        backward: takes `Saved` and the gradient of the first output, contiguous unless `strided`. It returns gradients
            by argument name: an argument whose gradient is None has none, and shapes may differ from the argument's.
        strided: whether `backward` takes a gradient of any strides.
        public: what users call: the function of `sparsecnx.ops`, by default of the operator's own name.
        flops: what `torch.utils.flop_counter` counts, see `sparsecnx.ops.flops`; None for nothing.
    """
    namespace, _, short = name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]
    if function is not None:
        library.define(short + torch.library.infer_schema(function, mutates_args=()))
        library.impl(short, function, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, namespace), short)
    torch.library.register_fake(name, _on_one_device(operator.default, fake), lib=library)
    if flops is not None:
        register_flop_formula(operator)(flops)

    arguments, called = list(inspect.signature(function or fake).parameters), public or short

    class Differentiable(torch.autograd.Function):
        """The operator below autograd, and its gradient.

        `torch.library.register_autograd` would do, but fills in default arguments: on a CPU the block with its 17
        arguments took 149 us forward and backward with it, 100 us without (benchmarks/overhead.py, 2026-11-28).
        """

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = below_autograd(*inputs)
            extra = output[1:] if isinstance(output, tuple) else ()
            ctx.set_materialize_grads(False)  # These would be zeros in the shapes of outputs that nobody reads.
            if backward is None:
                return output
            given = dict(zip(arguments, inputs, strict=True))
            ctx.names = [key for key in saves if isinstance(given[key], Tensor)]
            ctx.constants = {key: given[key] for key in saves if key not in ctx.names}
            ctx.shapes = {key: value.shape for key, value in given.items() if isinstance(value, Tensor)}
            ctx.mark_non_differentiable(*extra)
            ctx.save_for_backward(*(given[key] for key in ctx.names), *extra)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            grad = grads[0]
            if backward is None:
                raise _refusal("second derivatives", called, name)
            if grad is None:
                return (None,) * len(arguments)
            tensors = ctx.saved_tensors
            saved = Saved(
                **ctx.constants,
                **dict(zip(ctx.names, tensors, strict=False)),
                outputs=tensors[len(ctx.names) :],
                shapes=ctx.shapes,
                needs={key for key, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed},
            )
            grad = grad if strided else grad.contiguous()
            # Without derivatives of gradients the operators that the formula calls need no autograd of their own.
            once = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _transformed())
            with torch._C._AutoDispatchBelowAutograd() if once else nullcontext():
                found = backward(saved, grad)
            try:
                return tuple(
                    _reshaped(found[key], ctx.shapes[key]) if key in saved.needs else None for key in arguments
                )
            except KeyError as missing:
                raise _refusal(f"gradient of {missing}", called, name) from None

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.default(*inputs)

    class DifferentiableInTransform(_SingleLevelFunction):
        """`Differentiable` for one level of `torch.func`. The level below has derivatives of its own."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # A function in its forward has neither.
                return Differentiable.forward(ctx, *inputs)

        backward = Differentiable.backward

    def autograd(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and _have_tangents(inputs):
            raise _refusal("forward-mode derivatives", called, name)
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)):
            return below_autograd(*inputs)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return DifferentiableInTransform.apply(*inputs)  # type: ignore[attr-defined]
        return Differentiable.apply(*inputs)

    library.impl(short, autograd, "Autograd")
    return operator


def _have_tangents(inputs: tuple[Any, ...]) -> bool:
    return torch._C._is_fwd_grad_enabled() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in inputs if isinstance(x, Tensor)
    )


def _transformed() -> bool:
    """Return whether derivatives other than those of the autograd graph are being computed, maybe of a gradient."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _on_one_device(operator: torch._ops.OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Let a fake kernel refuse tensors of several devices: torch calls it when one of them is on meta."""

    def checked(*inputs: Any) -> Any:
        places = [
            (argument.name, x.device)
            for argument, given in zip(operator._schema.arguments, inputs, strict=False)
            for x in (given if isinstance(given, (list, tuple)) else (given,))
            if isinstance(x, Tensor)
        ]
        if len({device for _, device in places}) > 1:
            found = ", ".join(dict.fromkeys(f"{key} on {device}" for key, device in places))
            raise ValueError(f"torch.ops.{operator}: expected tensors on one device, got {found}")
        return fake(*inputs)

    return checked


def _reshaped(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
    return grad if grad is None or grad.shape == shape else grad.reshape(shape)


def _refusal(what: str, called: str, name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{called} has no {what} (in torch.ops.{name.replace('::', '.')}): call it inside "
        '`with sparsecnx.use_backend("reference"):`, plain torch, which has every derivative'
    )
