"""ConvNeXt V2 and its masked autoencoder by the names of their sizes."""

from __future__ import annotations

from typing import Any

from sparsecnx.models.convnextv2 import ConvNeXtV2, ConvNeXtV2Encoder, get_size
from sparsecnx.models.fcmae import FCMAE


def create_convnextv2(
    size: str, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build the classifier of a named size; options are those of `ConvNeXtV2` and `ConvNeXtV2Encoder`.

    Raises:
        ValueError: there is no such size.
    """
    config = get_size(size)
    return ConvNeXtV2(
        num_classes,
        depths=config.depths,
        dims=config.dims,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        **options,
    )


def convnextv2_atto(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Atto, 3.7 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("atto", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_femto(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Femto, 5.2 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("femto", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_pico(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Pico, 9.1 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("pico", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_nano(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Nano, 15.6 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("nano", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_tiny(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Tiny, 28.6 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("tiny", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_base(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Base, 89 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("base", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_large(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Large, 198 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("large", num_classes, in_chans, drop_path_rate, **options)


def convnextv2_huge(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> ConvNeXtV2:
    """Build ConvNeXt V2 Huge, 660 million parameters; options are those of `create_convnextv2`."""
    return create_convnextv2("huge", num_classes, in_chans, drop_path_rate, **options)


def create_fcmae(
    size: str, *, in_chans: int = 3, drop_path_rate: float = 0.0, grn_scope: str = "sample", **options: Any
) -> FCMAE:
    """Build an FCMAE with the encoder of a named size; other options are those of `FCMAE`.

    Raises:
        ValueError: there is no such size.
    """
    config = get_size(size)
    encoder = ConvNeXtV2Encoder(config.depths, config.dims, in_chans, drop_path_rate, grn_scope)
    return FCMAE(encoder, **options)


def fcmae_convnextv2_atto(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Atto; options are those of `create_fcmae`."""
    return create_fcmae("atto", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_femto(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Femto; options are those of `create_fcmae`."""
    return create_fcmae("femto", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_pico(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Pico; options are those of `create_fcmae`."""
    return create_fcmae("pico", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_nano(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Nano; options are those of `create_fcmae`."""
    return create_fcmae("nano", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_tiny(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Tiny; options are those of `create_fcmae`."""
    return create_fcmae("tiny", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_base(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Base; options are those of `create_fcmae`."""
    return create_fcmae("base", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_large(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Large; options are those of `create_fcmae`."""
    return create_fcmae("large", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)


def fcmae_convnextv2_huge(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
    """Build the masked autoencoder of ConvNeXt V2 Huge; options are those of `create_fcmae`."""
    return create_fcmae("huge", in_chans=in_chans, drop_path_rate=drop_path_rate, **options)
