"""Register operators with torch: schema, fake kernel and gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsecnx.backends import transforms
from sparsecnx.backends.transforms import levels, transforms_active

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
    sizes: Mapping[str, str] | None = None,
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
        sizes: shapes of arguments, which the fake kernel checks: `{"x": "rows C", "weight": "out K*C", "bias": "C"}`.
            A name stands for the same size everywhere, "..." at the end for any further sizes. An argument of other
            dimensions may have as many values.
    """
    namespace, _, short = name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _libraries[namespace]
    if function is not None:
        library.define(short + torch.library.infer_schema(function, mutates_args=()))
        library.impl(short, function, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, namespace), short)
    torch.library.register_fake(name, _checked(operator.default, fake, sizes or {}), lib=library)
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
                ctx.shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]
                return output
            given = dict(zip(arguments, inputs, strict=True))
            ctx.shapes = {key: value.shape for key, value in given.items() if isinstance(value, Tensor)}
            ctx.names = [key for key in saves if isinstance(given[key], Tensor)]
            ctx.constants = {key: given[key] for key in saves if key not in ctx.names}
            ctx.mark_non_differentiable(*extra)
            ctx.save_for_backward(*(given[key] for key in ctx.names), *extra)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if backward is None:  # Every output may have a gradient.
                grad = next((value for value in grads if value is not None), None)
                message = _refusal("second derivatives", called, name)
                return tuple(
                    None if grad is None or not needed else _refuse(grad, shape, message)
                    for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
                )
            grad = grads[0]
            if grad is None:
                return (None,) * len(arguments)
            tensors = ctx.saved_tensors
            needs = {key for key, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed}
            saved = Saved(
                **ctx.constants,
                **dict(zip(ctx.names, tensors, strict=False)),
                outputs=tensors[len(ctx.names) :],
                shapes=ctx.shapes,
                needs=needs,
            )
            grad = grad if strided else grad.contiguous()
            # Without derivatives of gradients the operators that the formula calls need no autograd of their own.
            once = not (
                torch.is_grad_enabled()
                or torch.compiler.is_compiling()
                or levels._current_level >= 0
                or transforms_active()
            )
            with torch._C._AutoDispatchBelowAutograd() if once else nullcontext():
                found = backward(saved, grad)
            for key in needs - found.keys():
                found[key] = _refuse(grad, ctx.shapes[key], _refusal(f"gradient of {key!r}", called, name))
            return tuple(_reshaped(found[key], ctx.shapes[key]) if key in needs else None for key in arguments)

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.default(*inputs)

    class DifferentiableInTransform(transforms.SingleLevelFunction):
        """`Differentiable` for one level of `torch.func`. The level below has derivatives of its own."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch.enable_grad(), transforms.set_forward_mode(True):  # A function in its forward has neither.
                return Differentiable.forward(ctx, *inputs)

        backward = Differentiable.backward

    def autograd(*inputs: Any) -> Any:
        if levels._current_level >= 0 and transforms.have_tangents(inputs):
            raise NotImplementedError(_refusal("forward-mode derivatives", called, name))
        if torch.is_grad_enabled():
            for x in inputs:  # any() takes a microsecond longer for the arguments of the block.
                if isinstance(x, Tensor) and x.requires_grad:
                    return differentiable(inputs)
        return below_autograd(*inputs)

    def differentiable(inputs: tuple[Any, ...]) -> Any:
        if not transforms_active():
            return Differentiable.apply(*inputs)
        if transforms.missing is not None:
            what = f"gradient inside torch.func with torch {torch.__version__} ({transforms.missing})"
            raise NotImplementedError(_refusal(what, called, name))
        with transforms.single_level():
            return DifferentiableInTransform.apply(*inputs)

    library.impl(short, autograd, "Autograd")
    return operator


def _checked(operator: torch._ops.OpOverload, fake: Callable[..., Any], sizes: Mapping[str, str]) -> Callable[..., Any]:
    """Let a fake kernel refuse wrong shapes, and tensors of several devices: it is called when one of them is on meta.

    Real kernels check their arguments themselves.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def checked(*inputs: Any) -> Any:
        tensors = {key: given for key, given in zip(names, inputs, strict=False) if isinstance(given, Tensor)}
        if len({x.device for x in tensors.values()}) > 1:
            found = ", ".join(dict.fromkeys(f"{key} on {x.device}" for key, x in tensors.items()))
            raise ValueError(f"torch.ops.{operator}: expected tensors on one device, got {found}")
        known: dict[str, int] = {}
        for key, shape in sizes.items():
            if key in tensors and not _fits(tensors[key], shape.split(), known):
                expected = "".join(f", {name} = {size}" for name, size in known.items())
                raise ValueError(
                    f"torch.ops.{operator}: {key} is {tuple(tensors[key].shape)}, expected ({shape}){expected}"
                )
        return fake(*inputs)

    return checked


def _fits(x: Tensor, shape: Sequence[str], known: dict[str, int]) -> bool:
    """Return whether x has a shape such as `("out", "K*C")`, and add the names that are new to `known`."""
    sizes = x.shape
    if shape[-1:] == ["..."]:
        shape = shape[:-1]
        sizes = sizes[: len(shape)]
    if len(sizes) == len(shape):
        for name, size in zip(shape, sizes, strict=True):
            if name.isidentifier():
                known.setdefault(name, size)
    elif not known.keys() >= set(shape):
        return False
    wanted = [math.prod(int(part) if part.isdigit() else known[part] for part in name.split("*")) for name in shape]
    return wanted == list(sizes) if len(sizes) == len(shape) else math.prod(wanted) == x.numel()


def _reshaped(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
    return grad if grad is None or grad.shape == shape else grad.reshape(shape)


def _refusal(what: str, called: str, name: str) -> str:
    return (
        f"{called} has no {what} (in torch.ops.{name.replace('::', '.')}): call it inside "
        '`with sparsecnx.use_backend("reference"):`, plain torch, which has every derivative'
    )


def _refuse_gradient(grad: Tensor, shape: Sequence[int], message: str) -> Tensor:
    raise NotImplementedError(message)


# torch.compile traces gradients that may never be computed. So an operator refuses, which runs where one is computed.
_refuse: Any = register(
    "sparsecnx_derivatives::refuse",
    function=_refuse_gradient,
    fake=lambda grad, shape, message: grad.new_empty(shape),
    saves=("message",),
    backward=lambda saved, grad: {"grad": _refuse(grad, saved.shapes["grad"], saved.message)},
)
