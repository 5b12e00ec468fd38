"""The ConvNeXt V2 block, dense and sparse from one set of weights."""

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
_logged: set[str] = set()

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
# Before anybody replaces one.
FORWARD = {kind: kind.forward for kinds in FUSED.values() for kind in kinds}


def _computes_otherwise(kind: Any) -> bool:
    """Return whether tensors of a type have operators of their own: DTensors, quantized and other subclasses."""
    overrides = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    # A fake tensor stands for a plain one, and has no overrides.
    plain = overrides in (TENSOR.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return hasattr(kind, "__tensor_flatten__") or not plain


class ConvNeXtV2Block(nn.Module):
    """Depthwise convolution, LayerNorm, Linear C -> 4C, GELU, GRN, Linear 4C -> C, stochastic depth, + input.

    On a SparseTensor the whole block is one fused operator, `ops.convnextv2_block`, which reads the parameters of the
    layers without calling them. Where a layer was replaced, wrapped, pruned or given a hook, or a global hook exists,
    the layers are called one by one instead, which is slower: `dwconv`, `grn` and `drop_path` with a SparseTensor, the
    others with its features `(rows, channels)`. The logger `sparsecnx` says so once at level INFO.

    Args:
        dim: channels C.
        drop_path: probability that stochastic depth drops the branch of an image.
        grn_scope: groups of GRN on a SparseTensor, `"sample"` or `"batch"`.
        kernel_size: odd size of the depthwise kernel, one number or one for each axis.
        ndim: spatial dimensions, 1 to 3.

    Raises:
        ValueError: `kernel_size` is even, or another number of sizes than `ndim`.
    """

    _shapes: Sequence[torch.Size] = ()  # a block that was pickled before blocks had it checks more

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        grn_scope: str = "sample",
        kernel_size: int | Sequence[int] = 7,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        kernel = axis_sizes("kernel_size", kernel_size, ndim)
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel_size is {kernel_size}: expected an odd size, whose kernel has a centre")
        padding = tuple(size // 2 for size in kernel)
        self.dwconv = CONVOLUTIONS[ndim](dim, dim, kernel, padding=padding, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim, grn_scope, ndim=ndim)
        self.pwconv2 = Linear(4 * dim, dim)
        self.drop_path = StochasticDepth(drop_path)
        self._shapes = [parameter.shape for parameter in self.parameters_by_name()]

    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense `(B, C, *spatial)` or a SparseTensor; return the same shape."""
        if not isinstance(x, SparseTensor):
            return self._dense(x)
        reason = self.unfused()
        if reason is None:
            return self._fused(x)
        if not torch.compiler.is_compiling() and reason not in _logged:
            _logged.add(reason)
            _logger.info("ConvNeXtV2Block calls its layers one by one, since %s", reason)
        return self._layer_by_layer(x)

    def unfused(self) -> str | None:
        """Return why the fused operator cannot stand for the layers; None where it can."""
        layers: dict[str, Any] = self._modules  # Attributes of a module are slow to look up.
        for name, kinds in FUSED.items():
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
        for name in ("dwconv", "norm", "pwconv1", "grn", "pwconv2"):
            for value in layers[name]._parameters.values():
                kind: Any = type(value)
                if value is not None and kind is not nn.Parameter and _computes_otherwise(kind):
                    return f"a parameter of {name} is a {kind.__name__}"
        return None

    def _fused(self, x: SparseTensor) -> SparseTensor:
        survival = ops.draw_survival(x, getattr(self.drop_path, "p", 0.0), self.drop_path.training)
        parameters, scope, eps, grn_eps = self.parameters_by_name(), self.grn.scope, self.norm.eps, self.grn.eps
        # Arguments with the shapes that the block was built with need no other check.
        channels, device = parameters.dwconv_weight.shape[:1], parameters.dwconv_weight.device
        built = [None if value is None else value.shape for value in parameters] == self._shapes and scope in SCOPES
        ndim = parameters.dwconv_weight.ndim - 2
        if built and x.layout.ndim == ndim and x.features.shape[1:] == channels and x.device == device:
            return block.run(x, parameters, survival, scope, eps, grn_eps, None)
        return ops.convnextv2_block(x, parameters, survival, scope, eps, grn_eps=grn_eps)

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
