"""Code in the style of the published sparse ConvNeXt V2, against the dense masked computation with its weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, needs_gpu
from torch import Tensor

from sparsecnx import random_mask
from sparsecnx.compat import minkowski
from sparsecnx.compat.minkowski import convolution
from sparsecnx.compat.minkowski.convolution import to_torch
from sparsecnx.geometry.coordinates import CoordinateMap

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEPTHS, DIMS = (1, 1, 2, 1), (8, 12, 16, 24)
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture
def style(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the code, with our API as its MinkowskiEngine."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("published_style", None)
    minkowski.install()
    yield importlib.import_module("published_style")
    minkowski.uninstall()
    sys.modules.pop("published_style", None)


def make(style: ModuleType, device: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Return a small model with random GRN, images, and a mask that leaves the last row and column visible."""
    model = style.FCMAE(DEPTHS, DIMS, decoder_dim=16, **options)
    for name, parameter in model.named_parameters():
        if "grn" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        if name.endswith(("weight", "kernel")) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(3, 3, 96, 96)
    mask = random_mask(3, (3, 3), ratio=0.5).float()
    mask[0, 8] = 0.0
    return model.to(device, dtype), images.to(device, dtype), mask.to(device, dtype)


def norm_over_batch(x: Tensor, grn: Any) -> Tensor:
    norm = x.square().sum(dim=(0, 1, 2), keepdim=True).sqrt()
    return grn.gamma * (x * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + grn.beta + x


def dense_encoder(encoder: Any, images: Tensor, mask: Tensor) -> Tensor:
    """Run all operators on the whole image, times the mask."""
    side = int(mask.shape[1] ** 0.5)

    def active(x: Tensor) -> Tensor:
        return F.interpolate(1 - mask.view(-1, 1, side, side), scale_factor=x.shape[-1] / side, mode="nearest")

    x = encoder.downsample_layers[0](images)
    for index, stage in enumerate(encoder.stages):
        if index > 0:
            norm, down = encoder.downsample_layers[index]
            x = norm.ln(x.movedim(1, -1)).movedim(-1, 1) * active(x)
            x = F.conv2d(x, to_torch(down.kernel, [2, 2]), down.bias.view(-1), stride=2)
        x = x * active(x)
        for block in stage:
            dwconv = block.dwconv
            weight = to_torch(dwconv.kernel, [7, 7])
            branch = F.conv2d(x, weight, dwconv.bias.view(-1), padding=3, groups=x.shape[1]).movedim(1, -1)
            branch = F.gelu(block.pwconv1.linear(block.norm.ln(branch))) * active(x).movedim(1, -1)
            branch = block.pwconv2.linear(norm_over_batch(branch, block.grn))
            x = x + branch.movedim(-1, 1) * active(x)
    return x


def loss_and_gradients(model: Any, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(images, mask)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_those_of_the_dense_computation(
    style: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, bound = (torch.float64, 1e-10) if device == "cpu" else (torch.float32, 1e-4)
    model, images, mask = make(style, device, dtype)
    found = loss_and_gradients(model, images, mask)
    encode = model.encoder
    monkeypatch.setattr(type(encode), "forward", lambda self, *given: dense_encoder(self, *given))
    assert_same(found, loss_and_gradients(model, images, mask), bound)


@pytest.mark.parametrize("device", DEVICES)
def test_training_lowers_the_loss(style: ModuleType, device: str) -> None:
    model, images, mask = make(style, device, torch.float32, drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_masks_of_patches_take_the_operators_on_tiles(style: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(convolution.ops, "mapped_conv", refuse)
    monkeypatch.setattr(convolution.ops, "mapped_depthwise_conv", refuse)
    monkeypatch.setattr(CoordinateMap, "kernel_map", refuse)
    model, images, mask = make(style, "cpu", torch.float32)
    model(images, mask).backward()
    x = model.encoder.features(images, mask)
    assert x._map.layout is not None
    assert x._map.layout.side == 1


def test_any_other_mask_gives_the_same_as_the_tiles(style: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, mask = make(style, "cpu", torch.float64)
    expected = loss_and_gradients(model, images, mask)
    monkeypatch.setattr("sparsecnx.compat.minkowski.operations.tiles_of_mask", lambda _: None)
    assert_same(loss_and_gradients(model, images, mask), expected, 1e-10)


def test_state_dict_has_the_published_shapes(style: ModuleType) -> None:
    model = style.FCMAE(DEPTHS, DIMS, decoder_dim=16)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["encoder.stages.0.0.dwconv.kernel"] == (49, 8)
    assert shapes["encoder.stages.0.0.dwconv.bias"] == (1, 8)
    assert shapes["encoder.stages.0.0.pwconv1.linear.weight"] == (32, 8)
    assert shapes["encoder.stages.0.0.grn.gamma"] == (1, 32)
    assert shapes["encoder.downsample_layers.1.0.ln.weight"] == (8,)
    assert shapes["encoder.downsample_layers.1.1.kernel"] == (4, 8, 12)
    assert shapes["encoder.downsample_layers.1.1.bias"] == (1, 12)
