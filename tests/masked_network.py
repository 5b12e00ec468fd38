"""Run any network dense, with every masked site set to zero after every function: what a sparse network has to equal.

    y = run_masked(network, images, mask)  # bool (B, *grid), True = masked

Nothing here is of sparsecnx. The network runs on ordinary tensors that hold every site, and a `TorchFunctionMode` sees
every function of torch that it calls. A tensor with sites carries an attribute `sites`, which says which of its
dimensions are spatial. After every function the masked sites of the result are set to zero. Functions whose result at a
visible site depends on how many sites there are (means, variances, maxima, norms) are computed here from their
formulas, over visible sites alone. A function that is in no list below raises `Unknown`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Unknown(Exception):
    """A function that has no masked meaning, or none that is written here."""


@dataclass(frozen=True)
class Sites:
    """The spatial dimensions of a tensor, and how many sites `F.pad` has put before and after each."""

    dims: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


# Functions of each site by itself, or of the sites under a kernel: dense, then zero at masked sites.
NAMES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear
    relu relu6 relu_ relu6_ silu silu_ gelu elu elu_ selu celu leaky_relu leaky_relu_ prelu hardswish hardsigmoid
    hardtanh hardtanh_ mish mish_ sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid threshold clamp clamp_min
    clamp_max clamp_ clip exp log sqrt rsqrt pow square abs neg reciprocal erf sin cos where
    add sub mul div add_ sub_ mul_ div_ rsub true_divide subtract multiply divide addcmul
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
    __pow__ __neg__
    dropout dropout2d dropout3d feature_dropout alpha_dropout interpolate upsample
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle cat concat concatenate
    repeat contiguous clone detach to float double half type_as type requires_grad_ expand expand_as flip
    chunk split tensor_split unbind narrow index_select __getitem__ lerp maximum minimum
    zeros_like ones_like empty_like rand_like randn_like
"""
DENSE = frozenset(NAMES.split())
WITHOUT_SITES = {"__get__", "__set__", "size", "dim", "numel", "is_floating_point", "stride", "new_empty"}
ACROSS_CHANNELS = {"mean", "sum", "amax", "amin", "max", "softmax", "log_softmax", "var", "std", "norm", "vector_norm"}


def expanded(mask: Tensor, extents: Sequence[int]) -> Tensor:
    """Return a mask of tiles `(B, *grid)` as one of sites `(B, *extents)`; raise Unknown where they do not fit."""
    for dim, extent in enumerate(extents, start=1):
        if extent % mask.shape[dim]:
            raise Unknown(f"extents {tuple(extents)} are no multiple of the grid {tuple(mask.shape[1:])}")
        mask = mask.repeat_interleave(extent // mask.shape[dim], dim)
    return mask


class Masked(TorchFunctionMode):
    """Set masked sites to zero after every function.

    Args:
        mask: bool `(B, *grid)`, True = masked.
        images: extents of the images, `(*spatial)`. Those of every later tensor are a whole fraction or multiple.
        below_tile: "dense" counts every site as visible where a tensor has fewer sites than the grid has tiles.
    """

    def __init__(self, mask: Tensor, images: Sequence[int], below_tile: str = "raise") -> None:
        super().__init__()
        self.mask, self.images, self.below_tile = mask, tuple(images), below_tile

    def place(self, images: Tensor) -> Tensor:
        """Return images `(B, C, *spatial)` with masked sites zero, as a tensor with sites."""
        return self.marked(images * 1, Sites(tuple(range(2, images.ndim)), ((0, 0),) * (images.ndim - 2)))

    # Masks

    def masked_sites(self, x: Tensor, sites: Sites) -> Tensor:
        """Return where the masked sites of x are, bool, of a shape that broadcasts to that of x."""
        extents = [x.shape[dim] - sum(pad) for dim, pad in zip(sites.dims, sites.padding, strict=True)]
        if any(extent % image and image % extent for extent, image in zip(extents, self.images, strict=True)):
            raise Unknown(f"extents {extents} do not divide those of the images {self.images}")
        if self.below_tile == "dense" and any(map(int.__lt__, extents, self.mask.shape[1:])):
            masked = self.mask.new_zeros(len(self.mask), *extents)
        else:
            masked = expanded(self.mask, extents)
        if any(map(sum, sites.padding)):
            masked = torch.nn.functional.pad(masked, [pad for pads in reversed(sites.padding) for pad in pads])
        shape = [1] * x.ndim
        for dim, extent in zip((0, *sites.dims), masked.shape, strict=True):
            shape[dim] = extent
        return masked.view(shape)

    def marked(self, x: Tensor, sites: Sites) -> Tensor:
        """Return x with masked sites zero, and remember its sites."""
        masked = self.masked_sites(x, sites)
        if not hasattr(x, "sites"):
            x = x.masked_fill(masked, 0.0)  # where these are 0 already, their gradient may not be
        elif bool((x.detach() != 0).logical_and(masked).any()):
            raise Unknown("a function in place that gives masked sites a value, which others may see")
        x.sites = sites
        return x

    # Functions

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        with_sites = [x for x in tensors if hasattr(x, "sites")]
        name = function.__name__.removeprefix("linalg_")
        if not with_sites or name in WITHOUT_SITES:
            return function(*args, **kwargs)
        x = with_sites[0]
        for special in (f"_{name}", f"_{name.rstrip('123d_')}"):
            if hasattr(self, special):
                return getattr(self, special)(*args, **kwargs)
        if name in DENSE or (name in ACROSS_CHANNELS and self.channels_alone(x, *args[1:], **kwargs)):
            found = function(*args, **kwargs)
            return pytree.tree_map_only(Tensor, lambda out: self.result(name, out, with_sites, args, kwargs), found)
        if name in ("mean", "sum", "amax", "amin", "var", "std", "norm", "vector_norm"):
            return self.over_space(name, x, *args[1:], **kwargs)
        raise Unknown(f"{name} of tensors {[tuple(x.shape) for x in tensors]}")

    def result(self, name: str, out: Tensor, inputs: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> Tensor:
        """Return the result of a function that was computed dense, with masked sites zero."""
        widest = max(inputs, key=lambda x: x.ndim)
        dims, ndim = widest.sites.dims, widest.ndim
        # Dimensions line up from the last, as torch broadcasts, unless a function takes one away.
        if name in ACROSS_CHANNELS and out.ndim < ndim:
            axis = self.axes(widest, args[1] if len(args) > 1 else kwargs["dim"])
            dims = tuple(dim - sum(a < dim for a in axis) for dim in dims)
        elif name in ("__getitem__", "unbind"):
            dims = self.kept_by_index(widest, args[1] if name == "__getitem__" else (slice(None), 0), out)
        elif out.ndim != ndim or any(x.ndim == ndim and x.sites.dims != dims for x in inputs):
            raise Unknown(f"{name} of {[(tuple(x.shape), x.sites) for x in inputs]} is {tuple(out.shape)}")
        padding = ((0, 0),) * len(dims)
        if all(out.shape[d] == widest.shape[e] for d, e in zip(dims, widest.sites.dims, strict=True)):
            padding = widest.sites.padding  # a function of each site leaves it as it is
        return self.marked(out, Sites(dims, padding))

    def kept_by_index(self, x: Tensor, index: Any, out: Tensor) -> tuple[int, ...]:
        """Return where the spatial dimensions of `x[index]` are."""
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index[at : at + 1] = [slice(None)] * (x.ndim - (len(index) - 1 - index.count(None)))
        dims, source, target = {}, 0, 0
        for item in index + [slice(None)] * (x.ndim - len(index) + index.count(None)):
            if isinstance(item, slice):
                dims[source], source, target = target, source + 1, target + 1
            elif item is None:
                target += 1
            elif isinstance(item, int) and source not in (0, *x.sites.dims):
                source += 1
            else:
                raise Unknown(f"__getitem__ with {item} at dimension {source} of {tuple(x.shape)}")
        assert target == out.ndim
        return tuple(dims[dim] for dim in x.sites.dims)

    # Functions that move dimensions

    def moved(self, x: Tensor, order: Sequence[int]) -> Tensor:
        out = x.permute(*order)
        return self.marked(out, replace(x.sites, dims=tuple(list(order).index(dim) for dim in x.sites.dims)))

    def _permute(self, x: Tensor, *order: Any) -> Tensor:
        order = order[0] if isinstance(order[0], (tuple, list)) else order
        return self.moved(x, [dim % x.ndim for dim in order])

    def _transpose(self, x: Tensor, first: int, second: int) -> Tensor:
        order = list(range(x.ndim))
        order[first], order[second] = order[second], order[first]
        return self.moved(x, order)

    _swapaxes = _transpose

    def _reshape(self, x: Tensor, *shape: Any) -> Tensor:
        shape = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        out = x.reshape(*shape)
        extents = [x.shape[dim] for dim in x.sites.dims]
        before = math.prod(x.shape[: x.sites.dims[0]])
        for first in range(out.ndim - len(extents) + 1):
            same = list(out.shape[first : first + len(extents)]) == extents
            if same and math.prod(out.shape[:first]) == before and out.shape[0] == x.shape[0]:
                return self.marked(out, replace(x.sites, dims=tuple(range(first, first + len(extents)))))
        raise Unknown(f"reshape of {tuple(x.shape)} to {tuple(out.shape)}, which loses the sites")

    _view = _reshape

    def _flatten(self, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        shape = [*x.shape[:start_dim], -1, *x.shape[end_dim % x.ndim + 1 :]]
        return self._reshape(x, shape)

    def _unflatten(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        return self._reshape(x, [*x.shape[: dim % x.ndim], *sizes, *x.shape[dim % x.ndim + 1 :]])

    def _unsqueeze(self, x: Tensor, dim: int) -> Tensor:
        dim %= x.ndim + 1
        return self.marked(x.unsqueeze(dim), replace(x.sites, dims=tuple(d + (dim <= d) for d in x.sites.dims)))

    def _squeeze(self, x: Tensor, dim: int) -> Tensor:
        dim %= x.ndim
        if dim in x.sites.dims or x.shape[dim] != 1:
            raise Unknown(f"squeeze of dimension {dim} of {tuple(x.shape)}")
        return self.marked(x.squeeze(dim), replace(x.sites, dims=tuple(d - (dim < d) for d in x.sites.dims)))

    def _stack(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        parts = [self._unsqueeze(x, dim) for x in tensors]
        return self.marked(torch.cat(parts, dim), parts[0].sites)

    def _pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
        out = torch.nn.functional.pad(x, pad, mode, value)
        pairs = dict(enumerate(zip(pad[::2], pad[1::2], strict=True)))
        added = [pairs.pop(x.ndim - 1 - dim, (0, 0)) for dim in x.sites.dims]
        padding = tuple((a + c, b + d) for (a, b), (c, d) in zip(x.sites.padding, added, strict=True))
        return self.marked(out, replace(x.sites, padding=padding))

    # Pooling

    def _max_pool(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Take the maximum over the visible sites; a site that F.pad put there counts as it is."""
        masked = self.masked_sites(x, x.sites)
        pool = getattr(torch.nn.functional, f"max_pool{x.ndim - 2}d")
        out = pool(x.masked_fill(masked, -math.inf), *args, **kwargs)
        return self.marked(out, Sites(x.sites.dims, ((0, 0),) * len(x.sites.dims)))

    def _avg_pool(self, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, *args: Any, **kw: Any) -> Tensor:
        """Count masked sites as zeros; average the visible ones alone where one window is the whole image."""
        extents = [x.shape[dim] for dim in x.sites.dims]
        kernels = [kernel] * len(extents) if isinstance(kernel, int) else list(kernel)
        if kernels == extents and padding in (0, (0,) * len(extents)) and not any(map(sum, x.sites.padding)):
            return self.over_space("mean", x, x.sites.dims, keepdim=True)
        pool = getattr(torch.nn.functional, f"avg_pool{x.ndim - 2}d")
        out = pool(x, kernel, stride, padding, *args, **kw)
        return self.marked(out, Sites(x.sites.dims, ((0, 0),) * len(x.sites.dims)))

    def _adaptive_avg_pool(self, x: Tensor, output_size: Any) -> Tensor:
        return self.adaptive("mean", x, output_size)

    def _adaptive_max_pool(self, x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        return self.adaptive("amax", x, output_size)

    def adaptive(self, name: str, x: Tensor, output_size: Any) -> Tensor:
        sizes = (output_size,) * len(x.sites.dims) if isinstance(output_size, int) else tuple(output_size)
        if any(size != 1 for size in sizes):
            raise Unknown(f"adaptive pooling of {tuple(x.shape)} to {sizes}")
        return self.over_space(name, x, x.sites.dims, keepdim=True)

    # Reductions

    def axes(self, x: Tensor, dim: Any) -> tuple[int, ...]:
        """Return the axes of a reduction as numbers from 0."""
        dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
        return tuple(d % x.ndim for d in dims)

    def channels_alone(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether a reduction leaves out the batch and the sites."""
        dim = kwargs.get("dim", args[0] if args else None)
        return not {0, *x.sites.dims} & set(self.axes(x, dim))

    def over_space(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Reduce x over all its spatial dimensions, and perhaps channels, over the visible sites alone."""
        if name in ("norm", "vector_norm"):
            keys = ("p" if name == "norm" else "ord", "dim", "keepdim")
        else:
            keys = ("dim", "keepdim") if name not in ("var", "std") else ("dim", "unbiased", "keepdim")
        options = {**dict(zip(keys, args, strict=False)), **kwargs}
        axes, keepdim = self.axes(x, options.get("dim")), options.get("keepdim", False)
        if not set(x.sites.dims) <= set(axes) or any(map(sum, x.sites.padding)):
            raise Unknown(f"{name} of {tuple(x.shape)} over {axes}")
        visible = (~self.masked_sites(x, x.sites)).expand(x.shape)
        zeroed, count = x.where(visible, 0.0), visible.sum(axes, keepdim=True)
        if name == "sum":
            out = zeroed.sum(axes, keepdim=True)
        elif name == "mean":
            out = zeroed.sum(axes, keepdim=True) / count
        elif name in ("amax", "amin"):
            out = getattr(x.where(visible, math.copysign(math.inf, (name == "amin") - 0.5)), name)(axes, keepdim=True)
        elif name in ("var", "std"):
            mean = zeroed.sum(axes, keepdim=True) / count
            correction = options.get("correction", int(options.get("unbiased", True)))
            out = ((x - mean) ** 2).where(visible, 0.0).sum(axes, keepdim=True) / (count - correction)
            out = out if name == "var" else out.sqrt()
        else:
            order = options.get("p", options.get("ord", 2))
            order = {"fro": 2, None: 2}.get(order, order)
            out = torch.linalg.vector_norm(zeroed, order, axes, keepdim=True)
        return out if keepdim else out.reshape([size for dim, size in enumerate(x.shape) if dim not in axes])

    # Normalisation

    def normalized(
        self, x: Tensor, axes: Sequence[int], eps: float, groups: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x normalised over the visible sites along `axes`, with the mean, variance and count that it took."""
        visible = (~self.masked_sites(x, x.sites)).expand(x.shape)
        shape = x.shape
        if groups is not None:
            shape = (x.shape[0], groups, -1, *x.shape[2:])
        values, visible = x.reshape(shape), visible.reshape(shape)
        count = visible.sum(axes, keepdim=True)
        mean = values.where(visible, 0.0).sum(axes, keepdim=True) / count
        variance = ((values - mean) ** 2).where(visible, 0.0).sum(axes, keepdim=True) / count
        return ((values - mean) / (variance + eps).sqrt()).reshape(x.shape), mean, variance, count

    def affine(self, x: Tensor, sites: Sites, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        x = x if weight is None else x * weight.view(shape)
        return self.marked(x if bias is None else x + bias.view(shape), sites)

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        if not training:
            assert running_mean is not None and running_var is not None
            out = (x - running_mean.view(shape)) / (running_var.view(shape) + eps).sqrt()
            return self.affine(out, x.sites, weight, bias)
        out, mean, variance, count = self.normalized(x, (0, *x.sites.dims), eps)
        self.update(running_mean, running_var, mean, variance, count, momentum)
        return self.affine(out, x.sites, weight, bias)

    def _layer_norm(self, x: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        if max(x.sites.dims) >= x.ndim - len(normalized_shape):
            raise Unknown(f"layer_norm of {tuple(x.shape)} over {tuple(normalized_shape)}")
        return self.marked(torch.nn.functional.layer_norm(x, normalized_shape, *args, **kwargs), x.sites)

    def _instance_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not use_input_stats:
            return self._batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        out, mean, variance, count = self.normalized(x, x.sites.dims, eps)
        self.update(running_mean, running_var, mean, variance, count, momentum)
        return self.affine(out, x.sites, weight, bias)

    def _group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        out, *_ = self.normalized(x, tuple(range(2, x.ndim + 1)), eps, groups)
        return self.affine(out, x.sites, weight, bias)

    @torch.no_grad()
    def update(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        momentum: float,
    ) -> None:
        """Move running statistics towards those of this batch; those of several images are averaged."""
        if running_mean is not None and running_var is not None:
            unbiased = variance * count / (count - 1)
            running_mean.lerp_(mean.flatten(1).mean(0), momentum)
            running_var.lerp_(unbiased.flatten(1).mean(0), momentum)


def run_masked(network: Callable[[Tensor], Any], images: Tensor, mask: Tensor, below_tile: str = "raise") -> Any:
    """Return what the network answers for images `(B, C, *spatial)` under a mask `(B, *grid)`, True = masked."""
    mode = Masked(mask, images.shape[2:], below_tile)
    with mode:
        return network(mode.place(images))


def differences(
    network: torch.nn.Module,
    images: Tensor,
    mask: Tensor,
    run: Callable[[torch.nn.Module, Tensor], Any],
    below_tile: str = "raise",
) -> dict[str, float]:
    """Compare a network as `run` runs it with the same network masked after every function.

    Args:
        run: gets a copy of the network and the images, and returns dense outputs, which may be nested.
        below_tile: see `Masked`.

    Returns:
        Relative errors by name: of each output, of the gradient of the images and of each parameter, and of each
        buffer. A gradient or buffer counts as at least 1e-6 of the largest one, since some are sums that cancel.
    """
    found = []
    for function in (run, lambda network, images: run_masked(network, images, mask, below_tile)):
        copied, x = copy.deepcopy(network), images.clone().requires_grad_()
        torch.manual_seed(0)  # of dropout
        outputs = {f"output {path}": y for path, y in enumerate(pytree.tree_leaves(function(copied, x)))}
        generator = torch.Generator().manual_seed(0)
        loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in outputs.values())
        loss.backward()
        gradients = {"images": x.grad, **{name: p.grad for name, p in copied.named_parameters() if p.grad is not None}}
        buffers = {name: buffer for name, buffer in copied.named_buffers() if buffer.is_floating_point()}
        found.append((outputs, gradients, buffers))
    errors = {}
    for got, expected in zip(*found, strict=True):
        if got.keys() != expected.keys():
            return {f"the names {sorted(got.keys() ^ expected.keys())}": math.inf}
        largest = max((float(value.detach().norm()) for value in expected.values()), default=0.0)
        least = 1e-30 if "output 0" in expected else 1e-6 * largest
        for name, value in expected.items():
            errors[name] = float((got[name] - value).detach().norm() / value.detach().norm().clamp(min=least))
    return errors
