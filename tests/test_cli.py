import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="needs the extra [train]")

from PIL import Image

from sparsecnx.cli import main
from sparsecnx.models import SIZES
from sparsecnx.train import checkpoint
from sparsecnx.train.command import parse
from sparsecnx.train.options import Options
from sparsecnx.train.recipe import Recipe

PHOTOS = 6


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(PHOTOS):
        Image.linear_gradient("L").rotate(60 * i).convert("RGB").save(folder / f"{i}.jpg")
    return folder


def refused(arguments, capsys):
    """Run a command that must be refused, and return the one line that it prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "giant"], "--model is giant: expected one of atto, femto, pico"),
        (
            ["--model", "timm:resnet5O"],
            "--model is timm:resnet5O: timm has no such network; did you mean timm:resnet50",
        ),
        (["--method", "mae"], "--method is mae: expected one of fcmae, spark"),
        (["--image-size", 100], "--image-size is 100: expected a multiple of the patch size, 32, such as 96"),
        (["--mask-ratio", 1], "--mask-ratio is 1.0: expected 0 <= ratio < 1"),
        (["--dtype", "float8"], "--dtype is float8: expected one of float32, bfloat16"),
        (["--device", "tpu"], "--device is tpu: expected auto, cpu, cuda or one GPU such as cuda:1"),
        (["--device", "cuda:7"], "--device is cuda:7: this torch sees "),
        (
            ["--image-size", "64x100"],
            "--image-size is 64x100: expected a multiple of the patch size, 32, such as 96",
        ),
        (["--grn-scope", "image"], "--grn-scope is image: expected one of sample, batch"),
        (["--extend", 2], "--extend is 2: expected 1 to 1000000000 epochs, together with --resume"),
        (["--extend", 2, "--resume", "auto"], "--extend is 2: there is no run in {tmp}/run"),
        (["--data", ""], "--data is '': expected a name"),
        (["--device", "cuda:99999999999999999999"], "--device is cuda:99999999999999999999: this torch sees "),
        (["--resume"], "run: holds no checkpoint to resume; leave out --resume for a new run, or --resume auto"),
        (["--base-lr", "nan"], "--base-lr is nan: expected a number"),
        (["--batch-size", 7, "--epochs", 1], "--batch-size is 7: expected at most the 6 images of an epoch"),
        (["--data", "{tmp}/none"], "--data is {tmp}/none: no such folder"),
        (["--data", "{tmp}/empty"], "--data is {tmp}/empty: holds no images"),
        (["--data", "/dev/zero"], "--data is /dev/zero: not a folder"),
        (
            ["--data", "{tmp}/scans"],
            "--data is {tmp}/scans: channel 0 is constant in the sample, 0; expected others, or --std",
        ),
        (
            ["--max-pixels", 65535],
            "0.jpg, which has 256 x 256 pixels, more than --max-pixels, 65535; a larger one",
        ),
        (["--data", "{tmp}/bad"], "none of its 1 image files can be read, first a.png"),
        (["--output", "{tmp}/full"], "--output is {tmp}/full: holds a run already"),
        (["--output", "{tmp}/photos/0.jpg"], "--output is {tmp}/photos/0.jpg: not a folder"),
        (["--output", "/dev/null"], "--output is /dev/null: not a folder"),
        (["--resume", "/dev/zero"], "--resume is /dev/zero: a device; expected a regular file"),
        (["--resume", "{tmp}/none.pt"], "--resume is {tmp}/none.pt: no such file"),
        (["--resume", "{tmp}/bad/a.png"], "--resume is {tmp}/bad/a.png: "),
    ],
)
def test_pretrain_refuses_in_one_line_that_names_the_argument(arguments, message, photos, tmp_path, capsys):
    for folder in ("empty", "bad", "full", "scans"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    Image.new("F", (4, 4)).save(tmp_path / "scans" / "a.tif")
    (tmp_path / "full" / "log.jsonl").write_text("")
    output = tmp_path / "run"
    arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
    line = refused(["pretrain", "--data", photos, "--output", output, *arguments], capsys)
    assert line.startswith("sparsecnx pretrain: error: ")
    assert message.format(tmp=tmp_path) in line
    assert not output.exists()


def test_reconstruct_refuses_in_one_line(tmp_path, capsys):
    line = refused(["reconstruct", tmp_path / "none.pt"], capsys)
    assert line == f"sparsecnx reconstruct: error: CHECKPOINT is {tmp_path}/none.pt: no such file\n"


def test_a_missing_library_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    for command in (["pretrain"], ["reconstruct", "last.pt"]):
        assert "tqdm not installed: pip install sparsecnx[train]" in refused(command, capsys)


def test_doctor_prints_its_report(monkeypatch, capsys):
    monkeypatch.setattr("sparsecnx.doctor.report", lambda: "report")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "report\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain", "--device", "tpu"], "--device is tpu: expected one of auto, cpu, cuda"),
        (["--explain", "--dtype", "int8"], "--dtype is int8: expected one of float32, float64, bfloat16, float16"),
        (["--explain", "--model", "giant"], "--model is giant: expected one of tiny, atto, "),
        (["--model", "tiny"], "--model is tiny: expected together with --explain"),
    ],
)
def test_doctor_refuses_in_one_line(arguments, message, capsys):
    assert refused(["doctor", *arguments], capsys).startswith(f"sparsecnx doctor: error: {message}")


def test_doctor_does_not_explain_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refused(["doctor", "--explain", "--device", "cuda"], capsys)
    assert line == "sparsecnx doctor: error: --device is cuda: this torch sees no CUDA device; expected auto or cpu\n"


def test_doctor_explains(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor", "--explain", "--dtype", "float16", "--model", "base"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("What runs on cpu in float16, in the four stages of ConvNeXt V2 Base\n")
    assert "convnextv2_block" in out and "1024" in out


@pytest.mark.parametrize(
    ("typed", "meant"), [("--dta", "--data"), ("--lr", "--base-lr"), ("--epoch", "--epochs"), ("--zebra", None)]
)
def test_the_nearest_option_is_named(typed, meant, capsys):
    line = refused(["pretrain", typed, "1"], capsys)
    hint = f"; did you mean {meant}?" if meant else ""
    assert line == f"sparsecnx pretrain: error: {typed} is unknown: expected an option of --help{hint}\n"


def test_a_configuration_is_a_file_and_arguments_have_the_last_word(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: tiny\nimage_size: [64, 96]\nclip_grad: null\nbase_lr: 1e-3\n")
    options, given = parse(
        ["--config", str(tmp_path / "mine.yaml"), "--model", "atto", "--resume", "--no-norm-pix-loss"]
    )
    assert options == Options(resume="newest")
    chosen = {"model": "atto", "image_size": (64, 96), "clip_grad": None, "base_lr": 1e-3, "norm_pix_loss": False}
    assert given == chosen
    (tmp_path / "wrong.yaml").write_text("modell: tiny\n")
    for text, name in (("epochs: 8\nepochs: 4\n", "epochs"), ("targets:\n  a: {}\n  b: {}\n  a: {}\n", "a")):
        (tmp_path / "twice.yaml").write_text(text)
        line = refused(["pretrain", "--config", tmp_path / "twice.yaml"], capsys)
        assert line.strip().endswith(f"--config is {tmp_path}/twice.yaml: has {name} twice; expected each option once")
    line = refused(["pretrain", "--config", tmp_path / "wrong.yaml"], capsys)
    assert "--modell is unknown: expected an option of --help; did you mean --model?" in line
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    assert "image_size:\n- 64\n- 96\n" in capsys.readouterr().out


@pytest.mark.parametrize("size", SIZES)
def test_the_published_recipes_are_files(size):
    options, given = parse(["--config", size])
    recipe = Recipe(**given)
    assert (recipe.model, recipe.effective_batch, recipe.epochs, recipe.peak_lr) == (size, 4096, 1600, 2.4e-3)
    assert options == Options()


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("pretrain", "reconstruct", "convert", "doctor"))


def test_a_terminated_run_saves_resumes_and_is_drawn(photos, tmp_path, capsys):
    """Send SIGTERM to the whole process group, including workers, as a scheduler does."""
    run = tmp_path / "run"
    arguments = ["--data", photos, "--output", run, "--image-size", 64, "--batch-size", 2, "--epochs", 1000]
    command = [sys.executable, "-m", "sparsecnx.cli", "pretrain", "--workers", "1", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for_a_step(run / "log.jsonl", process)
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 143
    state = checkpoint.read(run / "last.pt")
    assert f"SIGTERM: saved step {state['step']} in {run}" in out
    assert len((run / "log.jsonl").read_text().splitlines()) == state["step"]

    assert main(["reconstruct", str(run / "last.pt"), "--out", str(tmp_path / "grid.png")]) == 0
    assert "loss" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"

    line = refused(["pretrain", "--resume", "--output", run, "--model", "femto"], capsys)
    assert "--model is femto: the run to resume has atto" in line
    os.truncate((run / "last.pt").resolve(), 10_000)
    line = refused(["pretrain", "--resume", "--output", run], capsys)
    assert f"--resume is {run}/checkpoint-" in line
    assert "truncated or damaged" in line


def wait_for_a_step(log: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < until, "no step was logged"
        time.sleep(0.05)
