"""Tests of `sparsecnx.models.FCMAE`: loss, masks, gradients, compilation, autocast, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import EVERY_MODEL_BACKEND, MODEL_BACKENDS, assert_close, assert_same, bound, device_of, draw_mask, widest
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecnx import models, random_mask, use_backend
from sparsecnx.models import masked_dense


def small_model(patch_size: int = 32, **options):
    """Build four blocks of encoder and one of decoder, with a GRN that is not the identity."""
    encoder = models.ConvNeXtV2Encoder(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    model = models.FCMAE(encoder, patch_size=patch_size, decoder_dim=16, **options)
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model


def images(batch: int = 2, height: int = 64, width: int = 96, dtype: torch.dtype = torch.float64):
    return torch.randn(batch, 3, height, width, dtype=dtype)


def some_mask(kind: str = "equal counts", batch: int = 2, grid: tuple[int, int] = (2, 3)):
    return draw_mask(kind, batch, grid, seed=2)


def expected_prediction(model, x, mask):
    """Compute the prediction `(B, patch**2 * 3, gh, gw)` densely, with the mask token at the hidden sites."""
    hidden = mask[:, None].repeat_interleave(model.patch_size // 32, 2).repeat_interleave(model.patch_size // 32, 3)
    encoded = model.proj(masked_dense.forward_features(model.encoder, x, mask)[-1])
    return model.pred(model.decoder(torch.where(hidden, model.mask_token, encoded)))


def expected_loss(x, prediction, mask, patch: int, normalise: bool):
    """Average the mean squared errors of the hidden patches, one by one."""
    errors = []
    for image, row, column in mask.nonzero().tolist():
        pixels = x[image, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        target = torch.stack([pixels[colour] for colour in range(3)], dim=-1).flatten()  # row, column, colour
        if normalise:
            centred = target - target.mean()
            target = centred / (centred.square().sum() / (target.numel() - 1) + 1e-6).sqrt()
        errors.append((prediction[image, :, row, column] - target).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("kind", ["equal counts", "random counts"])
@pytest.mark.parametrize(
    "patch, normalise", [(32, True), (32, False), (64, True)], ids=["32 px", "32 px, raw pixels", "64 px"]
)
def test_loss_and_gradients_are_those_of_the_definition(patch, normalise, kind, backend):
    model = small_model(patch, norm_pix_loss=normalise).double()
    x, mask = images(2, 2 * patch, 3 * patch).float().double(), some_mask(kind)
    prediction = expected_prediction(model, x, mask)
    expected = expected_loss(x, prediction, mask, patch, normalise)
    device, dtype = device_of(backend), widest(backend)
    there = copy.deepcopy(model).to(device, dtype)
    with use_backend(backend):
        loss, found, returned = there(x.to(device, dtype), mask=mask.to(device))
        gradients = torch.autograd.grad(loss, list(there.parameters()))
    assert torch.equal(returned.cpu(), mask.flatten(1))
    assert_close(found, prediction, bound(backend))
    assert_close(loss, expected, bound(backend))
    parameters = dict(model.named_parameters())
    limit = 1e-9 if dtype == torch.float64 else bound(backend)
    references = torch.autograd.grad(expected, list(parameters.values()))
    assert_same(dict(zip(parameters, gradients, strict=True)), dict(zip(parameters, references, strict=True)), limit)


def test_gradient_reaches_every_parameter():
    model = small_model()
    model(images(dtype=torch.float32))[0].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert model.mask_token.grad.any()


@pytest.mark.parametrize("patch, grid", [(32, (4, 6)), (64, (2, 3))], ids=["32 px", "64 px"])
def test_patches_hold_pixels_by_row_column_and_colour(patch, grid):
    model, x = small_model(patch), images(2, 128, 192)
    patches = model.patchify(x)
    assert patches.shape == (2, grid[0] * grid[1], patch * patch * 3)
    assert torch.equal(model.unpatchify(patches, grid), x)
    assert torch.equal(model.unpatchify(patches.mT.unflatten(2, grid)), x)  # as `forward` returns predictions
    for image, row, column, y, x_, colour in [(0, 0, 0, 0, 0, 1), (1, 1, 2, 5, 7, 0), (1, grid[0] - 1, 1, 31, 0, 2)]:
        found = patches[image, row * grid[1] + column, (y * patch + x_) * 3 + colour]
        assert found == x[image, colour, row * patch + y, column * patch + x_]


def test_unpatchify_rejects_another_number_of_patches():
    model = small_model()
    patches = model.patchify(images())
    for given, grid in (
        (patches, (2, 2)),
        (patches, None),
        (patches.mT.unflatten(2, (2, 3)), (3, 2)),
        (patches[0], None),
    ):
        with pytest.raises(ValueError, match=r"patches is \(.*\) and grid is .*: expected \(B, 3072, gh, gw\), or"):
            model.unpatchify(given, grid)


def test_normalised_target_uses_the_unbiased_variance():
    model, x = small_model().double(), images(1, 32, 64)
    patches = model.patchify(x)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=1) + 1e-6).sqrt()
    prediction, mask = target.mT.reshape(1, -1, 1, 2), torch.tensor([[True, False]])
    assert model.reconstruction_loss(x, prediction, mask).item() < 1e-24
    biased = target * (target.shape[-1] / (target.shape[-1] - 1)) ** 0.5
    assert model.reconstruction_loss(x, biased.mT.reshape(1, -1, 1, 2), mask).item() > 1e-9


@pytest.mark.parametrize("flat", [True, False], ids=["(B, L)", "(B, gh, gw)"])
def test_given_mask(flat):
    model, x, mask = small_model().double(), images(), some_mask("random counts")
    counts = mask.flatten(1).sum(1)
    assert counts[0] != counts[1]
    loss, prediction, returned = model(x, mask=mask.flatten(1) if flat else mask)
    assert torch.equal(returned, mask.flatten(1))
    assert prediction.shape == (2, 3072, 2, 3)
    assert_close(loss, expected_loss(x, prediction, mask, 32, True))


def test_random_mask_hides_the_ratio_and_follows_the_generator():
    model, x = small_model(), images(dtype=torch.float32)

    def draw(seed):
        return model(x, mask_ratio=0.6, generator=torch.Generator().manual_seed(seed))

    first, again, other = draw(1), draw(1), draw(3)
    assert first[2].shape == (2, 6) and first[2].dtype == torch.bool
    assert (first[2].sum(1) == 6 - int(6 * 0.4)).all()
    assert torch.equal(first[2], again[2]) and torch.equal(first[0], again[0])
    assert not torch.equal(first[2], other[2])


def test_nothing_hidden_costs_nothing():
    model = small_model()
    loss, _, _ = model(images(dtype=torch.float32), mask=torch.zeros(2, 6, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["an empty and a full image", "none visible"])
def test_image_with_nothing_visible_is_predicted_from_the_token(kind):
    model, x, mask = small_model().double(), images(), some_mask(kind)
    loss, prediction, _ = model(x, mask=mask)
    assert_close(prediction, expected_prediction(model, x, mask))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.mask_token.grad.any()


@pytest.mark.parametrize(
    "ratio, message",
    [
        (0.0, r"mask_ratio is 0.0: it leaves no patch to reconstruct"),
        (1.0, r"mask_ratio is 1.0"),
        (-0.5, r"mask_ratio is -0.5"),
        (1.5, r"mask_ratio is 1.5"),
        (0.9, r"mask_ratio is 0.9: it leaves none of the 6 patches visible"),
    ],
)
def test_mask_ratio_that_does_not_fit(ratio, message):
    with pytest.raises(ValueError, match=message):
        small_model()(images(dtype=torch.float32), mask_ratio=ratio)


@pytest.mark.parametrize("patch", [0, 16, 48, -32])
def test_patch_size_that_does_not_fit(patch):
    with pytest.raises(ValueError, match=f"patch_size is {patch}: expected a multiple of 32"):
        small_model(patch)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, 3, 64, 96), ValueError, r"images is \(2, 3, 64, 96\): .* 64, the patch size"),
        (torch.zeros(2, 3, 64, 80), ValueError, r"images is \(2, 3, 64, 80\)"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"images is \(2, 1, 64, 64\)"),
        (torch.zeros(0, 3, 64, 64), ValueError, r"images is \(0, 3, 64, 64\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), TypeError, "images is torch.int64"),
    ],
    ids=["patch size", "stride", "channels", "empty batch", "int64"],
)
def test_images_that_do_not_fit(x, error, message):
    with pytest.raises(error, match=message):
        small_model(64)(x)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.full((2, 6), 0.5), ValueError, r"mask has the values 0\.5: expected 0 and 1"),
        (torch.zeros(2, 5, dtype=torch.bool), ValueError, r"mask is \(2, 5\): a 2x3 grid needs \(2, 6\)"),
        (torch.zeros(2, 3, 2, dtype=torch.bool), ValueError, r"mask is \(2, 3, 2\): a 2x3 grid needs"),
        (torch.zeros(3, 6, dtype=torch.bool), ValueError, r"mask is \(3, .*2 images"),
        ([[True] * 6] * 2, TypeError, "mask is a list"),
    ],
    ids=["float", "cells", "grid", "batch", "list"],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        small_model()(images(dtype=torch.float32), mask=mask)


def test_mask_in_the_place_of_the_ratio_is_an_error():
    with pytest.raises(TypeError, match=r"mask_ratio is a Tensor: .* mask="):
        small_model()(images(dtype=torch.float32), some_mask())


class Recorder(TorchDispatchMode):
    """Records the names of operators, and the dtypes of numbers that are read back."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.names.add(name)
        if name == "aten::_local_scalar_dense":
            self.reads.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", EVERY_MODEL_BACKEND)
def test_random_masks_read_nothing_back_from_the_device(backend, monkeypatch):
    """On the CPU this takes the path of torch.compile, which is that of a GPU; without it masks are counted there."""
    device = device_of(backend)
    model, x = small_model().to(device), images(dtype=torch.float32).to(device)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with use_backend(backend), Recorder() as recorder:
        model(x, mask_ratio=0.6)[0].backward()
    assert "aten::rand" in recorder.names and len(recorder.names) > 20
    assert not recorder.names & {"aten::nonzero", "aten::masked_select", "aten::unique_dim"}
    # MinkowskiEngine multiplies the sizes of a kernel in a tensor of its own.
    assert not [dtype for dtype in recorder.reads if backend != "minkowski" or dtype != torch.int64]


def test_compiled_model_is_the_eager_one():
    model, x, mask = small_model(), images(dtype=torch.float32), some_mask()
    visible = int((~mask[0]).sum())
    parameters = dict(model.named_parameters())

    def run(call):
        loss, prediction, _ = call(x, mask=mask, visible=visible)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {"loss": loss, "prediction": prediction, **dict(zip(parameters, gradients, strict=True))}

    torch.compiler.reset()
    assert_same(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model), 1e-5)


def test_masks_compile_for_any_size():
    def draw(x):
        return random_mask(x.shape[0], (x.shape[2] // 32, x.shape[3] // 32), 0.6)

    compiled = torch.compile(draw, fullgraph=True, backend="eager", dynamic=True)
    for batch, height, width in ((2, 64, 96), (3, 96, 128)):
        cells = height * width // 32**2
        assert compiled(images(batch, height, width)).sum(1).tolist() == [cells - int(cells * 0.4)] * batch


def test_bfloat16_autocast_is_close_and_keeps_float32_gradients():
    model, x, mask = small_model(), images(dtype=torch.float32), some_mask()
    exact = model(x, mask=mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, mask=mask)[0]
    assert loss.isfinite() and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
