"""The helper that registers operators with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

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
