"""Our networks in timm's registry: `timm.create_model("sparsecnx_convnextv2_tiny")`.

Importing this module registers them. `import sparsecnx` arranges that this happens as soon as timm is imported, see
`register_with_timm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from sparsecnx.models.classifier import ConvNeXtV2
from sparsecnx.models.convnextv2 import SIZES

PREFIX = "sparsecnx_convnextv2_"
# Images are normalised as in pretraining. There are no weights to download.
DEFAULT: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "downsample_layers.0.0",
    "classifier": "head",
}

__all__: list[str] = []  # `register_model` adds the names.
default_cfgs = generate_default_cfgs({f"{PREFIX}{size}": DEFAULT for size in SIZES})


def _register(size: str) -> None:
    name, config = f"{PREFIX}{size}", SIZES[size]

    def create(pretrained: bool = False, **options: Any) -> Any:
        options = {"depths": config.depths, "dims": config.dims, **options}
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(ConvNeXtV2, name, pretrained, feature_cfg=features, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build `sparsecnx.models.convnextv2_{size}`."
    register: Callable[[Callable[..., Any]], object] = register_model
    register(create)


for _size in SIZES:
    _register(_size)
