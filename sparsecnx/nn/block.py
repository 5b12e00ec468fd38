"""The ConvNeXt V2 block, dense and sparse from one set of weights."""

from __future__ import annotations

from torch import Tensor, nn

from sparsecnx import ops
from sparsecnx.nn.layers import GRN, Conv2d, LayerNorm, Linear, StochasticDepth
from sparsecnx.tensor import SparseTensor


class ConvNeXtV2Block(nn.Module):
    """Depthwise 7x7, LayerNorm, Linear C -> 4C, GELU, GRN, Linear 4C -> C, stochastic depth, + input.

    On a SparseTensor the whole block is one fused operator, `ops.convnextv2_block`.

    Args:
        dim: channels C.
        drop_path: probability that stochastic depth drops the branch of an image.
        grn_scope: groups of GRN on a SparseTensor, `"sample"` or `"batch"`.
        kernel_size: size of the depthwise kernel, odd.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, grn_scope: str = "sample", kernel_size: int = 7) -> None:
        super().__init__()
        self.dwconv = Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim, scope=grn_scope)
        self.pwconv2 = Linear(4 * dim, dim)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Take dense `(B, C, H, W)` or a SparseTensor; return the same shape."""
        return self._sparse(x) if isinstance(x, SparseTensor) else self._dense(x)

    def _sparse(self, x: SparseTensor) -> SparseTensor:
        survival = ops.draw_survival(x, self.drop_path.p, self.training)
        return ops.convnextv2_block(x, self.parameters_by_name(), survival, scope=self.grn.scope, eps=self.norm.eps)

    def _dense(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(self.grn(self.act(self.pwconv1(branch))))
        return x + self.drop_path(branch.permute(0, 3, 1, 2))

    def parameters_by_name(self) -> ops.BlockParameters:
        """Return the block's parameters as `ops.convnextv2_block` takes them."""
        assert self.dwconv.bias is not None  # The constructor asks for one.
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
