"""Test that errors name the function that has no meaning on visible sites, its line, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import draw_mask, example_layout, make_layout, random_sparse, site_mask
from torch import Tensor, nn

import sparsecnx
from sparsecnx import SparseTensor, UnsupportedFunctionError
from sparsecnx.geometry.layout import Layout

CHANNELS = 4


def example() -> SparseTensor:
    """Return two images of 12 x 8 sites in tiles of 4."""
    return random_sparse(example_layout(), CHANNELS)


def other_mask() -> SparseTensor:
    return random_sparse(make_layout(draw_mask("equal counts", 2, (3, 2), seed=2), 4), CHANNELS)


def set_a_channel(x: Any) -> None:
    x[:, 0] = 1.0


def halved(x: Any) -> Any:
    return F.max_pool2d(x, 2)


def one_site() -> SparseTensor:
    return sparsecnx.sparse(torch.ones(1, CHANNELS, 2, 2), torch.tensor([[0, 1, 1, 1]]))


def padded_and_changed(x: Any) -> Any:
    padded = F.pad(x, (1, 1, 1, 1))
    x.mul_(2)
    return F.conv2d(padded, W)


def with_old_hook(x: Any) -> Any:
    module = nn.ReLU()
    module.register_backward_hook(lambda *_: None)
    return module(x)


W = torch.randn(CHANNELS, CHANNELS, 3, 3, dtype=torch.float64)
UNSUPPORTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a function that is not in the table": (lambda x: torch.fft.fft2(x), "torch.fft.fft2 .*: it is not in docs"),
    "a method that is not in the table": (lambda x: x.lu(), "Tensor.lu .*: it is not in docs/functions.md"),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
    "flatten of space": (lambda x: x.flatten(1), "flatten .* pool over space first"),
    "view of space": (lambda x: x.view(2, CHANNELS, -1), "reshape .*would become"),
    "a pixel": (lambda x: x[:, :, 0, 0], "__getitem__ .*dimension 2 is space"),
    "a crop": (lambda x: x[:, :, 2:], "__getitem__ .*dimension 2 is space"),
    "an image": (lambda x: x[0], "__getitem__ .*dimension 0 is the batch"),
    "None as an index": (lambda x: x[:, None], "unsqueeze adds"),
    "setting values": (set_a_channel, "__setitem__ .*sets no values by an index"),
    "out=": (lambda x: torch.add(x, 1, out=torch.empty(1)), "add .*out= would write"),
    "out= of a reduction": (lambda x: torch.mean(x, (2, 3), out=torch.empty(1)), "mean .*out= would write"),
    "out= of an activation": (lambda x: torch.exp(torch.ones(1), out=x), "exp .*out= would write"),
    "an array of numpy": (lambda x: x * numpy.ones(3), r"mul .*numpy array \(3,\); torch.as_tensor"),
    "images of a batch one after another": (lambda x: torch.cat([x, x], 0), "cat .*dim is 0, which is the batch"),
    "cat along space": (lambda x: torch.cat([x, x], 2), "cat .*dim is 2, which is space"),
    "softmax over space": (lambda x: torch.softmax(x, -1), "softmax .*which is space"),
    "mean over a part of space": (lambda x: x.mean(3), "mean .*a part of space"),
    "mean over images": (lambda x: x.mean(0), "mean .*over images without space"),
    "places of maxima": (lambda x: x.flatten(2).max(2), "pool over space first"),
    "indices of pooling": (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d.*pool without indices"),
    "layer norm over space": (lambda x: F.layer_norm(x, (CHANNELS, 12, 8)), "layer_norm .*not its channels alone"),
    "layer norm over the last axis of space": (lambda x: F.layer_norm(x, (8,)), "layer_norm .*not its channels"),
    "linear over space": (lambda x: F.linear(x, torch.ones(3, 8)), "linear .*last dimension is space"),
    "transposed space": (lambda x: x.transpose(2, 3), "transpose"),
    "permute that splits space": (lambda x: x.permute(0, 2, 1, 3), "permute .*mix space"),
    "reflected border": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "pad .*'reflect'.*pad with zeros"),
    "cropping": (lambda x: F.pad(x, (-1, 1)), "pad .*does not remove"),
    "arithmetic on a border": (lambda x: F.pad(x, (1, 1, 1, 1)) * 2, "F.pad, whose border only a convolution"),
    "a function on a border": (lambda x: torch.relu(F.pad(x, (1, 1))), "F.pad, whose border only a convolution"),
    "a border of ones before a convolution": (lambda x: F.conv2d(F.pad(x, (1,) * 4, value=1.0), W), "put 1.0 around"),
    "other masks": (lambda x: x + other_mask(), "add .*other layouts: "),
    "other strides": (lambda x: torch.cat([x, halved(x)], 1), "cat .*other layouts: "),
    "channels at other places": (lambda x: x + x.permute(0, 2, 3, 1), "channels are at other places"),
    "convolution of channels last": (lambda x: F.conv2d(x.permute(0, 2, 3, 1), W), "conv2d .*channels last.*permute"),
    "a tensor of another size": (lambda x: x * torch.ones(1, 1, 5, 5), "does not broadcast"),
    "another dimension": (lambda x: F.conv1d(x, W[..., 0]), "conv1d .*1 axes.*function of 2 dimensions"),
    "a weight that is sparse": (lambda x: F.conv2d(torch.ones(1, 1, 4, 4), x), "conv2d .*input is a tensor"),
    "writing into an ordinary tensor": (lambda x: torch.zeros(2, CHANNELS, 12, 8).add_(x), "add_ .*would write"),
    "pooling of integers": (lambda x: F.avg_pool2d(x.int(), 2), "avg_pool2d .*x is torch.int32"),
    "places of elements": (lambda x: torch.where(x > 0), "where .*places of single elements"),
    "a scripted module": (lambda x: torch.jit.script(nn.ReLU())(x), r"ScriptModule.forward .*alone; .* torch.compile"),
    "a traced module": (lambda x: torch.jit.trace(nn.ReLU(), x), "torch.jit.trace .*this mask for all; .*dense images"),
    "a deprecated hook": (with_old_hook, r"Module.register_backward_hook .*register_hook\(\) on the SparseTensor"),
    "truth": (bool, "__bool__ .*reduce it first"),
    "numpy": (lambda x: x.numpy(), "numpy .*reduce it first"),
    "iteration": (list, "__iter__ .*reduce it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_meaning_names_the_function_the_line_and_the_remedy(name: str) -> None:
    function, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedFunctionError, match=f"(?s){message}") as caught:
        function(example())
    assert f", called at {__file__}:" in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("ndim", [1, 3])
def test_pixels_are_shuffled_in_images_alone(ndim: int) -> None:
    """Of a signal or volume torch takes another axis for the channels."""
    x = random_sparse(make_layout(draw_mask("equal counts", 2, (2,) * ndim, seed=2), 2), 8)
    for function in (F.pixel_shuffle, F.pixel_unshuffle):
        with pytest.raises(UnsupportedFunctionError, match=f"{function.__name__} .*2 axes, .*kernel = stride"):
            function(x, 2)


def on_meta(x: Any) -> Any:
    return SparseTensor(x.features.to("meta"), Layout(x.layout.tiles.to(torch.device("meta")), x.layout.tile))


OTHER_DEVICE = "is on meta: x is on cpu; move one of them"
# Where operators, or torch itself, find the fault.
BAD: dict[str, tuple[type[Exception], Callable[[Any], Any], str]] = {
    "channels of a weight": (ValueError, lambda x: F.conv2d(x, W[:, :3], padding=1), "conv2d .*take 3; .*as_tensor"),
    "axes of a scale": (ValueError, lambda x: F.interpolate(x, scale_factor=(2, 2, 2)), "interpolate .*each of 2 axes"),
    "device of a weight": (ValueError, lambda x: F.conv2d(x, W.to("meta"), padding=1), "conv2d .*weight is on meta"),
    "device of an operand": (ValueError, lambda x: x + torch.ones(4, 1, 1, device="meta"), f"add.*{OTHER_DEVICE}"),
    "device of images": (ValueError, lambda x: x * x.dense().to("meta"), f"mul.*{OTHER_DEVICE}"),
    "device of a number": (ValueError, lambda x: x * torch.ones((), device="meta"), f"mul.*{OTHER_DEVICE}"),
    "device of a condition": (ValueError, lambda x: torch.where(W[0, :, :1, :1].to("meta") > 0, x, 0), OTHER_DEVICE),
    "device of what is joined": (ValueError, lambda x: torch.cat([x, x.dense().to("meta")], 1), OTHER_DEVICE),
    "device of slopes": (ValueError, lambda x: F.prelu(x, W[0, :, 0, 0].to("meta")), f"prelu .*{OTHER_DEVICE}"),
    "device of a matrix": (ValueError, lambda x: x.permute(0, 2, 3, 1) @ W[..., 0, 0].to("meta"), OTHER_DEVICE),
    "device of features": (
        ValueError, lambda x: F.linear(x.permute(0, 2, 3, 1), W[..., 0, 0].to("meta")), f"linear .*{OTHER_DEVICE}"
    ),
    "device of factors": (
        ValueError, lambda x: torch.einsum("bchw,dc->bdhw", x, W[..., 0, 0].to("meta")), f"einsum .*{OTHER_DEVICE}"
    ),
    "device of a norm": (
        ValueError, lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (4,), W[0, :, 0, 0].to("meta")), OTHER_DEVICE
    ),
    "device of a whole window": (ValueError, lambda x: F.conv2d(x, torch.ones(1, 4, 12, 8).to("meta")), OTHER_DEVICE),
    "device of two": (UnsupportedFunctionError, lambda x: x + on_meta(x), "one is on cpu, the other on meta; move one"),
    "dtype of a weight": (TypeError, lambda x: F.conv2d(x, W.float(), padding=1), "conv2d .*weight is torch.float32"),
    "dtype of features": (TypeError, lambda x: nn.Linear(4, 2)(x.movedim(1, -1)), "linear .*weight is torch.float32"),
    "dtype of a matrix": (TypeError, lambda x: x.movedim(1, -1) @ torch.ones(4, 2), "matmul.*other is torch.float32"),
    "a probability": (ValueError, lambda x: F.dropout2d(x, 2.0), "dropout2d .*p is 2.0: expected a probability"),
    "bias": (ValueError, lambda x: F.conv2d(x, W, W[:3, 0, 0, 0], padding=1), r"conv2d .*bias is \(3,\)"),
    "groups": (ValueError, lambda x: F.group_norm(x, 3), "group_norm .*groups is 3: expected a divisor"),
    "groups of a module": (ValueError, nn.GroupNorm(2, 8).double(), r"group_norm .*weight is \(8,\)"),
    "statistics": (ValueError, lambda x: F.batch_norm(x, W[0, :3, 0, 0], None), "batch_norm .*running_mean is"),
    "slopes": (ValueError, nn.PReLU(7), r"prelu .*weight is \(7,\): expected \(4,\)"),
    "features": (ValueError, lambda x: nn.Linear(7, 2)(x.movedim(1, -1)), r"linear .*\(2, 7\): .* \(C_out, 4\)"),
    "a matrix": (ValueError, lambda x: x.movedim(1, -1) @ torch.ones(7, 2), r"matmul.*\(7, 2\): .* \(4, C_out\)"),
    "channels of a norm": (ValueError, nn.BatchNorm2d(7), r"batch_norm .*weight is \(7,\): expected \(4,\)"),
    "channels to norm": (TypeError, lambda x: nn.LayerNorm(7)(x.movedim(1, -1)), r"layer_norm .*; expected \(4,\)"),
    "an operator": (UnsupportedFunctionError, lambda x: x + torch.ones(3, 1, 1), "add .*does not broadcast"),
    "channels of two": (RuntimeError, lambda x: x[:, :3] + x[:, :2], "__add__ .*must match"),
    "a method": (RuntimeError, lambda x: x.chunk(0, 1), "chunk .*greater than 0"),
    "no such argument": (TypeError, lambda x: x.mean(nonsense=1), "mean .*argument 'nonsense'"),
    "one visible site": (ValueError, lambda x: nn.InstanceNorm2d(CHANNELS)(one_site()), "instance_norm .*"),
    "numbers for each axis": (ValueError, lambda x: F.avg_pool2d(x, (2, 2, 2)), "avg_pool2d .*has 3 numbers"),
    "stride": (ValueError, lambda x: F.conv2d(x, W, stride=0), r"conv2d .*stride is \(0, 0\): expected 1 or more"),
    "window": (ValueError, lambda x: F.avg_pool2d(x, 0), r"avg_pool2d .*kernel is \(0, 0\): expected 1 or more"),
    "kind of number": (TypeError, lambda x: F.max_pool2d(x, 2.0), r"max_pool2d .*2.0 is a float"),
    "kind of padding": (ValueError, lambda x: F.conv2d(x, W, padding="reflect"), "conv2d .*padding is 'reflect'"),
    "stride with padding": (ValueError, lambda x: F.conv2d(x, W, None, 2, "same"), "conv2d .*'same' and stride"),
    "no output": (ValueError, lambda x: F.conv2d(x, W[:0], padding=1), "conv2d .*at least one channel of the output"),
    "axes": (UnsupportedFunctionError, lambda x: F.conv1d(x, W, padding=1), "conv1d .*goes along 1 axes"),
    "after a border": (ValueError, lambda x: F.conv2d(F.pad(x, (1,) * 4), W[:, :3]), "conv2d .*has 4 channels"),
    "pixels for a tensor": (UnsupportedFunctionError, torch.as_tensor, r"x.as_tensor\(\) is one"),
    "a border of what has changed": (UnsupportedFunctionError, padded_and_changed, "pad .*changed in place before"),
    "sum over space": (UnsupportedFunctionError, lambda x: torch.einsum("bchw->bc", x), "einsum .*x.sum"),
    "letters": (UnsupportedFunctionError, lambda x: torch.einsum("bcw->bw", x), "einsum .*a letter for each dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_of_operators_name_the_function_and_the_line(name: str) -> None:
    error, function, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        function(example())
    assert str(caught.value).count(" on a SparseTensor, called at ") == 1


DIMENSIONS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean((2, 3, 5)),
    "permute": lambda x: x.permute(0, 2, 3, 5),
    "transpose": lambda x: x.transpose(1, -5),
    "unsqueeze": lambda x: x.unsqueeze(6),
    "flatten": lambda x: x.flatten(5, 5),
    "movedim": lambda x: x.movedim(5, -1),
    "stack": lambda x: torch.stack([x, x], 5),
    "softmax": lambda x: x.softmax(4),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimensions_out_of_range_are_an_index_error_as_in_torch(name: str) -> None:
    for x in (example(), example().dense()):
        with pytest.raises(IndexError):
            DIMENSIONS[name](x)


def test_a_dimension_given_twice_is_an_error() -> None:
    for function in (lambda x: x.mean((2, 2, 3)), lambda x: x.permute(0, 1, 1, 2)):
        with pytest.raises(ValueError, match="expected each dimension once"):
            function(example())


def test_a_missing_method_is_no_attribute() -> None:
    x = example()
    assert hasattr(x, "relu") and not hasattr(x, "lu") and not hasattr(x, "nonsense")
    with pytest.raises(AttributeError, match="SparseTensor has no attribute 'nonsense'"):
        _ = x.nonsense


EXTENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no padding": (lambda x: F.conv2d(x, W), r"conv2d on .* make \(10, 6\) sites of \(12, 8\).*; padding=1 does"),
    "too much padding": (lambda x: F.conv2d(x, W, padding=2), r"make \(14, 10\) sites.*padding=1 does"),
    "even kernel": (lambda x: F.conv2d(x, W[..., :2, :2]), "1 sites of padding per axis do.*padding='same', or F.pad"),
    "dilation": (lambda x: F.conv2d(x, W, padding=1, dilation=2), "padding=2 does"),
    "pooling": (lambda x: F.max_pool2d(x, 3, 2), r"max_pool2d on .* make \(5, 3\).*padding=1 does"),
    "rounded up into a border": (lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, ceil_mode=True), r"\(7, 5\) sites"),
    "transposed": (lambda x: F.conv_transpose2d(x, W, stride=2), "extent . stride sites.*must be the stride"),
    "stride below the tile": (
        lambda x: F.conv2d(x, W, stride=8, padding=1),
        r"conv2d on .*: stride is 8: it must divide the tile side, 4 sites; take larger patches, .*below_tile=.dense.",
    ),
    "stride that does not divide": (
        lambda x: F.avg_pool2d(x, 3),
        "avg_pool2d on .*: stride is 3: it must divide the tile side, 4",
    ),
    "adaptive size": (
        lambda x: F.adaptive_avg_pool2d(x, 5),
        r"output_size is 5: expected 1, or a divisor of \(12, 8\)",
    ),
    "interpolated size": (lambda x: F.interpolate(x, size=(13, 9)), "would become .*multiples of the grid.*below_tile"),
}


@pytest.mark.parametrize("name", EXTENTS)
def test_extents_that_do_not_fit_say_what_does(name: str) -> None:
    function, message = EXTENTS[name]
    with pytest.raises(ValueError, match=message):
        function(example())


def test_a_window_as_wide_as_the_image_leaves_an_ordinary_tensor() -> None:
    x = example()
    weight = torch.randn(5, CHANNELS, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, weight), F.conv2d(x.dense(), weight))


BELOW_THE_TILE: dict[str, Callable[[Any], Any]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 4),
    "max_pool2d after pad": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-9.0), 5, 4),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 4),
    "avg_pool2d after pad": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 5, 4),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 4),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "conv2d": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), W, stride=4),
    "every site": lambda x: x[:, :, ::4, ::4],
}


@pytest.mark.parametrize("name", BELOW_THE_TILE)
def test_below_the_tile_an_ordinary_tensor_comes_out_where_it_was_asked_for(name: str) -> None:
    function, images = BELOW_THE_TILE[name], example().dense()
    mask = draw_mask("random counts", 2, (6, 4), seed=2)
    x = sparsecnx.sparse(images, mask, below_tile="dense")
    fill = -math.inf if name.startswith("max") else 0.0
    expected = function(x.dense(fill))
    found = function(x)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected.masked_fill(expected == -math.inf, 0.0))
    with pytest.raises(ValueError, match=r"stride is .*: it must divide the tile side, 2"):  # by default
        function(sparsecnx.sparse(images, mask))


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "method": lambda x: x.relu_(),
    "function": lambda x: torch.relu_(x),
    "module": nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "dropout": lambda x: F.dropout(x, 1.0, inplace=True),
    "dropout of channels": lambda x: F.dropout2d(x, 1.0, inplace=True),
    "operator": lambda x: x.__iadd__(1),
    "addition": lambda x: x.add_(torch.ones(2, CHANNELS, 1, 1), alpha=2),
    "clamp": lambda x: x.clamp_(0, 1),
    "keeps the dtype": lambda x: x.to(torch.float32).mul_(torch.ones(CHANNELS, 1, 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_functions_change_x_and_return_it(name: str) -> None:
    function, x = IN_PLACE[name], example()
    dense, other = x.dense(), x
    found = function(x)
    expected = function(dense)
    assert found.dtype == expected.dtype and (found is x or name == "keeps the dtype")
    for y in (found, other) if found is x else (found,):
        torch.testing.assert_close(y.dense(), expected * site_mask(x.layout, y.dtype), rtol=0, atol=0)


def test_in_place_functions_of_views_change_the_whole() -> None:
    x = example()
    before = x.features.clone()
    first, _ = x.chunk(2, 1)
    F.relu_(first)
    assert torch.equal(x.features, torch.cat([before[:, :2].relu(), before[:, 2:]], 1))
    x.permute(0, 2, 3, 1).mul_(3)
    x.as_tensor().add_(1)
    assert torch.equal(x.features[:, 2:], before[:, 2:] * 3 + 1)
    before = x.features.clone()
    F.adaptive_avg_pool2d(x, (12, 8)).mul_(2)  # A pooling is no view, also where it changes nothing.
    assert torch.equal(x.features, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_statements_have_gradients(compiled: bool) -> None:
    """A network such as timm's nfnet multiplies the residual by a learned gain and drops what mul_ returns."""

    def network(x: Any, gain: Tensor) -> Any:
        out = F.conv2d(x, W, padding=1)
        out.mul_(gain)
        out += x
        return F.relu(out, inplace=True).dense()

    runs = torch.compile(network, fullgraph=True, backend="eager") if compiled else network
    x, gain = example(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    mask = site_mask(x.layout, x.dtype)
    image = x.dense().detach().requires_grad_()
    expected = torch.relu((F.conv2d(image, W, padding=1) * gain + image) * mask)
    found = runs(x, gain)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.square().sum(), gain)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.square().sum(), gain)[0])


@pytest.mark.parametrize("name", ["group_norm", "batch_norm", "conv_transpose2d"])
def test_a_saved_tensor_that_was_changed_is_an_error_in_the_backward_pass(name: str) -> None:
    x = example()
    x.requires_grad_()
    x = x * 1
    weight = torch.randn(CHANNELS, CHANNELS, 2, 2, dtype=torch.float64, requires_grad=True)
    functions: dict[str, Callable[[], Any]] = {
        "group_norm": lambda: F.group_norm(x, 2),
        "batch_norm": lambda: F.batch_norm(x, None, None, training=True),
        "conv_transpose2d": lambda: F.conv_transpose2d(x, weight, stride=2),
    }
    loss = functions[name]().square().sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_functions_raise_where_those_of_torch_do() -> None:
    with pytest.raises(RuntimeError, match="can't be cast"):
        example().int().add_(0.5)
    x = example()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        x.mul_(2)


def test_gradients_are_not_lost_in_an_autograd_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = example()
    assert torch.equal(Doubled.apply(x).features, 2 * x.features)
    x.requires_grad_()
    with pytest.raises(UnsupportedFunctionError, match=r"autograd\.Function .*would lose its gradient"):
        Doubled.apply(x)
    with torch.no_grad():
        assert not (x * 2).requires_grad

    class WithSetup(Doubled):
        @staticmethod
        def forward(x: Any) -> Any:
            return x.mean((2, 3))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    weight = torch.ones(CHANNELS, CHANNELS, 1, 1, dtype=x.dtype)
    operators: list[Callable[[Any], Any]] = [
        lambda x: x.sum(), lambda x: F.conv2d(x, weight), lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.max_pool2d(x, 2), lambda x: torch.cat([x, x], 1), lambda x: torch.mul(weight[:, :1, 0], other=x),
        lambda x: x.dense(), lambda x: sparsecnx.ops.conv(getattr(x, "sparse", x), weight),
    ]  # fmt: skip
    for given in (x, x.as_tensor()):
        with pytest.raises(UnsupportedFunctionError, match=r"autograd\.Function .*would lose its gradient"):
            WithSetup.apply(given)
        for operator in operators:
            monkeypatch.setattr(Doubled, "forward", lambda ctx, x, operator=operator: operator(x))
            with pytest.raises(UnsupportedFunctionError, match=r"autograd\.Function .*would lose its gradient"):
                Doubled.apply(given)

    class OfFeatures(Doubled):
        @staticmethod
        def forward(ctx: Any, features: Tensor, layout: Any) -> Tensor:
            x = SparseTensor(features, layout) * 2
            return x.features

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 2, None

    assert OfFeatures.apply(x.features, x.layout).requires_grad


def test_backward_hooks_of_torch_modules_are_refused() -> None:
    for module in (nn.ReLU(), nn.Sequential(nn.BatchNorm2d(CHANNELS).double())):
        handle = module.register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=rf"{type(module).__name__} has a backward hook, which torch ignores"):
            module(example())
        with torch.no_grad():
            module(example())
        assert module(torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64, requires_grad=True)).requires_grad
        handle.remove()
        module(example())
