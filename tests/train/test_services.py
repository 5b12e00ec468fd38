"""Weights & Biases and MLflow, on disk: no network, real files."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import logged, train

from sparsecnx.common.errors import TrainingStopped

KILLED_AT_STEP_6 = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_runs import train, use_tiny_models
from sparsecnx.train.log import RunLog

write = RunLog.write
def write_and_die(log, record):
    write(log, record)
    if record.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

RunLog.write = write_and_die
use_tiny_models()
train(Path(sys.argv[2]), Path(sys.argv[3]), options={"log": sys.argv[4]})
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return the folder of a store of MLflow, whose tables take seconds to make."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def offline(store, monkeypatch):
    """Keep both services on this machine."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(store)


def kill_a_run(photos, output, log):
    """Train in another process, which dies after step 6 of 8; its newest checkpoint is of step 4."""
    command = [sys.executable, "-c", KILLED_AT_STEP_6, os.path.dirname(__file__), str(photos), str(output), log]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("WANDB_SERVICE", None)  # of this process, which would outlive the killed one
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [line["step"] for line in logged(output)] == list(range(1, 7))


def wandb_records(path):
    """Return the records of a file of Weights & Biases: 7 bytes, then blocks of 32 KiB as LevelDB's logs have them."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def wandb_runs(output):
    """Return for each attempt, in order, its run and configuration, the points that it logged, and its exit code."""
    attempts = []
    for path in sorted((output / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        records = wandb_records(path)
        points = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        run = next((record.run for record in records if record.WhichOneof("record_type") == "run"), None)
        ends = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        attempts.append((run, points, ends))
    return attempts


def test_weights_and_biases_has_steps_pictures_and_the_recipe(photos, tmp_path):
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    run = tmp_path / "run"
    assert train(photos, run, options={"log": "wandb", "draw_every": 1}) == 0
    ((told, points, ends),) = wandb_runs(run)
    assert (told.run_id, told.project, told.display_name) == ((run / "wandb-run-id").read_text(), "sparsecnx", "run")
    config = {item.key: json.loads(item.value_json) for item in told.config.update}
    assert (config["model"], config["batch_size"], config["images"]) == ("atto", 2, 8)
    steps = [point for point in points if "loss" in point]
    fields = ("step", "epoch", "loss", "lr", "grad_norm")
    assert [{name: point[name] for name in fields} for point in steps] == logged(run)
    pictures = [point for point in points if "reconstructions/path" in point]
    assert [point["step"] for point in pictures] == [4, 8]
    (files,) = (run / "wandb").glob("offline-run-*/files")
    assert all((files / point["reconstructions/path"]).stat().st_size > 1000 for point in pictures)
    assert ends == [0]


def test_a_killed_run_goes_on_as_the_same_run_of_both_services(photos, tmp_path):
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs the extra [mlflow]")
    from mlflow.tracking import MlflowClient

    run, client = tmp_path / "killed", MlflowClient()
    kill_a_run(photos, run, "wandb,mlflow")
    kept = {name: (run / f"{name}-run-id").read_text() for name in ("wandb", "mlflow")}
    assert client.get_run(kept["mlflow"]).info.status == "RUNNING"
    assert train(None, run, resume="auto", options={"log": "wandb,mlflow", "draw_every": 1}) == 0
    assert kept == {name: (run / f"{name}-run-id").read_text() for name in kept}
    whole = [(line["step"], line["loss"]) for line in logged(run)]
    assert [step for step, _ in whole] == list(range(1, 9))

    # Weights & Biases writes every 15 seconds: a kill takes the last of them along.
    (_, before, cut), (resumed, after, ends) = wandb_runs(run)
    assert [path.stem for path in (run / "wandb").rglob("run-*.wandb")] == [f"run-{kept['wandb']}"] * 2
    assert (resumed.run_id, cut, ends) == (kept["wandb"], [], [0])
    assert [(point["step"], point["loss"]) for point in before] == whole[: len(before)]
    assert [(point["step"], point["loss"]) for point in after if "loss" in point] == whole[4:]

    found = client.get_run(kept["mlflow"])
    assert (found.info.run_name, found.info.status) == ("killed", "FINISHED")
    assert (found.data.params["model"], found.data.params["batch_size"]) == ("atto", "2")
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(kept["mlflow"], "loss")]
    assert sorted(losses) == sorted([*whole, *whole[4:6]])  # those of the killed attempt stay
    pictures = [file.path for file in client.list_artifacts(kept["mlflow"], "reconstructions")]
    assert pictures == ["reconstructions/step-00000008.jpg"]

    # A run that is trained on has more epochs, and MLflow changes no parameter.
    assert train(None, run, resume="newest", options={"log": "mlflow", "extend": 1}) == 0
    steps = [metric.step for metric in client.get_metric_history(kept["mlflow"], "loss")]
    assert sorted(steps)[-4:] == [9, 10, 11, 12]


def test_a_service_that_cannot_begin_stops_the_run_before_its_first_step(photos, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    run = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://there")
    with pytest.raises(TrainingStopped, match=r"^step 0: MLflow failed \(.*nonsense.*no checkpoint yet$"):
        train(photos, run, options={"log": "mlflow"})
    assert train(photos, run) == 0  # nothing of the run was begun


def test_a_folder_of_runs_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    from sparsecnx.train.services import chosen_callbacks

    with pytest.raises(ImportError, match=r"wandb is not installed: pip install 'sparsecnx\[wandb\]'"):
        chosen_callbacks("wandb")


def test_the_number_of_a_run_that_is_gone_is_named(photos, tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs the extra [mlflow]")
    run = tmp_path / "run"
    train(photos, run, epochs=1)
    Path(run / "mlflow-run-id").write_text("0" * 32)
    with pytest.raises(TrainingStopped, match=r"step 4: MLflow failed .*0{32}.*last good checkpoint: "):
        train(None, run, resume="auto", options={"log": "mlflow"})
