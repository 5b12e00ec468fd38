"""`sparsecnx convert`: what it prints, what it refuses."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from sparsecnx import models
from sparsecnx.cli import main
from sparsecnx.compat import checkpoints

FORMATS = "fcmae, sparsecnx, convnextv2, fcmae-encoder, timm, transformers"


def autoencoder():
    encoder = models.ConvNeXtV2Encoder(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    return models.FCMAE(encoder, decoder_dim=12)


@pytest.fixture
def published(tmp_path):
    """A published training checkpoint: the model, its moving average, and the command line."""
    state = checkpoints.convert(autoencoder().state_dict(), "fcmae").state_dict
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": state, "model_ema": state, "args": argparse.Namespace(epochs=800)}, path)
    return path


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_it_says_what_it_did(published, tmp_path, capsys):
    out = tmp_path / "encoder.pt"
    assert convert(published, out, "--to", "convnextv2") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    network = "ConvNeXt V2 with depths 1 1 2 1, dims 8 16 24 32"
    assert (
        lines[0] == f"{published}, part model (beside model_ema, args): fcmae, {network} (encoder, decoder), 81 entries"
    )
    assert lines[1] == f"{out}: convnextv2, 66 entries"
    assert lines[2] == "left out, having no place in convnextv2: 15 entries"
    assert sorted(line.strip() for line in lines[3:]) == sorted(
        name for name in autoencoder().state_dict() if not name.startswith("encoder.")
    )
    encoder = models.ConvNeXtV2Encoder(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    encoder.load_state_dict(torch.load(out, weights_only=True)["model"])


def test_a_whole_conversion_leaves_nothing_out(tmp_path, capsys):
    source, target = tmp_path / "atto.pt", tmp_path / "atto.safetensors"
    pytest.importorskip("safetensors", reason="needs safetensors")
    torch.save(models.convnextv2_atto(num_classes=10).state_dict(), source)
    assert convert(source, target, "--to", "timm") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{source}: convnextv2, ConvNeXt V2 atto (encoder, final norm, head of 10 classes), 140 entries",
        f"{target}: timm, 140 entries",
    ]
    assert checkpoints.load(target).state_dict["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4
    assert convert(source, target, "--to", "timm", "--no-conv-mlp", "--from", "convnextv2") == 0
    assert checkpoints.load(target).state_dict["stages.0.blocks.0.mlp.fc1.weight"].ndim == 2
    assert convert(target, f"{tmp_path}/folder/", "--to", "transformers") == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_part_by_name(published, tmp_path, capsys):
    assert convert(published, tmp_path / "ema.pt", "--to", "timm", "--key", "model_ema") == 0
    assert capsys.readouterr().out.startswith(f"{published}, part model_ema (beside model, args): fcmae, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none.pt", "{tmp}/out.pt", "--to", "timm"], "IN is {tmp}/none.pt: no such file"),
        (["{published}", "{tmp}/out.pt", "--to", "jax"], f"--to is jax: expected one of {FORMATS}"),
        (["{published}", "{tmp}/out.pt", "--to", "timm", "--from", "x"], f"--from is x: expected one of {FORMATS}"),
        (
            ["{published}", "{tmp}/out.pt", "--to", "timm", "--from", "transformers"],
            "IN is {published}: none of its 81 entries is one of transformers: they are ",
        ),
        (
            ["{published}", "{tmp}/out.pt", "--to", "fcmae", "--conv-mlp"],
            "--to is fcmae: expected timm together with --conv-mlp",
        ),
        (
            ["{published}", "{tmp}/out.pt", "--to", "timm", "--key", "ema"],
            "IN is {published}: holds no state dict under ema: it holds model, model_ema, args",
        ),
        (
            ["{published}", "{tmp}/out.npz", "--to", "timm"],
            "OUT is {tmp}/out.npz: expected a name that ends in .pt, .pth, .safetensors\n",
        ),
        (["{published}", "{tmp}", "--to", "timm"], "OUT is {tmp}: a folder, which transformers alone has; expected"),
        (["{published}", "{tmp}/none/out.pt", "--to", "timm"], "OUT is {tmp}/none/out.pt: cannot be written ("),
        (["{published}", "{published}", "--to", "timm"], "OUT is {published}: IN itself; expected another file"),
    ],
)
def test_it_refuses_in_one_line_and_writes_nothing(arguments, message, published, tmp_path, capsys):
    before = published.read_bytes()
    assert convert(*(argument.format(tmp=tmp_path, published=published) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sparsecnx convert: error: " + message.format(tmp=tmp_path, published=published))
    assert list(tmp_path.iterdir()) == [published]
    assert published.read_bytes() == before


def test_without_safetensors_it_says_what_to_install(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert convert(published, tmp_path / "out.safetensors", "--to", "timm") == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [published]
