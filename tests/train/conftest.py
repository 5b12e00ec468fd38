"""A model and photographs that are small enough for real training in a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorboard", reason="needs the extra [train]")
from PIL import Image
from small_runs import use_tiny_models


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_models(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write eight images of different sizes, some in class folders."""
    folder = tmp_path / "photos"
    generator = torch.Generator().manual_seed(7)
    for i in range(8):
        path = folder / ("", "cat", "dog/small")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, 4, 5, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (70 + 3 * i, 90 - 2 * i), mode="bilinear")
        Image.fromarray(pixels[0].mul(255).byte().permute(1, 2, 0).numpy()).save(path)
    return folder
