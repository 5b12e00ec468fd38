"""Pixels without a value, and the patches that the loss of a masked autoencoder counts."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_close, assert_same, draw_mask

from sparsecnx import models

PATCH, GRID = 8, (3, 4)


def encoder(**options):
    return models.ConvNeXtV2Encoder((1, 1, 1, 1), (4, 4, 8, 8), in_chans=2, stem=1, **options)


def fcmae(**options):
    model = models.FCMAE(encoder(), decoder_dim=8, **options)
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model.double()


def spark(**options):
    return models.SparK(encoder(), decoder_dim=16, **options).double()


def example(channels: int = 2):
    """Return images, a mask, and which pixels have a value: in some patches one, in others none or all of them."""
    images = torch.randn(2, 2, *(PATCH * cells for cells in GRID), dtype=torch.float64)
    mask = draw_mask("random counts", 2, GRID, seed=4)
    valid = torch.rand(2, channels, *images.shape[2:]) < 0.7
    valid[0, :, :, PATCH : 2 * PATCH] = False  # a column of patches without a value
    valid[1, :, :PATCH, : 2 * PATCH] = True
    valid[1, :, -PATCH:] = False
    valid[1, 0, -PATCH::PATCH, ::PATCH] = True  # a row of patches with one value in a channel
    return images, mask, valid


def expected_loss(model, images, pred, mask, valid):
    """Average the errors of the patches that count, one by one, from their valid pixels alone."""
    valid, errors = valid.expand_as(images), []
    counts = {"masked": mask, "visible": ~mask, "all": torch.ones_like(mask)}[model.loss_on]
    for image, row, column in counts.nonzero().tolist():
        box = (image, slice(None), slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
        seen = valid[box].movedim(0, -1)
        target, found = images[box].movedim(0, -1)[seen], pred[image, :, row, column].view_as(seen)[seen]
        if len(target) == 0:
            continue
        if model.norm_pix_loss:
            variance = target.var() if len(target) > 1 else 0.0
            target = (target - target.mean()) / (variance + 1e-6) ** 0.5
        errors.append((found - target).square().mean())
    return torch.stack(errors).mean()


def gradients(value, model):
    taken = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(taken, torch.autograd.grad(value, list(taken.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("loss_on", ["masked", "all", "visible"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "raw pixels"])
@pytest.mark.parametrize("channels", [2, 1], ids=["each channel", "all channels"])
@pytest.mark.parametrize("make", [fcmae, spark])
def test_loss_and_gradients_are_those_of_the_definition(make, channels, normalise, loss_on):
    model = make(norm_pix_loss=normalise, loss_on=loss_on)
    images, mask, valid = example(channels)
    poisoned = images.masked_fill(~valid, torch.nan)
    loss, pred, _ = model(poisoned, mask=mask, valid=valid)
    assert torch.equal(pred, copy.deepcopy(model)(images.masked_fill(~valid, 0), mask=mask)[1])
    expected = expected_loss(model, poisoned, pred, mask, valid)
    assert_close(loss, expected, 1e-12)
    assert_same(gradients(loss, model), gradients(expected, model), 1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
@pytest.mark.parametrize("make", [fcmae, spark])
def test_what_stands_at_pixels_without_a_value_is_never_read(make, value):
    model, (images, mask, valid) = make(), example()

    def run(images):
        images = images.clone().requires_grad_()
        model.zero_grad()
        loss = model(images, mask=mask, valid=valid)[0]
        loss.backward()
        return [loss.detach(), images.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    before = copy.deepcopy(model.state_dict())
    found = run(images.masked_fill(~valid, value))
    model.load_state_dict(before)
    for one, other in zip(found, run(images), strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def test_everything_valid_is_the_loss_without_valid():
    for model in (fcmae(), fcmae(norm_pix_loss=False)):
        images, mask, _ = example()
        plain, given = model(images, mask=mask)[0], model(images, mask=mask, valid=torch.ones_like(images).bool())[0]
        assert_close(given, plain, 1e-12)


def test_no_value_at_all_costs_nothing():
    model, (images, mask, _) = fcmae(), example()
    loss = model(images.fill_(torch.nan), mask=mask, valid=torch.zeros_like(images).bool())[0]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("loss_on", ["masked", "all", "visible"])
def test_sums_and_counts_of_parts_make_the_loss_of_the_whole(loss_on):
    model, (images, mask, valid) = fcmae(loss_on=loss_on), example()
    mask[0], mask[0, 0], mask[1, :, 0] = False, True, True
    loss, pred, mask = model(images, mask=mask, valid=valid)
    parts = [model.summed_error(images[i, None], pred[i, None], mask[i, None], valid[i, None]) for i in (0, 1)]
    assert parts[0][1] != parts[1][1]
    assert_close(sum(total for total, _ in parts) / sum(count for _, count in parts), loss, 1e-12)
    assert_close(model.reconstruction_loss(images, pred, mask, valid), loss, 1e-12)


def test_only_the_loss_on_masked_patches_needs_some():
    images = example()[0]
    for loss_on in ("all", "visible"):
        loss, _, mask = fcmae(loss_on=loss_on)(images, mask_ratio=0.0)
        assert loss > 0 and not mask.any()
    with pytest.raises(ValueError, match=r"mask_ratio is 0\.0: it leaves no patch to reconstruct"):
        fcmae()(images, mask_ratio=0.0)


def test_compiled_model_is_the_eager_one():
    model, (images, _, valid) = fcmae(), example(1)
    mask = draw_mask("equal counts", 2, GRID, seed=4)
    arguments = {"mask": mask, "visible": int((~mask[0]).sum()), "valid": valid}
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(images, **arguments)[0], model(images, **arguments)[0]
    assert_close(found, expected, 1e-12)
    assert_same(gradients(found, model), gradients(expected, model), 1e-10)


@pytest.mark.parametrize("loss_on", ["masked", "all", "visible"])
@pytest.mark.parametrize("given", [True, False], ids=["valid", "without valid"])
def test_compiled_loss_is_the_eager_one(given, loss_on):
    model, (images, mask, valid) = fcmae(loss_on=loss_on), example()
    pred = torch.randn(2, 2 * PATCH**2, *GRID, dtype=torch.float64)
    arguments = (images, pred, mask.flatten(1), valid if given else None)
    torch.compiler.reset()
    compiled = torch.compile(model.reconstruction_loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), model.reconstruction_loss(*arguments), 1e-12)


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (torch.ones(2, 2, 24, 32), TypeError, "valid is torch.float32: expected a bool tensor"),
        ([[True]], TypeError, "valid is list: expected a bool tensor"),
        (torch.ones(2, 24, 32, dtype=torch.bool), ValueError, r"valid is \(2, 24, 32\): expected \(2, 2, 24, 32\) as"),
        (torch.ones(1, 1, 24, 32, dtype=torch.bool), ValueError, r"valid is .* or \(2, 1, 24, 32\)"),
        (torch.ones(2, 1, 24, 32, dtype=torch.bool, device="meta"), ValueError, "valid is on meta, images on cpu"),
    ],
)
def test_valid_that_does_not_fit(valid, error, message):
    images, mask, _ = example()
    with pytest.raises(error, match=message):
        fcmae()(images, mask=mask, valid=valid)


@pytest.mark.parametrize("make", [fcmae, spark])
def test_loss_on_other_patches_is_refused(make):
    with pytest.raises(ValueError, match="loss_on is 'hidden': expected one of masked, all, visible"):
        make(loss_on="hidden")
