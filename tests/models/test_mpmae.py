"""Tests of `sparsecnx.models.MPMAE`: its losses and gradients are those of the definition, one patch at a time."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, assert_same, draw_mask
from torch.nn import functional as F

from sparsecnx import models
from sparsecnx.models import masked_dense

PATCH, GRID, BATCH = 8, (3, 4), 3
TARGETS = {
    "optical": models.ImageTarget(2, norm_pix_loss=True),
    "radar": models.ImageTarget(3, weight=2.0, loss_on="all"),
    "height": models.ImageTarget(1, patch_size=4),  # of half the resolution
    "land_cover": models.ClassMapTarget(5, ignore_index=255, weight=0.5),
    "clouds": models.ClassMapTarget(2, patch_size=(16, 8), loss_on="visible"),
    "weather": models.RegressionTarget(4),
    "biome": models.ClassificationTarget(6, weight=3.0),
}


def mpmae(targets=TARGETS, **options):
    encoder = models.ConvNeXtV2Encoder((1, 1, 1, 1), (4, 4, 8, 8), in_chans=2, stem=1, stem_type="conv3x3")
    model = models.MPMAE(encoder, targets, decoder_dim=8, **options)
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model.double()


def example():
    """Return images, a mask, and a value of each target, with NaN and pixels without a class."""

    def image(channels, height, width):
        return torch.randn(BATCH, channels, GRID[0] * height, GRID[1] * width, dtype=torch.float64)

    images, mask = image(2, PATCH, PATCH), draw_mask("random counts", BATCH, GRID, seed=4)
    targets = {
        "optical": images.clone(),
        "radar": image(3, PATCH, PATCH),
        "height": image(1, 4, 4),
        "land_cover": torch.randint(5, (BATCH, GRID[0] * PATCH, GRID[1] * PATCH)).to(torch.uint8),
        "clouds": torch.randint(2, (BATCH, GRID[0] * 16, GRID[1] * 8), dtype=torch.int32),
        "weather": torch.randn(BATCH, 4, dtype=torch.float64),
        "biome": torch.randint(6, (BATCH,)),
    }
    targets["radar"][torch.rand(targets["radar"].shape) < 0.3] = torch.nan
    targets["radar"][1, :, :PATCH] = -torch.inf
    targets["height"][2] = torch.nan
    targets["land_cover"][torch.rand(targets["land_cover"].shape) < 0.3] = 255
    targets["land_cover"][0, :, : 2 * PATCH] = 255
    targets["weather"][0], targets["weather"][1, 2] = torch.nan, torch.nan
    targets["biome"][1] = -100
    return images, mask, targets


def expected_predictions(model, images, mask):
    """Compute every prediction densely, with the mask token at the masked sites."""
    encoded = model.proj(masked_dense.forward_features(model.encoder, images, mask)[-1])
    x = torch.where(mask[:, None], model.mask_token, encoded)
    predictions = {}
    for name, target in model.targets.items():
        features, pred = model.decoders[name](x), model.preds[name]
        if isinstance(target, models.ImageTarget | models.ClassMapTarget):
            predictions[name] = pred(features)
        else:
            predictions[name] = pred.linear(pred.norm(features.movedim(1, -1)).mean(dim=(1, 2)))
    return predictions


def expected_loss(target, value, pred, mask):
    """Average the errors of the patches or images that count, one by one, from their values alone."""
    errors = []
    if isinstance(target, models.RegressionTarget):
        for found, wanted in zip(pred, value, strict=True):
            there = wanted.isfinite()
            errors += [(found[there] - wanted[there]).square().mean()] if there.any() else []
        return torch.stack(errors).mean()
    if isinstance(target, models.ClassificationTarget):
        there = value != target.ignore_index
        return F.cross_entropy(pred[there], value[there])
    height, width = target.patch_size if isinstance(target.patch_size, tuple) else 2 * (target.patch_size or PATCH,)
    counts = {"masked": mask, "visible": ~mask, "all": torch.ones_like(mask)}[target.loss_on]
    for image, row, column in counts.nonzero().tolist():
        box = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        wanted, found = value[image][box], pred[image, :, row, column]
        if isinstance(target, models.ClassMapTarget):
            there = wanted != target.ignore_index
            found = found.view(height, width, target.classes)[there]
            errors += [F.cross_entropy(found, wanted[there].long())] if there.any() else []
            continue
        wanted = wanted.movedim(0, -1)
        there = wanted.isfinite()
        found, wanted = found.view_as(wanted)[there], wanted[there]
        if target.norm_pix_loss:
            wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
        errors += [(found - wanted).square().mean()] if there.any() else []
    return torch.stack(errors).mean()


def gradients(value, model):
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def test_losses_and_gradients_are_those_of_the_definition():
    model, (images, mask, targets) = mpmae(), example()
    out = model(images, targets, mask=mask)
    assert torch.equal(out.mask, mask.flatten(1)) and list(out.losses) == list(out.predictions) == list(TARGETS)
    predictions = expected_predictions(model, images, mask)
    losses = {name: expected_loss(TARGETS[name], targets[name], predictions[name], mask) for name in TARGETS}
    assert_same(out.predictions, predictions, 1e-10)
    assert_same(out.losses, losses, 1e-10)
    loss = sum(TARGETS[name].weight * value for name, value in losses.items())
    assert_close(out.loss, loss, 1e-10)
    assert_same(gradients(out.loss, model), gradients(loss, model), 1e-8)


def test_uncertainty_learns_the_weight_of_each_loss():
    targets = {"optical": models.ImageTarget(2), "height": models.ImageTarget(1, patch_size=4)}
    model, (images, mask, values) = mpmae(targets, uncertainty=True), example()
    values = {name: values[name] for name in targets}
    torch.nn.init.normal_(model.log_vars)
    out, (first, second) = model(images, values, mask=mask), model.log_vars
    expected = (-first).exp() * out.losses["optical"] + first + (-second).exp() * out.losses["height"] + second
    assert_close(out.loss, expected, 1e-12)
    assert_same(gradients(out.loss, model), gradients(expected, model), 1e-12)

    values["height"].fill_(torch.nan)
    out = model(images, values, mask=mask)
    assert_close(out.loss, (-first).exp() * out.losses["optical"] + first, 1e-12)
    found = gradients(out.loss, model)
    assert found["log_vars"][0] != 0 and found["log_vars"][1] == 0
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_batch_without_values_costs_nothing():
    model, (images, mask, targets) = mpmae(), example()
    nothing = {"land_cover": 255, "clouds": -100, "biome": -100}
    targets = {name: value.clone().fill_(nothing.get(name, torch.nan)) for name, value in targets.items()}
    out = model(images, targets, mask=mask)
    assert out.loss == 0 and not any(map(bool, out.losses.values()))
    assert not any(gradient.any() for gradient in gradients(out.loss, model).values())


def test_pixels_of_the_input_without_a_value_are_never_read():
    model, (images, mask, targets) = mpmae(), example()
    valid = torch.rand(BATCH, 1, *images.shape[2:]) < 0.7
    found = model(images.masked_fill(~valid, torch.nan), targets, mask=mask, valid=valid)
    expected = model(images.masked_fill(~valid, 0), targets, mask=mask)
    assert torch.equal(found.loss, expected.loss)


def test_sums_and_counts_of_parts_make_the_loss_of_the_whole():
    model, (images, mask, targets) = mpmae(), example()
    out = model(images, targets, mask=mask)
    sums: dict[str, list[torch.Tensor]] = {name: [0, 0] for name in TARGETS}
    for part in (slice(0, 1), slice(1, BATCH)):
        pieces = [{name: value[part] for name, value in values.items()} for values in (targets, out.predictions)]
        for name, (total, count) in model.summed_errors(*pieces, out.mask[part]).items():
            sums[name][0] += total
            sums[name][1] += count
    loss, losses = model.total_loss({name: (total, count) for name, (total, count) in sums.items()})
    assert_close(loss, out.loss, 1e-12)
    assert_same(losses, out.losses, 1e-12)


def test_classes_of_8_bits_are_never_taken_for_none():
    """-100 is 156 in 8 bits."""
    target, scores = models.ClassificationTarget(200), torch.randn(2, 200)
    found = [
        target.summed_error(torch.tensor([156, 3], dtype=dtype), scores, torch.ones(2, 1, dtype=torch.bool), (8, 8))
        for dtype in (torch.uint8, torch.int64)
    ]
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
    assert found[0][1] == 2


def test_compiling_and_checkpointing_change_nothing():
    names = ("optical", "land_cover", "biome")
    model = mpmae({name: TARGETS[name] for name in names})
    images, _, targets = example()
    targets, mask = {name: targets[name] for name in names}, draw_mask("equal counts", BATCH, GRID, seed=4)
    visible = int((~mask[0]).sum())

    def run(call):
        return gradients(call(images, targets, mask=mask, visible=visible).loss, model)

    expected = run(model)
    torch.compiler.reset()
    assert_same(run(torch.compile(model, fullgraph=True, backend="eager")), expected, 1e-10)
    model.set_grad_checkpointing()
    assert_same(run(model), expected, 1e-12)


def test_volumes_and_larger_patches():
    encoder = models.ConvNeXtV2Encoder((1, 1), (4, 6), in_chans=1, ndim=3, stem=2, kernel_size=3)
    targets = {
        "scan": models.ImageTarget(1),
        "organs": models.ClassMapTarget(3, patch_size=(4, 8, 8)),
        "age": models.RegressionTarget(1),
    }
    model = models.MPMAE(encoder, targets, patch_size=8, decoder_dim=8)
    scan = torch.randn(2, 1, 16, 16, 8)
    values = {"scan": scan, "organs": torch.randint(3, (2, 8, 16, 8)), "age": torch.rand(2, 1)}
    out = model(scan, values, mask=draw_mask("equal counts", 2, (2, 2, 1), seed=1))
    assert out.predictions["scan"].shape == (2, 512, 2, 2, 1)
    assert out.predictions["organs"].shape == (2, 3 * 256, 2, 2, 1)
    assert out.predictions["age"].shape == (2, 1)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_keeps_losses_in_float32():
    model, (images, mask, targets) = mpmae().float(), example()
    targets = {name: value.float() if value.is_floating_point() else value for name, value in targets.items()}
    exact = model(images.float(), targets, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images.float(), targets, mask=mask)
    assert {value.dtype for value in out.losses.values()} == {torch.float32}
    for name in TARGETS:
        assert out.losses[name].item() == pytest.approx(exact.losses[name].item(), rel=0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mpmae({}), ValueError, r"targets is \{\}: expected one or more"),
        (lambda: mpmae({"a": "b"}), TypeError, r"targets\['a'\] is a str: expected a target"),
        (lambda: mpmae({"a.b": TARGETS["biome"]}), ValueError, r"targets has the name 'a\.b'"),
        (lambda: mpmae({"values": TARGETS["biome"]}), ValueError, "targets has the name 'values'"),
        (lambda: mpmae(uncertainty=True), ValueError, r"weight of radar is 2\.0: expected 1, since uncertainty"),
        (lambda: models.ImageTarget(0), ValueError, "channels is 0: expected 1 or more"),
        (lambda: models.ImageTarget(1, weight=0.0), ValueError, r"weight is 0\.0: expected more than 0"),
        (lambda: models.ImageTarget(1, loss_on="none"), ValueError, "loss_on is 'none': expected one of masked"),
        (lambda: models.ClassMapTarget(1), ValueError, "classes is 1: expected 2 or more"),
        (lambda: models.RegressionTarget(0), ValueError, "values is 0: expected 1 or more"),
        (lambda: models.ClassificationTarget(1), ValueError, "classes is 1: expected 2 or more"),
        (lambda: mpmae({"a": models.ImageTarget(1, patch_size=(4, 4, 4))}), ValueError, r"patch_size is \(4, 4, 4\)"),
    ],
)
def test_a_model_that_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("radar", torch.zeros(3, 2, 24, 32), ValueError, r"targets\['radar'\] is .*: expected \(3, 3, 24, 32\)"),
        ("radar", torch.zeros(3, 3, 24, 32, dtype=torch.int16), TypeError, "is torch.int16: expected a floating"),
        ("height", torch.zeros(3, 1, 24, 32), ValueError, r"expected \(3, 1, 12, 16\)"),
        ("land_cover", torch.zeros(3, 24, 32), TypeError, "is torch.float32: expected a tensor of whole numbers"),
        ("land_cover", torch.zeros(3, 1, 24, 32, dtype=torch.long), ValueError, r"expected \(3, 24, 32\)"),
        ("weather", [[0.0]], TypeError, r"is a list: expected a floating tensor \(3, 4\)"),
        ("biome", torch.zeros(3, 6, dtype=torch.long), ValueError, r"is \(3, 6\): expected \(3,\)"),
        ("biome", torch.tensor([0, 6, -100]), ValueError, r"targets\['biome'\] has the value 6: expected 0 to 5, or"),
        ("land_cover", torch.full((3, 24, 32), -1), ValueError, "has the value -1: expected 0 to 4, or 255 for none"),
        ("moon", torch.zeros(3), ValueError, "targets is biome, .*moon.*: expected a value for each of biome, clouds"),
    ],
)
def test_values_that_do_not_fit_are_named(name, value, error, message):
    images, mask, targets = example()
    with pytest.raises(error, match=message):
        mpmae()(images, {**targets, name: value}, mask=mask)
