import math

import pytest

from sparsecnx.common.errors import InputError
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.schedule import learning_rate, param_groups


def test_defaults_are_the_published_recipe():
    recipe = Recipe()
    assert (recipe.mask_ratio, recipe.norm_pix_loss, recipe.weight_decay) == (0.6, True, 0.05)
    assert (recipe.epochs, recipe.warmup, recipe.image_size, recipe.visible) == (800, 40, 224, 19)
    assert Recipe(batch_size=512, grad_accum_steps=8).peak_lr == pytest.approx(1.5e-4 * 4096 / 256)


@pytest.mark.parametrize(("epochs", "warmup"), [(1600, 40), (400, 40), (100, 10), (5, 0.5)])
def test_default_warmup_is_at_most_a_tenth(epochs, warmup):
    assert Recipe(epochs=epochs).warmup == warmup
    assert Recipe(epochs=epochs, warmup_epochs=3).warmup == 3


def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    def at(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110)

    assert [at(0), at(5), at(10)] == [0.0, 1.0, 2.0]
    assert at(35) == pytest.approx(1 + math.cos(math.pi / 4))
    assert at(60) == pytest.approx(1.0)
    assert at(110) == pytest.approx(0.0, abs=1e-12)
    assert at(109) > 0


def test_without_warmup_the_first_step_has_the_peak():
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=4) == 2.0


def test_only_filters_and_matrices_decay():
    model = build_model(Recipe())
    decay, no_decay = param_groups(model, 0.05)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)

    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    spared = {names[id(p)] for p in no_decay["params"]}
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    block = "encoder.stages.0.0"
    assert {f"{block}.dwconv.weight", f"{block}.pwconv1.weight", "proj.weight", "pred.weight"} <= decayed
    assert {f"{block}.grn.gamma", f"{block}.grn.beta", f"{block}.norm.weight", "mask_token"} <= spared
    assert {f"{block}.dwconv.bias", "pred.bias"} <= spared


def test_steps_per_epoch_leaves_out_the_incomplete_batch():
    recipe = Recipe(batch_size=4, grad_accum_steps=2, epoch_repeats=3)
    assert recipe.steps_per_epoch(9) == 3  # 27 samples in batches of 8


def test_batch_larger_than_an_epoch():
    with pytest.raises(InputError, match=r"batch_size is 64: .* at most the 22 images of an epoch"):
        Recipe().steps_per_epoch(22)
    assert Recipe(epoch_repeats=3).steps_per_epoch(22) == 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", "gigantic", "expected one of atto, femto"),
        ("image_size", 200, "multiple of the patch size, 32, such as 192 or 224"),
        ("image_size", (64, 100), "multiple of the patch size, 32, such as 96 or 128"),
        ("image_size", 32, "more than one patch"),
        ("image_size", (64,), "expected a whole number, or two"),
        ("image_size", (64, 64, 64), "expected a whole number, or two"),
        ("image_size", (64, 2.0), "expected a whole number, or two"),
        ("grn_scope", "image", "expected one of sample, batch"),
        ("first_epoch", 800, "0 to 799"),
        ("image_size", 0, "multiple of the patch size, 32, such as 32 or 64"),
        ("mask_ratio", 1.0, "0 <= ratio < 1"),
        ("mask_ratio", -0.1, "0 <= ratio < 1"),
        ("mask_ratio", math.nan, "0 <= ratio < 1"),
        ("mask_ratio", 0.99, "masks some of the 49 patches"),
        ("mask_ratio", 0.0, "masks some of the 49 patches"),
        ("epochs", 0, "1 or more"),
        ("batch_size", -2, "1 or more"),
        ("base_lr", math.nan, "more than 0"),
        ("weight_decay", -1.0, "0 or more"),
        ("warmup_epochs", 900, "0 to epochs, 800"),
        ("clip_grad", 0.0, "more than 0"),
        ("dtype", "float16", "float32, bfloat16"),
        ("seed", -1, "0 or more"),
        ("seed", 2**63, "less than 2"),
        ("epochs", 10**400, "at most 1000000000"),
        ("image_size", 32_000, "at most --max-pixels, 64000000"),
        ("block", "v3", "expected one of v2, v1"),
        ("stem_type", "conv", "expected one of patchify, conv3x3"),
        ("norm_eps", 0.0, "more than 0, at most 1"),
        ("grn_eps", math.nan, "more than 0, at most 1"),
        ("decoder_depth", 0, "1 to 256"),
        ("loss_on", "hidden", "expected one of masked, all, visible"),
    ],
)
def test_a_field_out_of_range_is_named(field, value, expected):
    with pytest.raises(InputError, match=expected) as error:
        Recipe(**{field: value})
    assert error.value.argument == field
    shown = "x".join(map(str, value)) if isinstance(value, tuple) and 100 in value else str(value)
    assert ("1329 bits" if value == 10**400 else shown) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "given", "expected"),
    [
        *[
            (field, value, {"model": "timm:resnet18"}, f"expected {default}, since timm:resnet18 is no network of")
            for field, value, default in (
                ("block", "v1", "v2"),
                ("stem_type", "conv3x3", "patchify"),
                ("norm_eps", 1e-5, "1e-06"),
                ("grn_eps", 1e-4, "1e-06"),
                ("dwconv_bias", False, "True"),
            )
        ],
        ("grn_eps", 1e-4, {"block": "v1"}, "expected 1e-06, since blocks v1 have no GRN"),
        ("grn_scope", "batch", {"block": "v1"}, "expected sample, since blocks v1 have no GRN"),
        ("decoder_depth", 1, {"method": "spark"}, "expected none, since spark has a decoder of its own"),
    ],
)
def test_a_field_without_a_meaning_is_named(field, value, given, expected):
    if "model" in given:
        pytest.importorskip("timm")
    with pytest.raises(InputError, match=expected) as error:
        Recipe(**given, **{field: value})
    assert error.value.argument == field


def test_a_resumed_run_keeps_its_recipe():
    saved = Recipe(epochs=7, seed=3)
    saved.refuse_change({"epochs": 7})
    with pytest.raises(InputError, match="epochs is 9: the run to resume has 7"):
        saved.refuse_change({"epochs": 9})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", ["atto"], "text"),
        ("epochs", "7", "a whole number"),
        ("batch_size", 2.5, "a whole number"),
        ("grad_accum_steps", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("base_lr", "1e-3", "a number"),
        ("warmup_epochs", [], "a number"),
        ("norm_pix_loss", "no", "True or False"),
    ],
)
def test_a_field_of_another_type_is_named(field, value, expected):
    with pytest.raises(InputError, match=f"expected {expected}$") as error:
        Recipe(**{field: value})
    assert error.value.argument == field
    assert repr(value) in str(error.value)
