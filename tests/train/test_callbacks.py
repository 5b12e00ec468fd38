"""What callbacks are told, and what happens where one fails."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
from pathlib import Path

import pytest
import torch
from small_runs import logged, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.train import callbacks, checkpoint
from sparsecnx.train.callbacks import Callback, LogError, Run, StepRecord
from sparsecnx.train.log import RunLog, Terminal
from sparsecnx.train.options import Options
from sparsecnx.train.services import chosen_callbacks

CODE = """
from sparsecnx.train.callbacks import Callback

class Told(Callback):
    said = []

    def start(self, run):
        self.said.append(("start", run.step, run.total_steps, run.config["model"], run.config["images"]))

    def step(self, record):
        self.said.append(("step", record.step, record.loss))

    def figure(self, name, figure, step):
        self.said.append(("figure", name, len(figure.axes), step))

    def end(self, complete):
        self.said.append(("end", complete))

class Failing(Callback):
    def step(self, record):
        if record.step == 6:
            1 / 0

def number():
    return 7
"""
RECORD = StepRecord(5, 1.25, 0.5, 1e-3, 2.0, 100.0, [100.0], [0.1], {"biome": 0.25})


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write CODE as a module of its own name, and return the name."""
    name = f"logs_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def run_of(folder, step=4):
    return Run(folder, step, 8, 2, torch.device("cpu"), {})


class Remembering(Callback):
    def __init__(self, said, fails=None):
        self.said, self.fails = said, fails

    def start(self, run):
        self._say("start")

    def end(self, complete):
        self._say(("end", complete))

    def _say(self, what):
        self.said.append((id(self), what))
        if what == self.fails:
            raise ValueError("broken")


def test_a_callback_of_the_user_is_told_everything(photos, tmp_path, module):
    names = f"{module}:Told"
    assert train(photos, tmp_path / "run", options={"log": names, "draw_every": 1}) == 0
    said = __import__(module).Told.said
    steps = [("step", line["step"], line["loss"]) for line in logged(tmp_path / "run")]
    picture = ("figure", "reconstructions", 6)  # two images, a batch, in three panels each
    whole = [("start", 0, 8, "atto", 8), *steps[:4], (*picture, 4), *steps[4:], (*picture, 8), ("end", True)]
    assert said == whole


def test_the_callback_of_the_documentation_runs_as_written(photos, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Losses" in block)
    (tmp_path / "my_logs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert train(photos, tmp_path / "run", options={"log": "my_logs:Losses", "draw_every": 1}) == 0
    lines = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert lines == [f"{line['step']},{line['loss']}" for line in logged(tmp_path / "run")]


def test_a_callback_that_fails_stops_the_run_and_is_named(photos, tmp_path, module):
    line = CODE[: CODE.index("1 / 0")].count("\n") + 1
    failed = rf"step 6: {module}.Failing failed \(ZeroDivisionError: division by zero, {module}.py line {line}\)"
    with pytest.raises(TrainingStopped, match=f"{failed}, last good checkpoint: .*checkpoint-00000004.pt"):
        train(photos, tmp_path / "run", options={"log": f"{module}:Failing"})
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_checkpoint_alone_runs_no_code_of_its_logs(photos, tmp_path, module):
    train(photos, tmp_path / "run", epochs=1, options={"log": f"{module}:Told"})
    told = __import__(module).Told.said
    told.clear()
    assert train(None, tmp_path / "run", resume="newest") == 0
    assert told == []


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("", "log is '': expected wandb, mlflow, or module:factory"),
        ("comet", "log is comet: expected wandb, mlflow, or module:factory"),
        ("wandb, wandb", "log is wandb, wandb: expected each name once"),
        ("no_such_module:Log", "log is no_such_module:Log: ModuleNotFoundError: No module named 'no_such_module'"),
        ("{module}:Other", "log is {module}:Other: AttributeError: .*; expected wandb"),
        ("{module}:number", "log is {module}:number: it returned int; expected wandb"),
    ],
)
def test_a_log_that_is_not_one_is_refused_before_anything_is_written(names, problem, photos, tmp_path, module):
    with pytest.raises(InputError, match=problem.format(module=module)):
        train(photos, tmp_path / "run", options={"log": names.format(module=module)})
    assert not (tmp_path / "run").exists()


def test_every_callback_that_was_started_is_ended(tmp_path):
    said = []
    first, second, third = Remembering(said), Remembering(said, fails=("end", True)), Remembering(said)
    with (
        pytest.raises(LogError, match=r"Remembering failed \(ValueError: broken"),
        RunLog([first, second, third], run_of(tmp_path, 8)),
    ):
        pass
    assert [entry for entry in said if entry[0] == id(first)] == [(id(first), "start"), (id(first), ("end", False))]
    ends = [what for _, what in said if what != "start"]
    assert ends == [("end", True), ("end", True), ("end", False)]  # the failure of the second ended the first one's run

    said.clear()
    second.fails = "start"
    with pytest.raises(LogError), RunLog([first, second, third], run_of(tmp_path)):
        pytest.fail("it began")
    assert said == [(id(first), "start"), (id(second), "start"), (id(first), ("end", False))]


def test_the_error_that_stops_a_run_is_reported_and_not_that_of_a_log(tmp_path):
    failing = Remembering([], fails=("end", False))
    with pytest.raises(ZeroDivisionError), RunLog([failing], run_of(tmp_path)):
        raise ZeroDivisionError
    died = "DataLoader worker (pid 7) is killed by signal: Killed."
    with pytest.raises(RuntimeError, match="DataLoader worker"), callbacks.naming("log.jsonl"):
        raise RuntimeError(died)


def test_a_process_without_callbacks_writes_nothing(tmp_path):
    with RunLog([], run_of(tmp_path)) as log:
        log.say("a line")
        log.write(RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_has_one_live_line(tmp_path, monkeypatch):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    with open(writer, "w") as screen, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        patch.setattr("sys.stdout", screen)
        with RunLog([Terminal()], run_of(tmp_path)) as log:
            log.say("epoch 1/2")
            log.write(RECORD)
    shown = b""
    with contextlib.suppress(OSError):  # Linux has no other end of a terminal
        while part := os.read(reader, 1000):
            shown += part
    os.close(reader)
    live = re.split(r"[\r\n]+", shown.decode())
    form = r"62%\|.*\| 10\.0/16\.0 \[\d\d:\d\d<.*img/s, loss=0\.5000, lr=1\.00e-03, memory=\d+\.\dGiB\]"
    assert any(re.search(form, line) for line in live), live
    assert "epoch 1/2" in live
    assert shown.count(b"\n") == 2  # one after the line of text, one after the live line at its end


def test_without_a_terminal_there_are_lines_alone(tmp_path, monkeypatch, capsys):
    with RunLog([Terminal()], run_of(tmp_path)) as log:
        log.say("epoch 1/2")
        log.write(RECORD)
    assert capsys.readouterr() == ("epoch 1/2\n", "")


def test_a_library_that_is_missing_is_named_with_the_command(monkeypatch):
    for name in ("wandb", "mlflow"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            with pytest.raises(ImportError, match=rf"{name} is not installed: pip install 'sparsecnx\[{name}\]'"):
                chosen_callbacks(name)


def test_tensorboard_has_steps_and_pictures_of_all_attempts(photos, tmp_path):
    from PIL import Image

    train(photos, tmp_path / "run", options={"draw_every": 1})
    (tmp_path / "run" / "checkpoint-00000008.pt").unlink()
    train(None, tmp_path / "run", resume="auto", options={"draw_every": 1})
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("pretrain/loss")] == list(range(1, 9))
    pictures = events.Images("pretrain/reconstructions")
    assert [event.step for event in pictures] == [4, 8]
    for event in pictures:
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            assert image.size == (event.width, event.height)


def test_draw_every_must_not_be_negative():
    with pytest.raises(InputError, match="draw_every is -1: expected 0 or more"):
        Options(draw_every=-1)
