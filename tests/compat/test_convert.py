"""Tests of `sparsecnx convert`: its lines and its errors."""

from __future__ import annotations

import argparse
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
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
    """Write a published training checkpoint: the model, its moving average, and the command line."""
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
    assert lines[2] == "left out, because convnextv2 has no place for them: 15 entries"
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
        (["{published}", "{tmp}", "--to", "timm"], "OUT is {tmp}: a folder, which only transformers takes; expected"),
        (["{published}", "{tmp}/none/out.pt", "--to", "timm"], "OUT is {tmp}/none/out.pt: cannot be written ("),
        (["{published}", "{published}", "--to", "timm"], "OUT is {published}: the same file as IN; "),
        (["{tmp}/" + "a" * 300, "{tmp}/out.pt", "--to", "timm"], "IN is {tmp}/" + "a" * 300 + ": cannot be read ("),
        (["{published}", "{tmp}/" + "a" * 300, "--to", "transformers"], "OUT is {tmp}/" + "a" * 300 + ": cannot be w"),
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


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tiny/", "tiny/model.safetensors"),
        ("tiny", "tiny/"),
        ("tiny/model.safetensors", "tiny/"),
        ("tiny/model.safetensors", "link"),
        ("link", "tiny/model.safetensors"),
    ],
)
def test_it_does_not_overwrite_its_input_with_a_folder_on_either_side(source, target, published, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="needs safetensors")
    assert convert(published, f"{tmp_path}/tiny/", "--to", "transformers") == 0
    capsys.readouterr()
    (tmp_path / "link").symlink_to("tiny")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    source, target = f"{tmp_path}/{source}", f"{tmp_path}/{target}"
    assert convert(source, target, "--to", "transformers") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"sparsecnx convert: error: OUT is {target}: the same file as IN; expected another one\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} == contents


@pytest.mark.parametrize("name", ["out.safetensors", "new/folder/"])
def test_a_full_disk_is_one_line(name, published, tmp_path, capsys):
    """The kernel refuses to write more than 5000 bytes into a file."""
    pytest.importorskip("safetensors", reason="needs safetensors")
    target = f"{tmp_path}/{name}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert convert(published, target, "--to", "transformers") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"sparsecnx convert: error: OUT is {target}: cannot be written (")
    assert "File too large" in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [published]


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_it_says_which_wrappers_it_took_off(prefix, tmp_path, capsys):
    source, target = tmp_path / "ddp.pt", tmp_path / "out.pt"
    state = autoencoder().state_dict()
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3}, source)
    assert convert(source, target, "--to", "sparsecnx") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{source}, part model (beside epoch), without {prefix} before every name: sparsecnx, Conv")
    assert torch.load(target, weights_only=True).keys() == state.keys()


@pytest.mark.parametrize(
    ("nest", "key", "others"),
    [
        (lambda state: {"state_dict_ema": state, "arch": "atto"}, "state_dict_ema", "arch"),
        (lambda state: {"model": {"net": state, "step": 3}, "epoch": 2}, "model.net", "epoch"),
    ],
)
def test_it_says_which_part_to_ask_for(nest, key, others, tmp_path, capsys):
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    contents = nest(autoencoder().state_dict())
    torch.save(contents, source)
    assert convert(source, target, "--to", "timm") == 2
    error = "holds no state dict under model or state_dict: it holds " + ", ".join(contents)
    assert capsys.readouterr().err == f"sparsecnx convert: error: IN is {source}: {error}; --key can be {key}\n"
    assert convert(source, target, "--to", "timm", "--key", key) == 0
    assert capsys.readouterr().out.startswith(f"{source}, part {key} (beside {others}): sparsecnx, ")


def test_of_many_parts_it_names_the_largest(tmp_path, capsys):
    parts = {f"part{i}": {str(j): torch.ones(1) for j in range(i)} for i in (1, 4, 3, 2)}
    torch.save(parts, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 2
    assert capsys.readouterr().err.endswith("; --key can be part4, part3, part2, ...\n")
    torch.save({"epoch": 3}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 2
    assert capsys.readouterr().err.endswith("it holds epoch\n")


@pytest.mark.parametrize(
    "value", [Path("runs"), np.float64(0.5), torch.nn.Linear(1, 1)], ids=["path", "numpy", "module"]
)
def test_objects_beside_the_model_are_no_hindrance(value, tmp_path, capsys):
    state = autoencoder().state_dict()
    torch.save({"model": state, "value": value}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "sparsecnx") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/in.pt, part model (beside value): sparsecnx, ")
    assert all(torch.equal(value, state[name]) for name, value in torch.load(tmp_path / "out.pt").items())
    torch.save({"model": value}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 2
    assert re.search(r"holds a whole \S+ under model: expected its state dict\n$", capsys.readouterr().err)


def test_it_keeps_numbers_that_are_not_finite_and_says_where(tmp_path, capsys):
    state = autoencoder().state_dict()
    state["mask_token"].fill_(torch.nan)
    torch.save(state, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "fcmae") == 0
    assert capsys.readouterr().err == "sparsecnx convert: warning: kept numbers that are not finite, in mask_token\n"
    assert torch.load(tmp_path / "out.pt", weights_only=True)["model"]["mask_token"].isnan().all()
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 0
    assert capsys.readouterr().err == ""


def test_what_steers_a_terminal_is_escaped(tmp_path, capsys):
    source = tmp_path / "\x1b[2Jin.pt"
    torch.save({"model": autoencoder().state_dict(), "\x1b]0;title\x07\nout.pt: forged": 1}, source)
    assert convert(source, tmp_path / "out.pt", "--to", "fcmae") == 0
    assert convert(source, tmp_path / "out.pt", "--to", "fcmae", "--key", "ema") == 2
    captured = capsys.readouterr()
    beside = r"\x1b]0;title\x07\nout.pt: forged"
    assert captured.out.startswith(rf"{tmp_path}/\x1b[2Jin.pt, part model (beside {beside}): ")
    assert captured.err.endswith(f"it holds model, {beside}; --key can be model\n")
    assert (captured.out + captured.err).replace("\n", "").isprintable()


def test_a_compressed_file_needs_its_bytes(published, tmp_path, capsys):
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(published) as stored, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as file:
        for record in stored.infolist():
            file.writestr(record.filename, stored.read(record))
        file.writestr(f"{published.stem}/more", bytes(2**24))
    arguments = (compressed, tmp_path / "out.pt", "--to", "timm", "--max-bytes")
    assert convert(*arguments, 2**24) == 2
    problem = capsys.readouterr().err
    assert re.search(r"expands from .* kB to 17.* MB: expected at most 16.8 MB; raise max_bytes \(--max-bytes", problem)
    assert convert(*arguments, 2**25) == 0
    assert convert(*arguments, 0) == 2
    assert capsys.readouterr().err == "sparsecnx convert: error: --max-bytes is 0: expected 1 or more\n"
