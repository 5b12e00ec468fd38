"""ConvNeXt V2, and masked autoencoders around it and around other networks."""

from sparsecnx.models.classifier import ConvNeXtV2
from sparsecnx.models.convnextv2 import SIZES, ConvNeXtV2Encoder
from sparsecnx.models.factories import (
    convnextv2_atto,
    convnextv2_base,
    convnextv2_femto,
    convnextv2_huge,
    convnextv2_large,
    convnextv2_nano,
    convnextv2_pico,
    convnextv2_tiny,
    create_convnextv2,
    create_fcmae,
    fcmae_convnextv2_atto,
    fcmae_convnextv2_base,
    fcmae_convnextv2_femto,
    fcmae_convnextv2_huge,
    fcmae_convnextv2_large,
    fcmae_convnextv2_nano,
    fcmae_convnextv2_pico,
    fcmae_convnextv2_tiny,
)
from sparsecnx.models.fcmae import FCMAE
from sparsecnx.models.mpmae import MPMAE, MPMAEOutput
from sparsecnx.models.spark import SparK
from sparsecnx.models.targets import ClassificationTarget, ClassMapTarget, ImageTarget, RegressionTarget
from sparsecnx.models.timm_hook import register_with_timm

__all__ = [
    "FCMAE",
    "MPMAE",
    "SIZES",
    "ClassMapTarget",
    "ClassificationTarget",
    "ConvNeXtV2",
    "ConvNeXtV2Encoder",
    "ImageTarget",
    "MPMAEOutput",
    "RegressionTarget",
    "SparK",
    "convnextv2_atto",
    "convnextv2_base",
    "convnextv2_femto",
    "convnextv2_huge",
    "convnextv2_large",
    "convnextv2_nano",
    "convnextv2_pico",
    "convnextv2_tiny",
    "create_convnextv2",
    "create_fcmae",
    "fcmae_convnextv2_atto",
    "fcmae_convnextv2_base",
    "fcmae_convnextv2_femto",
    "fcmae_convnextv2_huge",
    "fcmae_convnextv2_large",
    "fcmae_convnextv2_nano",
    "fcmae_convnextv2_pico",
    "fcmae_convnextv2_tiny",
]

register_with_timm()
