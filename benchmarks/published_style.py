"""FCMAE as code written against MinkowskiEngine has it: for what such code costs here, and on MinkowskiEngine itself.

Its imports, its modules around `x.F` and its state dict are those of the published PyTorch code of ConvNeXt V2
(arXiv 2301.00808), batch-wide GRN included; MinkowskiEngine 0.5.4 lacks the fork's depthwise layer, and its
channelwise one stands in.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from MinkowskiEngine import MinkowskiConvolution, MinkowskiGELU, MinkowskiLinear, SparseTensor
from MinkowskiOps import to_sparse
from torch import Tensor, nn

try:
    from MinkowskiEngine import MinkowskiDepthwiseConvolution
except ImportError:
    from MinkowskiEngine import MinkowskiChannelwiseConvolution as MinkowskiDepthwiseConvolution


def like(x: SparseTensor, features: Tensor) -> SparseTensor:
    return SparseTensor(features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


class SparseLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return like(x, self.ln(x.F))


class GRN(nn.Module):
    """Normalise rows `(N, C)` over the whole batch, as in the published code, and `(B, H, W, C)` by image."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, p=2, dim=(1, 2) if x.ndim == 4 else 0, keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class SparseDropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        survives = [torch.full((len(c), 1), float(torch.rand(()) < keep)) for c in x.decomposed_coordinates]
        return like(x, x.F * torch.cat(survives).to(x.device) / keep)


class SparseBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = MinkowskiDepthwiseConvolution(dim, kernel_size=7, bias=True, dimension=2)
        self.norm = SparseLayerNorm(dim)
        self.pwconv1 = MinkowskiLinear(dim, 4 * dim)
        self.act = MinkowskiGELU()
        self.grn = GRN(1, 4 * dim)
        self.pwconv2 = MinkowskiLinear(4 * dim, dim)
        self.drop_path = SparseDropPath(drop_path)

    def forward(self, x: SparseTensor) -> SparseTensor:
        branch = self.act(self.pwconv1(self.norm(self.dwconv(x))))
        return x + self.drop_path(self.pwconv2(like(branch, self.grn(branch.F))))


class DenseLayerNorm(nn.LayerNorm):
    """Normalise over the channels of `(B, C, H, W)`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SparseConvNeXtV2(nn.Module):
    """Encode images under a float mask `(B, L)`, 1 = masked, to dense `(B, dims[-1], gh, gw)`, 0 where masked."""

    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...], drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        self.downsample_layers.append(nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), DenseLayerNorm(dims[0])))
        for dim, wider in itertools.pairwise(dims):
            down = MinkowskiConvolution(dim, wider, kernel_size=2, stride=2, bias=True, dimension=2)
            self.downsample_layers.append(nn.Sequential(SparseLayerNorm(dim), down))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(SparseBlock(dim, next(rates)) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def features(self, images: Tensor, mask: Tensor) -> SparseTensor:
        x = self.downsample_layers[0](images)
        side = int(mask.shape[1] ** 0.5)
        scale = x.shape[-1] // side
        mask = mask.reshape(-1, side, side).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        x = to_sparse(x * (1.0 - mask.unsqueeze(1).type_as(x)))
        for index, stage in enumerate(self.stages):
            if index > 0:
                x = self.downsample_layers[index](x)
            x = stage(x)
        return x

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.features(images, mask).dense()[0]


class DenseBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(1, 1, 1, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + self.pwconv2(self.grn(F.gelu(branch))).permute(0, 3, 1, 2)


class FCMAE(nn.Module):
    """Compute the loss on masked patches, normalised by patch, of images and a float mask `(B, L)`, 1 = masked."""

    def __init__(
        self, depths: tuple[int, ...], dims: tuple[int, ...], decoder_dim: int = 512, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = SparseConvNeXtV2(depths, dims, drop_path_rate)
        self.patch = 2 ** (len(dims) + 1)
        self.proj = nn.Conv2d(dims[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = nn.Sequential(DenseBlock(decoder_dim))
        self.pred = nn.Conv2d(decoder_dim, self.patch**2 * 3, 1)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = self.proj(self.encoder(images, mask))
        hidden = mask.reshape(-1, 1, *x.shape[2:]).type_as(x)
        pred = self.pred(self.decoder(x * (1.0 - hidden) + self.mask_token * hidden)).flatten(2).mT
        side, p = images.shape[-1] // self.patch, self.patch
        target = images.reshape(-1, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(pred.shape)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        error = (pred - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()
