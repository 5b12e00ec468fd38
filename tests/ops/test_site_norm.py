"""`ops.batch_norm`, `ops.group_norm` and `ops.instance_norm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    assert_same,
    layouts,
    outputs_and_gradients,
    random_sparse,
)
from hypothesis import given
from hypothesis import strategies as st
from operators import channel_parameters

from sparsecnx import SparseTensor, ops, use_backend
from sparsecnx.ops.site_normalization.activations import ACTIVATIONS

OPERATORS = ["batch_norm", "group_norm", "instance_norm"]


def by_torch(name: str, groups: int, activation: str):
    """Return a function that normalises by torch's own function: the batch's sites, or those of image after image."""

    def run(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor) -> SparseTensor:
        sizes = x.layout.row_splits.diff().tolist() if name != "batch_norm" else [x.layout.rows]
        parts = []
        for rows in x.features.split(sizes):
            if rows.shape[0] == 0:
                out = rows
            elif name == "group_norm":
                out = F.group_norm(rows.t()[None], groups, weight, bias, 1e-3)[0].t()
            else:
                out = F.batch_norm(rows, None, None, weight, bias, True, 0.1, 1e-3)
            parts.append(ACTIVATIONS[activation](out, 0.2))
        features = torch.cat(parts) + 0 * (weight.sum() + bias.sum())
        return x.with_features(features)

    return run


def ours(name: str, groups: int, activation: str):
    options = {"eps": 1e-3, "activation": activation, "slope": 0.2}

    def run(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor) -> SparseTensor:
        if name == "group_norm":
            return ops.group_norm(x, groups, weight, bias, **options)
        training = {"training" if name == "batch_norm" else "use_input_stats": True}
        return getattr(ops, name)(x, None, None, weight, bias, **training, **options)

    return run


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
def test_reference_is_torch_on_the_visible_sites(ndim, name, data):
    layout = data.draw(layouts(ndim, sites=(24, 8, 4)[ndim - 1], tiles=(2, 4, 6)))
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    x, p = random_sparse(layout, 6), channel_parameters(6, "weight", "bias")
    with use_backend("reference"):
        found = outputs_and_gradients(ours(name, groups, activation), x, p)
    assert_same(found, outputs_and_gradients(by_torch(name, groups, activation), x, p), 1e-10)
