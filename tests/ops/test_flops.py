"""`torch.utils.flop_counter` counts every operator as it counts the dense network."""

from __future__ import annotations

import math

import pytest
import torch
from cases import device_of, make_layout, needs_cpu, needs_cuda, needs_triton, random_sparse, suit
from mapped import mapped_values, random_map, suited
from operators import CASES
from torch.utils.flop_counter import FlopCounterMode

from sparsecnx import models, ops, use_backend

CPU = [pytest.param("cpu", name, marks=needs_cpu, id=f"cpu-{name}") for name in CASES]
# Every operator of these backends with a count is in one of these cases.
GPU = [
    pytest.param("triton", "conv-3x3-stride2", marks=needs_triton, id="triton-conv"),
    pytest.param("triton", "depthwise_conv-7x7", marks=needs_triton, id="triton-depthwise_conv"),
    pytest.param("triton", "block-recompute", marks=needs_triton, id="triton-block"),
    pytest.param("cuda", "depthwise_conv-7x7", marks=needs_cuda, id="cuda-depthwise_conv"),
]


def convolution_backward(grad, x, weight, *rest, out_shape):
    """Return the count of the gradients that are asked for.

    torch counts those of the weight of a depthwise convolution C times: it passes over the groups.
    """
    transposed, asked = rest[4], rest[-1]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(asked[:2])


def counts(forward, leaves):
    """Return the FLOPs of `forward()`, and of the gradients of `leaves`."""
    found = []
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    ) as counter:
        out = forward()
        found.append(counter.get_total_flops())
        torch.autograd.grad(out.sum(), leaves)
    return *found, counter.get_total_flops() - found[0]


def case_counts(backend, name):
    layout = make_layout(torch.zeros(2, 1, 2, dtype=torch.bool), 2)
    x, p = suit(backend, random_sparse(layout, 3), CASES[name].parameters(3))
    leaves = [value.requires_grad_() for value in (x.features, *p.values())]
    with use_backend(backend):
        return counts(lambda: CASES[name].run(x, **p).features, leaves)


@pytest.mark.parametrize(("backend", "name"), CPU + GPU)
def test_all_visible_counts_as_dense(backend, name):
    expected = case_counts("reference", name)
    assert case_counts(backend, name) == expected
    assert all(expected) == (CASES[name].operator in ("conv", "conv_transpose", "depthwise_conv", "convnextv2_block"))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("operator", "products"), [("mapped_depthwise_conv", 3), ("mapped_conv", 15)])
def test_mapped_operators_count_every_tap(backend, operator, products):
    kernel_map = random_map(9, 7, 4, 0.6).to(device_of(backend))
    values = suited(mapped_values(operator, kernel_map, 9, 3), torch.float32, backend, operator)
    values = {name: value.requires_grad_() for name, value in values.items()}
    with use_backend(backend):
        forward, backward = counts(lambda: getattr(ops, operator)(kernel_map=kernel_map, **values), [*values.values()])
    assert forward == 2 * 7 * 4 * products
    assert backward == 2 * forward


@needs_cpu
def test_an_encoder_counts_what_is_visible():
    encoder = models.ConvNeXtV2Encoder(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16))
    images, parameters = torch.randn(2, 3, 64, 64), list(encoder.parameters())

    def of(mask):
        def forward():
            last = encoder.forward_features(images, mask)[-1]
            return last if mask is None else last.features

        return counts(forward, parameters)

    dense = of(None)
    assert of(torch.zeros(2, 2, 2, dtype=torch.bool)) == dense
    quarter = torch.tensor([[[True, False], [True, True]]]).expand(2, -1, -1)
    assert of(quarter) == tuple(count // 4 for count in dense)


@needs_cpu
def test_recomputation_is_not_counted():
    assert case_counts("cpu", "block-recompute") == case_counts("cpu", "block-keep-survival")
