"""ConvNeXt V2 and FCMAE on signals, volumes and patches that are no squares: values, gradients, files, errors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import assert_close, assert_same, draw_mask

from sparsecnx import SparseTensor, load_encoder, models
from sparsecnx.common.errors import CheckpointError
from sparsecnx.compat import checkpoints
from sparsecnx.models import masked_dense
from sparsecnx.nn import ConvNeXtV2Block

SIZES = {"depths": (1, 1, 2, 1), "dims": (4, 6, 8, 8), "in_chans": 2}
# Options of the encoder, the stride that they make, and the grid of patches in the tests.
CASES = {
    "1-D": ({"ndim": 1, "kernel_size": 9}, (32,), (5,)),
    "2-D, oblong": ({"kernel_size": (3, 7), "stem": (2, 4), "strides": (1, 2, (2, 1))}, (8, 8), (2, 3)),
    "3-D": ({"ndim": 3, "kernel_size": 3, "stem": 2}, (16, 16, 16), (2, 1, 2)),
    "3-D, thick slices": (
        {"ndim": 3, "kernel_size": (1, 7, 7), "stem": (1, 4, 4), "strides": ((1, 2, 2), 2, 2)}, (4, 32, 32), (3, 2, 1)
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(("options", "stride", "grid"), CASES.values(), ids=list(CASES))


def encoder(options, **more):
    torch.manual_seed(0)
    return drawn(models.ConvNeXtV2Encoder(**SIZES, **options, **more))


def drawn(model):
    """Draw the parameters of GRN, which starts as the identity and would hide its errors."""
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model.double()


def images(stride, grid, batch=2):
    return torch.randn(batch, 2, *(cells * step for cells, step in zip(grid, stride, strict=True)), dtype=torch.float64)


def gradients(value, model):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value, list(model.parameters()), materialize_grads=True), strict=True))


@each_case
@pytest.mark.parametrize("kind", ["random counts", "an empty and a full image"])
def test_sparse_encoder_and_its_gradients_are_the_masked_dense_ones(options, stride, grid, kind):
    model, x, mask = encoder(options), images(stride, grid), draw_mask(kind, 2, grid, seed=2)
    assert model.stride == stride
    expected, found = masked_dense.forward_features(model, x, mask), model.forward_features(x, mask)
    for out, reference, info in zip(found, expected, model.feature_info, strict=True):
        assert out.layout.stride == info["strides"] and max(out.layout.stride) == info["reduction"]
        assert_close(out.dense(), reference, 1e-10)
    loss = sum(out.dense().square().sum() for out in found)
    assert_same(gradients(loss, model), gradients(sum(out.square().sum() for out in expected), model), 1e-8)


@each_case
def test_everything_visible_is_the_dense_network(options, stride, grid):
    torch.manual_seed(0)
    model, x = drawn(models.ConvNeXtV2(5, **SIZES, **options)), images(stride, grid)
    pixels = SparseTensor.from_dense(x, torch.zeros(2, *grid, dtype=torch.bool))
    assert_close(model(pixels), model(x), 1e-10)
    sites = model.forward_features(x)
    assert sites.shape == (2, 8, *grid)
    model.reset_classifier(3, "")
    assert_close(model(pixels).dense(), model(x), 1e-10)


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_volumes_depend_on_each_other_only_with_batch_scope(scope):
    options, stride, grid = CASES["3-D"]
    model, x, mask = encoder(options, grn_scope=scope), images(stride, grid), draw_mask("equal counts", 2, grid, seed=2)
    alone, together = model(x[:1], mask[:1]).dense(), model(x, mask).dense()[:1]
    assert torch.allclose(alone, together) == (scope == "sample")


@each_case
@pytest.mark.parametrize("factor", [1, 2], ids=["patch of the stride", "larger patch"])
def test_loss_and_gradients_of_fcmae_are_those_of_the_definition(options, stride, grid, factor):
    patch = tuple(factor * step for step in stride)
    model = drawn(models.FCMAE(encoder(options), None if factor == 1 else patch, decoder_dim=8))
    assert model.patch == patch
    x, mask = images(patch, grid), draw_mask("random counts", 2, grid, seed=2)
    loss, pred, returned = model(x, mask=mask.flatten(1))
    assert torch.equal(returned, mask.flatten(1)) and model.unpatchify(pred).shape == x.shape

    reference = copy.deepcopy(model)
    hidden = mask[:, None]
    for axis in range(2, hidden.ndim):
        hidden = hidden.repeat_interleave(factor, axis)
    encoded = reference.proj(masked_dense.forward_features(reference.encoder, x, mask)[-1])
    expected = reference.pred(reference.decoder(torch.where(hidden, reference.mask_token, encoded)))
    assert_close(pred, expected, 1e-10)
    errors = []
    for image, *cell in mask.nonzero().tolist():
        box = [slice(place * side, (place + 1) * side) for place, side in zip(cell, patch, strict=True)]
        target = x[(image, slice(None), *box)].movedim(0, -1).flatten()  # pixels in raster order, then channels
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((expected[(image, slice(None), *cell)] - target).square().mean())
    expected_loss = torch.stack(errors).mean()
    assert_close(loss, expected_loss, 1e-10)
    assert_same(gradients(loss, model), gradients(expected_loss, reference), 1e-8)


@each_case
def test_unpatchify_undoes_patchify(options, stride, grid):
    model, x = models.FCMAE(encoder(options), decoder_dim=8), images(stride, grid)
    assert torch.equal(model.unpatchify(model.patchify(x), grid), x)


def test_checkpointing_and_compiling_change_nothing():
    options, stride, grid = CASES["3-D, thick slices"]
    two_stages = {"depths": (1, 1), "dims": (4, 6), "in_chans": 2, "drop_path_rate": 0.5, **options, "strides": (2,)}
    model = drawn(models.FCMAE(models.ConvNeXtV2Encoder(**two_stages), stride, decoder_dim=8))
    x, mask = images(stride, grid), draw_mask("equal counts", 2, grid, seed=2)
    visible = int((~mask[0]).sum())

    def run(call):
        torch.manual_seed(1)
        return gradients(call(x, mask=mask, visible=visible)[0], model)

    expected = run(model)
    torch.compiler.reset()
    assert_same(run(torch.compile(model, fullgraph=True, backend="eager")), expected, 1e-10)
    model.set_grad_checkpointing()
    assert_same(run(model), expected, 1e-12)


@each_case
def test_files_hold_networks_of_any_dimensions(options, stride, grid, tmp_path):
    patch = tuple(2 * step for step in stride)
    model = drawn(models.FCMAE(encoder(options), patch, decoder_dim=8))
    torch.save(model.state_dict(), tmp_path / "run.pt")
    loaded = checkpoints.load(tmp_path / "run.pt").state_dict
    there = checkpoints.convert(loaded, "convnextv2")
    architecture = there.architecture
    built = {key: getattr(architecture, key) for key in ("depths", "dims", "in_chans")}
    again = models.ConvNeXtV2Encoder(**built, ndim=len(grid), **architecture.kernels._asdict()).double()
    again.load_state_dict(there.state_dict, strict=True)
    x, mask = images(stride, grid), draw_mask("random counts", 2, grid, seed=2)
    assert torch.equal(again(x, mask).features, model.encoder(x, mask).features)
    assert architecture.decoder.patch_size == (patch[0] if len(set(patch)) == 1 else patch)
    classifier = models.ConvNeXtV2(3, **SIZES, **options).double()
    assert set(load_encoder(classifier, tmp_path / "run.pt")) == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    assert torch.equal(classifier.forward_features(x, mask).features, model.encoder(x, mask).features)
    with pytest.raises(CheckpointError, match=r"has kernel .*: timm holds networks with the published kernels only"):
        checkpoints.convert(loaded, "timm")
    with pytest.raises(CheckpointError, match=r"with kernel .*: .* of the model is \(4, .*\), expected \(4, "):
        load_encoder(models.ConvNeXtV2Encoder(**SIZES, kernel_size=5), tmp_path / "run.pt")


def test_names_of_a_volume_network_are_the_published_ones():
    names = models.ConvNeXtV2(**SIZES).state_dict().keys()
    volumes = models.ConvNeXtV2(**SIZES, ndim=3).state_dict()
    assert volumes.keys() == names
    assert volumes["stages.0.0.dwconv.weight"].shape == (4, 1, 7, 7, 7)
    assert volumes["stages.0.0.grn.gamma"].shape == (1, 1, 1, 1, 16)
    models.ConvNeXtV2(**SIZES, ndim=3).to(memory_format=torch.channels_last_3d)  # takes no parameters of 4 dimensions
    with torch.device("meta"):
        model = models.create_fcmae("atto", in_chans=1, ndim=3, kernel_size=(3, 7, 7), stem=(2, 4, 4), decoder_dim=64)
    assert (model.stride, model.patch_size, model.patch) == ((16, 32, 32),) * 3
    assert model.pred.weight.shape == (16 * 32 * 32, 64, 1, 1, 1)


def test_timm_builds_networks_of_volumes():
    timm = pytest.importorskip("timm")
    options = {
        "ndim": 3,
        "in_chans": 2,
        "stem": (1, 2, 2),
        "kernel_size": 3,
        "depths": (1, 1, 1, 1),
        "dims": (4, 6, 8, 8),
    }
    network = timm.create_model("sparsecnx_convnextv2_atto", features_only=True, out_indices=(1, 3), **options)
    pixels = SparseTensor.from_dense(torch.randn(1, 2, 16, 32, 32), torch.tensor([[[[False, True]], [[True, False]]]]))
    assert [tuple(stage.shape) for stage in network(pixels)] == [(1, 6, 8, 8, 8), (1, 8, 2, 2, 2)]
    model = models.FCMAE(network, decoder_dim=8)
    assert model.patch == (8, 16, 16)


def small(**options):
    return models.ConvNeXtV2Encoder(**SIZES, **options)


VOLUME = torch.zeros(1, 2, 32, 32, 32)


@pytest.mark.parametrize("kind", [models.FCMAE, models.SparK])
def test_a_single_volume_whose_patches_are_in_a_line(kind):
    """A mask (1, 2, 1, 1) could be one of a batch of one or of a grid with an axis more."""
    model, volume = kind(small(ndim=3), decoder_dim=32), torch.randn(1, 2, 64, 32, 32)
    loss, pred, mask = model(volume, mask_ratio=0.5)
    assert loss.isfinite() and pred.shape[2:] == (2, 1, 1) and mask.sum() == 1
    given = model(volume, mask=mask.view(1, 1, 2, 1, 1))
    assert torch.equal(given[1], pred)


def test_a_number_of_visible_patches_needs_their_mask():
    with pytest.raises(ValueError, match="visible is 1: expected None without mask"):
        models.FCMAE(small(), decoder_dim=8)(torch.zeros(1, 2, 64, 64), visible=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(ndim=4), "ndim is 4: expected 1, 2 or 3"),
        (lambda: small(ndim=3, kernel_size=(7, 7)), "kernel_size is (7, 7): expected a positive number, or one for"),
        (lambda: small(ndim=3, kernel_size=(3, 4, 7)), "kernel_size is (3, 4, 7): expected an odd size"),
        (lambda: small(ndim=1, stem=(2, 4)), "stem is (2, 4): expected a positive number"),
        (lambda: small(ndim=3, stem=0), "stem is 0: expected a positive number, or one for each of 3 axes"),
        (lambda: small(strides=(2, 2)), "strides is (2, 2): expected one number, or 3 for 4 stages"),
        (lambda: small(ndim=3, strides=((1, 2), 2, 2)), "strides is (1, 2): expected a positive number, or one for"),
        (lambda: ConvNeXtV2Block(4, kernel_size=(3, 3, 3)), "kernel_size is (3, 3, 3): expected a positive number"),
        (lambda: small(ndim=3)(VOLUME[..., :16]), "images is (1, 2, 32, 32, 16): its sides must be at least 32"),
        (
            lambda: small(ndim=3, stem=(2, 4, 4))(VOLUME[:, :, :8]),
            "images is (1, 2, 8, 32, 32): its sides must be at least (16, 32, 32), the stride of the network",
        ),
        (lambda: small(ndim=3)(VOLUME[0]), "images is (2, 32, 32, 32): expected (B, 2, D, H, W) with B >= 1"),
        (lambda: small()(VOLUME), "images is (1, 2, 32, 32, 32): expected (B, 2, H, W) with B >= 1"),
        (
            lambda: small()(SparseTensor.from_dense(VOLUME, torch.zeros(1, 1, dtype=torch.bool))),
            "images is (1, 2, 32, 32, 32): expected (B, 2, H, W)",
        ),
        (
            lambda: small(ndim=3)(VOLUME, torch.zeros(1, 2, 1, 1, dtype=torch.bool)),
            "mask is (1, 2, 1, 1): its patches of (16, 32, 32) pixels must be a multiple of 32, the stride of",
        ),
        (
            lambda: models.FCMAE(small(ndim=3), (32, 32)),
            "patch_size is (32, 32): expected a multiple of 32 pixels on 3 axes, the stride of the encoder",
        ),
        (
            lambda: models.FCMAE(small(ndim=3, stem=(2, 4, 4)), (16, 32, 16)),
            "patch_size is (16, 32, 16): expected a multiple of (16, 32, 32) pixels on 3 axes",
        ),
        (
            lambda: models.FCMAE(small(ndim=3, stem=2), (16, 32, 16), decoder_dim=8)(VOLUME[..., :16, :]),
            "images is (1, 2, 32, 16, 32): its sides must be multiples of (16, 32, 16), the patch size",
        ),
        (
            lambda: ConvNeXtV2Block(2)(SparseTensor.from_dense(VOLUME, torch.zeros(1, 1, dtype=torch.bool))),
            "dwconv_weight is (2, 1, 7, 7): expected (2, 1, k, k, k)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
