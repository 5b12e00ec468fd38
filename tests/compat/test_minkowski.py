"""The API of MinkowskiEngine against dense torch, its errors, and the ways to install it.

`test_minkowski_parity.py` compares it with MinkowskiEngine itself, where that is installed.
"""

from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, draw_mask
from torch import Tensor

import sparsecnx.compat.minkowski as ME
from sparsecnx.compat.minkowski import convolution
from sparsecnx.compat.minkowski.convolution import to_minkowski, to_torch
from sparsecnx.compat.minkowski.errors import NEAREST
from sparsecnx.compat.minkowski.installation import main
from sparsecnx.geometry.coordinates import CoordinateMap

PATTERNS = ("sites", "shuffled", "tiles", "shuffled tiles", "dense")
CONV = {2: F.conv2d, 3: F.conv3d}


def pattern(kind: str, ndim: int, channels: int) -> tuple[ME.SparseTensor, Tensor, Tensor]:
    """Return a tensor on a pattern, the same dense, and 1 at its sites `(B, 1, *spatial)`, all float64."""
    tile = 4 if "tiles" in kind else 1
    grid = ((3, 2, 2) if tile == 1 else (2, 2, 1))[:ndim] if ndim == 3 else ((7, 9) if tile == 1 else (3, 2))
    mask = draw_mask("random counts", 2, grid, seed=5)
    mask[0].view(-1)[-1] = mask[1].view(-1)[-1] = False
    mask[0].view(-1)[0] = True
    for axis in range(1, mask.ndim):
        mask = mask.repeat_interleave(tile, axis)
    active = (~mask).unsqueeze(1).double()
    dense = torch.randn(2, channels, *mask.shape[1:], dtype=torch.float64) * active
    if kind == "dense":
        return ME.to_sparse(dense), dense, active
    coordinates = (~mask).nonzero()
    if "shuffled" in kind:
        coordinates = coordinates[torch.randperm(len(coordinates))]
    features = dense.movedim(1, -1)[tuple(coordinates.t())]
    return ME.SparseTensor(features, coordinates.to(torch.int32)), dense, active


def strided(active: Tensor, stride: int) -> Tensor:
    """Return 1 at every site of the coarser grid with a site behind it."""
    pad = [0 if axis % 2 == 0 else -size % stride for size in active.shape[:1:-1] for axis in (0, 1)]
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[active.ndim - 2]
    return pool(F.pad(active, pad), stride)


def dense_conv(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int, sites: Tensor) -> Tensor:
    """Convolve densely where `sites` is 1; odd kernels are centred, even ones begin at the site."""
    pad: list[int] = []
    for size, kernel, count in zip(x.shape[:1:-1], weight.shape[:1:-1], sites.shape[:1:-1], strict=True):
        before = dilation * (kernel // 2) if kernel % 2 else 0
        needed = (count - 1) * stride + dilation * (kernel - 1) + 1
        pad += [before, max(0, needed - size - before)]
    out = CONV[x.ndim - 2](F.pad(x, pad), weight, stride=stride, dilation=dilation, groups=groups)
    return out[(..., *(slice(count) for count in sites.shape[2:]))] * sites


def dense_of(x: ME.SparseTensor, like: Tensor) -> Tensor:
    return x.dense(torch.Size(like.shape))[0]


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize(
    ("ndim", "size", "stride", "dilation"),
    [(2, k, s, 1) for k, s in itertools.product((1, 2, 3), (1, 2, 3))]
    + [(2, 7, 1, 1), (2, 3, 1, 2), (2, 2, 2, 3), (2, 4, 2, 1), (3, 3, 1, 1), (3, 2, 2, 1), (3, 3, 2, 1), (3, 3, 1, 2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("layer", ["full", "depthwise", "channelwise"])
def test_convolutions(kind: str, ndim: int, size: int, stride: int, dilation: int, layer: str) -> None:
    x, dense, active = pattern(kind, ndim, 4)
    given: dict[str, Any] = {"kernel_size": size, "stride": stride, "dilation": dilation, "bias": True}
    if layer == "full":
        module: Any = ME.MinkowskiConvolution(4, 5, dimension=ndim, **given)
    else:
        kinds = {"depthwise": ME.MinkowskiDepthwiseConvolution, "channelwise": ME.MinkowskiChannelwiseConvolution}
        module = kinds[layer](4, dimension=ndim, **given)
    module.double()
    features, dense = x.F.requires_grad_(), dense.requires_grad_()
    out = module(x)
    kernel = module.kernel if module.kernel.ndim == (3 if layer == "full" else 2) else module.kernel[None]
    sites = strided(active, stride)
    weight = to_torch(kernel, [size] * ndim)
    expected = dense_conv(dense, weight, stride, dilation, 1 if layer == "full" else 4, sites)
    expected = expected + module.bias.view(1, -1, *[1] * ndim) * sites
    assert out.tensor_stride == [stride] * ndim
    assert len(out) == int(sites.sum())
    assert_close(dense_of(out, expected), expected)
    grad = torch.randn_like(expected)
    parameters = [module.kernel, module.bias]
    found = torch.autograd.grad((dense_of(out, expected) * grad).sum(), [features, *parameters])
    wanted = torch.autograd.grad((expected * grad).sum(), [dense, *parameters])
    at_sites = wanted[0].movedim(1, -1)[tuple(x.C.long().t())]
    for one, other in zip(found, (at_sites, *wanted[1:]), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("from_fine", [True, False], ids=["back", "new sites"])
def test_transposed_convolution_of_kernel_and_stride_alike(kind: str, ndim: int, size: int, from_fine: bool) -> None:
    x, _, active = pattern(kind, ndim, 3)
    down = ME.MinkowskiConvolution(3, 4, kernel_size=size, stride=size, dimension=ndim).double()
    up = ME.MinkowskiConvolutionTranspose(4, 5, kernel_size=size, stride=size, bias=True, dimension=ndim).double()
    coarse = down(x)
    if not from_fine:  # the same sites in a manager that has no finer map
        coarse = ME.SparseTensor(coarse.F, coarse.C.contiguous(), tensor_stride=coarse.tensor_stride)
    features = coarse.F.detach().requires_grad_()
    out = up(coarse._with(features))
    assert out.tensor_stride == [1] * ndim
    if from_fine:
        assert out._map is x._map
    sites = strided(active, size)
    wanted = active if from_fine else sites
    if not from_fine:
        for axis in range(2, 2 + ndim):
            wanted = wanted.repeat_interleave(size, axis)
    assert len(out) == int(wanted.sum())
    weight = to_torch(up.kernel if up.kernel.ndim == 3 else up.kernel[None], [size] * ndim).transpose(0, 1)
    transposed = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[ndim]
    dense = dense_of(coarse._with(features), torch.empty(2, 4, *sites.shape[2:]))
    expected = transposed(dense, weight, up.bias.view(-1), stride=size)
    expected = expected[(..., *(slice(n) for n in wanted.shape[2:]))] * wanted
    assert_close(dense_of(out, expected), expected)
    grad = torch.randn_like(expected)
    leaves = [features, up.kernel, up.bias]
    found = torch.autograd.grad((dense_of(out, expected) * grad).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad((expected * grad).sum(), leaves), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("mode", ["sum", "avg", "max"])
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 3), (3, 1), (2, 1)])
@pytest.mark.parametrize("kind", ["shuffled", "tiles"])
def test_pooling(mode: str, size: int, stride: int, kind: str) -> None:
    x, dense, active = pattern(kind, 2, 3)
    layers = {"sum": ME.MinkowskiSumPooling, "avg": ME.MinkowskiAvgPooling, "max": ME.MinkowskiMaxPooling}
    out = layers[mode](kernel_size=size, stride=stride, dimension=2)(x)
    sites = strided(active, stride)
    if size == stride:  # a kernel as large as its stride begins at the output's site, also of odd size
        pad = (0, sites.shape[3] * stride - dense.shape[3], 0, sites.shape[2] * stride - dense.shape[2])
        windows = F.unfold(F.pad(dense, pad), size, stride=stride), F.unfold(F.pad(active, pad), size, stride=stride)
    else:
        before = size // 2 if size % 2 else 0
        after = [
            (n - 1) * stride + size - m - before for n, m in zip(sites.shape[:1:-1], dense.shape[:1:-1], strict=True)
        ]
        pad = (before, max(0, after[0]), before, max(0, after[1]))
        windows = F.unfold(F.pad(dense, pad), size, stride=stride), F.unfold(F.pad(active, pad), size, stride=stride)
    values, there = windows[0].view(2, 3, size * size, -1), windows[1].view(2, 1, size * size, -1)
    pooled = {
        "sum": values.sum(2),
        "avg": values.sum(2) / there.sum(2).clamp(min=1),
        "max": values.masked_fill(there == 0, -torch.inf).amax(2),
    }[mode]
    rows, columns = (
        int((n - size) // stride + 1) for n in (dense.shape[2] + pad[2] + pad[3], dense.shape[3] + pad[0] + pad[1])
    )
    expected = pooled.view(2, 3, rows, columns)[..., : sites.shape[2], : sites.shape[3]]
    expected = expected.where(sites > 0, 0.0)
    assert_close(dense_of(out, expected), expected)


def test_global_pooling_and_back() -> None:
    x, _, _ = pattern("shuffled", 2, 3)
    image = x.C[:, 0]
    by_image = [x.F[image == number] for number in (0, 1)]
    for layer, reduce in (
        (ME.MinkowskiGlobalSumPooling(), lambda f: f.sum(0)),
        (ME.MinkowskiGlobalAvgPooling(), lambda f: f.mean(0)),
        (ME.MinkowskiGlobalMaxPooling(), lambda f: f.amax(0)),
    ):
        out = layer(x)
        assert_close(out.F, torch.stack([reduce(f) for f in by_image]))
        assert out.C.tolist() == [[0, 0, 0], [1, 0, 0]]
        assert out.tensor_stride == [0, 0]
    back = out.F[image.long()]
    assert_close(ME.MinkowskiBroadcast()(x, out).F, back)
    assert_close(ME.MinkowskiBroadcastAddition()(x, out).F, x.F + back)
    assert_close(ME.MinkowskiBroadcastMultiplication()(x, out).F, x.F * back)
    assert_close(ME.MinkowskiBroadcastConcatenation()(x, out).F, torch.cat([x.F, back], 1))


def test_instance_norm() -> None:
    x, _, _ = pattern("shuffled", 2, 3)
    image = x.C[:, 0]
    for layer, eps in ((ME.MinkowskiInstanceNorm(3), 1e-8), (ME.MinkowskiStableInstanceNorm(3), 1e-6)):
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
        out = layer.double()(x)
        for number in (0, 1):
            f = x.F[image == number]
            normal = (f - f.mean(0)) / (f.var(0, correction=0) + eps).sqrt()
            assert_close(out.F[image == number], normal * layer.weight + layer.bias)


def test_layers_that_see_each_site_alone() -> None:
    x, _, _ = pattern("sites", 2, 3)
    names = [name for name in ME.__all__ if isinstance(getattr(ME, name), type)]
    nonlinear = [name for name in names if issubclass(getattr(ME, name), ME.MinkowskiNonlinearityBase)]
    assert len(nonlinear) == 28  # MinkowskiEngine's 27, and their base
    for name in nonlinear:
        if name == "MinkowskiNonlinearityBase":
            continue
        layer = getattr(ME, name)
        given = {"MinkowskiThreshold": (0.1, 20.0), "MinkowskiSoftmax": (1,), "MinkowskiSoftmin": (1,)}.get(name, ())
        given = (1,) if name == "MinkowskiLogSoftmax" else given
        torch.manual_seed(1)
        expected = getattr(torch.nn, name.removeprefix("Minkowski"))(*given).eval().double()(x.F)
        out = layer(*given).eval().double()(x)
        assert_close(out.F, expected)
        assert out.coordinate_map_key == x.coordinate_map_key
    assert_close(ME.MinkowskiFunctional.relu(x).F, x.F.relu())
    norm = ME.MinkowskiBatchNorm(3).double()
    assert_close(norm(x).F, torch.nn.BatchNorm1d(3).double()(x.F))
    linear = ME.MinkowskiLinear(3, 5).double()
    assert_close(linear(x).F, linear.linear(x.F))
    assert_close(ME.MinkowskiLayerNorm(3).double()(x).F, F.layer_norm(x.F, (3,), eps=1e-6))


def test_sync_batch_norm_takes_over_the_state() -> None:
    model = torch.nn.Sequential(ME.MinkowskiLinear(3, 4), ME.MinkowskiBatchNorm(4, momentum=0.3))
    model(pattern("sites", 2, 3)[0].float())
    before = model.state_dict()
    converted = ME.MinkowskiSyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], ME.MinkowskiSyncBatchNorm)
    assert isinstance(converted[1].bn, torch.nn.SyncBatchNorm)
    assert converted.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


@pytest.mark.parametrize("kind", ["dense", "shuffled tiles", "sites"])
def test_dense_and_back(kind: str) -> None:
    x, dense, active = pattern(kind, 2, 3)
    assert torch.equal(dense_of(x, dense), dense)
    found, low, stride = x.dense()
    last = active.nonzero().amax(0)
    assert found.shape == (last[0] + 1, 3, last[2] + 1, last[3] + 1)
    assert low.tolist() == [active.nonzero()[:, 2:].amin(0).tolist()]
    assert stride.tolist() == [1, 1]
    larger, _, _ = x.dense(torch.Size((3, 1, 20, 21)))
    assert larger.shape == (3, 3, 20, 21)
    assert torch.equal(larger[:2, :, : dense.shape[2], : dense.shape[3]], dense)
    assert larger.count_nonzero() == dense.count_nonzero()
    moved, _, _ = x.dense(torch.Size((2, 3, 30, 30)), min_coordinate=torch.tensor([-2, -1], dtype=torch.int32))
    assert torch.equal(moved[:, :, 2 : 2 + dense.shape[2], 1 : 1 + dense.shape[3]], dense)
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    apart, _, _ = coarse.dense(torch.Size((2, 3, 30, 30)), contract_stride=False)
    side_by_side, _, _ = coarse.dense(torch.Size((2, 3, 15, 15)))
    assert torch.equal(apart[:, :, ::2, ::2], side_by_side)
    assert apart.count_nonzero() == side_by_side.count_nonzero()


def test_to_sparse_drops_the_sites_that_are_zero() -> None:
    dense = torch.randn(2, 4, 3, 5) * (torch.rand(2, 1, 3, 5) < 0.5)
    dense[0, 1, 0, 0], dense[0, 0, 0, 0] = 0.0, 1.0  # one channel keeps a site
    x = ME.to_sparse(dense)
    assert x.C.tolist() == (dense != 0).any(1).nonzero().tolist()
    assert torch.equal(dense_of(x, dense), dense)
    again = ME.to_sparse(dense.movedim(1, -1), format="BXXC")
    assert torch.equal(again.F, x.F)
    every = ME.MinkowskiOps.to_sparse_all(dense, ME.dense_coordinates(dense.shape))
    assert len(every) == 30
    assert torch.equal(every.F, dense.movedim(1, -1).reshape(-1, 4))
    assert len(ME.MinkowskiToSparseTensor(remove_zeros=False)(dense)) == 30
    assert torch.equal(ME.MinkowskiToDenseTensor(dense.shape)(x), dense)


def test_arithmetic() -> None:
    x, _, _ = pattern("sites", 2, 3)
    y = x._with(torch.randn_like(x.F))
    assert torch.equal((x + y).F, x.F + y.F)
    assert torch.equal((x - y).F, x.F - y.F)
    assert torch.equal((x * y).F, x.F * y.F)
    assert torch.equal((x / y).F, x.F / y.F)
    assert torch.equal((x * torch.tensor(2.0)).F, x.F * 2)
    assert torch.equal((x**2).F, x.F**2)
    assert torch.equal(ME.cat(x, y).F, torch.cat([x.F, y.F], 1))
    assert torch.equal(ME.cat([x, y, x]).F, torch.cat([x.F, y.F, x.F], 1))
    assert_close(ME.sum(x, y).F, x.F + y.F)
    assert_close(ME.mean(x, y).F, (x.F + y.F) / 2)
    assert_close(ME.var(x, y).F, ((x.F - y.F) / 2) ** 2)
    expected = x.F + y.F
    x += y
    assert torch.equal(x.F, expected)


def test_arithmetic_on_the_sites_of_either() -> None:
    coordinates = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 2, 0]], dtype=torch.int32)
    x = ME.SparseTensor(torch.randn(3, 2), coordinates)
    others = torch.tensor([[1, 2, 0], [0, 5, 5]], dtype=torch.int32)
    y = ME.SparseTensor(torch.randn(2, 2), others, coordinate_manager=x.coordinate_manager)
    shape = torch.Size((2, 2, 6, 6))
    a, b = x.dense(shape)[0], y.dense(shape)[0]
    assert torch.equal((x + y).dense(shape)[0], a + b)
    assert torch.equal((x - y).dense(shape)[0], a - b)
    assert torch.equal(ME.MinkowskiUnion()(x, y).dense(shape)[0], a + b)
    assert len(x + y) == 4


def test_pruning() -> None:
    x, _, _ = pattern("shuffled", 2, 3)
    kept = torch.rand(len(x)) < 0.5
    features = x.F.requires_grad_()
    out = ME.MinkowskiPruning()(x, kept)
    assert torch.equal(out.F, features[kept])
    assert torch.equal(out.C, x.C[kept])
    (grad,) = torch.autograd.grad(out.F.sum(), features)
    assert torch.equal(grad, kept[:, None].expand(-1, 3).double())


def test_by_image() -> None:
    x, _, _ = pattern("shuffled", 2, 3)
    coordinates, features = x.decomposed_coordinates_and_features
    for number in (0, 1):
        rows = x.C[:, 0] == number
        assert torch.equal(coordinates[number], x.C[rows, 1:])
        assert torch.equal(features[number], x.F[rows])
        assert torch.equal(x.features_at(number), x.F[rows])
        assert torch.equal(x.coordinates_at(number), x.C[rows, 1:])


def test_rows_keep_the_order_in_which_they_are_given() -> None:
    x, _, _ = pattern("shuffled tiles", 2, 3)
    assert x._map.layout is not None
    assert x._map.order is not None
    again = ME.SparseTensor(x.F, x.C)
    assert torch.equal(again.F, x.F)
    assert torch.equal(again.C, x.C)


def test_a_pattern_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = CoordinateMap.kernel_map

    def count(self: CoordinateMap, *given: Any) -> Tensor:
        built.append(self.rows)
        return build(self, *given)

    monkeypatch.setattr(CoordinateMap, "kernel_map", count)
    x, _, _ = pattern("shuffled", 2, 4)
    layers = [ME.MinkowskiChannelwiseConvolution(4, kernel_size=3, dimension=2).double() for _ in range(3)]
    layers.append(ME.MinkowskiConvolution(4, 4, kernel_size=3, dimension=2).double())
    for layer in layers:
        x = layer(x)
    assert len(built) == 1
    once = [ME.MinkowskiMaxPooling(2, 2, dimension=2)(x), ME.MinkowskiConvolution(4, 2, 3, 2, dimension=2).double()(x)]
    assert once[0].coordinate_map_key == once[1].coordinate_map_key
    assert once[0]._map is once[1]._map


def test_tiles_take_the_operators_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(convolution.ops, "mapped_conv", refuse)
    monkeypatch.setattr(convolution.ops, "mapped_depthwise_conv", refuse)
    x, _, _ = pattern("shuffled tiles", 2, 4)
    x = ME.MinkowskiDepthwiseConvolution(4, kernel_size=7, dimension=2).double()(x)
    x = ME.MinkowskiConvolution(4, 4, kernel_size=2, stride=2, dimension=2).double()(x)
    ME.MinkowskiConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=2).double()(
        ME.SparseTensor(x.F, x.C, tensor_stride=2)
    )
    with pytest.raises(AssertionError, match="general path"):
        ME.MinkowskiDepthwiseConvolution(4, kernel_size=3, dilation=2, dimension=2).double()(x)


def test_output_at_given_sites() -> None:
    x, dense, _ = pattern("sites", 2, 3)
    layer = ME.MinkowskiConvolution(3, 2, kernel_size=3, dimension=2).double()
    sites = torch.tensor([[1, 0, 0], [0, 3, 4], [0, 50, 50]], dtype=torch.int32)
    out = layer(x, sites)
    everywhere = F.conv2d(dense, to_torch(layer.kernel, [3, 3]), padding=1)
    assert torch.equal(out.C, sites)
    assert_close(out.F[0], everywhere[1, :, 0, 0])
    assert_close(out.F[1], everywhere[0, :, 3, 4])
    assert out.F[2].abs().sum() == 0
    assert layer(x, out).coordinate_map_key == out.coordinate_map_key


def test_cross_shaped_kernel() -> None:
    x, dense, active = pattern("sites", 2, 3)
    kernel = ME.KernelGenerator(3, region_type=ME.RegionType.HYPER_CROSS, dimension=2)
    layer = ME.MinkowskiConvolution(3, 2, kernel_generator=kernel, dimension=2).double()
    assert layer.kernel.shape == (5, 3, 2)
    weight = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    for tap, (y, column) in enumerate([(1, 1), (2, 1), (0, 1), (1, 2), (1, 0)]):
        weight[:, :, y, column] = layer.kernel[tap].t()
    assert_close(dense_of(layer(x), active.expand(-1, 2, -1, -1)), F.conv2d(dense, weight, padding=1) * active)


def test_kernel_maps_by_tap() -> None:
    coordinates = torch.tensor([[0, 0], [0, 1], [0, 3]], dtype=torch.int32)
    x = ME.SparseTensor(torch.ones(3, 1), coordinates)
    manager, key = x.coordinate_manager, x.coordinate_map_key
    found = {tap: pairs.tolist() for tap, pairs in manager.kernel_map(key, key, kernel_size=3).items()}
    assert found == {0: [[0], [1]], 1: [[0, 1, 2], [0, 1, 2]], 2: [[1], [0]]}
    assert manager.size(manager.stride(key, 2)) == 2
    assert manager.get_coordinates(2).tolist() == [[0, 0], [0, 2]]
    assert manager.number_of_unique_batch_indices() == 1


@pytest.mark.parametrize("size", [(3,), (2, 3), (3, 2, 1)], ids=str)
def test_weights_to_minkowskis_layout_and_back(size: tuple[int, ...]) -> None:
    weight = torch.randn(4, 5, *size)
    kernel = to_minkowski(weight)
    assert torch.equal(to_torch(kernel, list(size)), weight)
    for place in itertools.product(*map(range, size)):
        tap, width = 0, 1
        for axis, extent in enumerate(size):  # the first axis varies fastest
            tap, width = tap + place[axis] * width, width * extent
        assert torch.equal(kernel[tap], weight[(..., *place)].t())


def test_several_rows_at_one_site() -> None:
    again = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.int32)
    features = torch.tensor([[1.0], [2.0], [3.0], [8.0]])
    with pytest.raises(ValueError, match=r"2 rows at sites that have one already, the first at \[0, 1, 1\]"):
        ME.SparseTensor(features, again)
    modes = ME.SparseTensorQuantizationMode
    for mode, expected in (
        (modes.RANDOM_SUBSAMPLE, [[1.0], [2.0]]),
        (modes.UNWEIGHTED_SUM, [[12.0], [2.0]]),
        (modes.UNWEIGHTED_AVERAGE, [[4.0], [2.0]]),
    ):
        x = ME.SparseTensor(features, again, quantization_mode=mode)
        assert x.F.tolist() == expected
        assert x.C.tolist() == [[0, 1, 1], [0, 0, 0]]
        assert x.inverse_mapping.tolist() == [0, 1, 0, 0]
        assert x.unique_index.tolist() == [0, 1]
    with pytest.raises(ValueError, match="already"):
        ME.SparseTensor(features, again, quantization_mode=modes.NO_QUANTIZATION)
    with pytest.raises(ME.NotOffered, match="UNWEIGHTED_AVERAGE"):
        ME.SparseTensor(features, again, quantization_mode=modes.MAX_POOL)


def test_a_strided_map_that_the_manager_had_already() -> None:
    tiles = ME.to_sparse(torch.randn(2, 4, 8, 16, dtype=torch.float64))
    manager = tiles.coordinate_manager
    elsewhere = tiles.C[::4].clone()
    elsewhere[:, 1] += 100
    elsewhere[0] = torch.tensor([0, 0, 2])
    taken = ME.SparseTensor(torch.ones(len(elsewhere), 1), elsewhere, tensor_stride=2, coordinate_manager=manager)
    layer = ME.MinkowskiConvolution(4, 5, kernel_size=2, stride=2, dimension=2).double()
    out = layer(tiles)
    assert out.coordinate_map_key == taken.coordinate_map_key
    assert torch.equal(out.C, elsewhere)
    first = F.conv2d(tiles.dense()[0], to_torch(layer.kernel, [2, 2]), stride=2)[0, :, 0, 1]
    assert_close(out.F[0], first)
    assert out.F[1:].abs().sum() == 0


def test_sites_do_not_move_with_the_coordinates_of_their_maker() -> None:
    x, _, _ = pattern("sites", 2, 4)
    layer = ME.MinkowskiConvolution(4, 5, kernel_size=3, dimension=2).double()
    expected = layer(ME.SparseTensor(x.F, x.C)).F
    given = x.C.clone()
    y = ME.SparseTensor(x.F, given)
    given[:, 1:] *= 3
    y.C[:, 1:] *= 5
    y.coordinate_manager.get_coordinates(y.coordinate_map_key)[:, 1:] *= 7
    assert torch.equal(layer(y).F, expected)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@HALVES
def test_gradients_of_many_rows_are_not_summed_in_half_precision(dtype: torch.dtype) -> None:
    coordinates = torch.cat([torch.zeros(4096, 1), torch.arange(4096)[:, None].expand(-1, 2)], 1).to(torch.int32)
    x = ME.SparseTensor(torch.ones(4096, 1, dtype=dtype), coordinates)
    pooled = ME.MinkowskiGlobalAvgPooling()(x)
    pooled.requires_grad_()
    ME.MinkowskiBroadcastMultiplication()(x, pooled).F.sum().backward()
    assert pooled.F.grad.item() == 4096
    assert ME.MinkowskiGlobalSumPooling()(x).F.item() == 4096


def test_average_pooling_of_large_numbers_in_float16() -> None:
    x = ME.to_sparse(torch.full((1, 1, 4, 4), 20000.0, dtype=torch.float16))
    assert ME.MinkowskiAvgPooling(2, 2, dimension=2)(x).F.flatten().tolist() == [20000.0] * 4


@HALVES
@pytest.mark.parametrize("kind", ["shuffled", "shuffled tiles"])
def test_layers_in_half_precision_and_under_autocast(kind: str, dtype: torch.dtype) -> None:
    x, _, _ = pattern(kind, 2, 8)
    layers = torch.nn.Sequential(
        ME.MinkowskiDepthwiseConvolution(8, kernel_size=3, bias=True, dimension=2),
        ME.MinkowskiConvolution(8, 8, kernel_size=2, stride=2, bias=True, dimension=2),
        ME.MinkowskiReLU(),
        ME.MinkowskiConvolution(8, 8, kernel_size=3, bias=True, dimension=2),
        ME.MinkowskiConvolutionTranspose(8, 8, kernel_size=2, stride=2, bias=True, dimension=2),
        ME.MinkowskiMaxPooling(3, 1, dimension=2),
    ).double()
    expected = layers(x).F
    layers.to(dtype)
    low = layers(x._with(x.F.to(dtype)))
    assert low.F.dtype == dtype
    assert_close(low.F, expected, 3e-2)
    low.F.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())
    layers.float()
    with torch.autocast("cpu", dtype):
        cast = layers(x._with(x.F.float()))
    assert cast.F.dtype == dtype
    assert_close(cast.F, expected, 3e-2)


def test_maps_made_under_inference_mode_serve_training() -> None:
    x, _, _ = pattern("shuffled", 2, 4)
    layers = torch.nn.Sequential(
        ME.MinkowskiConvolution(4, 4, kernel_size=3, dimension=2),
        ME.MinkowskiMaxPooling(2, 2, dimension=2),
        ME.MinkowskiInstanceNorm(4),
        ME.MinkowskiGlobalMaxPooling(),
    ).double()
    with torch.inference_mode():
        expected = layers(x).F.clone()
    out = layers(x).F
    out.sum().backward()
    assert torch.equal(out, expected)
    assert layers[0].kernel.grad is not None


def test_a_pruned_tensor_goes_back_to_all_the_sites() -> None:
    x, _, _ = pattern("sites", 2, 4)
    kept = ME.MinkowskiPruning()(x, torch.arange(len(x)) % 3 == 0)
    down = ME.MinkowskiConvolution(4, 4, kernel_size=2, stride=2, dimension=2).double()
    up = ME.MinkowskiConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=2).double()
    assert up(down(kept)).coordinate_map_key == x.coordinate_map_key  # as in MinkowskiEngine
    assert len(ME.cat(up(down(kept)), x)) == len(x)


@pytest.mark.parametrize("how", ["pruned", "united", "asked for", "of another tensor"])
def test_maps_made_otherwise_are_not_taken_for_those_of_a_stride(how: str) -> None:
    full = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(5)).to(torch.int32)
    x = ME.SparseTensor(torch.arange(1.0, 31.0)[:, None], full)
    down = ME.MinkowskiSumPooling(2, 2, dimension=2)
    prune = ME.MinkowskiPruning()
    if how == "asked for":
        ME.MinkowskiConvolution(1, 1, 2, 2, dimension=2)(x, full[:1])
    elif how == "of another tensor":
        other = ME.SparseTensor(x.F, full, coordinate_manager=x.coordinate_manager)
        prune(down(other), torch.arange(9) < 1)
    else:
        some = down(prune(x, torch.arange(30) < 20))
        fewer = prune(some, torch.arange(len(some)) < 2)
        if how == "united":
            assert len(fewer + some) == len(some)
    assert down(x).F.sum() == x.F.sum()
    assert len(down(x)) == 9


def test_transposed_layers_of_tensors_that_share_a_manager_keep_to_their_own_sites() -> None:
    places = torch.tensor([[0, 0, 0], [0, 8, 8]], dtype=torch.int32)
    u = ME.SparseTensor(torch.ones(1, 2), places[:1], tensor_stride=2)
    v = ME.SparseTensor(torch.ones(1, 2), places[1:], tensor_stride=2, coordinate_manager=u.coordinate_manager)
    up = ME.MinkowskiConvolutionTranspose(2, 2, kernel_size=2, stride=2, dimension=2)
    assert up(u).C[:, 1:].amax() == 1
    assert up(v).C[:, 1:].amin() == 8


def test_what_is_handed_out_does_not_move_the_sites() -> None:
    x, dense, _ = pattern("shuffled", 2, 3)
    x.C[:, 1:] = 0
    for image in (*x.decomposed_coordinates, *x.decomposition_permutations):
        image.zero_()
    assert torch.equal(dense_of(x, dense), dense)
    assert x.features_at(1).shape[0] == int((dense[1] != 0).any(0).sum())
    again = ME.SparseTensor(x.F, x._map.coordinates)
    assert again.unique_index is not again.inverse_mapping


def test_images_looked_up_under_inference_mode_serve_training() -> None:
    x = ME.SparseTensor(torch.randn(2, 3), torch.tensor([[2, 0, 0], [0, 1, 2]], dtype=torch.int32))
    with torch.inference_mode():
        assert [len(rows) for rows in x.decomposition_permutations] == [1, 0, 1]
    y = x._with(torch.randn(2, 3).requires_grad_())
    torch.cat(y.decomposed_features).sum().backward()
    y.features_at(1).sum().backward()
    assert torch.equal(y.F.grad, torch.ones(2, 3))


def test_tensors_of_different_dtypes_on_different_sites() -> None:
    x, _, _ = pattern("sites", 2, 3)
    some = ME.MinkowskiPruning()(x, torch.arange(len(x)) % 2 == 0)
    low = x._with(x.F.bfloat16())
    assert (low + some).dtype == torch.float64
    assert (some + low).dtype == torch.float64
    assert ME.MinkowskiUnion()(low, some).dtype == torch.float64


def test_tensors_without_sites() -> None:
    empty = ME.SparseTensor(torch.ones(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    for layer in (
        ME.MinkowskiConvolution(3, 4, kernel_size=3, dimension=2),
        ME.MinkowskiConvolution(3, 4, kernel_size=2, stride=2, dimension=2),
        ME.MinkowskiDepthwiseConvolution(3, kernel_size=3, dimension=2),
        ME.MinkowskiMaxPooling(2, 2, dimension=2),
        ME.MinkowskiGlobalMaxPooling(),
        ME.MinkowskiGlobalAvgPooling(),
        ME.MinkowskiInstanceNorm(3),
    ):
        assert len(layer(empty)) == 0
    assert empty.decomposed_features == []
    assert empty.features_at_coordinates(torch.zeros(2, 3, dtype=torch.int32)).tolist() == [[0.0] * 3] * 2
    assert empty.dense(torch.Size((1, 3, 2, 2)))[0].abs().sum() == 0


COORDINATES = torch.tensor([[0, 0, 0], [0, 1, 1]], dtype=torch.int32)


def example(channels: int = 3) -> ME.SparseTensor:
    return ME.SparseTensor(torch.randn(2, channels), COORDINATES)


def convolution_of(**geometry: Any) -> Any:
    return ME.MinkowskiConvolution(3, 4, **{"kernel_size": 3, "dimension": 2, **geometry})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ME.SparseTensor([1.0], COORDINATES), "features is a list"),
        (lambda: ME.SparseTensor(torch.ones(2), COORDINATES), r"features is \(2,\): expected \(rows, C\)"),
        (lambda: ME.SparseTensor(torch.ones(3, 1), COORDINATES), r"\(3, 1\) and coordinates is \(2, 3\)"),
        (lambda: ME.SparseTensor(torch.ones(2, 1)), "coordinates is None"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES[0]), r"coordinates is \(3,\)"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES > 0), "coordinates is torch.bool"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES.tolist()), "coordinates is a list"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES, tensor_stride=[1]), "tensor_stride is \\[1\\]"),
        (lambda: example()._with(torch.ones(3, 1)), "the map of coordinate_map_key has 2 sites"),
        (lambda: example().coordinate_manager.map(ME.CoordinateMapKey([4, 4], "")), "has no such map"),
        (lambda: example() + example(), "different coordinate managers"),
        (lambda: ME.cat(example(), example()), "different coordinate managers"),
        (lambda: ME.cat(example()), "expected at least two|argument 0"),
        (lambda: example() + "1", "other is a str"),
        (lambda: ME.MinkowskiConvolution(3, 4, kernel_size=3), "dimension is a NoneType"),
        (lambda: convolution_of(kernel_size=[3, 3, 3]), "kernel_size is"),
        (lambda: convolution_of(stride=0), "stride is"),
        (lambda: ME.MinkowskiConvolution(3, 4, dimension=2), "kernel_size is"),
        (lambda: convolution_of()(example(5)), "takes 3"),
        (lambda: convolution_of(dimension=3)(example()), "has dimension=3"),
        (lambda: convolution_of()(torch.ones(2, 3)), "input is a Tensor"),
        (lambda: ME.MinkowskiConvolutionTranspose(3, 4, 2, 2, dimension=2)(example()), "must divide the tensor stride"),
        (lambda: example().dense(torch.Size((1, 3, 1, 1))), "reach from"),
        (lambda: example().dense(torch.Size((1, 3, 4))), r"shape is \(1, 3, 4\)"),
        (lambda: example().dense(min_coordinate=torch.zeros(2)), "min_coordinate is torch.float32"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES - 1).dense(), "below 0"),
        (lambda: ME.MinkowskiPruning()(example(), torch.ones(2)), "mask is torch.float32"),
        (lambda: ME.to_sparse(torch.ones(2, 3)), r"x is \(2, 3\)"),
        (lambda: ME.to_sparse(torch.ones(2, 3, 4), format="CBX"), "format is 'CBX'"),
        (lambda: ME.utils.batched_coordinates([COORDINATES[0]]), r"coords\[0\] is \(3,\)"),
        (lambda: ME.utils.sparse_collate([COORDINATES], [torch.ones(3, 1)]), "feats have 3 rows"),
        (lambda: ME.CoordinateManager(), "D is 0"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES, tensor_stride=0), "tensor_stride is"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES, tensor_stride=2), "between multiples"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES, quantization_mode=1), "quantization_mode is a int"),
        (lambda: ME.CoordinateManager("2"), "D is a str"),
        (lambda: example().dense(5), "shape is a int"),
        (lambda: example().features_at_coordinates([[0, 0, 0]]), "query_coordinates is a list"),
        (lambda: example().features_at_coordinates(COORDINATES[:, :2]), r"expected \(n, 3\)"),
        (lambda: convolution_of(kernel_size=["a", 3]), "expected whole numbers"),
        (lambda: convolution_of(kernel_size=[math.inf, 3]), "expected whole numbers"),
        (lambda: convolution_of(kernel_size=[2.5, 3]), "expected whole numbers"),
        (lambda: convolution_of(kernel_generator=ME.KernelGenerator(2, 2, dimension=3)), "kernel_generator has 3 axes"),
        (
            lambda: ME.MinkowskiPruning()(x := example(), torch.tensor([True, False])) + x._with(torch.ones(2, 5)),
            "other has 5 channels",
        ),
        (lambda: ME.MinkowskiBroadcastAddition()(x := example(), x), "expected the sites of a global pooling"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES - COORDINATES.new_tensor([1, 0, 0])), "below 0"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES * torch.nan), "or NaN"),
        (lambda: ME.SparseTensor(torch.ones(2, 1), COORDINATES.long() + 2**31), "expected those of int32"),
        (lambda: ME.MinkowskiConvolution("3", 4, kernel_size=3, dimension=2), "in_channels is a str"),
        (
            lambda: ME.MinkowskiBroadcastMultiplication()(example(), ME.MinkowskiGlobalAvgPooling()(example())),
            "different coordinate managers",
        ),
        (lambda: example()._with(torch.ones(2, 1, device="meta")), "features is on meta: the map of .* is on cpu"),
        (lambda: ME.CoordinateMapKey(3).get_key(), "is not set"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:  # as MinkowskiEngine raises
        make()
    assert isinstance(caught.value, (ValueError, TypeError))  # as Python raises


def test_coordinates_of_other_numbers_are_rounded_down_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="coordinates is torch.float32"):
        x = ME.SparseTensor(torch.ones(2, 1), torch.tensor([[0, 0.5, -0.5], [0, 1.9, 1.0]]))
    assert x.C.tolist() == [[0, 0, -1], [0, 1, 1]]


@pytest.mark.parametrize("name", NEAREST)
def test_what_is_not_offered_imports_and_raises_where_it_is_called(name: str) -> None:
    placeholder = getattr(ME, name)
    assert not isinstance(example(), placeholder)
    with pytest.raises(ME.NotOffered, match=f"{name} of MinkowskiEngine is not offered.*Nearest: "):
        placeholder(1, kernel_size=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: convolution_of(expand_coordinates=True),
        lambda: ME.KernelGenerator(3, region_type=ME.RegionType.CUSTOM, dimension=2),
        lambda: ME.utils.sparse_quantize(COORDINATES),
        lambda: example().slice(None),
        lambda: example().coordinate_manager.stride_map(None),
        lambda: ME.KernelGenerator(3, dimension=2).get_kernel([1, 1], False),
        lambda: example().features_at_coordinates(torch.tensor([[0.0, 0.5, 0.5]])),
    ],
    ids=["expand", "custom", "quantize", "slice", "stride_map", "get_kernel", "interpolate"],
)
def test_options_that_are_not_offered(make: Any) -> None:
    with pytest.raises(NotImplementedError, match="Nearest: "):
        make()


def test_members_that_are_not_offered_say_so_in_classes_of_their_own() -> None:
    class Own(ME.SparseTensor):
        @property
        def broken(self) -> Any:
            return self.F.nothing_of_the_kind

    x = Own(torch.ones(2, 1), COORDINATES)
    with pytest.raises(ME.NotOffered, match=r"SparseTensor\.slice of MinkowskiEngine is not offered"):
        x.slice(None)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        x.broken  # noqa: B018


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="MinkowskiFrobnicate"):
        ME.MinkowskiFrobnicate  # noqa: B018


def test_batches_of_coordinates() -> None:
    coords = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4.7, -5.2]])]
    batched = ME.utils.batched_coordinates(coords)
    assert batched.tolist() == [[0, 0, 1], [0, 2, 3], [1, 4, -6]]
    assert batched.dtype == torch.int32
    feats = [torch.ones(2, 1), torch.zeros(1, 1)]
    labels = [torch.tensor([7, 8]), torch.tensor([9])]
    c, f, y = ME.utils.sparse_collate(coords, feats, labels)
    assert torch.equal(c, batched)
    assert f.tolist() == [[1.0], [1.0], [0.0]]
    assert y.tolist() == [7, 8, 9]
    data = list(zip(coords, feats, labels, strict=True))
    assert torch.equal(ME.utils.batch_sparse_collate(data)[2], y)
    with pytest.warns(UserWarning, match="1 of 2 images are left out"):
        c, _, _ = ME.utils.SparseCollation(limit_numpoints=2)(data)
    assert c.tolist() == [[0, 0, 1], [0, 2, 3]]
    with pytest.raises(ValueError, match="the first image alone has 2 sites"):
        ME.utils.SparseCollation(limit_numpoints=1)(data)


def test_pooling_over_images_that_came_later() -> None:
    x = example()
    ME.MinkowskiGlobalAvgPooling()(x)
    later = ME.SparseTensor(
        torch.ones(1, 3), torch.tensor([[5, 0, 0]], dtype=torch.int32), coordinate_manager=x.coordinate_manager
    )
    with pytest.raises(ValueError, match="tensors of one batch"):
        ME.MinkowskiGlobalAvgPooling()(later)


def test_pruned_images_are_pooled_to_zero() -> None:
    coordinates = torch.tensor([[0, 0, 0], [2, 1, 1], [2, 1, 2]], dtype=torch.int32)
    x = ME.SparseTensor(torch.arange(6.0).view(3, 2), coordinates)
    kept = ME.MinkowskiPruning()(x, torch.tensor([False, True, True]))
    for pool, expected in (
        (ME.MinkowskiGlobalSumPooling, [6.0, 8.0]),
        (ME.MinkowskiGlobalAvgPooling, [3.0, 4.0]),
        (ME.MinkowskiGlobalMaxPooling, [4.0, 5.0]),
    ):
        assert pool()(x).C[:, 0].tolist() == [0, 2]
        assert pool()(kept).F.tolist() == [[0.0, 0.0], expected]


def test_a_shared_manager() -> None:
    mode = ME.SparseTensorOperationMode
    ME.set_sparse_tensor_operation_mode(mode.SHARE_COORDINATE_MANAGER)
    try:
        x, y = example(), example()
        assert x.coordinate_manager is y.coordinate_manager is ME.global_coordinate_manager()
        assert x.coordinate_map_key != y.coordinate_map_key
        assert_close((x + y).F, x.F + y.F)
        ME.clear_global_coordinate_manager()
        assert example().coordinate_manager is not x.coordinate_manager
    finally:
        ME.set_sparse_tensor_operation_mode(mode.SEPARATE_COORDINATE_MANAGER)
        ME.clear_global_coordinate_manager()


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck", "SEBasicBlock", "SEBottleneck"])
def test_residual_blocks(block: str) -> None:
    made = getattr(ME.modules, block)
    axes = {"D": 2} if block.startswith("SE") else {"dimension": 2}
    down = torch.nn.Sequential(
        ME.MinkowskiConvolution(4, 16 * made.expansion, kernel_size=1, stride=2, dimension=2),
        ME.MinkowskiBatchNorm(16 * made.expansion),
    )
    module = made(4, 16, stride=2, downsample=down, **axes)
    x, _, active = pattern("sites", 2, 4)
    out = module(x.float())
    assert out.F.shape == (int(strided(active, 2).sum()), 16 * made.expansion)
    assert out.F.min() >= 0
    names = set(module.state_dict())
    assert {"conv1.kernel", "norm1.bn.weight", "conv2.kernel", "downsample.0.kernel"} <= names
    assert ("se.fc.0.linear.weight" in names) == block.startswith("SE")


def test_modules_pickle() -> None:
    model = torch.nn.Sequential(ME.MinkowskiConvolution(3, 4, 3, dimension=2), ME.MinkowskiReLU())
    again = pickle.loads(pickle.dumps(model))
    x = example()
    assert torch.equal(again(x).F, model(x).F)


def test_kaiming_normal() -> None:
    kernel = ME.utils.kaiming_normal_(torch.empty(9, 64, 256), mode="fan_out", nonlinearity="relu")
    assert kernel.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="mode is 'fan'"):
        ME.utils.kaiming_normal_(torch.empty(2, 2), mode="fan")


def test_install_answers_imports() -> None:
    assert not ME.installed()
    with pytest.raises(ModuleNotFoundError):
        __import__("MinkowskiOps")
    ME.install()
    try:
        scope: dict[str, Any] = {}
        exec(
            "import MinkowskiEngine as ME\n"
            "from MinkowskiEngine import MinkowskiConvolution, MinkowskiDepthwiseConvolution, SparseTensor\n"
            "from MinkowskiEngine.modules.resnet_block import BasicBlock\n"
            "from MinkowskiEngine.utils import sparse_collate\n"
            "from MinkowskiEngineBackend._C import CoordinateMapKey\n"
            "from MinkowskiOps import to_sparse\n"
            "from MinkowskiSparseTensor import SparseTensor as Same\n"
            "import MinkowskiEngine.MinkowskiFunctional as MEF\n"
            "import MinkowskiEngine.MinkowskiSparseTensor as module\n"
            "import MinkowskiEngine.utils.collation as collation\n"
            "import MinkowskiEngine.modules.resnet_block as resnet_block\n"
            "import MinkowskiEngineBackend._C as backend\n"
            "from MinkowskiCommon import MinkowskiModuleBase, convert_to_int_list\n",
            scope,
        )
        assert scope["ME"] is ME
        assert scope["SparseTensor"] is scope["Same"] is ME.SparseTensor
        assert scope["to_sparse"] is ME.to_sparse
        assert ME.installed()
    finally:
        ME.uninstall()
    assert not ME.installed()


def test_install_refuses_beside_minkowski_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", types.ModuleType("MinkowskiEngine"))
    with pytest.raises(RuntimeError, match="MinkowskiEngine is imported already"):
        ME.install()
    assert not ME.installed()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "sparsecnx.compat.minkowski", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_runs_a_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from MinkowskiOps import to_sparse\n")
    (tmp_path / "script.py").write_text(
        "import sys, argparse, torch, MinkowskiEngine as ME\n"
        "from beside import to_sparse\n"
        "from torch._six import inf\n"
        "torch.save({'args': argparse.Namespace(lr=1.0)}, 'run.pt')\n"
        "print(__name__, sys.argv[1:], len(to_sparse(torch.ones(1, 1, 2, 3))), inf, torch.load('run.pt'))\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    expected = "__main__ ['--lr', '1'] 6 inf {'args': Namespace(lr=1.0)}\n"
    found = run(str(tmp_path / "script.py"), "--lr", "1", cwd=tmp_path / "elsewhere")
    assert (found.stdout, found.returncode) == (expected, 3), found.stderr
    found = run("-m", "script", "--lr", "1", cwd=tmp_path)
    assert (found.stdout, found.returncode) == (expected, 3), found.stderr


def test_processes_that_a_script_spawns_import_it_too(tmp_path: Path) -> None:
    # It comes before an installed MinkowskiEngine, and `torch._six` can be imported before it.
    (tmp_path / "MinkowskiOps.py").write_text("raise ImportError('the wrong one')\n")
    (tmp_path / "script.py").write_text(
        "from torch._six import inf\n"
        "import torch\n"
        "from MinkowskiOps import to_sparse\n"
        "def work(rank):\n"
        "    print('rows', len(to_sparse(torch.ones(1, 1, 2, 3))))\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.spawn(work, nprocs=1)\n"
    )
    found = run("script.py", cwd=tmp_path)
    assert (found.stdout, found.returncode) == ("rows 6\n", 0), found.stderr


def test_the_runner_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m sparsecnx.compat.minkowski" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing.py")]) == 2
    assert "nothing.py: there is no such file" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert not ME.installed()
