"""Which kernels a training step launches, and how: every operator is run at its real size without computing anything.

`trace` runs programs of operators, forward and backward, on tensors on the CPU whose memory is never touched, and
collects the launches that they make. A launch says which specialisation of its kernel Triton would compile: types
of the arguments, values of those that are constants to the kernel, which integers and addresses are divisible by 16,
number of warps. No GPU takes part.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction, create_function_from_signature

import sparsecnx
from sparsecnx import Layout, SparseTensor, ops, random_mask, use_backend
from sparsecnx.backends import triton_launch
from sparsecnx.geometry.masks import visible_count
from sparsecnx.models import SIZES

PACKAGE = Path(sparsecnx.__file__).resolve().parent
NAMESPACE = "sparsecnx_triton"  # of the operators that launch kernels

BATCH, IMAGE, PATCH, RATIO = 256, 224, 32, 0.6  # the published pretraining, as far as memory of one GPU goes
GRID = (IMAGE // PATCH, IMAGE // PATCH)
VISIBLE = visible_count(math.prod(GRID), RATIO)
TILES = {"1": 8, "2": 4, "3": 2, "4": 1, "decoder": 1}
DECODER_CHANNELS = 512

LARGE = 2**16  # elements of a floating tensor from which on nothing is computed


@dataclass(frozen=True)
class Setting:
    """Where in a network the operators run.

    Attributes:
        size: of the model, a key of `SIZES`.
        stage: `1` to `4` of the encoder, or `decoder`, which sees all patches.
        dtype: name of the features' dtype.
    """

    size: str
    stage: str
    dtype: str

    @property
    def channels(self) -> int:
        return DECODER_CHANNELS if self.stage == "decoder" else SIZES[self.size].dims[int(self.stage) - 1]

    @property
    def tile(self) -> int:
        """Sites per tile side."""
        return TILES[self.stage]

    @property
    def visible(self) -> int:
        """Visible tiles of an image."""
        return math.prod(GRID) if self.stage == "decoder" else VISIBLE

    @property
    def rows(self) -> int:
        return BATCH * self.visible * self.tile**2

    @property
    def place(self) -> str:
        return f"{self.size} {self.stage}"


@dataclass(frozen=True)
class Specialisation:
    """What one compilation takes: a kernel and all that Triton knows of its arguments in advance.

    Attributes:
        module, name: where the kernel is found.
        signature: type of every argument by name, `constexpr` for constants.
        constants: values of the constants by position, as `ASTSource` takes them.
        attributes: divisibility by position.
        options: `num_warps` and the like, where given.
    """

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def named_constants(self) -> dict[str, Any]:
        """Constants by name, without absent tensors."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if value is not None}


@dataclass
class Use:
    """Where a specialisation is launched.

    Attributes:
        settings: by program, in the order met.
        wide: arguments that have to be moved 16 bytes at a time, see `is_wide`.
    """

    settings: dict[str, list[Setting]] = field(default_factory=dict)
    wide: set[str] = field(default_factory=set)


def trace(settings: Iterable[Setting]) -> dict[Specialisation, Use]:
    """The specialisations that the programs of these settings launch, each with its uses."""
    uses: dict[Specialisation, Use] = {}
    current: tuple[Setting, str]

    def observe(kernel: Any, grid: triton_launch.Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        setting, program = current
        for found, wide in specialisations(kernel, arguments, options, setting):
            use = uses.setdefault(found, Use())
            use.wide |= wide
            places = use.settings.setdefault(program, [])
            if setting not in places:
                places.append(setting)

    for setting in settings:
        for program, run in programs(setting).items():
            current = (setting, program)
            with triton_launch.observing(observe), use_backend("triton"), WithoutComputing():
                run()
    return uses


def programs(setting: Setting) -> dict[str, Callable[[], None]]:
    """Operators as a step of pretraining or fine-tuning runs them, forward and backward, by name."""
    channels, hidden, tile = setting.channels, 4 * setting.channels, setting.tile
    dtype = getattr(torch, setting.dtype)
    mask = random_mask(BATCH, GRID, 1 - setting.visible / math.prod(GRID), generator=torch.Generator().manual_seed(0))
    mask = mask.view(BATCH, *GRID)
    shape = (GRID[0] * tile, GRID[1] * tile)
    layout = Layout.from_mask(mask, shape, setting.visible)

    def leaf(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=True)

    def vector(size: int = channels) -> Tensor:
        return leaf(size, dtype=torch.float32)

    def rows() -> SparseTensor:
        return SparseTensor(leaf(layout.rows, channels), layout)

    def block(recompute: bool, dropping: bool) -> None:
        x = rows()
        parameters = ops.BlockParameters(
            leaf(channels, 1, 7, 7),
            vector(),
            vector(),
            vector(),
            leaf(hidden, channels),
            vector(hidden),
            vector(hidden),
            vector(hidden),
            leaf(channels, hidden),
            vector(),
        )
        survival = torch.ones(BATCH) if dropping else None
        out = ops.convnextv2_block(x, parameters, survival, recompute=recompute)
        backward(out.features, x.features, *parameters)

    def depthwise_conv(bias: bool) -> None:
        x, parameters = rows(), [leaf(channels, 1, 7, 7), *([vector()] if bias else [])]
        backward(ops.depthwise_conv(x, *parameters).features, x.features, *parameters)

    def conv() -> None:
        x, weight, bias = rows(), leaf(channels, channels, 3, 3), vector()
        backward(ops.conv(x, weight, bias).features, x.features, weight, bias)

    def mapped_depthwise_conv(bias: bool) -> None:
        # Maps that nobody reads: what is launched depends on their shapes.
        kernel_map, inverse_map = torch.empty(2, layout.rows, 49, dtype=torch.int32).unbind()
        x, parameters = leaf(layout.rows, channels), [leaf(49, channels), *([vector()] if bias else [])]
        out = ops.mapped_depthwise_conv(x, parameters[0], kernel_map, inverse_map, *parameters[1:])
        backward(out, x, *parameters)

    def layer_norm() -> None:
        x, weight, bias = rows(), vector(), vector()
        backward(ops.layer_norm(x, weight, bias).features, x.features, weight, bias)

    def grn(scope: str) -> None:
        # In the block and in the published model it stands behind the first matrix: 4C channels.
        x, gamma, beta = SparseTensor(leaf(layout.rows, hidden), layout), vector(hidden), vector(hidden)
        backward(ops.grn(x, gamma, beta, scope).features, x.features, gamma, beta)

    def stochastic_depth() -> None:
        x = rows()
        backward(ops.stochastic_depth(x, 0.1).features, x.features)

    def from_dense(channels: int = channels, shape: tuple[int, int] = shape) -> None:
        dense = leaf(BATCH, channels, *shape)
        backward(SparseTensor.from_dense(dense, mask, setting.visible).features, dense)

    def dense() -> None:
        x, fill = rows(), leaf(channels)
        backward(x.dense(fill), x.features, fill)

    found: dict[str, Callable[[], None]] = {
        "depthwise_conv": lambda: depthwise_conv(bias=True),
        "depthwise_conv, no bias": lambda: depthwise_conv(bias=False),
        "conv, 3x3": conv,
        "mapped_depthwise_conv": lambda: mapped_depthwise_conv(bias=True),
        "mapped_depthwise_conv, no bias": lambda: mapped_depthwise_conv(bias=False),
        "layer_norm": layer_norm,
        "grn": lambda: grn("sample"),
        "grn, batch": lambda: grn("batch"),
        "stochastic_depth": stochastic_depth,
        "from_dense": from_dense,
        "dense": dense,
        "convnextv2_block": lambda: block(recompute=False, dropping=False),
        "convnextv2_block, dropping": lambda: block(recompute=False, dropping=True),
        "convnextv2_block, recompute": lambda: block(recompute=True, dropping=False),
        "convnextv2_block, recompute, dropping": lambda: block(recompute=True, dropping=True),
    }
    if setting.stage == "1":
        found["from_dense, images"] = lambda: from_dense(3, (IMAGE, IMAGE))
    return found


def backward(out: Tensor, *leaves: Tensor) -> None:
    """Gradients of all leaves."""
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def specialisations(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any], setting: Setting
) -> Iterator[tuple[Specialisation, set[str]]]:
    """What Triton would compile for a launch, more than one where it would time configurations against each other;
    and the names of the arguments that are wide."""
    backend = make_backend(GPUTarget("cuda", 90, 32))  # signatures are the same on all
    for function, chosen in configurations(kernel, arguments, options):
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, types, rest = bind(*arguments, **chosen)
        _, signature, constants, attributes = function._pack_args(backend, dict(chosen), bound, types, rest)
        yield (
            Specialisation(
                function.fn.__module__,
                function.fn.__name__,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((path, tuple(map(tuple, attribute))) for path, attribute in attributes.items()),
                tuple((name, value) for name, value in sorted(chosen.items()) if name not in bound),
            ),
            {name for name, value in bound.items() if isinstance(value, Tensor) and is_wide(value, setting)},
        )


def configurations(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any]
) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    """The function under the decorators of a kernel, with the options of every configuration left after pruning."""
    if isinstance(kernel, Autotuner):
        kernel.nargs = dict(zip(kernel.arg_names, arguments, strict=False))
        several = len(kernel.configs) > 1
        for config in kernel.prune_configs(options) if several else kernel.configs:
            yield from configurations(kernel.fn, arguments, {**options, **config.all_kwargs()})
    elif isinstance(kernel, Heuristics):
        chosen = dict(options)
        for name, choose in kernel.values.items():
            chosen[name] = choose({**dict(zip(kernel.arg_names, arguments, strict=False)), **chosen})
        yield from configurations(kernel.fn, arguments, chosen)
    else:
        yield kernel, options


def is_wide(value: Tensor, setting: Setting) -> bool:
    """Whether a tensor holds the channels of every row, C or 4C of them, or those under a 3x3 kernel, or is one of the
    block's matrices, and its rows are a multiple of 16 bytes long: then kernels can and must move 16 bytes at a time.

    All traffic that grows with rows times channels goes through these. Not through vectors (one number a channel or
    a row), tables of integers, images (whose channels are not side by side), partial sums and the kernel's taps.
    """
    channels, rows, elements = setting.channels, setting.rows, value.numel()
    if not value.is_floating_point() or value.ndim == 0 or value.stride(-1) != 1:
        return False
    widths = (channels, 4 * channels)
    of_rows = value.shape[-1] in (*widths, elements) and elements in [rows * width for width in widths]
    of_taps = value.ndim == 2 and value.shape[1] == 9 * channels
    of_block = sorted(value.shape) == list(widths)
    width = elements // rows if of_rows else value.shape[-1]
    return (of_rows or of_taps or of_block) and width * value.element_size() % 16 == 0


class WithoutComputing(TorchDispatchMode):
    """Operators on large floating tensors give tensors of the right shape and do nothing else. Operators that launch
    kernels are entered, so that every launch is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            implementation = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
            with self:
                return implementation(*args, **kwargs)
        large = any(
            isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= LARGE
            for value in tree_leaves((args, kwargs))
        )
        if not large or func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        meta = tree_map_only(Tensor, _on_meta, (args, {**kwargs, **({"device": "meta"} if "device" in kwargs else {})}))
        out = func(*meta[0], **meta[1])
        return tree_map_only(Tensor, _on_cpu, out)


def _on_meta(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _on_cpu(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


def entry_points(package: Path = PACKAGE) -> set[str]:
    """Names of the kernels in the rooms `triton.py` below a folder: the jitted functions that no other one uses."""
    jitted, used = {}, set()
    for path in sorted(package.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(map(_is_jit, function.decorator_list)):
                if path.name == "triton.py":
                    jitted[function.name] = path
                names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
                used |= names - {function.name}
    return jitted.keys() - used


def _is_jit(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    return ast.unparse(decorator) in ("jit", "triton.jit")
