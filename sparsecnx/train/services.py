"""The logs that a user asks for: Weights & Biases, MLflow, and callbacks of the user's own.

The services' own settings decide where they write: `WANDB_MODE`, `WANDB_PROJECT`, `MLFLOW_TRACKING_URI` and their like.

    runs/demo/wandb-run-id      the run at Weights & Biases, which a resumed run continues
    runs/demo/mlflow-run-id     the same for MLflow
"""

from __future__ import annotations

import importlib.util
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.common.files import write_atomically
from sparsecnx.train.callbacks import Callback, Run, StepRecord, jpeg
from sparsecnx.train.code import load_code

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "sparsecnx"


class Wandb(Callback):
    """Writes to Weights & Biases, against the steps of the run: a step that is told again gets another point there."""

    def __str__(self) -> str:
        return "Weights & Biases"

    def start(self, run: Run) -> None:
        import wandb

        path = run.folder / "wandb-run-id"
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            id=_kept(path),
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            allow_val_change=True,  # a run that is extended has more epochs
            settings=wandb.Settings(console="off"),  # capturing the terminal would hide its errors
        )
        self.run.define_metric("*", step_metric="step")
        write_atomically(path, self.run.id)

    def step(self, record: StepRecord) -> None:
        self.run.log({"step": record.step, **record.numbers()})

    def evaluation(self, values: dict[str, float], step: int) -> None:
        self.run.log({"step": step, **{f"test/{name}": value for name, value in values.items()}})

    def figure(self, name: str, figure: Figure, step: int) -> None:
        import wandb

        with Image.open(BytesIO(jpeg(figure))) as image:
            self.run.log({name: wandb.Image(image, file_type="jpg"), "step": step})

    def end(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class Mlflow(Callback):
    """Writes to MLflow, where MLflow's own settings say."""

    def __str__(self) -> str:
        return "MLflow"

    def start(self, run: Run) -> None:
        import mlflow

        path, chosen = run.folder / "mlflow-run-id", {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}
        self.mlflow: Any = mlflow
        known = _kept(path)
        if known is None and not chosen & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        active = mlflow.start_run(run_id=known, run_name=None if known else run.folder.name)
        write_atomically(path, active.info.run_id)
        # MLflow refuses to change a parameter, such as the epochs of a run that is extended.
        mlflow.log_params({name: value for name, value in run.config.items() if name not in active.data.params})

    def step(self, record: StepRecord) -> None:
        self.mlflow.log_metrics(record.numbers(), step=record.step)

    def evaluation(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics({f"test/{name}": value for name, value in values.items()}, step=step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self.mlflow.log_figure(figure, f"{name}/step-{step:08d}.jpg")

    def end(self, complete: bool) -> None:
        self.mlflow.end_run("FINISHED" if complete else "KILLED")


SERVICES: dict[str, type[Callback]] = {"wandb": Wandb, "mlflow": Mlflow}


def chosen_callbacks(names: str | None) -> list[Callback]:
    """Return the callbacks of `--log`, names separated by commas.

    Args:
        names: wandb, mlflow, or `module:factory`, a function or class of Python that returns a `Callback`.

    Raises:
        InputError: a name is unknown or there twice, or a factory cannot be loaded or returns something else.
        MissingExtra: the library of a service is not installed.
    """
    if names is None:
        return []
    found = [name.strip() for name in names.split(",")]
    if len(set(found)) < len(found):
        raise InputError("log", names, "expected each name once")
    return [_callback(name) for name in found]


def _callback(name: str) -> Callback:
    if name in SERVICES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder `wandb` that runs leave behind is no library
            raise MissingExtra(f"{name} is not installed: pip install 'sparsecnx[{name}]'")
        return SERVICES[name]()
    expected = f"expected {', '.join(SERVICES)}, or module:factory, a Python function that returns a Callback"
    if ":" not in name:
        raise InputError("log", name or "''", expected)
    try:
        callback = load_code(name)()
    except Exception as error:  # code of the user can raise anything
        raise InputError("log", name, f"{type(error).__name__}: {error}; {expected}") from error
    if not isinstance(callback, Callback):
        raise InputError("log", name, f"it returned {type(callback).__name__}; {expected}")
    return callback


def _kept(path: Path) -> str | None:
    """Return the number of the run that an earlier attempt wrote to, or None."""
    return path.read_text().strip() or None if path.exists() else None
