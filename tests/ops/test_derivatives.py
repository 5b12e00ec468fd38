"""Every kind of derivative of every operator is right, or is refused with the operator's name and the remedy."""

from __future__ import annotations

import pytest
import torch
from cases import (
    assert_same,
    bound,
    device_of,
    example_layout,
    make_layout,
    needs_cpu,
    needs_cuda,
    needs_triton,
    place,
    random_sparse,
    suit,
    widest,
)
from mapped import mapped_values, random_map
from operators import CASES
from torch.autograd import forward_ad
from torch.autograd.functional import hessian
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap

from sparsecnx import SparseTensor, ops, use_backend

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")

# These are torch's own matrix product, mean or batch normalization.
OF_TORCH = ("conv-1x1", "conv-2x2-stride2", "avg_pool-2x2-stride2", "batch_norm-frozen")
LINEAR = ("stochastic_depth", "from_dense", "dense", "mapped_pool-sum", "avg_pool-3x3")
# Their gradient of x is the operator itself on the inverse map.
GATHERING = (
    "conv-3x3",
    "conv-3x3-stride2",
    "conv_transpose-4x4-stride2",
    "depthwise_conv-7x7",
    "mapped_conv",
    "mapped_depthwise_conv",
)
MAPPED = ("mapped_conv", "mapped_depthwise_conv", "mapped_pool-sum", "mapped_pool-max")
OPERATORS = (*(name for name in CASES if not name.endswith("drawn")), "from_dense", "dense", *MAPPED)
NORMS = ("batch_norm", "group_norm", "instance_norm")
PUBLIC = {"from_dense": "SparseTensor.from_dense", "dense": "SparseTensor.dense", "mapped_conv": "conv"}
PUBLIC |= {"conv_transpose-4x4-stride2": "conv"}
PUBLIC |= {"mapped_pool-sum": "mapped_depthwise_conv", "mapped_pool-max": "max_pool"}
PUBLIC |= {name: "batch, group or instance normalization" for name in CASES if name.partition("-")[0] in NORMS}


def public_name(operator):
    return PUBLIC.get(operator) or (CASES[operator].operator if operator in CASES else operator.split("-")[0])


def differentiable(operator, backend):
    """Return the operator as a function of tensors, and arguments where and as exact as a backend takes them."""
    torch.manual_seed(0)
    layout = example_layout(2, (2, 1), tile=2)
    if operator in MAPPED:
        kernel_map = random_map(6, 5, 4, 0.6).to(device_of(backend))
        values = mapped_values(
            "mapped_conv" if operator == "mapped_conv" else "mapped_depthwise_conv", kernel_map, 6, 3
        )
        if "pool" in operator:
            values = {"features": values["features"]}
            mode = operator.partition("-")[2]
            return lambda x: ops.mapped_pool(x, kernel_map, mode), suited(values.values(), backend)
        run = getattr(ops, operator)
        return lambda x, weight, bias: run(x, weight, kernel_map, bias=bias), suited(values.values(), backend)
    if operator == "from_dense":
        mask = layout.tiles.mask().view(2, *layout.tiles.grid).to(device_of(backend))
        dense = torch.randn(2, 3, *layout.shape, dtype=torch.float64)
        return lambda dense: SparseTensor.from_dense(dense, mask).features, suited([dense], backend)
    x, p = suit(backend, random_sparse(layout, 3), CASES[operator].parameters(3) if operator in CASES else {})
    if operator == "dense":
        return lambda rows, fill: x.with_features(rows).dense(fill), [x.features, *suited([torch.randn(3)], backend)]

    def run_case(features, *values):
        return CASES[operator].run(x.with_features(features), **dict(zip(p, values, strict=True))).features

    return run_case, [x.features, *p.values()]


def suited(values, backend):
    return [place(value.to(widest(backend)), backend) for value in values]


def random_like(values):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]


def weighted(function):
    """Return a number that depends on the whole output, for gradients, and not linearly."""

    def loss(*leaves):
        out = function(*leaves)
        weight = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view(out.shape)
        return (out * weight).sum() + (out.square() * weight).sum()

    return loss


def every(leaves):
    return tuple(range(len(leaves)))


def by_jvp(function, leaves):
    return jvp(function, tuple(leaves), tuple(random_like(leaves)))


def by_dual_tensors(function, leaves):
    with forward_ad.dual_level(), torch.no_grad():
        duals = map(forward_ad.make_dual, leaves, random_like(leaves))
        return forward_ad.unpack_dual(function(*duals))


def by_gradients_of_gradients(function, leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(weighted(function)(*leaves), leaves, create_graph=True)
    penalty = sum(value.square().sum() for value in first) + sum(0 * leaf.sum() for leaf in leaves)
    return torch.autograd.grad(penalty, leaves)


def by_grad_of_grad(function, leaves):
    first = grad(weighted(function), every(leaves))
    return grad(lambda *leaves: sum(value.square().sum() for value in first(*leaves)), every(leaves))(*leaves)


def by_hessian(function, leaves):
    return [hessian(weighted(lambda x: function(x, *leaves[1:])), leaves[0])]


def by_jvp_of_grad(function, leaves):
    primal, tangent = jvp(grad(weighted(function), every(leaves)), tuple(leaves), tuple(random_like(leaves)))
    return *primal, *tangent


def by_grad(function, leaves):
    return grad(weighted(function), every(leaves))(*leaves)


def by_jacrev(function, leaves):
    return jacrev(function, every(leaves))(*leaves)


def stacked(leaves):
    return [torch.stack([leaf, 2 * leaf]) for leaf in leaves]


def by_vmap(function, leaves):
    return [vmap(function)(*stacked(leaves))]


def by_vmap_of_grad(function, leaves):
    return vmap(grad(weighted(function), every(leaves)))(*stacked(leaves))


def by_grad_of_vmap(function, leaves):
    return grad(weighted(vmap(function)), every(leaves))(*stacked(leaves))


def by_grad_beyond_grad(function, leaves):
    """The operator runs inside a transform of something else."""
    loss, one = weighted(function), leaves[0].new_ones(())
    return [grad(lambda x: grad(lambda factor: factor * loss(x, *leaves[1:]))(one))(leaves[0])]


def by_backward_of_a_value_inside(function, leaves):
    """The graph outside goes on through what a transform returns."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    _, value = grad_and_value(weighted(function))(*leaves)
    values = vmap(weighted(function))(*stacked(leaves))
    return torch.autograd.grad(value + values.sum(), leaves)


# The first are right for every operator. The others are refused, except by the operators that are named.
RIGHT = (
    by_grad,
    by_jacrev,
    by_vmap,
    by_vmap_of_grad,
    by_grad_of_vmap,
    by_grad_beyond_grad,
    by_backward_of_a_value_inside,
)
REFUSED = {
    by_jvp: OF_TORCH,
    by_dual_tensors: OF_TORCH,
    by_jvp_of_grad: OF_TORCH,
    by_gradients_of_gradients: (*OF_TORCH, *LINEAR),
    by_grad_of_grad: (*OF_TORCH, *LINEAR),
    by_hessian: (*OF_TORCH, *LINEAR, *GATHERING),
}
KINDS = {kind.__name__.removeprefix("by_"): kind for kind in (*RIGHT, *REFUSED)}


def check(operator, kind, backend):
    function, leaves = differentiable(operator, "reference")
    with use_backend("reference"):
        expected = dict(enumerate(kind(function, leaves)))
    assert all(value.any() for value in expected.values())
    function, leaves = differentiable(operator, backend)
    with use_backend(backend):
        if kind in REFUSED and operator not in REFUSED[kind]:
            message = rf'^{public_name(operator)} has no .*`with sparsecnx.use_backend\("reference"\):`'
            with pytest.raises(NotImplementedError, match=message):
                kind(function, leaves)
        else:
            assert_same(dict(enumerate(kind(function, leaves))), expected, 10 * bound(backend))


@needs_cpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_the_cpu(operator, kind):
    check(operator, kind, "cpu")


SOME = ("conv-3x3", "depthwise_conv-7x7", "grn-sample", "layer_norm", "stochastic_depth", "block-recompute")
ON_TRITON = (*SOME, "from_dense", "mapped_conv", "mapped_depthwise_conv", "mapped_pool-max")


@needs_triton
@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        *((operator, kind) for operator in ON_TRITON for kind in (by_jvp, by_gradients_of_gradients)),
        *((operator, by_vmap_of_grad) for operator in ("layer_norm", "from_dense", "mapped_conv")),
    ],
)
def test_on_triton(operator, kind):
    check(operator, kind, "triton")


@needs_cuda
@pytest.mark.parametrize("kind", [by_jvp, by_gradients_of_gradients, by_vmap_of_grad])
def test_on_cuda(kind):
    check("depthwise_conv-7x7", kind, "cuda")


@needs_cpu
@pytest.mark.parametrize("kind", [by_jvp, by_grad])
def test_compiled(kind):
    """torch.compile around a transform, and a transform around torch.compile."""
    torch._dynamo.reset()
    function, (features, *values) = differentiable("layer_norm", "cpu")

    def of_features(run):
        return lambda x: kind(lambda y: run(y, *values), [x])

    compiled = torch.compile(function, backend="aot_eager")
    for run in (torch.compile(of_features(function), backend="aot_eager"), of_features(compiled)):
        if kind is by_jvp:
            with pytest.raises(NotImplementedError, match="layer_norm has no forward-mode"):
                run(features)
        else:
            assert_same(dict(enumerate(run(features))), dict(enumerate(of_features(function)(features))), 1e-11)


@needs_cpu
@pytest.mark.parametrize("mode", [grad, vmap])
def test_a_layout_serves_others_after_a_transform(mode):
    """Its tables are built on first use, here inside of a transform."""
    case = CASES["block-recompute"]
    mask = torch.tensor([[[True, False], [False, False]]])
    x, p = random_sparse(make_layout(mask, 2), 3), case.parameters(3)

    def total(features):
        return case.run(x.with_features(features), **p).features.sum()

    mode(total)(x.features if mode is grad else x.features[None])
    fresh = SparseTensor(x.features, make_layout(mask, 2))
    for function in (lambda y: total(y.features), lambda y: grad(total)(y.features)):
        assert torch.equal(function(x), function(fresh))
    features = x.features.clone().requires_grad_()
    total(features).backward()
    assert torch.equal(features.grad, grad(total)(x.features))


@needs_cpu
def test_torch_func_under_no_grad():
    """A gradient computed under no_grad is a constant for the graph outside."""
    function, (features, *values) = differentiable("layer_norm", "cpu")
    features.requires_grad_()
    with torch.no_grad():
        found = grad(weighted(function))(features, *values)
    assert not found.requires_grad
    assert grad(weighted(function))(features, *values).requires_grad


@needs_cpu
@pytest.mark.parametrize("operator", ["layer_norm", "block-recompute"])
def test_compiled_with_trainable_parameters(operator):
    """torch.compile prepares second derivatives that nobody computes. They are refused where one is computed."""
    torch._dynamo.reset()
    function, (features, *values) = differentiable(operator, "cpu")
    values = [value.requires_grad_() for value in values]

    def run(x):
        return grad(weighted(function))(x, *values)

    found = torch.compile(run, backend="aot_eager")(features)
    assert_same({"grad": found}, {"grad": run(features)}, 1e-11)
    with pytest.raises(NotImplementedError, match=f"^{public_name(operator)} has no second derivatives"):
        found.sum().backward()


@pytest.mark.parametrize("transform", [lambda f, x: grad(f)(x), vjp], ids=["grad", "vjp"])
def test_a_sparse_tensor_is_not_differentiated_with_respect_to(transform):
    x = random_sparse(example_layout(2, (2, 1), tile=2), 3)

    def total(x):
        return x.features.square().sum()

    with pytest.raises(TypeError, match=r"^torch.func got a SparseTensor .* with respect to x\.features"):
        transform(total, x)
    factor = torch.tensor(2.0, dtype=torch.float64)
    assert grad(lambda factor, x: factor * total(x))(factor, x) == total(x)
