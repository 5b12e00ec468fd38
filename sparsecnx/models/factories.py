"""ConvNeXt V2 and its masked autoencoder by the names of their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsecnx.models.classifier import ConvNeXtV2
from sparsecnx.models.convnextv2 import ConvNeXtV2Encoder, get_size
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


def create_fcmae(
    size: str,
    *,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    grn_scope: str = "sample",
    ndim: int = 2,
    kernel_size: int | Sequence[int] = 7,
    stem: int | Sequence[int] = 4,
    strides: int | Sequence[int | Sequence[int]] = 2,
    stem_type: str = "patchify",
    block: str = "v2",
    norm_eps: float = 1e-6,
    grn_eps: float = 1e-6,
    dwconv_bias: bool = True,
    **options: Any,
) -> FCMAE:
    """Build an FCMAE with the `ConvNeXtV2Encoder` of a named size; other options are those of `FCMAE`.

    Raises:
        ValueError: there is no such size, or an argument does not fit the encoder or FCMAE.
    """
    config = get_size(size)
    encoder = ConvNeXtV2Encoder(
        config.depths,
        config.dims,
        in_chans,
        drop_path_rate,
        grn_scope,
        ndim=ndim,
        kernel_size=kernel_size,
        stem=stem,
        strides=strides,
        stem_type=stem_type,
        block=block,
        norm_eps=norm_eps,
        grn_eps=grn_eps,
        dwconv_bias=dwconv_bias,
    )
    return FCMAE(encoder, **options)


def _classifier(size: str, millions: str) -> Callable[..., ConvNeXtV2]:
    def create(num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> ConvNeXtV2:
        return create_convnextv2(size, num_classes, in_chans, drop_path_rate, **options)

    create.__name__ = create.__qualname__ = f"convnextv2_{size}"
    create.__doc__ = (
        f"Build ConvNeXt V2 {size.title()}, {millions} million parameters for images; options are those of "
        "`create_convnextv2`."
    )
    return create


def _autoencoder(size: str) -> Callable[..., FCMAE]:
    def create(*, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> FCMAE:
        return create_fcmae(size, in_chans=in_chans, drop_path_rate=drop_path_rate, **options)

    create.__name__ = create.__qualname__ = f"fcmae_convnextv2_{size}"
    create.__doc__ = f"Build the masked autoencoder of ConvNeXt V2 {size.title()}; options are those of `create_fcmae`."
    return create


convnextv2_atto = _classifier("atto", "3.7")
convnextv2_femto = _classifier("femto", "5.2")
convnextv2_pico = _classifier("pico", "9.1")
convnextv2_nano = _classifier("nano", "15.6")
convnextv2_tiny = _classifier("tiny", "28.6")
convnextv2_base = _classifier("base", "89")
convnextv2_large = _classifier("large", "198")
convnextv2_huge = _classifier("huge", "660")

fcmae_convnextv2_atto = _autoencoder("atto")
fcmae_convnextv2_femto = _autoencoder("femto")
fcmae_convnextv2_pico = _autoencoder("pico")
fcmae_convnextv2_nano = _autoencoder("nano")
fcmae_convnextv2_tiny = _autoencoder("tiny")
fcmae_convnextv2_base = _autoencoder("base")
fcmae_convnextv2_large = _autoencoder("large")
fcmae_convnextv2_huge = _autoencoder("huge")
