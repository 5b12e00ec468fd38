"""SparseTensor. Packing on every backend is tested in geometry/test_packing.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import (
    example_layout,
    random_sparse,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsecnx import SparseTensor


@pytest.mark.parametrize("known", [{}, {"visible": 2}, {"count": 4}], ids=str)
def test_visible(known: dict[str, int]) -> None:
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    images = torch.randn(2, 3, 8, 8)
    x = SparseTensor.from_dense(images, mask, **known)
    assert x.layout.rows_per_image == (None if "count" in known else 32)
    assert torch.equal(x.features, SparseTensor.from_dense(images, mask).features)
    with pytest.raises(ValueError, match="mask does not keep visible=3 tiles in every image"):
        SparseTensor.from_dense(images, mask, visible=3)
    with pytest.raises(ValueError, match="mask does not keep count=3 tiles in all"):
        SparseTensor.from_dense(images, mask, count=3)


def saved_and_loaded(x: SparseTensor) -> SparseTensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    again: SparseTensor = torch.load(file, weights_only=True)
    return again


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["copy", "pickle", "save"],
)
def test_copies_and_pickles(duplicate: Callable[[SparseTensor], SparseTensor]) -> None:
    x = random_sparse(example_layout(), 3)
    window = (3, 3), (1, 1), (1, 1), (1, 1)
    x.layout.kernel_map(*window)  # A layout that holds tables.
    again = duplicate(x)
    assert again.layout is not x.layout and torch.equal(again.dense(), x.dense())
    assert x.layout.tiles.tables and not again.layout.tiles.tables
    assert torch.equal(again.layout.kernel_map(*window), x.layout.kernel_map(*window))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_arbitrary_masks_of_sites(batch: int, height: int, width: int, share: float, seed: int) -> None:
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < share
    images = torch.randn(batch, 4, height, width)
    x = SparseTensor.from_dense(images, mask)
    assert x.layout.shape == (height, width)
    assert torch.equal(x.features, images.movedim(1, -1)[~mask])
    assert torch.equal(x.dense(), images.masked_fill(mask[:, None], 0))


def test_immutable() -> None:
    x = random_sparse(example_layout(), 3)
    for name in ("features", "layout", "color"):
        with pytest.raises(AttributeError, match=f"SparseTensor is immutable: cannot set '{name}'; use with_features"):
            setattr(x, name, None)


def test_names_of_what_it_holds() -> None:
    layout = example_layout(batch=2, grid=(3, 2), tile=4)
    x = random_sparse(layout, 5, torch.float32)
    assert x.F is x.features and x.layout is layout
    assert torch.equal(x.C, layout.coordinates()) and torch.equal(x.coordinates, x.C)
    assert x.shape == tuple(x.dense().shape) == (2, 5, 12, 8)
    assert (x.dtype, x.device) == (torch.float32, torch.device("cpu"))
    coarse = SparseTensor(x.features[::4], layout.coarsen(2))
    assert repr(coarse) == (
        f"SparseTensor(shape=(2, 5, 6, 4), rows={layout.rows // 4}, tile=(2, 2), stride=(2, 2), "
        "dtype=torch.float32, device=cpu)"
    )


def test_with_features_and_to() -> None:
    x = random_sparse(example_layout(), 3)
    wider = x.with_features(torch.randn(x.layout.rows, 7))
    assert wider.layout is x.layout and wider.shape[1] == 7
    coarse = x.layout.coarsen(2)
    assert x.with_features(x.features[::4], coarse).layout is coarse
    half = x.to(torch.float16)
    assert half.dtype == torch.float16 and half.layout is x.layout
    assert torch.equal(half.features, x.features.half()) and x.dtype == torch.float64


IMAGES = torch.zeros(2, 3, 8, 8)
MASK = torch.tensor([[True, False, True, False]] * 2)


@pytest.mark.parametrize(
    ("dense", "mask", "error", "message"),
    [
        ([[0.0]], MASK, TypeError, r"dense is a list: expected a tensor \(B, C, \*spatial\)"),
        (IMAGES[0, 0], MASK, ValueError, r"dense is \(8, 8\): expected \(B, C, \*spatial\)"),
        (IMAGES[:0], MASK[:0], ValueError, r"dense is \(0, 3, 8, 8\): expected at least one image"),
        (IMAGES, MASK.to("meta"), ValueError, r"mask is on meta, dense on cpu: pass mask.to\(dense.device\)"),
        (IMAGES, MASK[[0, 0, 0]], ValueError, r"mask is \(3, 4\): dense holds 2 images"),
        (IMAGES, MASK.tolist(), TypeError, "mask is a list: expected a tensor"),
        (IMAGES, torch.tensor(True), ValueError, r"mask is \(\): expected \(B, L\)"),
        (IMAGES, MASK[:, :3], ValueError, r"mask is \(2, 3\): no grid of tiles .* 8x8 sites"),
        (IMAGES[..., :6], MASK, ValueError, r"mask is \(2, 4\): its tiles can be a grid of 2x2 or 4x1, on 8x6 sites"),
    ],
)
def test_from_dense_errors(dense: Tensor, mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseTensor.from_dense(dense, mask)


def test_constructor_errors() -> None:
    layout = SparseTensor.from_dense(IMAGES, MASK).layout
    needs = r"the layout needs \(64, C\), a row per active site"
    for shape in [(63, 3), (64,), (64, 3, 1)]:
        with pytest.raises(ValueError, match=rf"features is \({shape[0]},.*\): {needs}"):
            SparseTensor(torch.zeros(shape), layout)
    with pytest.raises(ValueError, match="features is on meta: the layout is on cpu"):
        SparseTensor(torch.zeros(64, 3, device="meta"), layout)
    x = SparseTensor(torch.zeros(64, 3), layout)
    with pytest.raises(ValueError, match=r"features is \(64, 3\): the layout needs \(16, C\)"):
        x.with_features(x.features, layout.coarsen(2))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 3)])
def test_fill_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    x = SparseTensor.from_dense(IMAGES, MASK)
    with pytest.raises(ValueError, match=r"fill is \(.*\): expected a number or \(3,\)"):
        x.dense(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"fill is on meta: x is on cpu; pass fill.to\(x.device\)"):
        x.dense(torch.zeros(3, device="meta"))


def test_tree_has_the_features_and_the_tensors_of_the_layout():
    x = random_sparse(example_layout(), 3)
    leaves, spec = pytree.tree_flatten({"x": x})
    expected = x.features, x.layout.tiles.index, x.layout.tiles.splits
    assert all(leaf is tensor for leaf, tensor in zip(leaves, expected, strict=True))
    again = pytree.tree_unflatten(leaves, spec)["x"]
    assert again.features is x.features and again.layout is x.layout
    copy = pytree.tree_map(torch.clone, x)
    assert copy.layout is not x.layout and torch.equal(copy.dense(), x.dense())
    assert "torch.Size" in repr(pytree.tree_map(lambda leaf: leaf.shape, x))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keys = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(x)[0]]
    assert keys == [".features", ".index", ".splits"]
