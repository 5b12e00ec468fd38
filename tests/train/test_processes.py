"""Several processes train one network as one process does, and a run outlives the death of one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import many_targets
import numpy as np
import pytest
import torch
from small_runs import SMALL, logged, train
from small_shards import write_shards

from sparsecnx import load_encoder
from sparsecnx.train import checkpoint
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.networks import build_model
from sparsecnx.train.recipe import Recipe

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(HERE)])}


def options(output, data=None, **given):
    """Return arguments of the command; those of a small run where there are data."""
    recipe = SMALL if data is not None else {}
    values = {"device": "cpu", "workers": 0, "draw_every": 0, "output": output, **recipe, **given} | (
        {"data": data} if data else {}
    )
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in values.items()]


@pytest.fixture(scope="module")
def in_ranks():
    """Return a function that runs cases: a number of processes, arguments, and at which step which gets a signal."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = []

    def run(*cases, **environment):
        if not started:
            command = [sys.executable, HERE / "ranks.py"]
            started.append(subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes))
        try:
            print(json.dumps([environment, cases]), file=started[0].stdin, flush=True)
            answer = started[0].stdout.readline()
            assert answer, "ranks.py ended, or ended itself for a case that hangs"
            return json.loads(answer)
        except BaseException:  # end all of its processes: a late answer must not reach the next test
            with suppress(OSError), started.pop() as ranks:
                os.killpg(ranks.pid, signal.SIGKILL)
            raise

    yield run
    for ranks in started:
        ranks.communicate()


def expect_close(found, expected):
    assert len(found) == len(expected) > 0
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


RECIPES = {
    "plain": {},
    "compile": {"compile": True},
    "shard": {"shard": True, "ema_decay": 0.9},
    "accumulate": {"grad_accum_steps": 2, "clip_grad": 0.1, "ema_decay": 0.9},
    "spark": {"method": "spark", "shard": True, "dtype": "bfloat16"},
}


def test_two_processes_have_the_losses_and_weights_of_one(in_ranks, photos, tmp_path):
    names = [name for name in RECIPES if name != "spark"]
    runs = in_ranks(*((2, options(tmp_path / name, photos, **RECIPES[name])) for name in names))
    for name, run in zip(names, runs, strict=True):
        assert run["codes"] == [0, 0], run["output"]
        assert "2 processes with 1 of the 2 images of a batch each" in run["output"][0]
        assert run["output"][1] == "" or name == "compile"  # torch.compile warns of what it misses
        one = tmp_path / f"one {name}"
        train(photos, one, **{key: value for key, value in RECIPES[name].items() if key not in ("shard", "compile")})
        expect_close(logged(tmp_path / name), logged(one))
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert all(len(line["each_images_per_s"]) == len(line["each_wait_s"]) == 2 for line in lines)
        saved, expected = (checkpoint.read(folder / "last.pt") for folder in (tmp_path / name, one))
        assert saved["processes"] == 2
        for part in ("model", "ema") if "ema_decay" in RECIPES[name] else ("model",):
            for entry, value in expected[part].items():
                torch.testing.assert_close(saved[part][entry], value, rtol=1e-3, atol=1e-5)


def test_several_targets_have_the_losses_of_one_process(in_ranks, tmp_path):
    """Their values are missing in some images, so that the processes hold different numbers of them."""
    targets = {name: {**values, "weight": 1} for name, values in many_targets.TARGETS.items()}
    given = {"in_chans": 2, "normalize": "none", "targets": json.dumps(targets), "uncertainty": True}
    data, sizes = "python:many_targets:tiles", {"batch_size": 4, "decoder_dim": 16, "draw_every": 1}
    ways = {"one": {}, "two": {}, "shard": {"shard": True}}
    worlds = {"one": 1}
    runs = in_ranks(
        *[[worlds.get(n, 2), options(tmp_path / n, data, **given, **sizes, **more)] for n, more in ways.items()],
    )
    assert [run["codes"] for run in runs] == [[0], [0, 0], [0, 0]], [run["output"] for run in runs]
    found = {name: [line | line.pop("losses") for line in logged(tmp_path / name)] for name in ways}
    assert set(targets) < set(found["one"][0])
    expect_close(found["two"], found["one"])
    expect_close(found["shard"], found["one"])


def test_pictures_change_nothing_and_process_0_writes_them_once(in_ranks, photos, tmp_path):
    names = ["plain", "shard"]
    cases = [(tmp_path / f"{name} {every}", RECIPES[name], every) for name in names for every in (0, 1)]
    *runs, unknown = in_ranks(
        *((2, options(folder, photos, **recipe, draw_every=every)) for folder, recipe, every in cases),
        (2, options(tmp_path / "unknown", photos, log="comet")),
    )
    assert all(run["codes"] == [0, 0] and run["output"][1] == "" for run in runs), [run["output"] for run in runs]
    for name in names:
        without, drawn = tmp_path / f"{name} 0", tmp_path / f"{name} 1"
        assert logged(without) == logged(drawn)
        one, other = (checkpoint.read(folder / "last.pt")["model"] for folder in (without, drawn))
        assert all(torch.equal(one[entry], other[entry]) for entry in one)
        pictures = [path.name for path in sorted((drawn / "reconstructions").iterdir())]
        assert pictures == ["step-00000004.jpg", "step-00000008.jpg"]
        assert len(list(drawn.glob("events.out.tfevents.*"))) == 1
    assert unknown["codes"] == [2, 2]
    assert "".join(unknown["output"]).count("--log is comet: expected wandb, mlflow, or module:factory") == 1


def test_a_picture_that_cannot_be_written_stops_all_processes_with_the_reason(in_ranks, photos, tmp_path):
    cases = []
    for name in ("plain", "shard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reconstructions").write_text("a file where the folder would be")
        cases.append((2, options(tmp_path / name, photos, **RECIPES[name], draw_every=1)))
    for run in in_ranks(*cases):
        assert run["codes"] == [1, 1], run["output"]
        assert "".join(run["output"]).count("step-00000004.jpg could not be written") == 1, run["output"]
        assert "another process" not in "".join(run["output"])


def test_batch_norm_runs_over_the_images_of_a_process_and_the_run_says_so(in_ranks, photos, tmp_path):
    run, again = in_ranks(
        (2, options(tmp_path / "run", photos, **RECIPES["spark"])),
        (2, options(tmp_path / "run", resume="auto", shard=True)),
    )
    assert run["codes"] == again["codes"] == [0, 0], run["output"] + again["output"]
    assert "parameters sharded; batch norm over the images of a process" in run["output"][0]
    assert "the run is finished" in again["output"][0]


def test_a_run_goes_on_with_other_processes_and_says_so(in_ranks, photos, tmp_path, capsys):
    """From one process to two that shard, and from the folder that they write to one process."""
    train(photos, tmp_path / "run")
    expected = logged(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-00000008.pt").unlink()
    (run,) = in_ranks((2, options(tmp_path / "run", resume="auto", shard=True)))
    assert run["codes"] == [0, 0], run["output"]
    said = "2 processes go on from a checkpoint of 1: the same images and masks, losses equal to rounding"
    assert said in run["output"][0]
    expect_close(logged(tmp_path / "run"), expected)
    newest = CheckpointFolder(tmp_path / "run").newest()
    assert newest.is_dir() and newest.name == "checkpoint-00000008.pt"
    capsys.readouterr()
    assert train(None, tmp_path / "longer", resume=str(newest), options={"extend": 1}) == 0
    assert "1 process goes on from a checkpoint of 2" in capsys.readouterr().out

    model = build_model(Recipe(**checkpoint.read(newest)["recipe"]))
    assert load_encoder(model, newest) and load_encoder(model, tmp_path / "longer" / "last.pt")
    part = next(newest.glob("shard-00002-*"))
    whole = bytearray(part.read_bytes())
    whole[-1] ^= 1
    part.write_bytes(whole)
    with pytest.raises(checkpoint.CheckpointError, match=r"shard-00002-\S+ is missing or damaged"):
        checkpoint.read(newest)


@pytest.mark.parametrize("how", ["whole", "shard"])
def test_a_run_goes_on_after_the_death_of_any_process(how, in_ranks, photos, tmp_path):
    """A signal to one process saves for all; after a kill the others end, and the run goes on from its checkpoint."""
    recipe = RECIPES["shard"] if how == "shard" else {}
    again = options(tmp_path / "run", resume="auto", **({"shard": True} if how == "shard" else {}))
    killed, stopped, other, end, one = in_ranks(
        (2, options(tmp_path / "run", photos, **recipe), [5, 1, signal.SIGKILL]),
        (2, again, [5, 1, signal.SIGTERM]),
        (2, again, [7, 0, signal.SIGKILL]),
        (2, again),
        (2, options(tmp_path / "one", photos, **recipe)),
    )
    assert killed["codes"] == [1, -9]
    assert "step 5: another process of the run ended" in killed["output"][0]
    assert "last good checkpoint" in killed["output"][0]
    assert stopped["codes"] == [143, 143], stopped["output"]
    assert "SIGTERM: saved step 6" in stopped["output"][0]
    assert other["codes"] == [-9, 1] and "another process of the run ended" in other["output"][1]
    assert end["codes"] == one["codes"] == [0, 0]
    assert "going on from step 6" in end["output"][0]
    assert logged(tmp_path / "run") == logged(tmp_path / "one")


def test_a_run_on_shards_goes_on_after_the_death_of_a_process(in_ranks, tmp_path):
    """Both processes read a part of the second shard."""
    pytest.importorskip("webdataset", reason="needs the extra [webdataset]")
    write_shards(tmp_path / "data", [1, 6, 1])
    data = f"wds:{tmp_path}/data/*.tar?window=2"
    whole, killed, stopped, end = in_ranks(
        (2, options(tmp_path / "whole", data)),
        (2, options(tmp_path / "run", data), [5, 1, signal.SIGKILL]),
        (2, options(tmp_path / "run", resume="newest", workers=1), [6, 0, signal.SIGTERM]),
        (2, options(tmp_path / "run", resume="newest")),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert whole["codes"] == end["codes"] == [0, 0], whole["output"] + end["output"]
    assert killed["codes"] == [1, -9] and stopped["codes"] == [143, 143], killed["output"] + stopped["output"]
    assert "going on from step 4" in stopped["output"][0]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "run")) == 8


def test_errors_are_said_once_before_anything_is_written(in_ranks, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    wrong = {
        "--batch-size is 3: expected a multiple of the 2 processes": {"batch_size": 3},
        "--model is giant: expected one of": {"model": "giant"},
        "--epochs is x: expected a whole number": {"epochs": "x"},
        f"--data is {other}: holds no images": {"data": other},
        "--device is tpu: expected auto": {"device": "tpu"},
    }
    runs = in_ranks(
        *(
            (2, options(tmp_path / "run", photos) + options(**{"output": tmp_path / "run"} | one))
            for one in wrong.values()
        ),
    )
    for message, run in zip(wrong, runs, strict=True):
        assert run["codes"] == [2, 2], run["output"]
        assert "".join(run["output"]).count(message) == 1, run["output"]
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_data_are_refused_and_say_why(in_ranks, photos, tmp_path):
    """One of them sees a folder without images, too few for a batch, or other ones."""
    few, none = tmp_path / "few", tmp_path / "none"
    none.mkdir()
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "3.png").unlink()
    few.mkdir()
    shutil.copy(photos / "3.png", few)
    wrong = {
        "none": "holds no images",
        "few": "--batch-size is 2: expected at most the 1 images",
        "other": "process 1 sees 7 images",
    }
    cases = []
    for name in wrong:
        link = tmp_path / f"data-{name}"
        cases.append((2, options(tmp_path / "run", f"{link}-RANK")))
        link.with_name(f"{link.name}-0").symlink_to(photos)
        link.with_name(f"{link.name}-1").symlink_to(tmp_path / name)
    for run, text in zip(in_ranks(*cases), wrong.values(), strict=True):
        assert run["codes"] == [2, 2], run["output"]
        assert "".join(run["output"]).count(text) == 1, run["output"]
    assert not (tmp_path / "run").exists()


def test_given_masks_are_drawn_from_a_file(in_ranks, photos, tmp_path):
    """Masks hide different numbers of patches, so the loss of a process counts as many patches as it has."""
    np.save(tmp_path / "masks.npy", np.array([[1, 0, 0, 1], [0, 1, 1, 1]], np.uint8))
    train(photos, tmp_path / "one", masks=str(tmp_path / "masks.npy"))
    (run,) = in_ranks((2, options(tmp_path / "two", photos, masks=tmp_path / "masks.npy")))
    assert run["codes"] == [0, 0], run["output"]
    expect_close(logged(tmp_path / "two"), logged(tmp_path / "one"))


def test_torchrun_restarts_a_process_that_dies(in_ranks, photos, tmp_path):
    arguments = options(tmp_path / "run", photos, resume="auto")
    (run,) = in_ranks((2, arguments, [6, 1, signal.SIGKILL], True))
    assert run["codes"] == [0], run["output"]
    assert "going on from step 4" in run["output"][0]
    train(photos, tmp_path / "one")
    expect_close(logged(tmp_path / "run"), logged(tmp_path / "one"))
