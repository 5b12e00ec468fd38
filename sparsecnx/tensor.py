"""SparseTensor: the features of the visible sites, and where they are."""

from __future__ import annotations

import inspect
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from sparsecnx.backends.transforms import transforms_active
from sparsecnx.common.memory import check_memory
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.mask_reading import check_same_device
from sparsecnx.geometry.packing import gather_rows, scatter_rows
from sparsecnx.geometry.tiles import TileSet

# The function of ours that answers each function and method of torch. `sparsecnx.functions` fills it.
HANDLERS: dict[Any, Callable[..., Any]] = {}
_LIBRARIES = tuple(f"{Path(module).parent}{os.sep}" for module in (torch.__file__, __file__))
PACKAGE = _LIBRARIES[1]

ON = " on a SparseTensor"
NOT_IN_TABLE = "it is not in docs/functions.md, the table of functions that have a meaning on visible sites"


class UnsupportedFunctionError(TypeError, AttributeError):
    """A function of torch has no meaning on the visible sites, or none with these arguments."""


def refuse(function: Any, why: str, remedy: str = "x.dense() is an ordinary tensor, zero at masked sites") -> NoReturn:
    """Raise UnsupportedFunctionError: which function, the line that called it, why it cannot run, and what to do."""
    raise UnsupportedFunctionError(f"{_called(function)}: {why}; {remedy}")


def name_function(error: Exception, function: Any) -> None:
    """Put the function and the line that called it before the message of an error that does not say them."""
    if torch.compiler.is_compiling() or len(error.args) != 1 or not isinstance(error.args[0], str):
        return
    message = error.args[0]
    if ON not in message:
        name = function if isinstance(function, str) else getattr(function, "__name__", "")
        error.args = (f"{_called(function)}: {message.removeprefix(f'{name}: ')}",)


def _called(function: Any) -> str:
    """Return the name of a function of torch, and the line that called it."""
    if isinstance(function, str):
        name = function
    elif torch.compiler.is_compiling():  # It does not trace resolve_name.
        name = function.__name__
    else:
        name = torch.overrides.resolve_name(function) or repr(function)
    return f"{name}{ON}{_caller()}"


def _caller() -> str:
    """Return where the network called torch: the first line outside torch and this package."""
    if torch.compiler.is_compiling():
        return ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return "" if frame is None else f", called at {frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass(init=False, eq=False, repr=False)
class SparseTensor:
    """Features of active sites, packed into rows, with the layout that says where the rows are.

    It answers torch's functions, methods and operators as a dense tensor of its `shape` that is masked after every
    operator: `sparsecnx.functions` has the table. Operators return new tensors that share the layout; in-place
    functions change the features. The attributes cannot be set.

    It is a dataclass and a pytree node, because DDP, FSDP and torch.export look for tensors inside these.

    Attributes:
        features: `(rows, C)`, one row per active site in the order of `layout`. Views of channels may have more or
            fewer dimensions of channels, `(rows, *channels)`; the operators take one.
        layout: the geometry, see `sparsecnx.geometry.layout`.
        channels_last: whether the channels are the last dimensions of `shape`, as after `x.permute(0, 2, 3, 1)`.
            The features are the same.
    """

    __slots__ = ("channels_last", "features", "layout")
    features: Tensor
    layout: Layout
    channels_last: bool

    def __init__(self, features: Tensor, layout: Layout, channels_last: bool = False) -> None:
        """
        Raises:
            ValueError: `features` is not `(layout.rows, C)` or lies on another device than `layout`.
        """
        if features.ndim != 2 or features.shape[0] != layout.rows:
            raise ValueError(
                f"features is {tuple(features.shape)}: the layout needs ({layout.rows}, C), a row per active site"
            )
        if features.device != layout.device:
            raise ValueError(f"features is on {features.device}: the layout is on {layout.device}")
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "channels_last", channels_last)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(function)
        if handler is None:
            if isinstance(function, torch.ScriptMethod):
                refuse(f"ScriptModule.{function.name}", "TorchScript takes tensors alone",
                       "call the module that was scripted or traced, or compile it with torch.compile")  # fmt: skip
            refuse(function, NOT_IN_TABLE)
        return answer(function, handler, args, kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"SparseTensor is immutable: cannot set {name!r}; use with_features()")

    def __reduce__(self) -> tuple[Callable[..., SparseTensor], tuple[Tensor, Layout, bool]]:
        # Copying and pickling must not set attributes.
        return packed, (self.features, self.layout, self.channels_last)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        mask: Tensor,
        visible: int | None = None,
        count: int | None = None,
        *,
        ones: str = "masked",
        below_tile: str = "raise",
    ) -> SparseTensor:
        """Pack the visible sites of a dense tensor. Masked sites are never read. `sparsecnx.sparse` is the same.

        Args:
            dense: `(B, C, *spatial)`, for example images `(B, 3, H, W)`.
            mask: which tiles are masked, on the device of `dense`: bool, or integers or floats of zeros and ones. It is
                `(B, L)`, L tiles in raster order, `(B, *grid)` or `(B, 1, *grid)`, on any grid that divides the
                spatial shape. With 1 for B, or without B, it is for all images. L tiles are taken as squares where
                these fit. `(B, 1, L)` and `(B, L, 1)` are an error where L squares fit, because they may be a grid, or
                `(B, L)` with an axis more; `(B, 1, *grid)` says the grid. A mask on the grid of single sites, such as
                pixels `(B, H, W)`, is cut into the largest tiles that it consists of, square ones if there are any;
                which strides fit then depends on its values. With `visible` or `count`, and where torch.compile
                compiles, no values are read and it stays one of single sites, which no stride divides: pass every p-th
                pixel, `mask[:, ::p, ::p]`.
            visible: visible tiles per image, where known and equal: then nothing is read back from the
                device and no shape depends on data.
            count: visible tiles of the whole batch, where known: the same for images that differ.
            ones: what ones in `mask` are, "masked" as in MAE or "visible" as in SparK.
            below_tile: what a network does whose stride leaves less than a site of a tile. "raise": an error. "dense":
                it goes on from there with an ordinary tensor, zero at masked sites.

        Raises:
            TypeError: `dense` is not a tensor, or `mask` not one of bool, integers or floats.
            ValueError: shapes or devices do not fit, or the shape of `mask` has two meanings; the batch is empty;
                `mask` has other values than zeros and ones (on a GPU an assertion on the device fails), or does not
                keep `visible` or `count` tiles.
        """
        if not isinstance(dense, Tensor):
            raise TypeError(f"dense is a {type(dense).__name__}: expected a tensor (B, C, *spatial)")
        if dense.ndim < 3:
            raise ValueError(f"dense is {tuple(dense.shape)}: expected (B, C, *spatial)")
        if dense.shape[0] == 0:
            raise ValueError(f"dense is {tuple(dense.shape)}: expected at least one image in the batch")
        check_memory(dense=dense)
        shape = tuple(dense.shape[2:])
        check_same_device(mask, dense, "dense")
        batch = dense.shape[0]
        layout = Layout.from_mask(mask, shape, visible, count, batch=batch, ones=ones, below_tile=below_tile)
        return packed(gather_rows(dense, layout), layout)

    def dense(self, fill: float | Tensor = 0.0) -> Tensor:
        """Scatter the rows into a dense tensor of `shape`, `(B, C, *spatial)`.

        Args:
            fill: value of the inactive sites: a number, or a tensor `(C,)` such as a mask token.

        Raises:
            ValueError: `fill` is a tensor of another shape than `(C,)`, or on another device.
        """
        if not torch.is_grad_enabled():
            refuse_custom_function((self,))
        features, layout = self.features, self.layout
        rows = features if features.ndim == 2 else features.reshape(layout.rows, math.prod(features.shape[1:]))
        channels = rows.shape[1]
        if not isinstance(fill, Tensor):
            fill = rows.new_full((channels,), fill)
        elif fill.shape != (channels,):
            raise ValueError(f"fill is {tuple(fill.shape)}: expected a number or ({channels},)")
        elif fill.device != self.device:
            raise ValueError(f"fill is on {fill.device}: x is on {self.device}; pass fill.to(x.device)")
        else:
            check_memory(fill=fill)
        check_memory(features=rows)
        images = scatter_rows(rows, layout, fill.to(self.dtype))
        if features.ndim != 2:
            images = images.reshape(layout.batch, *features.shape[1:], *layout.shape)
        if self.channels_last:
            last = range(1 + layout.ndim, images.ndim)
            images = images.movedim(tuple(range(1, features.ndim)), tuple(last))
        return images

    def with_features(self, features: Tensor, layout: Layout | None = None) -> SparseTensor:
        """Return other features on the same sites, or on those of `layout`."""
        return SparseTensor(features, self.layout if layout is None else layout, self.channels_last)

    @property
    def coordinates(self) -> Tensor:
        """Return the image and the position of each row, int32 `(rows, 1 + ndim)`, in multiples of `layout.stride`."""
        return self.layout.coordinates()

    @property
    def F(self) -> Tensor:  # noqa: N802 - MinkowskiEngine's name
        """Return `features`, by MinkowskiEngine's name."""
        return self.features

    @property
    def C(self) -> Tensor:  # noqa: N802 - MinkowskiEngine's name
        """Return `coordinates`, by MinkowskiEngine's name."""
        return self.coordinates

    @property
    def shape(self) -> torch.Size:
        """Return `(B, C, *spatial)`, the shape of `dense()`; `(B, *spatial, C)` where the channels are last."""
        channels, layout = self.features.shape[1:], self.layout
        if self.channels_last:
            return torch.Size((layout.batch, *layout.shape, *channels))
        return torch.Size((layout.batch, *channels, *layout.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    def __getattr__(self, name: str) -> Any:  # Methods of torch that have handlers are attributes of the class.
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"SparseTensor has no attribute {name!r}")
        refuse(f"Tensor.{name}", NOT_IN_TABLE)

    def __repr__(self) -> str:
        if not isinstance(self.features, Tensor) or self.features.ndim < 1:  # A tree_map made it.
            return f"SparseTensor(features={self.features!r}, layout={self.layout!r})"
        return (
            f"SparseTensor(shape={tuple(self.shape)}, rows={self.layout.rows}, tile={self.layout.tile}, "
            f"stride={self.layout.stride}, dtype={self.dtype}, device={self.device})"
        )


# Names of torch's arguments, and those that its functions and methods have besides.
ALIASES = {"axis": "dim", "keepdims": "keepdim", "axis0": "dim0", "axis1": "dim1", "train": "training"}  # fmt: skip


def answer(function: Any, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Call a handler. An error of whatever it calls says which function of torch it was, and the line."""
    try:
        if not torch.is_grad_enabled():
            refuse_custom_function(args, kwargs)
        if not kwargs:
            return handler(*args)
        args, kwargs = by_name(function, args, kwargs)
        return handler(*args, **kwargs)
    except Exception as error:
        name_function(error, function)
        raise


def by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function by the names that its handler has; refuse `out`."""
    if kwargs.get("out") is not None:
        refuse(function, "out= would write visible sites into a tensor", "use the value that it returns")
    kwargs = {ALIASES.get(name, name): value for name, value in kwargs.items() if name != "out"}
    for name in ("input", "tensor"):
        if not args and name in kwargs and "condition" not in kwargs:
            args = (kwargs.pop(name),)
    return args, kwargs


_PLAIN = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None)}


def _need_gradients(values: Iterable[Any]) -> bool:
    """Return whether one is a SparseTensor, or x.as_tensor(), whose features require a gradient. Lists may hold it."""
    for value in values:
        if type(value) in _PLAIN:  # To ask a tensor for an attribute that it lacks takes a microsecond.
            continue
        x = getattr(value, "sparse", None) if isinstance(value, Tensor) else value
        if isinstance(x, SparseTensor):
            if x.features.requires_grad:
                return True
        elif isinstance(x, (list, tuple)) and _need_gradients(x):
            return True
    return False


# Names of the functions that autograd.Function calls: to list all Functions at every call would take 100 us.
_FORWARD_NAMES = ("forward", "<lambda>", "decorate_fwd")


def _is_forward(code: CodeType) -> bool:
    """Return whether this is the forward method of an autograd.Function."""
    functions = [torch.autograd.Function]
    for function in functions:
        functions += function.__subclasses__()
    return any(getattr(function.forward, "__code__", None) is code for function in functions)


def refuse_custom_function(args: Iterable[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Raise where an autograd.Function got a SparseTensor that needs a gradient, which it gives to tensors alone.

    Args:
        args, kwargs: those of an operator in its forward method. Nothing is sought where none of them needs a gradient.
    """
    if torch.compiler.is_compiling() or not (_need_gradients(args) or (kwargs and _need_gradients(kwargs.values()))):
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _FORWARD_NAMES:  # forward(ctx, x, ...), or forward(x, ...) beside setup_context
            values = frame.f_locals
            names = code.co_varnames[: code.co_argcount + bool(code.co_flags & inspect.CO_VARARGS)]
            of_module = names and isinstance(values.get(names[0]), torch.nn.Module)
            if not of_module and _need_gradients(values.get(name) for name in names) and _is_forward(code):
                if code is checkpoint.CheckpointFunction.forward.__code__:
                    _refuse_reentrant_checkpoint()
                refuse("autograd.Function", "it would lose its gradient", "apply the Function to x.features, and "
                       "x.with_features(...) makes a SparseTensor of the result")  # fmt: skip
        frame = frame.f_back


def packed(features: Any, layout: Layout, channels_last: bool = False) -> SparseTensor:
    """Return a SparseTensor of any dimensions of channels, without checks."""
    x = object.__new__(SparseTensor)
    object.__setattr__(x, "features", features)
    object.__setattr__(x, "layout", layout)
    object.__setattr__(x, "channels_last", channels_last)
    return x


# The layouts of flattened SparseTensors: the same tensors are unflattened to the same layout, whose tables are built.
_layouts: weakref.WeakValueDictionary[tuple[Any, ...], Layout] = weakref.WeakValueDictionary()


def _flatten(x: SparseTensor) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Return the tensors of x and the constants of its layout.

    The tensors of the layout are leaves too, so that an exported program or a CUDA graph takes those of another mask.
    """
    layout, tiles = x.layout, x.layout.tiles
    constants = tiles.batch, tiles.grid, tiles.visible, tiles.below_tile, layout.tile, layout.stride, x.channels_last
    if not torch.compiler.is_compiling():
        refuse_reentrant_checkpoint()
        _refuse_transforms(x)
        key = id(tiles.index), *constants[:-1]
        _layouts[key] = layout
    return [x.features, tiles.index, tiles.splits], constants


def _flatten_with_keys(x: SparseTensor) -> tuple[list[tuple[Any, Tensor]], tuple[Any, ...]]:
    leaves, constants = _flatten(x)
    return list(zip(map(pytree.GetAttrKey, ("features", "index", "splits")), leaves, strict=True)), constants


def _unflatten(leaves: Iterable[Any], constants: tuple[Any, ...]) -> SparseTensor:
    features, index, splits = leaves
    if isinstance(index, Tensor) and index.is_floating_point():
        raise TypeError(
            f"the layout of a SparseTensor became {index.dtype}, expected int64: its tensors are leaves of the pytree "
            "too; change the features alone, x.with_features(function(x.features)), their dtype with x.to(dtype)"
        )
    batch, grid, visible, below_tile, tile, stride, channels_last = constants
    layout = None if torch.compiler.is_compiling() else _layouts.get((id(index), *constants[:-1]))
    if layout is None or layout.tiles.index is not index or layout.tiles.splits is not splits:
        layout = Layout(TileSet(batch, grid, index, splits, visible, below_tile), tile, stride)
    return packed(features, layout, channels_last)  # Leaves need not fit each other while torch replaces them.


def refuse_reentrant_checkpoint() -> None:
    """Raise RuntimeError where torch's reentrant checkpoint flattens its arguments.

    It asks their devices before it runs the function without gradients. Only tensors in the place of an argument get
    one, so that a SparseTensor would lose its gradient without a word.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    caller = None if frame is None else frame.f_back
    if caller is not None and caller.f_code is checkpoint.CheckpointFunction.forward.__code__:
        _refuse_reentrant_checkpoint()


def _refuse_reentrant_checkpoint() -> NoReturn:
    raise RuntimeError(
        "checkpoint(..., use_reentrant=True) got a SparseTensor: it would lose its gradient; "
        "use checkpoint(..., use_reentrant=False), or set_grad_checkpointing() of the model"
    )


def _refuse_transforms(x: SparseTensor) -> None:
    """Raise TypeError where a transform of torch.func maps over `x`, returns it, or asks for the gradient of leaves."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (__file__, pytree.__file__):
        frame = frame.f_back
    caller = "" if frame is None else frame.f_code.co_name
    if transforms_active() and caller in ("grad_and_value_impl", "_create_differentiable"):  # of vjp
        raise TypeError(
            "torch.func got a SparseTensor to differentiate with respect to, whose layout is of integers: "
            "differentiate with respect to x.features, and call x.with_features(features) in the function"
        )
    if frame is not None and caller == "_unwrap_batched" and frame.f_locals["out_dims"] is not None:  # of vmap
        raise TypeError(
            "torch.vmap got a SparseTensor to return, whose rows would be those of one sample: return x.features, or "
            "x.dense()"
        )
    if frame is not None and caller == "_process_batched_inputs":  # of vmap
        dims, args = frame.f_locals["in_dims"], frame.f_locals["args"]
        dims = dims if isinstance(dims, tuple) else (dims,) * len(args)
        mapped = any(arg is x and dim is not None for arg, dim in zip(args, dims, strict=False))
        if mapped and x.layout.tiles.index.ndim == 1:  # Leaves of several may be stacked.
            raise TypeError(
                "torch.vmap got a SparseTensor to map over, whose rows are those of all images: map over images and "
                "masks, and make it in the function with visible=; or give it None in in_dims"
            )


pytree.register_pytree_node(
    SparseTensor,
    _flatten,
    _unflatten,
    serialized_type_name="sparsecnx.SparseTensor",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=list,
    from_dumpable_context=lambda constants: tuple(tuple(c) if isinstance(c, list) else c for c in constants),
)

# Files with SparseTensors, such as programs of torch.export with their example inputs, load with weights_only=True.
torch.serialization.add_safe_globals([SparseTensor, packed, Layout, TileSet])
