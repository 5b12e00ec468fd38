"""Modules, operators and networks compile in one graph, with the layout given or made inside, and change nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sparsecnx
from sparsecnx import SparseTensor

IMAGES = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)).argsort(1) < 8
PER_CHANNEL = torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(3)) + 0.5
KERNEL = torch.randn(5, 8, 2, 2, generator=torch.Generator().manual_seed(5))
MATRIX = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
FUNCTIONS: list[Callable[[Any], Any]] = [
    nn.ReLU(True), nn.ReLU6(True), nn.LeakyReLU(inplace=True), nn.GELU(), nn.SiLU(True), nn.Mish(), nn.Hardswish(),
    nn.Hardswish(True), nn.Hardsigmoid(), nn.Hardtanh(), nn.Sigmoid(), nn.PReLU(8), nn.Softmax(1), nn.GLU(1),
    nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(8), nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2),
    nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ConvTranspose2d(8, 4, 2, 2), F.hardswish,
    lambda x: x.view(x.size(0), 2, -1, *x.shape[2:]), lambda x: x.std((2, 3)), lambda x: x.movedim(1, -1) @ MATRIX,
    lambda x: x.type_as(IMAGES), lambda x: x[:, :, ::2, ::2], lambda x: torch.cat((x, x), 1),
    lambda x: x / x.norm(dim=(2, 3), keepdim=True), lambda x: PER_CHANNEL - x, lambda x: PER_CHANNEL**x,
    lambda x: x.sort(1)[0], lambda x: x.split(2, 1)[1],
    lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), KERNEL),
]  # fmt: skip


def values(x: Any) -> Tensor:
    found: Tensor = x.features if isinstance(x, SparseTensor) else x
    return found


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_functions_compile_in_one_graph(number: int) -> None:
    torch._dynamo.reset()
    function = FUNCTIONS[number]

    def inside(images: Tensor, mask: Tensor) -> Any:
        return function(sparsecnx.sparse(images, mask, visible=8))

    for run, inputs in ((function, (sparsecnx.sparse(IMAGES, MASK, visible=8),)), (inside, (IMAGES, MASK))):
        expected = run(*(value.clone() for value in inputs))
        found = torch.compile(lambda *x, run=run: run(*x), fullgraph=True, backend="eager")(*inputs)
        assert getattr(found, "channels_last", None) == getattr(expected, "channels_last", None)
        torch.testing.assert_close(values(found), values(expected))


@pytest.mark.parametrize("name", ["sub", "truediv", "isub", "itruediv", "pow", "floordiv", "ipow"])
def test_operators_keep_the_order_of_operands(name: str) -> None:
    torch._dynamo.reset()
    function = getattr(operator, name)
    x = sparsecnx.sparse(IMAGES, MASK, visible=8)
    for other in (x.with_features(x.features * 2 + 5), PER_CHANNEL, 2.0):
        given, compiled = x.clone(), x.clone()
        expected = function(given, other)
        found = torch.compile(lambda x, y: function(x, y), fullgraph=True, backend="eager")(compiled, other)
        torch.testing.assert_close(found.features, expected.features, equal_nan=True)
        torch.testing.assert_close(compiled.features, given.features, equal_nan=True)


def test_a_network_of_timm_compiles_in_one_graph() -> None:
    timm = pytest.importorskip("timm")
    torch._dynamo.reset()
    model = timm.create_model("mobilenetv3_small_050").eval()
    images, mask = torch.randn(2, 3, 64, 64), torch.tensor([[True, False, False, True]] * 2)
    x = sparsecnx.sparse(images, mask, visible=2)
    inside = torch.compile(lambda *inputs: model(sparsecnx.sparse(*inputs)), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
        torch.testing.assert_close(inside(images, mask), model(x))


def test_one_graph_takes_masks_of_any_count() -> None:
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))

    def run(images: Tensor, mask: Tensor) -> Any:
        return network(sparsecnx.sparse(images, mask))

    compiled = torch.compile(run, fullgraph=True, backend=(counter := CompileCounter()))
    for kept in (2, 5, 12, 32):
        mask = torch.ones(32, dtype=torch.bool).index_fill(0, torch.randperm(32)[:kept], False).view(2, 16)
        expected, found = run(IMAGES, mask), compiled(IMAGES, mask)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), tuple(network.parameters())) for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match="mask keeps less than two tiles: pass visible= or count="):
        compiled(IMAGES, torch.ones(2, 16, dtype=torch.bool))
