"""Networks that know nothing of masks, on a SparseTensor: they equal dense networks masked after every function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_network import differences, run_masked
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsecnx import SparseTensor
from sparsecnx.tensor import UnsupportedFunctionError

# Networks of timm at 64x96 pixels, some with fewer layers. `benchmarks/check_networks.py` goes through all of timm.
SHALLOW = {"layers": (1, 1, 1, 1)}
NARROW = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": SHALLOW,
    "resnet50d": SHALLOW,
    "seresnet50": SHALLOW,
    "ecaresnet50d": SHALLOW,
    "resnext50_32x4d": SHALLOW,
    "skresnet18": SHALLOW,
    "res2net50_26w_4s": SHALLOW,
    "resnetv2_50": SHALLOW,
    "resnet50_gn": SHALLOW,
    "convnext_atto": NARROW,
    "convnext_atto_ols": NARROW,
    "convnextv2_atto": NARROW,
    "efficientnet_b0": {},
    "efficientnet_lite0": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_050": {},
    "mixnet_s": {},
    "regnetx_002": {},
    "regnety_002": {},
    "regnetz_005": {},
    "densenet121": {"block_config": (2, 2, 2, 2), "growth_rate": 16},
    "vgg11_bn": {"features_only": True},
    "repvgg_a0": {},
    "dla46_c": {},
    "cs3darknet_s": {},
    "ghostnet_050": {},
    "inception_next_atto": {},
}
# Unequal counts in one batch, on a grid that is not square.
MASK = torch.tensor([[[0, 1, 0], [0, 1, 0]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.bool)
OUTPUT_LIMIT, LIMIT = 1e-10, 1e-8


def on_sparse_tensors(network: Callable[[Any], Any], images: Tensor, mask: Tensor, below_tile: str) -> Any:
    """Return what the network answers for a SparseTensor, dense."""
    out = network(SparseTensor.from_dense(images, mask, below_tile=below_tile))
    return pytree.tree_map(dense, out, is_leaf=lambda y: isinstance(y, SparseTensor))


def dense(y: Any) -> Any:
    return y.dense() if isinstance(y, SparseTensor) else y


def assert_equals_masked(
    network: torch.nn.Module, shape: tuple[int, ...] = (2, 3, 64, 96), mask: Tensor = MASK, below_tile: str = "raise"
) -> None:
    """Compare outputs, gradients and running statistics, in training and in evaluation."""
    torch.manual_seed(0)
    with torch.no_grad():  # layer scales and GRN start near zero, where a wrong branch goes unnoticed
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        network.double().train(training)
        errors = differences(
            network, images, mask, lambda copied, x: on_sparse_tensors(copied, x, mask, below_tile), below_tile
        )
        worst = {name: error for name, error in errors.items() if not error <= LIMIT}
        assert not worst, f"training is {training}"
        assert max(error for name, error in errors.items() if name.startswith("output")) <= OUTPUT_LIMIT


@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    assert_equals_masked(timm.create_model(name, **NETWORKS[name]))


def test_networks_of_torchvision() -> None:
    """Channel shuffle and chunk (ShuffleNet); scales that are joined by interpolation (LR-ASPP)."""
    models = pytest.importorskip("torchvision").models
    assert_equals_masked(models.shufflenet_v2_x0_5())
    assert_equals_masked(models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None))


class UNet(torch.nn.Module):
    """A U-Net with what the networks above have not: transposed convolution, skips, instance norm, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.InstanceNorm2d(b, affine=True), nn.LeakyReLU(inplace=True))
            for a, b, stride in ((3, 8, 1), (8, 12, 2), (12, 16, 2))
        )
        self.dilated = nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.wide = nn.ConvTranspose2d(24, 8, 4, 2, 1)
        self.shuffle = nn.Sequential(nn.Conv2d(16, 32, (3, 1), padding=(1, 0)), nn.PixelShuffle(2), nn.PReLU(8))
        self.gate = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        full = self.down[0](x)
        half = self.down[1](full)
        quarter = self.down[2](half)
        quarter = quarter + torch.sigmoid(self.dilated(quarter)) * quarter.amax((2, 3), keepdim=True)
        half = torch.cat([self.up(quarter), half], 1)
        full = torch.cat([self.wide(half), full], dim=1)
        fine = self.shuffle(full)
        coarse = torch.nn.functional.interpolate(quarter, scale_factor=8, mode="bilinear")
        return fine * self.gate(fine).sigmoid() + coarse[:, ::2], quarter.mean((2, 3))


def test_a_homemade_network() -> None:
    assert_equals_masked(UNet())


class Volume(torch.nn.Module):
    """A U-Net of volumes: strides that differ by axis, residual blocks of nnU-Net and MedNeXt, a stem of R3D, skips.

    It has no downsampling along the first axis at first, as networks for thick slices have.
    """

    def __init__(self, last: int | tuple[int, ...] = 2) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(
            nn.Conv3d(1, 6, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool3d(3, (1, 2, 2), 1)
        self.skip = nn.Sequential(nn.AvgPool3d(2, 2), nn.Conv3d(6, 8, 1, bias=False), nn.InstanceNorm3d(8, affine=True))
        self.conv = nn.Sequential(
            nn.Conv3d(6, 8, 3, 2, 1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(inplace=True),
            nn.Conv3d(8, 8, (1, 3, 3), 1, (0, 1, 1)), nn.InstanceNorm3d(8, affine=True),
        )  # fmt: skip
        self.down = nn.Conv3d(8, 12, 1, last)
        self.next = nn.Sequential(
            nn.Conv3d(8, 8, (3, 5, 5), last, (1, 2, 2), groups=8), nn.GroupNorm(8, 8),
            nn.Conv3d(8, 16, 1), nn.GELU(), nn.Conv3d(16, 12, 1),
        )  # fmt: skip
        self.up = nn.ConvTranspose3d(12, 8, last, last)
        self.merge = nn.Conv3d(16, 6, 3, padding=1)
        self.wide = nn.ConvTranspose3d(6, 6, (2, 4, 4), 2, (0, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.pool(self.stem(x))
        second = torch.nn.functional.leaky_relu(self.conv(first) + self.skip(first))
        third = self.next(second) + self.down(second)
        third = third * torch.sigmoid(third.mean((2, 3, 4), keepdim=True))
        fine = self.wide(self.merge(torch.cat([self.up(third), second], 1))) + first
        return fine, third, torch.nn.functional.adaptive_avg_pool3d(third, 1).flatten(1)


class Signal(torch.nn.Module):
    """A residual network of signals, as SparK1D has it, with grouped and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(nn.Conv1d(2, 8, 15, 2, 7, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool1d(3, 2, 1)
        self.block = nn.Sequential(
            nn.Conv1d(8, 12, 3, 2, 1, groups=4, bias=False), nn.BatchNorm1d(12), nn.SiLU(inplace=True),
            nn.Conv1d(12, 12, 7, padding=6, dilation=2, groups=12), nn.InstanceNorm1d(12, affine=True),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.AvgPool1d(2), nn.Conv1d(8, 12, 1))
        self.up = nn.ConvTranspose1d(12, 8, 4, 2, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = self.pool(self.stem(x))
        coarse = self.block(fine).add_(self.skip(fine))
        return self.head(coarse), self.up(coarse) + fine, torch.nn.functional.interpolate(coarse, scale_factor=2)


VOLUME_MASK = torch.tensor([[[[0, 1], [0, 0]], [[1, 1], [0, 1]]], [[[1, 0], [1, 1]], [[1, 1], [1, 0]]]]).bool()
SIGNAL_MASK = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 1, 0]]).bool()


@pytest.mark.parametrize("tile", [(4, 16, 16), (8, 16, 32)], ids=["4x16x16", "8x16x32"])
def test_a_homemade_network_of_volumes(tile: tuple[int, ...]) -> None:
    assert_equals_masked(Volume(), (2, 1, *(2 * side for side in tile)), VOLUME_MASK)


def test_a_network_of_volumes_that_goes_on_dense_below_the_tile() -> None:
    assert_equals_masked(Volume(last=(2, 2, 4)), (2, 1, 8, 32, 32), VOLUME_MASK, "dense")


def test_a_homemade_network_of_signals() -> None:
    assert_equals_masked(Signal(), (2, 2, 5 * 16), SIGNAL_MASK)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mobilevit_xxs", "reshape"),  # attends across patches of its own
        ("inception_v3", "conv2d"),  # convolves without padding
        ("resnetblur18", "pad"),  # mirrors sites at the border
        ("selecsls42b", "conv2d"),  # ends at stride 64
    ],
)
def test_a_network_without_a_masked_meaning_raises(name: str, function: str) -> None:
    timm = pytest.importorskip("timm")
    x = SparseTensor.from_dense(torch.randn(2, 3, 64, 96), MASK)
    with pytest.raises((UnsupportedFunctionError, ValueError), match=function):
        timm.create_model(name, num_classes=10)(x)


def test_the_masked_dense_computation_is_its_formulas() -> None:
    """The computation that everything else is held to, against sums over sites that are written out."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    pool = torch.nn.MaxPool2d(3, 2, 1)
    images = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    mask = torch.tensor([[[False, True], [False, False]], [[True, True], [False, True]]])
    seen: dict[str, Tensor] = {}

    def network(x: Tensor) -> Tensor:
        seen["conv"] = conv(x)
        seen["norm"] = norm(seen["conv"] + 1.0)
        seen["pool"] = pool(seen["norm"])
        seen["mean"] = seen["pool"].permute(0, 2, 3, 1).mean((1, 2))
        return seen["mean"]

    run_masked(network, images, mask)

    visible = [(b, y, x) for b in range(2) for y in range(4) for x in range(4) if not mask[b, y // 2, x // 2]]
    expected = {name: torch.zeros_like(value) for name, value in seen.items()}
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for b, y, x in visible:
        taps = [(b, y + dy, x + dx, dy, dx) for dy, dx in around if (b, y + dy, x + dx) in visible]
        sums = [conv.weight[:, :, dy + 1, dx + 1] @ images[b, :, v, u] for b, v, u, dy, dx in taps]
        expected["conv"][b, :, y, x] = conv.bias + torch.stack(sums).sum(0)
    values = torch.stack([expected["conv"][b, :, y, x] + 1.0 for b, y, x in visible])
    variance, mean = torch.var_mean(values, 0, correction=0)
    for (b, y, x), value in zip(visible, values, strict=True):
        expected["norm"][b, :, y, x] = (value - mean) / (variance + norm.eps).sqrt()
    coarse = [(b, y, x) for b in range(2) for y in range(2) for x in range(2) if not mask[b, y, x]]
    for b, y, x in coarse:
        sites = [(b, 2 * y + dy, 2 * x + dx) for dy, dx in around if (b, 2 * y + dy, 2 * x + dx) in visible]
        expected["pool"][b, :, y, x] = torch.stack([expected["norm"][b, :, v, u] for b, v, u in sites]).amax(0)
    for b in range(2):
        expected["mean"][b] = torch.stack([expected["pool"][b, :, y, x] for c, y, x in coarse if c == b]).mean(0)

    for name, value in expected.items():
        assert torch.allclose(seen[name], value, rtol=0, atol=1e-13), name
    count = len(visible)
    assert torch.allclose(norm.running_mean, 0.1 * mean)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * variance * count / (count - 1))
