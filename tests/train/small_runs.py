"""Runs for tests: eight images in batches of two, two epochs of four steps."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sparsecnx.models import FCMAE, SIZES, SparK
from sparsecnx.models.convnextv2 import Size
from sparsecnx.train import drawing, networks
from sparsecnx.train.log import RunLog, StepRecord
from sparsecnx.train.options import Options
from sparsecnx.train.start import pretrain

SMALL: dict[str, Any] = {"image_size": 64, "epochs": 2, "batch_size": 2, "base_lr": 0.05}


def use_tiny_models(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Give two sizes of the real architecture few channels, different ones, and draw no curves: they take longer."""
    monkeypatch = monkeypatch or pytest.MonkeyPatch()
    monkeypatch.setattr(drawing, "draw_losses", lambda *_: Figure((1, 1)))
    monkeypatch.setitem(SIZES, "atto", Size((1, 1, 1, 1), (8, 8, 16, 16)))
    monkeypatch.setitem(SIZES, "femto", Size((1, 1, 1, 1), (8, 8, 16, 24)))
    monkeypatch.setattr(networks, "FCMAE", partial(FCMAE, decoder_dim=16))
    monkeypatch.setattr(networks, "SparK", partial(SparK, decoder_dim=32))


def train(
    data: Path | None,
    output: Path,
    resume: str | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    **given: Any,
) -> int:
    """Train with the recipe SMALL and the given fields, or go on with the recipe of the resumed run."""
    where = None if data is None else str(data)
    options = {"device": "cpu", "workers": workers, "draw_every": 0, **(options or {})}  # pictures take a second each
    chosen = Options(data=where, output=str(output), resume=resume, **options)
    return pretrain(chosen, given if resume else {**SMALL, **given})


def logged(output: Path) -> list[dict[str, float]]:
    """Return the log of a run without its times."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def signal_after(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal while step `step` is logged."""
    write = RunLog.write

    def write_and_signal(log: RunLog, record: StepRecord) -> None:
        write(log, record)
        if record.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(RunLog, "write", write_and_signal)
