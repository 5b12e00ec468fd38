"""Hold unmodified networks on SparseTensors to the same networks dense and masked after every function.

    python benchmarks/check_networks.py --page docs/networks-checked.md
    python benchmarks/check_networks.py --names resnet50 'regnet*'
    python benchmarks/check_networks.py --volumes --page docs/networks-checked-3d.md

Without names, these are `NETWORKS` of timm, `TORCHVISION`, and 2-D networks of MONAI, as far as these are installed.
Each runs at 64x96 pixels on a 2x3 grid with unequal counts, in float64, in training and in evaluation. Outputs have to
agree to 1e-10 and gradients and running statistics to 1e-8 with what `tests/masked_network.py` computes. The exit code
is 1 if any network runs and differs.

With `--volumes` these are networks of volumes and signals of dynamic-network-architectures (nnU-Net), MONAI and
torchvision, with few channels, at the settings that are written beside them. STU-Net is in no package: to have it too,
put the folder of `pretrain/STUNet.py`, from a checkout of AnatoMask, on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import math
import platform
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from measure import ROOT, say
from torch import Tensor
from torch.utils import _pytree as pytree

import sparsecnx
from sparsecnx import SparseTensor
from sparsecnx.geometry.masks import format_shape

sys.path.insert(0, str(ROOT / "tests"))
from masked_network import Unknown, differences

TORCHVISION = """
    resnet18 resnet50 resnext50_32x4d wide_resnet50_2 convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf shufflenet_v2_x0_5
    shufflenet_v2_x1_0 vgg11_bn vgg16 squeezenet1_0 googlenet inception_v3 efficientnet_b1 mnasnet0_75 regnet_x_800mf
    regnet_y_800mf resnet34 resnext101_32x8d shufflenet_v2_x1_5 densenet161 convnext_small
"""
OUTPUT_LIMIT, LIMIT = 1e-10, 1e-8
# The convolutional families of timm, several networks each, and some that attend over space. Those with EvoNorm and
# FilterResponseNorm are not among them: these layers compute in float32 whatever they are given. Nor is starnet_s100:
# the gradient of a bias before BatchNorm is zero but for rounding, of which torch's batch_norm leaves too much there.
NETWORKS = """
    resnet18 resnet34 resnet50 resnet18d resnet26t resnet50d resnet14t resnet50_gn resnetaa50 resnetblur18 resnetrs50
    seresnet50 legacy_seresnet18 seresnext26d_32x4d ecaresnet26t ecaresnet50d ecaresnetlight resnext50_32x4d
    wide_resnet50_2 res2net50_26w_4s res2next50 resnest14d resnest26d skresnet18 skresnet50 skresnext50_32x4d
    resnetv2_18 resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit
    resnet32ts resnet50_mlp gcresnet33ts bat_resnext26ts lambda_resnet26t botnet26t_256
    convnext_zepto_rms convnext_atto convnext_atto_ols convnext_pico convnext_tiny convnext_tiny_hnf
    convnextv2_atto convnextv2_femto convnextv2_tiny
    efficientnet_b0 efficientnet_b1 efficientnet_b0_gn efficientnet_lite0 efficientnet_es efficientnet_blur_b0
    efficientnet_cc_b0_4e efficientnetv2_rw_t tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0
    mnasnet_small mnasnet_100 semnasnet_100 mixnet_s fbnetc_100 spnasnet_100 tinynet_a tinynet_e hardcorenas_a
    mobilenetv1_100 mobilenetv2_050 mobilenetv2_100 mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv3_rw
    mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_aa_medium mobilenetv4_hybrid_medium lcnet_050
    lcnetv2_small fbnetv3_b ghostnet_050 ghostnet_100 ghostnetv2_100 ghostnetv3_050 rexnet_100 rexnetr_100
    regnetx_002 regnetx_008 regnety_002 regnety_004 regnety_008 regnetv_040 regnetz_005 regnetz_b16
    densenet121 densenet169 densenetblur121d rdnet_tiny vgg11 vgg11_bn vgg13_bn repvgg_a0 repvgg_b0 repvgg_d2se
    gernet_s mobileone_s0 repghostnet_050 repvit_m0_9 fastvit_t8 fastvit_sa12 starnet_s1 fasternet_t0
    nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 nf_resnet26 nf_regnet_b0 hrnet_w18_small hrnet_w18_small_v2 dla34 dla46_c
    dla60_res2net cs3darknet_s cs3darknet_focus_s cs3sedarknet_l cspresnet50 cspdarknet53 cspnext_tiny darknet17
    darknet53 sedarknet21 dpn48b dpn68 inception_next_atto inception_next_tiny inception_v3 xception41 legacy_xception
    vovnet39a ese_vovnet19b_dw hgnet_tiny hgnetv2_b0 selecsls42b tresnet_m convmixer_768_32
    mambaout_femto mambaout_kobe poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18 focalnet_tiny_srf
    edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientvit_b0 efficientformer_l1 csatv2 shvit_s1 swiftformer_xs
    pvt_v2_b0 hiera_tiny_224
    resnext26ts seresnet33ts regnetz_c16 regnetz_d8 resnet50_clip_gap resnet51q convnext_nano_ols cs3edgenet_x
    darknetaa53 cspresnext50 cs3sedarknet_xdw dla60x_c dla60_res2next tf_mixnet_s mobilenetv1_100h mobilenetv2_035
    efficientnet_x_b3 fastvit_s12 hgnetv2_b1 tf_mobilenetv3_large_minimal_100 mobilenetv4_conv_blur_medium
    nf_ecaresnet26 nf_seresnet26 regnety_040_sgn regnetx_004_tv repvit_m1 res2net50_14w_8s res2net50d
    resnest50d_1s4x24d resnet10t resnet50c resnet50s seresnet18 resnetaa34d resnetv2_18d legacy_seresnext26_32x4d
    skresnet50d starnet_s050 vgg13 eca_vovnet39b ese_vovnet19b_slim xception41p hrnet_w18_ssld mobileone_s1
    hardcorenas_b semnasnet_050
    mobilenet_edgetpu_100 mobilenet_edgetpu_v2_xs gc_efficientnetv2_rw_t efficientnet_b0_g8_gn efficientnet_b1_pruned
    ecaresnet50d_pruned tf_efficientnet_es tinynet_c mixnet_m mnasnet_050 tf_mobilenetv3_small_minimal_100 fbnetv3_d
    lcnet_100 mobilenetv4_conv_small_035 cpubone_nano resnet61q eca_resnext26ts regnetz_d32 regnetz_040 repvgg_b1g4
    resnetv2_50t resnet26d seresnext26t_32x4d ecaresnext26t_32x4d seresnetaa50d skresnet34 resnest50d_4s2x40d
    res2net50_48w_2s dla46x_c dpn68b xception65p vovnet57a ese_vovnet19b_slim_dw hgnet_small hgnetv2_b2
    cs3darknet_focus_m cs3se_edgenet_x cspnext_s darknet21 cspresnet50d repghostnet_080 ghostnet_130 repvit_m2
    rexnet_130 fasternet_t1 fastvit_t12 rdnet_small mambaout_tiny convnext_femto convnextv2_pico poolformer_s24
    nf_resnet50 nfnet_f0 nf_regnet_b1 nasnetalarge pnasnet5large efficientvit_m0 efficientvim_m1 lowformer_b0 iformer_t
    nextvit_small senet154 legacy_senet154 gernet_m hrnet_w30 densenet201
"""


@dataclass(frozen=True)
class Setting:
    """Images of some sides under a mask of random patches, other numbers of them in each image."""

    channels: int
    sides: tuple[int, ...]
    grid: tuple[int, ...]
    below_tile: str = "raise"

    def mask(self) -> Tensor:
        """Return bool `(2, *grid)`, True = masked: 2 patches visible of the first image, all but 2 of the second."""
        order = torch.rand(2, math.prod(self.grid), generator=torch.Generator().manual_seed(0)).argsort(1)
        mask = torch.ones_like(order, dtype=torch.bool)
        for image, kept in enumerate((2, order.shape[1] - 2)):
            mask[image, order[image, :kept]] = False
        return mask.view(2, *self.grid)

    def __str__(self) -> str:
        below = ', `below_tile="dense"`' if self.below_tile == "dense" else ""
        return f"{format_shape(self.sides)} in {format_shape(self.grid)} patches{below}"


PLANE = Setting(3, (64, 96), (2, 3))
VOLUME = Setting(1, (32, 32, 32), (2, 2, 2))
BELOW = Setting(1, (32, 32, 16), (4, 4, 2), "dense")  # patches of 8 under a stride of 16
THICK = Setting(1, (8, 32, 32), (2, 2, 2))  # slices that are thicker than their pixels
DEEP = Setting(1, (16, 64, 64), (1, 2, 2))
VIDEO = Setting(3, (16, 32, 32), (2, 2, 2))
SIGNAL = Setting(2, (160,), (5,))
Build = Callable[[], torch.nn.Module]
Networks = Iterator[tuple[str, Build, Setting]]


class Headless(torch.nn.Module):
    """A network without its head, for those whose head wants the image size of its training."""

    def __init__(self, network: torch.nn.Module, features: str) -> None:
        super().__init__()
        self.network, self.features = network, features

    def forward(self, x: Any) -> Any:
        return getattr(self.network, self.features)(x)


def timm_networks(patterns: Sequence[str]) -> Networks:
    """Yield networks of timm by name, for each pattern."""
    for pattern in patterns:
        for name in timm.list_models(pattern):
            yield name, lambda name=name: whole(timm.create_model(name)), PLANE


def whole(network: torch.nn.Module) -> torch.nn.Module:
    """Return a network, of VGG without its head, a 7x7 convolution."""
    return Headless(network, "forward_features") if type(network).__name__ == "VGG" else network


def torchvision_networks() -> Networks:
    from torchvision import models

    for name in TORCHVISION.split():
        network = models.get_model_builder(name)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name.startswith("vgg"):  # the head flattens a 7x7 map
            yield f"torchvision {name}", lambda network=network: network(weights=None).features, PLANE
        else:
            build = functools.partial(network, weights=None, **options)
            yield f"torchvision {name}", build, PLANE
    for name in ("lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_resnet50"):
        network = getattr(models.segmentation, name)
        yield f"torchvision {name}", functools.partial(network, weights=None, weights_backbone=None), PLANE


def monai_networks() -> Networks:
    from monai.networks import nets

    plane, maps = {"spatial_dims": 2, "in_channels": 3}, {"out_channels": 4}
    kernels, strides = [3, 3, 3, 3], [1, 2, 2, 2]
    dynamic = {**plane, **maps, "kernel_size": kernels, "strides": strides, "upsample_kernel_size": strides[1:]}
    blocks = {"block": "bottleneck", "layers": [1, 1, 1, 1], "block_inplanes": [16, 32, 64, 128]}
    networks = {
        "ResNet": lambda: nets.ResNet(**blocks, spatial_dims=2, n_input_channels=3, num_classes=4),
        "DenseNet121": lambda: nets.DenseNet121(**plane, **maps),
        "SEResNet50": lambda: nets.SEResNet50(**plane, num_classes=4),
        "EfficientNetBN": lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False),
        "UNet": lambda: nets.UNet(**plane, **maps, channels=(8, 16, 32), strides=(2, 2), num_res_units=1),
        "BasicUNet": lambda: nets.BasicUNet(**plane, **maps, features=(8, 8, 16, 32, 32, 8)),
        "SegResNet": lambda: nets.SegResNet(**plane, **maps, init_filters=8),
        "DynUNet": lambda: nets.DynUNet(**dynamic),
        "AttentionUnet": lambda: nets.AttentionUnet(**plane, **maps, channels=(8, 16, 32), strides=(2, 2)),
        "SegResNetDS": lambda: nets.SegResNetDS(**plane, **maps, init_filters=8),
        "SEResNext50": lambda: nets.SEResNext50(**plane, num_classes=4),
        "HighResNet": lambda: nets.HighResNet(**plane, **maps),
    }
    for name, build in networks.items():
        yield f"MONAI {name}", build, PLANE


def nnunet_networks() -> Networks:
    """Yield networks of volumes of dynamic-network-architectures, with the layers of nnU-Net's plans."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from dynamic_network_architectures.building_blocks.residual import BottleneckD
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
    from torch import nn

    whole, thick = [[1] * 3, [2] * 3, [2] * 3, [2] * 3, [2] * 3], [[1] * 3, [1, 2, 2], [2] * 3, [2] * 3]

    def of(network: Any, strides: Any, **options: Any) -> Build:
        stages = len(strides)
        norm = {"conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
        act = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
        kernels = [[1, 3, 3] if strides is thick else [3] * 3, *[[3] * 3] * (stages - 1)]
        sizes = {"features_per_stage": [8, 16, 16, 24, 24][:stages], "kernel_sizes": kernels, "strides": strides}
        common = {"input_channels": 1, "n_stages": stages, "conv_op": nn.Conv3d, **sizes, **norm, **act, **options}
        return lambda: network(**common)

    blocks = {"n_blocks_per_stage": [1, 2, 1, 1, 1]}
    decoder = {"num_classes": 2, "n_conv_per_stage_decoder": [1] * 4, "deep_supervision": True}
    bottleneck = {"block": BottleneckD, "bottleneck_channels": [4, 4, 8, 8], "return_skips": True}
    short = {"n_blocks_per_stage": [1, 2, 1, 1], "return_skips": True}
    yield "ResidualEncoderUNet", of(ResidualEncoderUNet, whole, **blocks, **decoder), VOLUME
    yield "ResidualEncoderUNet, blocks below the stride", of(ResidualEncoderUNet, whole, **blocks, **decoder), BELOW
    yield "ResidualEncoder, thick slices", of(ResidualEncoder, thick, **short), THICK
    yield "ResidualEncoder of bottlenecks", of(ResidualEncoder, thick, **{**short, **bottleneck}), THICK
    yield "PlainConvUNet", of(PlainConvUNet, whole, n_conv_per_stage=2, **decoder), VOLUME


def volume_networks() -> Networks:
    """Yield networks of volumes and signals of MONAI."""
    from monai.networks import nets
    from monai.networks.nets.segresnet_ds import SegResEncoder
    from torch.nn import Sequential

    volume, maps = {"spatial_dims": 3, "in_channels": 1}, {"out_channels": 2}
    filters = {"init_filters": 8, "blocks_down": (1, 2, 1)}
    slices: dict[str, Any] = {"conv1_t_size": (3, 7, 7), "conv1_t_stride": (1, 2, 2)}
    dynamic = {**volume, **maps, "filters": [8, 8, 16], "kernel_size": [(1, 3, 3), 3, 3], "strides": [1, (1, 2, 2), 2]}
    next_blocks = {f"{part}_expansion_ratio": 2 for part in ("encoder", "decoder", "bottleneck")}
    next_blocks |= {"blocks_down": (1, 1), "blocks_up": (1, 1), "blocks_bottleneck": 1, "init_filters": 8}

    def resnet(kind: str, dims: int, **options: Any) -> Build:
        widths = {"layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 16], "num_classes": 3}
        return lambda: nets.ResNet(kind, **widths, spatial_dims=dims, **options)

    def mednext() -> torch.nn.Module:
        network = nets.MedNeXt(**volume, **maps, kernel_size=3, **next_blocks)
        stages = [part for pair in zip(network.enc_stages, network.down_blocks, strict=True) for part in pair]
        return Sequential(network.stem, *stages, network.bottleneck)

    yield "MONAI ResNet, thick slices", resnet("bottleneck", 3, n_input_channels=1, **slices), DEEP
    yield "MONAI ResNet, stride 16", resnet("basic", 3, n_input_channels=1, conv1_t_stride=1), VOLUME
    yield "MONAI ResNet of signals", resnet("basic", 1, n_input_channels=2), SIGNAL
    yield "MONAI SegResNet", lambda: nets.SegResNet(**volume, **maps, **filters, blocks_up=(1, 1)), VOLUME
    yield "MONAI SegResEncoder", lambda: SegResEncoder(**volume, **filters), VOLUME
    yield (
        "MONAI SegResNetDS, thick slices",
        lambda: nets.SegResNetDS(**volume, **maps, **filters, resolution=(3, 1, 1), dsdepth=2),
        THICK,
    )
    yield "MONAI MedNeXt, its encoder", mednext, VOLUME
    yield "MONAI MedNeXt", lambda: nets.MedNeXt(**volume, **maps, kernel_size=3, **next_blocks), VOLUME
    yield "MONAI DynUNet, thick slices", lambda: nets.DynUNet(**dynamic, upsample_kernel_size=[(1, 2, 2), 2]), THICK
    yield (
        "MONAI UNet",
        lambda: nets.UNet(**volume, **maps, channels=(8, 16, 16), strides=(2, 2), num_res_units=1),
        VOLUME,
    )
    yield "MONAI UNet of signals", lambda: nets.UNet(1, 2, 2, (8, 16, 16), (2, 2), num_res_units=1), SIGNAL
    yield "MONAI AttentionUnet", lambda: nets.AttentionUnet(**volume, **maps, channels=(8, 16), strides=(2,)), VOLUME
    yield "MONAI VNet", lambda: nets.VNet(**volume, **maps), VOLUME
    yield (
        "MONAI DenseNet",
        lambda: nets.DenseNet(**volume, **maps, init_features=8, growth_rate=8, block_config=(1, 2, 1)),
        VOLUME,
    )


def video_networks() -> Networks:
    """Yield networks of videos of torchvision, and the encoder of STU-Net as `volumes.py` has it."""
    from torchvision.models import video
    from volumes import STUNet

    yield "STU-Net, its encoder", lambda: STUNet((8, 8, 16, 16, 16, 16)), VOLUME
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        yield f"torchvision {name}", functools.partial(getattr(video, name), weights=None), VIDEO


def stunet_networks() -> Networks:
    """Yield STU-Net whole from AnatoMask's file, with the strides of its pretraining."""
    from STUNet import STUNet

    def build() -> torch.nn.Module:
        strides, kernels = [[2] * 3] * 4 + [[1] * 3], [[3] * 3] * 6
        return STUNet(1, 2, dims=[8, 8, 16, 16, 16, 16], pool_op_kernel_sizes=strides, conv_kernel_sizes=kernels)

    yield "STU-Net, AnatoMask's STUNet.py", build, VOLUME
    yield "STU-Net, AnatoMask's STUNet.py, blocks below the stride", build, BELOW


def on_sparse_tensors(network: torch.nn.Module, images: Tensor, setting: Setting) -> Any:
    """Return what the network answers for a SparseTensor, dense."""
    out = network(SparseTensor.from_dense(images, setting.mask(), below_tile=setting.below_tile))
    return pytree.tree_map(
        lambda y: y.dense() if isinstance(y, SparseTensor) else y, out, is_leaf=lambda y: isinstance(y, SparseTensor)
    )


def compare(network: torch.nn.Module, setting: Setting) -> tuple[str, str]:
    """Return what came of a network, "equal", "differs", "raises" or "no reference", and the error in words."""
    torch.manual_seed(0)
    with torch.no_grad():  # layer scales and GRN start near zero, where a wrong branch goes unnoticed
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for module in network.modules():  # dropout draws one number for each visible element, so other ones
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    images, worst, outputs = torch.randn(2, setting.channels, *setting.sides, dtype=torch.float64), 0.0, 0.0
    network.double()

    def sparse(copied: torch.nn.Module, x: Tensor) -> Any:
        return on_sparse_tensors(copied, x, setting)

    # Evaluation takes statistics of these images: with means of 0 and variances of 1 some gradients reach 1e11.
    momenta = {norm: norm.momentum for norm in network.modules() if getattr(norm, "running_mean", None) is not None}
    try:
        with torch.no_grad():
            for norm in momenta:
                norm.momentum = 1.0
            network.train()(images)
    except Exception as error:
        return "no reference", f"not at this size: {error}"
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    for training in (True, False):
        try:
            errors = differences(network.train(training), images, setting.mask(), sparse, setting.below_tile)
        except Unknown as error:
            return "no reference", str(error)
        except Exception as error:
            return "raises", str(error).partition("\n")[0]
        if not max(errors.values()) <= LIMIT:
            name = max(errors, key=lambda name: errors[name])
            return "differs", f"{name} by {errors[name]:.1e}, training is {training}"
        worst = max(worst, *errors.values())
        outputs = max(outputs, *(error for name, error in errors.items() if name.startswith("output")))
    if not outputs <= OUTPUT_LIMIT:
        return "differs", f"the output by {outputs:.1e}"
    return "equal", f"{outputs:.0e}, {worst:.0e}"


def run_all(networks: Iterable[tuple[str, Build, Setting]], settings: dict[str, Setting]) -> dict[str, tuple[str, str]]:
    """Compare networks, note their settings by name, and return what came of each."""
    found = {}
    for name, build, settings[name] in networks:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = compare(build(), settings[name])
        say(f"{name}: {': '.join(found[name])}")
    return found


def write_page(path: Path, found: dict[str, tuple[str, str]], settings: dict[str, Setting]) -> None:
    """Write the table of networks, equal ones first; with their settings if these differ."""
    title, place = "# Networks that were held to", f"at {format_shape(PLANE.sides)} pixels on a 2x3 grid"
    shown, why = {name: f"`{name}`" for name in found}, "Most attend over space. "
    differing = set(settings.values()) != {PLANE}
    if differing:
        title, place = "# Networks of volumes and signals that were held to", "at the setting beside it"
        shown, why = {name: f"{name} ({setting})" for name, setting in settings.items()}, ""
    equal = [shown[name] for name, (status, _) in found.items() if status == "equal"]
    in_a_row = textwrap.fill(", ".join(equal) + ".", 120, break_on_hyphens=False)
    listed = [f"- {name}" for name in equal] if differing else [in_a_row]
    others = {shown[name]: reason for name, (status, reason) in found.items() if status == "raises"}
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "timm", "torchvision", "monai", "dynamic-network-architectures")
        if importlib.util.find_spec(name.replace("-", "_"))
    )
    command = " ".join(["python benchmarks/check_networks.py", *sys.argv[1:]])
    lines = [
        title,
        "",
        f"Written by `{command}` on {datetime.now(timezone.utc):%Y-%m-%d}, with sparsecnx {sparsecnx.__version__}, "
        f"{versions}, Python {platform.python_version()}.",
        f"Each network ran as it is made, {place} with unequal counts, in float64, in training",
        f"and in evaluation. Outputs agree to {OUTPUT_LIMIT:g} with the same network dense and masked after every",
        f"function, gradients and running statistics to {LIMIT:g}.",
        "",
        f"## {len(equal)} are equal",
        "",
        *listed,
        "",
        f"## {len(others)} raise",
        "",
        f"{why}[functions.md](functions.md) says what has no meaning on visible sites.",
        "",
        "| network | error |",
        "|---|---|",
    ]
    lines += [f"| {name} | {shortened(reason)} |" for name, reason in others.items()]
    path.write_text("\n".join(lines) + "\n")


def shortened(reason: str) -> str:
    """Return the first part of an error without the path of the caller."""
    function, called, rest = reason.partition(", called at ")
    reason = f"{function}: {rest.partition(': ')[2]}" if called else reason
    reason = reason.partition(";")[0].replace("|", "/")
    return reason if len(reason) < 130 else f"{reason[:127]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--names", nargs="+", default=[], help="names of timm, with wildcards")
    parser.add_argument("--volumes", action="store_true", help="networks of volumes and signals")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the result as a page of the documentation")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings: dict[str, Setting] = {}
    libraries: dict[str, Callable[[], Networks]] = {"torchvision": torchvision_networks, "monai": monai_networks}
    found = {}
    if options.volumes:
        libraries = {"torchvision": video_networks, "monai": volume_networks}
        libraries |= {"dynamic_network_architectures": nnunet_networks, "STUNet": stunet_networks}
    else:
        found = run_all(timm_networks(options.names or NETWORKS.split()), settings)
    for library, networks in libraries.items():
        if not options.names and importlib.util.find_spec(library):
            found |= run_all(networks(), settings)
    differ = [name for name, (status, _) in found.items() if status == "differs"]
    if options.page:
        write_page(options.page, found, settings)
    counts = {kind: sum(status == kind for status, _ in found.values()) for kind in ("equal", "raises", "no reference")}
    print(f"{counts}, differ: {', '.join(differ) or 'none'}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
