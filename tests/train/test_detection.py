"""Detectors on pretrained networks: every kind of start, their features, odd sizes, and what is refused."""

from functools import partial

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
import timm
import torchvision
from small_runs import train
from torchvision.models.detection import maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.feature_extraction import create_feature_extractor

from sparsecnx.common.errors import InputError
from sparsecnx.models import ConvNeXtV2Encoder, convnextv2_atto
from sparsecnx.train.data.scale import IMAGENET_MEAN, IMAGENET_STD
from sparsecnx.transfer.detection import check_target, detector
from sparsecnx.transfer.features import load_pretrained

BOXES = [[5.0, 5.0, 40.0, 30.0], [20.0, 10.0, 60.0, 50.0]]
FEW = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}


def small(backbone, classes, kind="maskrcnn", **options):
    """Return a detector of few channels and few proposals."""
    few = FEW if kind == "maskrcnn" else {}
    return detector(backbone, classes, kind, **{"out_channels": 32, "min_size": 64, "max_size": 96, **few, **options})


def encoder(**options):
    return ConvNeXtV2Encoder(**{"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), **options})


def seen(*size, channels=3):
    """Return an image and its target of two objects."""
    masks = torch.zeros(2, *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, torch.tensor(BOXES).long(), strict=True):
        mask[top:bottom, left:right] = 1
    image = torch.rand(channels, *size, generator=torch.Generator().manual_seed(size[0]))
    return image, {"boxes": torch.tensor(BOXES), "labels": torch.tensor([1, 2]), "masks": masks}


def trains_and_detects(model, channels=3):
    """Take a step on images of odd sizes, one without objects, and check what the model then returns."""
    (first, target), (second, _) = seen(57, 83, channels=channels), seen(70, 61, channels=channels)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing["masks"] = torch.zeros(0, 70, 61, dtype=torch.uint8)
    losses = model.train()([first, second], [target, nothing])
    loss = sum(losses.values())
    assert loss.isfinite()
    loss.backward()
    gradients = [parameter.grad for parameter in model.backbone.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    with torch.no_grad():
        found = model.eval()([first, second])
    for image, one in zip((first, second), found, strict=True):
        height, width = image.shape[1:]
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"])
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert "masks" not in one or one["masks"].shape[2:] == (height, width)
    return found


@pytest.mark.parametrize("kind", ["maskrcnn", "retinanet"])
@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (encoder, 3),
        (partial(encoder, in_chans=1, stem=1), 1),  # strides 1 to 8
        (partial(timm.create_model, "resnet18", pretrained=False), 3),
        (partial(timm.create_model, "convnextv2_atto", features_only=True, out_indices=(1, 2)), 3),
    ],
    ids=["ours", "grey-strides-1-to-8", "resnet18", "two-maps"],
)
def test_both_detectors_train_and_find_boxes_on_any_network(kind, network, channels):
    torch.manual_seed(0)
    scale = {"image_mean": [0.5], "image_std": [0.2]} if channels == 1 else {}
    thresholds = {"box_score_thresh": 0.0} if kind == "maskrcnn" else {"score_thresh": 0.0}
    found = trains_and_detects(small(network(), classes=2, kind=kind, **scale, **thresholds), channels)
    assert all(len(one["boxes"]) for one in found)
    assert ("masks" in found[0]) == (kind == "maskrcnn")


def test_a_network_of_torchvision_is_a_backbone():
    nodes = {f"layer{number}.1": str(number) for number in (1, 2, 3, 4)}
    network = create_feature_extractor(torchvision.models.resnet18(), nodes)
    trains_and_detects(small(network, classes=2, kind="retinanet"))


@pytest.mark.parametrize("kind", ["maskrcnn", "retinanet"])
def test_levels_and_anchors_are_those_of_torchvision(kind):
    ours = detector(timm.create_model("resnet50"), classes=90, kind=kind).backbone
    builder = maskrcnn_resnet50_fpn if kind == "maskrcnn" else retinanet_resnet50_fpn
    theirs = builder(weights=None, weights_backbone=None)
    images = torch.zeros(1, 3, 64, 96)
    shapes = [[(name, level.shape) for name, level in one(images).items()] for one in (ours, theirs.backbone)]
    assert shapes[0] == shapes[1]
    assert {name: value.shape for name, value in ours.fpn.state_dict().items()} == {
        name: value.shape for name, value in theirs.backbone.fpn.state_dict().items()
    }
    model = detector(encoder(), classes=90, kind=kind)
    own, other = (one.rpn.anchor_generator if kind == "maskrcnn" else one.anchor_generator for one in (model, theirs))
    assert own.sizes == other.sizes and own.aspect_ratios == other.aspect_ratios
    heads = [{k: v.shape for k, v in one.state_dict().items() if "backbone" not in k} for one in (model, theirs)]
    assert heads[0] == heads[1]


def test_the_pyramid_sees_the_features_of_the_encoder():
    network = encoder().eval()
    images, maps = torch.rand(2, 3, 64, 96), []
    backbone = small(network, classes=1).eval().backbone
    backbone.fpn.register_forward_pre_hook(lambda _, args: maps.extend(args[0].values()))
    backbone(images)
    expected = network.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(expected) == 4
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"method": "spark", "model": "timm:resnet18"}, {"method": "fcmae", "model": "timm:resnet18"}]
)
def test_a_checkpoint_alone_starts_a_detector(options, photos, tmp_path):
    assert train(photos, tmp_path / "run", epochs=1, **options) == 0
    path = tmp_path / "run" / "last.pt"
    model = small(path, classes=2, kind="retinanet")
    assert all(module.training for module in model.modules())
    expected = load_pretrained(path).encoder.state_dict()
    held = model.backbone.body.state_dict()
    assert held.keys() == expected.keys() and all(torch.equal(held[name], value) for name, value in expected.items())
    assert (model.transform.image_mean, model.transform.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    trains_and_detects(model)


def test_a_file_of_weights_starts_a_detector_by_the_name_of_its_network(tmp_path):
    network = convnextv2_atto()
    torch.save({"model": network.state_dict()}, tmp_path / "checkpoint-best.pth")
    model = small(tmp_path / "checkpoint-best.pth", classes=2, model="atto")
    assert torch.equal(model.backbone.body.stages[0][0].dwconv.weight, network.stages[0][0].dwconv.weight)


def test_images_are_normalised_as_in_pretraining(photos, tmp_path):
    given = {"normalize": "dataset", "value_range": (0.0, 255.0), "mean": (0.4, 0.5, 0.6), "std": (0.25,)}
    assert train(photos, tmp_path / "run", epochs=1, **given) == 0
    transform = small(tmp_path / "run" / "last.pt", classes=2).transform
    assert (transform.image_mean, transform.image_std) == ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25))
    own = timm.create_model("mobilenetv3_small_050")
    own.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    assert small(own, classes=2).transform.image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "yolo"}, "kind is 'yolo': expected one of maskrcnn, retinanet"),
        ({"classes": 0}, "classes is 0: expected a whole number, 1 or more"),
        ({"model": "atto"}, "model is 'atto': expected none"),
        ({"minsize": 64}, "minsize is 64: MaskRCNN of torchvision has no such argument"),
        ({"image_std": (0, 1, 1)}, r"image_std is \(0, 1, 1\): expected numbers above 0"),
        ({"backbone": encoder(in_chans=2)}, r"image_mean is \(0.485, .*as many numbers as the network has channels, 2"),
        ({"backbone": encoder(ndim=3)}, "backbone is ConvNeXtV2Encoder: its strides are .*expected those of images"),
        ({"backbone": torch.nn.Linear(2, 2)}, "backbone is Linear: .*it has no convolution"),
        ({"backbone": "nowhere.pt"}, "checkpoint is nowhere.pt"),
    ],
)
def test_arguments_that_cannot_work_are_named(change, problem):
    with pytest.raises(InputError, match=problem):
        detector(**{"backbone": encoder(), "classes": 2, **change})


@pytest.mark.parametrize(
    ("entry", "value", "problem"),
    [
        ("boxes", [[0, 0, 81, 50], BOXES[0]], r'"boxes"\]\[0\] is .*not lie in the image; .* x2 <= 80 .* y2 <= 60'),
        ("boxes", [BOXES[0], [-1, 0, 10, 10]], r'"boxes"\]\[1\] is .*does not lie in the image'),
        ("boxes", [BOXES[0], [0, 0, float("nan"), 10]], r'"boxes"\]\[1\] is .*does not lie in the image'),
        ("boxes", [BOXES[0], [40, 30, 10, 10]], r'"boxes"\]\[1\] is .*has no area'),
        ("boxes", [0, 0, 10, 10], r'"boxes"\] is int64 \(4,\): expected floats \(N, 4\)'),
        ("labels", [0, 1], r'"labels"\]\[0\] is 0: expected 1 to 2'),
        ("labels", [1, 3], r'"labels"\]\[1\] is 3: expected 1 to 2'),
        ("labels", [1.0, 2.0], r'"labels"\] is float32 \(2,\): expected int64'),
        ("labels", [1], r'"labels"\] is int64 \(1,\): expected int64 \(2,\)'),
        ("labels", None, r'"labels"\] is missing'),
        ("masks", torch.zeros(2, 30, 40), r'"masks"\] is float32 \(2, 30, 40\): expected \(2, 60, 80\)'),
        ("masks", None, r'"masks"\] is missing'),
    ],
)
def test_a_target_that_does_not_fit_is_named(entry, value, problem):
    image, target = seen(60, 80)
    check_target(image, target, classes=2, masks=True)
    target = {name: values for name, values in target.items() if name != entry or value is not None}
    if value is not None:
        target[entry] = torch.as_tensor(value)
    with pytest.raises(InputError, match=r"^target\[" + problem):
        check_target(image, target, classes=2, masks=True)
    with pytest.raises(InputError, match=r"^targets\[1\]\[" + problem):
        small(encoder(), classes=2)([image, image], [seen(60, 80)[1], target])
    if entry == "masks":
        small(encoder(), classes=2, kind="retinanet")([image], [target])


def test_images_that_do_not_fit_are_named():
    model = small(encoder(), classes=2)
    (image, target), (grey, _) = seen(60, 80), seen(60, 80, channels=1)
    with pytest.raises(InputError, match=r"images\[1\] is \(1, 60, 80\): expected \(3, height, width\)"):
        model.eval()([image, grey])
    with pytest.raises(InputError, match="targets is None: expected one for each of 1 images"):
        model.train()([image])
    with pytest.raises(InputError, match="targets is a list of 2: expected one for each of 1 images"):
        model(images=[image], targets=[target, target])


def test_atto_is_a_backbone_with_its_head():
    assert len(small(convnextv2_atto(num_classes=3), classes=2).eval()([seen(60, 80)[0]])) == 1
