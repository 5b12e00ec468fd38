"""The helper that registers operators with torch."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from cases import needs_cpu
from torch import Tensor
from torch.autograd import forward_ad

from sparsecnx.backends import registration, transforms
from sparsecnx.backends.registration import Saved, register

saved_by_last_call: Saved


def _scale(x: Tensor, factor: Tensor, bias: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    """Return `x * factor**power + bias`, and the square of x."""
    return x * factor**power + (0 if bias is None else bias), x.square()


def _scale_grad(grad: Tensor, factor: Tensor, power: int) -> Tensor:
    return grad * factor**power


def _backward(saved: Saved, grad: Tensor) -> dict[str, Tensor | None]:
    global saved_by_last_call
    saved_by_last_call = saved
    assert grad.is_contiguous()
    return {"x": SCALE_GRAD(grad, saved.factor, saved.power), "bias": grad.sum(0)}


SCALE_GRAD = register(
    "sparsecnx_test::scale_grad",
    public="scaling",
    function=_scale_grad,
    fake=lambda grad, factor, power: torch.empty_like(grad),
)
SCALE = register(
    "sparsecnx_test::scale",
    function=_scale,
    fake=lambda x, factor, bias, power: (torch.empty_like(x), torch.empty_like(x)),
    saves=("factor", "bias", "power"),
    backward=_backward,
    sizes={"x": "rows C", "bias": "C"},
)


@pytest.mark.parametrize("bias", [None, torch.ones(3)], ids=["none", "given"])
def test_schema_fake_kernel_and_gradient(bias: Tensor | None) -> None:
    x, factor = torch.randn(2, 3, requires_grad=True), torch.tensor(3.0)
    torch.library.opcheck(SCALE.default, (x, factor, bias, 2))
    assert str(SCALE.default._schema).startswith("sparsecnx_test::scale(Tensor x, Tensor factor, Tensor? bias, SymInt")
    out, square = SCALE(x, factor, bias, 2)
    assert out.requires_grad and not square.requires_grad
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert (gradient == 9).all()
    saved = saved_by_last_call
    assert saved.needs == {"x"} and saved.shapes["x"] == (2, 3) and saved.power == 2
    assert torch.equal(saved.factor, factor) and (saved.bias is bias or torch.equal(saved.bias, bias))
    assert torch.equal(saved.outputs[0], x.detach().square())


def test_gradients_of_the_tensors_that_ask_for_them() -> None:
    x, bias = torch.randn(2, 3), torch.ones(3, requires_grad=True)
    SCALE(x, torch.tensor(3.0), bias, 2)[0].sum().backward()
    assert bias.grad is not None and (bias.grad == 2).all()
    assert saved_by_last_call.needs == {"bias"}


def test_a_gradient_takes_the_shape_of_its_argument() -> None:
    bias = torch.ones(1, 3, requires_grad=True)
    SCALE(torch.randn(2, 3), torch.tensor(3.0), bias, 2)[0].sum().backward()
    assert bias.grad is not None and bias.grad.shape == (1, 3) and (bias.grad == 2).all()


def test_a_derivative_that_is_not_offered_raises() -> None:
    """Left alone, torch would return zeros or None or stay silent."""
    remedy = r'call it inside `with sparsecnx.use_backend\("reference"\):`'
    x, factor = torch.randn(2, 3, requires_grad=True), torch.tensor(3.0)
    out, _ = SCALE(x, factor, None, 2)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    message = rf"^scaling has no second derivatives \(in torch.ops.sparsecnx_test.scale_grad\): {remedy}"
    with pytest.raises(NotImplementedError, match=message):
        gradient.sum().backward()
    out, _ = SCALE(x, factor.requires_grad_(), None, 2)
    with pytest.raises(NotImplementedError, match=rf"^scale has no gradient of 'factor' .*{remedy}"):
        out.sum().backward()
    with (
        forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=rf"^scale has no forward-mode derivatives .*{remedy}"),
    ):
        SCALE(x, forward_ad.make_dual(factor, factor), None, 2)


def test_without_a_tangent_forward_mode_changes_nothing() -> None:
    x = torch.randn(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with forward_ad._set_fwd_grad_enabled(False):
            SCALE(dual, torch.tensor(3.0), None, 2)
        out, _ = SCALE(x, torch.tensor(3.0), None, 2)
        assert forward_ad.unpack_dual(out).tangent is None


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        ((2, 3), (3,), ""),
        ((2, 3), (1, 3), ""),
        ((2, 3), (4,), r"scale.default: bias is \(4,\), expected \(C\), rows = 2, C = 3$"),
        ((3,), (3,), r"scale.default: x is \(3,\), expected \(rows C\)$"),
    ],
)
def test_shapes_on_meta(x: tuple[int, ...], bias: tuple[int, ...], message: str) -> None:
    arguments = [torch.empty(shape, device="meta") for shape in (x, (), bias)]
    if message:
        with pytest.raises(ValueError, match=message):
            SCALE(*arguments, 2)
    else:
        assert SCALE(*arguments, 2)[0].shape == x


@needs_cpu
@pytest.mark.parametrize(
    ("operator", "shapes", "others"),
    [
        ("layer_norm", [(8, 4), (4,), (5,)], (1e-6,)),
        ("grn", [(8, 4), (5,), (4,), (3,)], (1e-6,)),
        ("depthwise_conv", [(8, 4), (5, 1, 3, 3), (4,), (8, 9)], ((1, 1),)),
        ("conv", [(8, 4), (1, 3, 4, 6), (5,), (8, 3)], ([], [])),
        ("mapped_depthwise_conv", [(8, 4), (3, 5), (4,), (8, 3), (8, 3)], ([], [])),
        ("scatter_tiles", [(8, 4), (5,), (2,)], (1, (4, 4), (2, 2))),
    ],
)
def test_operators_refuse_shapes_on_meta(operator: str, shapes: list[tuple[int, ...]], others: tuple[float]) -> None:
    with pytest.raises(ValueError, match=rf"^torch.ops.sparsecnx.{operator}.default: (weight|bias|gamma|fill) is "):
        getattr(torch.ops.sparsecnx, operator)(*(torch.empty(shape, device="meta") for shape in shapes), *others)


def _without(monkeypatch: pytest.MonkeyPatch, *removed: tuple[object, str]) -> ModuleType:
    """Return `sparsecnx.backends.transforms` as a torch that has no such names would import it."""
    with monkeypatch.context() as patch:
        for place, name in removed:
            patch.delattr(place, name)
        spec = importlib.util.find_spec(transforms.__name__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_a_torch_that_renamed_its_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only gradients inside transforms are refused."""
    removed = (torch.autograd.function, "_SingleLevelFunction"), (forward_ad, "_current_level")
    module = _without(monkeypatch, *removed, (torch._C, "_is_fwd_grad_enabled"))
    monkeypatch.setattr(registration, "transforms", module)
    monkeypatch.setattr(registration, "levels", module.levels)
    x, factor = torch.randn(2, 3, requires_grad=True), torch.tensor(3.0)

    def total(x: Tensor) -> Tensor:
        return SCALE(x, factor, None, 2)[0].sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    assert (gradient == 9).all() and torch.vmap(total)(x.detach()[None]) == total(x)
    with pytest.raises(NotImplementedError, match=r"^scale has no gradient inside torch.func .*_SingleLevelFunction"):
        torch.func.grad(total)(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^scale has no forward-mode derivatives"):
        total(forward_ad.make_dual(x.detach(), x.detach()))
    module = _without(monkeypatch, (torch._C, "_are_functorch_transforms_active"))
    assert module.missing and "_are_functorch_transforms_active" in module.missing and not module.transforms_active()
