"""Test what a network reads of a SparseTensor, conversions, hooks, and the tools of torch around unmodified modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import example_layout, random_sparse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsecnx import Layout, SparseTensor, TileSet

CHANNELS = 4


def example() -> SparseTensor:
    return random_sparse(example_layout(), CHANNELS)


def test_sizes_are_those_of_the_dense_tensor() -> None:
    x = example()
    for form in (x, x.permute(0, 2, 3, 1), x.unflatten(1, (2, 2)), x.mean(1)):
        dense = form.dense()
        assert form.shape == form.size() == dense.shape and isinstance(form.shape, torch.Size)
        assert [form.size(d) for d in (0, 1, -1)] == [dense.size(d) for d in (0, 1, -1)]
        assert form.dim() == form.ndim == form.ndimension() == dense.ndim and len(form) == len(dense)
        assert form.numel() == form.nelement() == torch.numel(form) == dense.numel()
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_facts_are_those_of_the_features() -> None:
    x = example()
    for name in ("dtype", "device", "is_cuda", "is_cpu", "requires_grad", "is_leaf", "grad_fn", "itemsize"):
        assert getattr(x, name) == getattr(x.features, name)
    for name in ("is_floating_point", "is_complex", "element_size", "get_device", "is_inference", "is_signed"):
        assert getattr(x, name)() == getattr(x.features, name)()
    assert x.type() == x.features.type()
    assert torch.is_floating_point(x) and not torch.is_tensor(x) and not x.is_sparse


def test_new_tensors_are_ordinary() -> None:
    x = example().to(torch.float16)
    made = [x.new_empty(2, 3), x.new_zeros((2, 3)), x.new_ones(2, 3), x.new_full((2, 3), 1.0), x.new_tensor([1.0])]
    assert all(type(value) is Tensor and value.dtype == torch.float16 for value in made)


def test_conversions_keep_the_sites() -> None:
    x = example()
    assert x.to(torch.float64) is x and x.double() is x and x.to("cpu") is x and x.contiguous() is x
    half = x.to("cpu", torch.float16, non_blocking=True)
    assert half.dtype == torch.float16 and half.layout is x.layout
    for moved in (x.to("meta"), x.to(torch.empty(0, device="meta")), x.to(device="meta")):
        assert moved.features.is_meta and moved.layout.device == moved.device == torch.device("meta")
    assert x.data.features.data_ptr() == x.features.data_ptr()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_channels_last_and_views_are_copied(duplicate: Any) -> None:
    for x in (example().permute(0, 2, 3, 1), example().unflatten(1, (2, 2))):
        again = duplicate(x)
        assert again.shape == x.shape and torch.equal(again.dense(), x.dense())


def test_files_with_channels_last_load_with_weights_only(tmp_path: Any) -> None:
    x = example().permute(0, 2, 3, 1)
    torch.save(x, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True).shape == x.shape


def test_hooks_and_retained_gradients() -> None:
    x = example().requires_grad_()
    assert x.requires_grad and x.is_leaf
    y = x * 2
    seen = []
    y.register_hook(lambda grad: seen.append(grad) or grad * 10)
    y.retain_grad()
    y.sum().backward()
    assert isinstance(seen[0], SparseTensor) and torch.equal(seen[0].features, torch.ones_like(x.features))
    assert torch.equal(x.features.grad, torch.full_like(x.features, 20.0))
    assert torch.equal(y.grad.features, torch.full_like(x.features, 10.0)) and (x * 1).detach().grad is None


def test_equality_is_that_of_elements() -> None:
    x = example()
    assert (x == x).features.all() and not (x != x).features.any() and (x == 0.0).dtype == torch.bool
    assert (x == None) is False and (x != "x") is True and x in {x}  # noqa: E711


def test_dropout_draws_elements_and_channels_of_images() -> None:
    torch.manual_seed(0)
    x = random_sparse(example_layout(), 64).to(torch.float32)
    x = x.with_features(torch.ones_like(x.features))
    elements = F.dropout(x, 0.25).features
    assert elements.unique().tolist() == pytest.approx([0, 4 / 3]) and 0.7 < (elements > 0).float().mean() < 0.8
    for dropped in (F.dropout2d(x, 0.25), nn.Dropout2d(0.25)(x)):
        for rows in dropped.features.split(x.layout.row_splits.diff().tolist()):
            assert (rows == rows[:1]).all() and 0 < (rows[0] == 0).sum() < 64


def test_running_statistics_move_as_those_of_the_rows() -> None:
    x = example()
    sparse, rows = (nn.BatchNorm2d(CHANNELS).double(), nn.BatchNorm1d(CHANNELS).double())
    torch.testing.assert_close(sparse(x).features, rows(x.features))
    for ours, theirs in zip(sparse.buffers(), rows.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sparse.eval()(x).features, rows.eval()(x.features))


def test_running_statistics_of_instances_are_the_mean_of_those_of_the_images() -> None:
    x = example()
    module = nn.InstanceNorm2d(CHANNELS, momentum=1.0, track_running_stats=True).double()
    module(x)
    images = x.features.split(x.layout.row_splits.diff().tolist())
    torch.testing.assert_close(module.running_var, sum(rows.var(0) for rows in images) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(module.running_mean, sum(rows.mean(0) for rows in images) / 2, rtol=1e-12, atol=0)


class AsksForTensors(nn.Module):
    """Drops what is no tensor, as MONAI's UpCat and transformers' ModelOutput do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Any) -> dict[str, Any]:
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        outputs = {"features": y + x.mean((2, 3), keepdim=True), "pooled": y.mean((2, 3)), "parts": y.chunk(2, 1)}
        return {name: value for name, value in outputs.items() if isinstance(value, (Tensor, tuple))}


def test_a_network_that_asks_for_tensors_gets_one() -> None:
    module, x = AsksForTensors().double(), example()
    assert set(module(x)) == {"pooled", "parts"}
    image = x.as_tensor()
    assert isinstance(image, Tensor) and (image.shape, image.dtype, image.device) == (x.shape, x.dtype, x.device)
    found = module(image)
    assert set(found) == {"features", "pooled", "parts"} and type(found["pooled"]) is Tensor
    expected = F.relu(module.norm(module.conv(x)))
    torch.testing.assert_close(found["features"].sparse.features, (expected + x.mean((2, 3), keepdim=True)).features)
    torch.testing.assert_close(found["features"].dense(), found["features"].sparse.dense())
    assert isinstance(found["parts"][1], Tensor) and found["parts"][1].shape == (2, CHANNELS // 2, *x.shape[2:])
    grads = torch.autograd.grad(found["features"].sum(), list(module.parameters()))
    theirs = torch.autograd.grad((expected + x.mean((2, 3), keepdim=True)).sum(), list(module.parameters()))
    torch.testing.assert_close(grads, theirs)


class Network(nn.Module):
    """Unmodified modules with what a compiler meets: strides, groups, a statistic, a gate, channels last, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(CHANNELS, 8, 3, 1, 1, groups=2),
            nn.AvgPool2d(2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 1, 1),
        )
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Any) -> Any:
        y = self.stem(x)
        z = F.gelu(self.mix(self.norm(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        y = y + z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        y += torch.cat((y[:, 4:], y[:, :4]), 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def gradients(network: nn.Module, run: Any) -> list[Tensor]:
    out = run()
    return [out, *torch.autograd.grad(out.square().sum(), list(network.parameters()))]


@pytest.mark.parametrize("known", [{}, {"count": 5}], ids=["argument", "made inside"])
def test_unmodified_modules_compile_whole(known: dict[str, int]) -> None:
    torch.compiler.reset()
    network = Network()
    images = torch.randn(2, CHANNELS, 12, 8, dtype=torch.float64)
    kept = [2, 2] if "count" not in known else [2, 3]
    mask = torch.tensor([[place >= keep for place in (3, 0, 4, 1, 2, 5)] for keep in kept])

    def masked(images: Tensor, mask: Tensor) -> Tensor:
        return network(SparseTensor.from_dense(images, mask, **known))

    expected = gradients(network, lambda: masked(images, mask))
    if known:
        compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
        found = gradients(network, lambda: compiled(images, mask))
    else:
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        found = gradients(network, lambda: compiled(SparseTensor.from_dense(images, mask)))
    torch.testing.assert_close(found, expected)


def test_unmodified_modules_are_exported() -> None:
    network, layout = Network().eval(), example_layout()
    x = random_sparse(layout, CHANNELS)
    program = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(program(x), network(x))
    other = layout.tiles.index.flip(0)  # Another mask with as many tiles.
    grid = layout.tiles.grid
    index = (2 * grid[0] * grid[1] - 1 - other).contiguous()
    splits = torch.tensor([0, int((index < grid[0] * grid[1]).sum()), len(index)])
    y = SparseTensor(x.features, Layout(TileSet(2, grid, index, splits, layout.tiles.visible), layout.tile))
    torch.testing.assert_close(program(y), network(y))


def test_unmodified_modules_are_checkpointed() -> None:
    network, x = Network().eval(), example()
    expected = gradients(network, lambda: network(x))
    found = gradients(network, lambda: checkpoint(network, x, use_reentrant=False))
    torch.testing.assert_close(found, expected)


def test_autocast_of_unmodified_modules() -> None:
    network, x = Network().float(), example().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), network(x), rtol=0.1, atol=0.05)
