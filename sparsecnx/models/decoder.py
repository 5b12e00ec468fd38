"""The light decoder of FCMAE and of MP-MAE: ConvNeXt V2 blocks at every site of the last feature map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.packing import gather_rows
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.models.convnextv2 import ConvNeXtV2Encoder, Layers
from sparsecnx.nn import ConvNeXtV2Block
from sparsecnx.tensor import SparseTensor


def decoder_blocks(encoder: nn.Module, depth: int, dim: int, ndim: int) -> Layers:
    """Return blocks with the kernel, epsilons and biases of a `ConvNeXtV2Encoder`, or else with the published ones."""
    same: dict[str, Any] = encoder.block_options if isinstance(encoder, ConvNeXtV2Encoder) else {"ndim": ndim}
    return Layers(*(ConvNeXtV2Block(dim, **same) for _ in range(depth)))


def every_site(encoded: SparseTensor, proj: nn.Module, token: Tensor, sites: tuple[int, ...]) -> SparseTensor:
    """Return projected features at every site, the mask token at masked ones, as a SparseTensor without a mask.

    The fused operator is faster on it than the dense sequence and keeps less for backward, and a matrix product than
    torch's dense convolution of volumes.

    Args:
        encoded: the last feature map.
        proj: projects its channels to those of the decoder.
        token: the mask token, `(1, C, 1, 1)`.
        sites: sites of a patch along each axis; a patch is a tile, in raster order.
    """
    x = proj(encoded).dense(fill=token.flatten())
    grid = tuple(side // site for side, site in zip(x.shape[2:], sites, strict=True))
    layout = Layout(TileSet.all_visible(x.shape[0], grid, x.device), sites, encoded.layout.stride)
    return SparseTensor(gather_rows(x, layout), layout)


def to_grid(patches: SparseTensor) -> Tensor:
    """Return predictions `(B, values, *grid)` for a SparseTensor without a mask whose rows are the patches."""
    return patches.features.unflatten(0, (patches.shape[0], *patches.shape[2:])).movedim(-1, 1)
