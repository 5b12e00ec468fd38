"""The blocks of ConvNeXt V2 and of the first ConvNeXt, dense and sparse from one set of weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparsecnx import ops
from sparsecnx.nn.layers import CONVOLUTIONS, GELU, GRN, LayerNorm, Linear, StochasticDepth, axis_sizes
from sparsecnx.ops import block
from sparsecnx.ops.global_response_norm.groups import SCOPES
from sparsecnx.tensor import SparseTensor

TENSOR: Any = Tensor
_logger = logging.getLogger("sparsecnx")
_logged: set[tuple[str, str]] = set()

# The fused operator computes what layers of exactly these types compute. torch's own serve as well as ours.
FUSED: dict[str, tuple[type[nn.Module], ...]] = {
    "dwconv": (*CONVOLUTIONS.values(), nn.Conv2d),
    "norm": (LayerNorm, nn.LayerNorm),
    "pwconv1": (Linear, nn.Linear),
    "act": (nn.GELU, GELU),
    "grn": (GRN,),
    "pwconv2": (Linear, nn.Linear),
    "drop_path": (StochasticDepth, nn.Identity),
}
FUSED_V1 = {name: kinds for name, kinds in FUSED.items() if name != "grn"}
LAYER_SCALE = 1e-6  # of a new ConvNeXt block, as published
# Before anybody replaces one.
FORWARD = {kind: kind.forward for kinds in FUSED.values() for kind in kinds}


def _computes_otherwise(kind: Any) -> bool:
    """Return whether tensors of a type have operators of their own: DTensors, quantized and other subclasses."""
    overrides = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    # A fake tensor stands for a plain one, and has no overrides.
    plain = overrides in (TENSOR.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return hasattr(kind, "__tensor_flatten__") or not plain


class FusedBlock(nn.Module):
    """Share what both blocks have: their layers, and the choice between the fused operator and the layers one by one.

    On a SparseTensor the whole block is one fused operator, `ops.convnextv2_block`, which reads the parameters of the
    layers without calling them. Where a layer was replaced, wrapped, pruned or given a hook, or a global hook exists,
    the layers are called one by one instead, which is slower: `dwconv`, `grn` and `drop_path` with a SparseTensor, the
    others with its features `(rows, channels)`. The logger `sparsecnx` says so once at level INFO.
    """

    _replaceable = FUSED  # the layers that the fused operator stands for
    _shapes: Sequence[torch.Size | None] = ()  # a block that was pickled before blocks had it checks more

    def __init__(
        self,
        dim: int,
        drop_path: float,
        kernel_size: int | Sequence[int],
        ndim: int,
        norm_eps: float,
        dwconv_bias: bool,
        grn: GRN | None = None,
    ) -> None:
        super().__init__()
        kernel = axis_sizes("kernel_size", kernel_size, ndim)
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel_size is {kernel_size}: expected an odd size, whose kernel has a centre")
        padding = tuple(size // 2 for size in kernel)
        self.dwconv = CONVOLUTIONS[ndim](dim, dim, kernel, padding=padding, groups=dim, bias=dwconv_bias)
        self.norm = LayerNorm(dim, norm_eps)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        if grn is not None:
            self.grn = grn
        self.pwconv2 = Linear(4 * dim, dim)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense `(B, C, *spatial)` or a SparseTensor; return the same shape."""
        if not isinstance(x, SparseTensor):
            return self._dense(x)
        reason = self.unfused()
        if reason is None:
            return self._fused(x)
        kind = type(self).__name__
        if not torch.compiler.is_compiling() and (kind, reason) not in _logged:
            _logged.add((kind, reason))
            _logger.info("%s calls its layers one by one, since %s", kind, reason)
        return self._layer_by_layer(x)

    def unfused(self) -> str | None:
        """Return why the fused operator cannot stand for the layers; None where it can."""
        layers: dict[str, Any] = self._modules  # Attributes of a module are slow to look up.
        for name, kinds in self._replaceable.items():
            layer = layers[name]
            if type(layer) not in kinds:
                return f"{name} is a {type(layer).__name__}"
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return f"{name} has a hook"
            # torch.compile misses a later change of the first; looking at `layer.forward` would make it miss hooks.
            if "forward" in layer.__dict__ or type(layer).forward is not FORWARD[type(layer)]:
                return f"the forward method of {name} is replaced"
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "there is a global hook of modules"
        conv = self.dwconv
        same = conv.padding == tuple(size // 2 for size in conv.kernel_size)
        if not same or {*conv.stride, *conv.dilation} != {1} or conv.padding_mode != "zeros":
            return f"dwconv is {conv}"
        if self.act.approximate != "none":
            return f"act is {self.act}"
        for name in self._replaceable:
            for value in layers[name]._parameters.values():
                kind: Any = type(value)
                if value is not None and kind is not nn.Parameter and _computes_otherwise(kind):
                    return f"a parameter of {name} is a {kind.__name__}"
        return None

    def parameters_by_name(self) -> ops.BlockParameters:
        """Return the block's parameters as `ops.convnextv2_block` takes them."""
        raise NotImplementedError

    def _fused(self, x: SparseTensor) -> SparseTensor:
        raise NotImplementedError

    def _layer_by_layer(self, x: SparseTensor) -> SparseTensor:
        raise NotImplementedError

    def _dense(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, x: SparseTensor, scope: str, grn_eps: float) -> SparseTensor:
        """Run the fused operator."""
        survival = ops.draw_survival(x, getattr(self.drop_path, "p", 0.0), self.drop_path.training)
        parameters, eps = self.parameters_by_name(), self.norm.eps
        # Arguments with the shapes that the block was built with need no other check.
        channels, device = parameters.dwconv_weight.shape[:1], parameters.dwconv_weight.device
        built = [None if value is None else value.shape for value in parameters] == self._shapes and scope in SCOPES
        ndim = parameters.dwconv_weight.ndim - 2
        if built and x.layout.ndim == ndim and x.features.shape[1:] == channels and x.device == device:
            return block.run(x, parameters, survival, scope, eps, grn_eps, None)
        return ops.convnextv2_block(x, parameters, survival, scope, eps, grn_eps=grn_eps)

    def _remember_shapes(self) -> None:
        self._shapes = [None if value is None else value.shape for value in self.parameters_by_name()]


class ConvNeXtV2Block(FusedBlock):
    """Depthwise convolution, LayerNorm, Linear C -> 4C, GELU, GRN, Linear 4C -> C, stochastic depth, + input.

    On a SparseTensor it is one fused operator while nobody replaced a layer, see `unfused`.

    Args:
        dim: channels C.
        drop_path: probability that stochastic depth drops the branch of an image.
        grn_scope: groups of GRN on a SparseTensor, `"sample"` or `"batch"`.
        kernel_size: odd size of the depthwise kernel, one number or one for each axis.
        ndim: spatial dimensions, 1 to 3.
        norm_eps: epsilon of LayerNorm, added to the variance.
        grn_eps: epsilon of GRN, added to the mean over channels.
        dwconv_bias: False leaves out the bias of the depthwise convolution.

    Raises:
        ValueError: `kernel_size` is even, or another number of sizes than `ndim`.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        grn_scope: str = "sample",
        kernel_size: int | Sequence[int] = 7,
        ndim: int = 2,
        *,
        norm_eps: float = 1e-6,
        grn_eps: float = 1e-6,
        dwconv_bias: bool = True,
    ) -> None:
        grn = GRN(4 * dim, grn_scope, grn_eps, ndim)
        super().__init__(dim, drop_path, kernel_size, ndim, norm_eps, dwconv_bias, grn)
        self._remember_shapes()

    def _fused(self, x: SparseTensor) -> SparseTensor:
        return self._run(x, self.grn.scope, self.grn.eps)

    def _layer_by_layer(self, x: SparseTensor) -> SparseTensor:
        u = self.dwconv(x)
        h = self.act(self.pwconv1(self.norm(u.features)))
        h = self.grn(u.with_features(h))
        branch = self.drop_path(u.with_features(self.pwconv2(h.features)))
        # The fused operator adds in the same dtype under autocast.
        return x.with_features(x.features.to(branch.dtype) + branch.features)

    def _dense(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).movedim(1, -1))
        branch = self.pwconv2(self.grn(self.act(self.pwconv1(branch))))
        return x + self.drop_path(branch.movedim(-1, 1))

    def parameters_by_name(self) -> ops.BlockParameters:
        """Return the block's parameters as `ops.convnextv2_block` takes them."""
        return ops.BlockParameters(
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
        )


class ConvNeXtBlock(FusedBlock):
    """The block of the first ConvNeXt (arXiv 2201.03545), which has LayerScale `gamma (C,)` and no GRN.

    Depthwise convolution, LayerNorm, Linear C -> 4C, GELU, Linear 4C -> C, times gamma, stochastic depth, + input.
    Names of parameters are the published ones. On a SparseTensor it is one fused operator while nobody replaced a
    layer, see `unfused`.

    Args:
        dim, drop_path, kernel_size, ndim, norm_eps, dwconv_bias: see `ConvNeXtV2Block`.

    Raises:
        ValueError: `kernel_size` is even, or another number of sizes than `ndim`.
    """

    _replaceable = FUSED_V1

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        kernel_size: int | Sequence[int] = 7,
        ndim: int = 2,
        *,
        norm_eps: float = 1e-6,
        dwconv_bias: bool = True,
    ) -> None:
        super().__init__(dim, drop_path, kernel_size, ndim, norm_eps, dwconv_bias)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self._remember_shapes()

    def _fused(self, x: SparseTensor) -> SparseTensor:
        return self._run(x, "sample", 1e-6)

    def _layer_by_layer(self, x: SparseTensor) -> SparseTensor:
        u = self.dwconv(x)
        branch = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(u.features))))
        branch = self.drop_path(u.with_features(branch))
        # The fused operator adds in the same dtype under autocast.
        return x.with_features(x.features.to(branch.dtype) + branch.features)

    def _dense(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).movedim(1, -1))
        branch = self.gamma * self.pwconv2(self.act(self.pwconv1(branch)))
        return x + self.drop_path(branch.movedim(-1, 1))

    def parameters_by_name(self) -> ops.BlockParameters:
        """Return parameters with which `ops.convnextv2_block` computes this block.

        LayerScale is a factor of the rows of the last matrix. A GRN whose gamma and beta are 0 is the identity.
        """
        bias, zeros = self.pwconv2.bias, self.gamma.new_zeros(self.pwconv1.weight.shape[0])
        return ops.BlockParameters(
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            zeros,
            zeros,
            self.pwconv2.weight * self.gamma[:, None],
            None if bias is None else bias * self.gamma,
        )
