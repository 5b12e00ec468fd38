"""`sparsecnx.models.SparK` and `FCMAE` around any network: values, gradients, encoders, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, assert_same, draw_mask
from masked_network import run_masked

from sparsecnx import SparseTensor, models
from sparsecnx.models.encoders import stages_of

timm = pytest.importorskip("timm")


def small_resnet(**options):
    """Build a ResNet of timm with four stages of one block and few channels."""
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8, num_classes=0, **options).double()


def small_convnext():
    from timm.models.convnext import ConvNeXt

    torch.manual_seed(0)
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), ls_init_value=None, num_classes=0).double()


def small_spark(encoder, **options):
    model = models.SparK(encoder, decoder_dim=64, **options).double()
    for parameter in model.parameters():  # norms that are the identity and biases of zero would hide errors
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def images(height: int = 64, width: int = 96, batch: int = 2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def expected_loss(model, x, mask):
    """Compute SparK's loss from its definition, dense and masked: mask (B, *grid), True = masked."""
    p, patch = dict(model.named_parameters()), x.shape[2] // mask.shape[1]
    strides = [32, 16, 8, 4]

    def features(images):
        return model.encoder.forward_intermediates(images, intermediates_only=True)

    maps = run_masked(features, x, mask, model.below_tile)[:-5:-1]
    image = torch.zeros((), dtype=x.dtype)
    for level in range(5):
        if level < 4:
            hidden = mask.new_zeros(len(mask), x.shape[2] // strides[level], x.shape[3] // strides[level])
            if strides[level] <= patch:
                hidden = mask.repeat_interleave(patch // strides[level], 1).repeat_interleave(
                    patch // strides[level], 2
                )
            visible = maps[level].movedim(1, -1)[~hidden]  # (sites, C)
            weight, bias = (p.get(f"densify_norms.{level}.{name}") for name in ("weight", "bias"))
            if isinstance(model.densify_norms[level], torch.nn.BatchNorm2d):
                visible = (visible - visible.mean(0)) / (visible.var(0, correction=0) + 1e-5).sqrt() * weight + bias
            elif weight is not None:
                visible = F.layer_norm(visible, weight.shape, weight, bias, 1e-6)
            filled = p[f"mask_tokens.{level}"].expand_as(maps[level]).movedim(1, -1).clone()
            filled[~hidden] = visible
            kernel = p[f"densify_projs.{level}.weight"]
            image = image + F.conv2d(filled.movedim(-1, 1), kernel, p[f"densify_projs.{level}.bias"], padding="same")
        block = f"decoder.dec.{level}"
        up = F.conv_transpose2d(image, p[f"{block}.up_sample.weight"], p[f"{block}.up_sample.bias"], 2, 1)
        for conv, norm in ((0, 1), (3, 4)):
            up = F.conv2d(up, p[f"{block}.conv.{conv}.weight"], padding=1)
            up = F.batch_norm(up, None, None, p[f"{block}.conv.{norm}.weight"], p[f"{block}.conv.{norm}.bias"], True)
            up = up.clamp(0, 6) if conv == 0 else up
        image = up
    image = F.conv2d(image, p["decoder.proj.weight"], p["decoder.proj.bias"])
    errors = []
    for i, row, column in mask.nonzero().tolist():
        place = (i, slice(None), slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
        target = x[place]
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((image[place] - target).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize(
    "build, options, grid",
    [
        (small_resnet, {}, (2, 3)),
        (small_convnext, {}, (2, 3)),
        (small_resnet, {"densify_norm": "none"}, (2, 3)),
        (small_resnet, {"patch_size": 16, "below_tile": "dense"}, (4, 6)),
        (small_resnet, {"patch_size": 64}, (1, 2)),
    ],
    ids=["resnet", "convnext", "without norms", "patches below the stride", "patches above the stride"],
)
def test_loss_and_gradients_are_those_of_the_definition(build, options, grid):
    model = small_spark(build(), **options)
    patch = options.get("patch_size", 32)
    x, mask = images(grid[0] * patch, grid[1] * patch), draw_mask("random counts", 2, grid, seed=2)
    assert mask.any() and not mask.all()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference = copy.deepcopy(model)
    loss, _, returned = model(x, mask=mask)
    expected = expected_loss(reference, x, mask)
    assert torch.equal(returned, mask.flatten(1))
    assert_close(loss, expected, 1e-10)
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    others = [dict(reference.named_parameters())[name] for name in parameters]
    gradients = torch.autograd.grad(expected, others, materialize_grads=True)
    assert_same(dict(zip(parameters, found, strict=True)), dict(zip(parameters, gradients, strict=True)), 1e-8)
    buffers = dict(reference.encoder.named_buffers())
    assert_same(dict(model.encoder.named_buffers()), buffers, 1e-10)


def test_below_the_patch_no_token_is_learned():
    model = small_spark(small_resnet(), patch_size=16, below_tile="dense")
    assert [token.requires_grad for token in model.mask_tokens] == [False, True, True, True]


TIMM = ["resnet50", "convnext_tiny", "efficientnet_b0", "mobilenetv3_large_100", "regnety_004", "densenet121"]


@pytest.mark.parametrize("name", TIMM)
def test_encoder_loads_strictly_into_the_unmodified_network(name):
    with torch.device("meta"):
        model = models.SparK(timm.create_model(name, num_classes=0))
        timm.create_model(name, num_classes=0).load_state_dict(model.encoder.state_dict(), strict=True)
        assert model.stride == 32 and len(model.mask_tokens) == 4
        fcmae = models.FCMAE(timm.create_model(name, num_classes=0))
        timm.create_model(name, num_classes=0).load_state_dict(fcmae.encoder.state_dict(), strict=True)


def test_parameters_have_the_published_names():
    names = {name.rsplit(".", 1)[0] for name in small_spark(small_resnet()).state_dict() if "encoder." not in name}
    levels = [f"{part}.{level}" for part in ("densify_norms", "densify_projs") for level in range(4)]
    blocks = [f"dec.{i}.{part}" for i in range(5) for part in ("up_sample", "conv.0", "conv.1", "conv.3", "conv.4")]
    assert names == {"mask_tokens", *levels, *(f"decoder.{part}" for part in (*blocks, "proj"))}


def test_random_masks_and_predictions_are_those_of_fcmae():
    x = images()
    results = []
    for model in (small_spark(small_resnet()), models.FCMAE(small_resnet(), decoder_dim=16).double()):
        loss, pred, mask = model(x, mask_ratio=0.6, generator=torch.Generator().manual_seed(1))
        assert pred.shape == (2, 3072, 2, 3) and model.unpatchify(pred).shape == x.shape
        assert_close(model.reconstruction_loss(x, pred, mask), loss)
        results.append(mask)
    assert torch.equal(*results)
    assert (~results[0]).sum(1).tolist() == [2, 2]  # int(6 * 0.4)


class Homemade(torch.nn.Module):
    """Four stages of two strides of 2, and whatever `answer` makes of their maps."""

    def __init__(self, answer, channels=3):
        super().__init__()
        self.stages = torch.nn.ModuleList(
            torch.nn.Conv2d(channels if i == 0 else 8, 8, 4 if i == 0 else 2, stride=4 if i == 0 else 2)
            for i in range(4)
        )
        self.answer = answer

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(stage(maps[-1] if maps else x).relu())
        return self.answer(maps)


class Stack(torch.nn.ModuleList):
    """Convolutions whose outputs are the maps."""

    def forward(self, x):
        maps = []
        for conv in self:
            x = conv(x).relu()
            maps.append(x)
        return maps


@pytest.mark.parametrize(
    ("answer", "levels"),
    [(tuple, 4), (lambda maps: dict(zip("abcd", maps, strict=True)), 4), (lambda maps: maps[-1], 1)],
    ids=["tuple", "dict", "one map"],
)
def test_homemade_encoders_answer_maps(answer, levels):
    torch.manual_seed(0)
    model = models.SparK(Homemade(answer, channels=5), decoder_dim=64)
    assert len(model.mask_tokens) == levels
    assert model.in_chans == 5 and model.stride == 32
    loss, pred, _ = model(torch.randn(2, 5, 64, 96))
    loss.backward()
    assert pred.shape == (2, 5 * 32 * 32, 2, 3)
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("ndim", "patch", "below_tile", "first"),
    [
        (1, 8, "raise", 2),
        (3, 8, "raise", 2),
        (2, (8, 16), "raise", 2),
        (3, 4, "dense", 2),
        (3, (4, 8, 8), "raise", (1, 2, 2)),
        (3, 4, "dense", (1, 2, 2)),
    ],
    ids=["1-D", "3-D", "oblong patches", "3-D below the patch", "thick slices", "thick slices below the patch"],
)
def test_any_dimensions_and_patches(ndim, patch, below_tile, first):
    torch.manual_seed(0)
    kind, extents = getattr(torch.nn, f"Conv{ndim}d"), (16, 32, 16)[:ndim]
    stages = [kind(2 if i == 0 else 8, 8, 3, stride=first if i == 0 else 2, padding=1) for i in range(3)]
    model = models.SparK(Stack(stages), patch, decoder_dim=32, densify_norm="none", below_tile=below_tile).double()
    x = torch.randn(2, 2, *extents, dtype=torch.float64)
    grid = model.grid(x)
    mask = draw_mask("random counts", 2, grid, seed=2)
    reference = copy.deepcopy(model)
    loss, pred, _ = model(x, mask=mask)
    filled = []
    for token, features in zip(
        reference.mask_tokens, run_masked(reference.encoder, x, mask, below_tile)[::-1], strict=True
    ):
        hidden = mask if token.requires_grad else torch.zeros_like(mask[(0, *(slice(1),) * ndim)])[None]
        for axis in range(ndim):
            hidden = hidden.repeat_interleave(features.shape[2 + axis] // hidden.shape[1 + axis], 1 + axis)
        filled.append(torch.where(hidden[:, None], token, features))
    image = reference.decoder([proj(map_) for proj, map_ in zip(reference.densify_projs, filled, strict=True)])
    assert_close(model.unpatchify(pred), image, 1e-10)
    expected = reference.reconstruction_loss(x, reference.patchify(image).mT.unflatten(2, grid), mask.flatten(1))
    assert_close(loss, expected, 1e-10)
    gradients = [
        torch.autograd.grad(value, list(m.encoder.parameters())) for value, m in ((loss, model), (expected, reference))
    ]
    for found, gradient in zip(*gradients, strict=True):
        assert_close(found, gradient, 1e-8)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_encoders_of_torchvision_and_features_only():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    network = torchvision.models.resnet18(weights=None)
    stages = create_feature_extractor(network, [f"layer{i}" for i in range(1, 5)])
    plain, wrapped = (timm.create_model("resnet18", features_only=only, num_classes=0) for only in (False, True))
    shared = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    x, losses = images().float(), []
    for encoder in (stages, plain, wrapped):
        encoder.load_state_dict(shared)
        torch.manual_seed(1)
        losses.append(models.SparK(encoder, decoder_dim=64)(x, generator=torch.Generator().manual_seed(1))[0])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[0].item() == pytest.approx(losses[2].item(), rel=1e-5)


def test_fcmae_of_any_encoder_is_the_definition():
    model = models.FCMAE(small_resnet(), decoder_dim=16).double()
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.shape[:3] == (1, 1, 1):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    x, mask = images(), draw_mask("random counts", 2, (2, 3), seed=2)
    reference = copy.deepcopy(model)
    loss, pred, _ = model(x, mask=mask)
    encoded = run_masked(reference.encoder.forward_features, x, mask)
    expected = reference.pred(
        reference.decoder(torch.where(mask[:, None], reference.mask_token, reference.proj(encoded)))
    )
    assert_close(pred, expected, 1e-10)
    found = torch.autograd.grad(loss, list(model.encoder.parameters()))
    gradients = torch.autograd.grad(
        reference.reconstruction_loss(x, expected, mask.flatten(1)), list(reference.encoder.parameters())
    )
    names = [name for name, _ in model.encoder.named_parameters()]
    assert_same(dict(zip(names, found, strict=True)), dict(zip(names, gradients, strict=True)), 1e-8)


def test_gradient_checkpointing_computes_the_same():
    model, mask = small_spark(small_resnet()), draw_mask("random counts", 2, (2, 3), seed=2)
    x, parameters = images(), list(model.parameters())
    expected = torch.autograd.grad(model(x, mask=mask)[0], parameters)
    model.set_grad_checkpointing()
    found = torch.autograd.grad(model(x, mask=mask)[0], parameters)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-10)
    with pytest.raises(TypeError, match="encoder is a Homemade: it has no set_grad_checkpointing"):
        models.SparK(Homemade(tuple), decoder_dim=64).set_grad_checkpointing()


def test_compiled_model_is_the_eager_one():
    model, mask = small_spark(Homemade(tuple)), draw_mask("equal counts", 2, (2, 3), seed=2)
    x, parameters, visible = images(), dict(model.named_parameters()), int((~mask[0]).sum())

    def run(call):
        loss, pred, _ = call(x, mask=mask, visible=visible)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {"loss": loss, "pred": pred, **dict(zip(parameters, gradients, strict=True))}

    torch.compiler.reset()
    assert_same(run(torch.compile(model, fullgraph=True, backend="eager")), run(model), 1e-8)


class Logits(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x).mean((2, 3))


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: models.SparK(lambda x: x), TypeError, "encoder is a function: expected a module"),
        (lambda: models.SparK(torch.nn.ReLU()), ValueError, "encoder is a ReLU: it has no convolution"),
        (
            lambda: models.SparK(Logits(Homemade(lambda maps: maps[-1]))),
            ValueError,
            r"encoder is a Logits: it returned \(1, 8\) for images \(1, 3, 64, 64\), expected a feature map; a network",
        ),
        (
            lambda: models.SparK(Homemade(lambda maps: maps[-1].flatten(2))),
            ValueError,
            "encoder is a Homemade, which does not run on visible pixels: .*flatten",
        ),
        (
            lambda: models.SparK(timm.create_model("vit_tiny_patch16_224", depth=1)),
            ValueError,
            "encoder is a VisionTransformer, which does not run on visible pixels: (flatten|reshape|view) on a Sparse",
        ),
        (
            lambda: models.FCMAE(timm.create_model("coatnet_pico_rw_224", num_classes=0)),
            ValueError,
            "encoder is a MaxxVit, which does not run on visible pixels: .* on a SparseTensor, called at",
        ),
        (
            lambda: models.SparK(small_resnet(), 16),
            ValueError,
            "patch_size is 16: expected a multiple of 32 pixels on 2 axes, the stride of the encoder, a ResNet; "
            "below_tile='dense'",
        ),
        (lambda: models.SparK(small_resnet(), 0), ValueError, "patch_size is 0: expected a multiple of 32"),
        (lambda: models.FCMAE(small_resnet(), 48), ValueError, "patch_size is 48: expected a multiple of 32"),
        (lambda: models.SparK(small_resnet(), levels=0), ValueError, "levels is 0: expected 1 or more"),
        (
            lambda: models.SparK(small_resnet(), decoder_dim=100),
            ValueError,
            "decoder_dim is 100: expected a multiple of 32",
        ),
        (
            lambda: models.SparK(small_resnet(), densify_norm="bn"),
            ValueError,
            "densify_norm is 'bn': expected one of batch",
        ),
        (
            lambda: models.SparK(Homemade(lambda maps: [maps[0], maps[3]])),
            ValueError,
            r"encoder is a Homemade with feature maps of strides \(4, 32\): expected powers of 2 that double",
        ),
    ],
)
def test_what_does_not_fit_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_learning_whether_an_encoder_runs_changes_nothing():
    encoder = small_resnet()
    before, seed = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    stages_of(encoder)
    assert encoder.training and torch.equal(seed, torch.get_rng_state())
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_images_that_do_not_fit_are_named():
    model = small_spark(small_resnet(), patch_size=64)
    with pytest.raises(
        ValueError, match=r"images is \(2, 3, 96, 64\): its sides must be multiples of 64, the patch size"
    ):
        model(images(96, 64))
    with pytest.raises(ValueError, match=r"images is \(2, 4, 64, 64\): expected \(B, 3, H, W\)"):
        model(torch.randn(2, 4, 64, 64))


def test_classifier_of_visible_pixels_pools_over_them():
    model, x, mask = models.convnextv2_atto(num_classes=3).double(), images(), draw_mask("random counts", 2, (2, 3), 2)
    pixels = SparseTensor.from_dense(x, mask)
    last = model.forward_features(pixels).dense()
    counts = (~mask).flatten(1).sum(1, keepdim=True)
    assert_close(model(pixels), model.head(model.norm(last.sum((2, 3)) / counts)), 1e-10)
