"""Run examples/ as its users do, at tiny sizes."""

from __future__ import annotations

import contextlib
import csv
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsecnx
from sparsecnx.models import convnextv2_atto, create_fcmae

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = ["--side", "64", "--batch", "4", "--lr", "0.0256", "--epochs", "4"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eight JPEGs that grow lighter downwards, one of them in a folder below it."""
    pytest.importorskip("torchvision")
    images: Any = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        colour = torch.randint(100, 256, (3,), generator=generator)
        pixels = (torch.linspace(0, 1, 80)[:, None, None] * colour).expand(80, 100, 3).to(torch.uint8)
        path = folder / ("more" if number == 0 else ".") / f"{number}.{'JPG' if number == 7 else 'jpg'}"
        images.fromarray(pixels.contiguous().numpy()).save(path)
    return folder


def start(*command: Any, **options: Any) -> subprocess.Popen[str]:
    """Start a Python command; options are those of Popen."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = (sys.executable, *map(str, command))
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str], by: signal.Signals = signal.SIGTERM) -> Iterator[subprocess.Popen[str]]:
    """Give a process, and end it after that, whatever happens. torchrun ends its own processes."""
    try:
        yield process
    finally:
        process.send_signal(by)
        process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until a condition holds, as long as pytest lets a test run; fail if the process ends before."""
    while not condition():
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.05)


def check_model(path: Path, photographs: Path) -> None:
    """Check that a file holds the weights of a network that has learned from these photographs, and a whole encoder."""
    from PIL import Image
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor

    model = create_fcmae("atto").eval()
    model.load_state_dict(torch.load(path)["model"])
    crops = [Image.open(photograph).crop((10, 10, 74, 74)) for photograph in photographs.rglob("*.[jJ]*")]
    images = torch.stack([pil_to_tensor(crop).float() / 255 for crop in crops])
    images = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mask = torch.tensor([[True, False, True, False]]).expand(8, -1)
    with torch.no_grad():
        assert model(images, mask=mask)[0] < 0.9, "before training it is 1.01"
    new = sparsecnx.load_encoder(convnextv2_atto(num_classes=2), path)
    assert sorted(new) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def test_accelerate_trains_on_two_processes_and_goes_on_after_a_kill(photographs: Path, tmp_path: Path) -> None:
    for library in ("accelerate", "jsonargparse"):
        pytest.importorskip(library)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, EXAMPLES / "accelerate_loop.py"]
    command = [*launch, photographs, tmp_path, *TINY]
    with ended(start(*command)) as killed:
        wait_for(lambda: list(tmp_path.glob("epoch-*")), killed)
    again = start(*command)
    printed, _ = again.communicate()
    assert again.returncode == 0
    epochs = [int(epoch) for epoch in re.findall(r"epoch (\d)/4  last loss [01]\.\d{4}\n", printed)]
    assert epochs == list(range(epochs[0], 5)) and epochs[0] > 1
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-00004"]
    check_model(tmp_path / "model.pt", photographs)


def run_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: Any) -> None:
    """Run an example in this process, which has imported torch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


@pytest.mark.parametrize(
    ("example", "library"), [("lightning_module", "pytorch_lightning"), ("accelerate_loop", "accelerate")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_batch_larger_than_the_folder_is_named(
    example: str, library: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (library, "jsonargparse"):
        pytest.importorskip(name)
    with pytest.raises(ValueError, match=r"batch is 16: expected .*at most .* images"):
        run_here(monkeypatch, f"{example}.py", photographs, tmp_path, *TINY[:2], "--batch", 16)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_goes_on_after_a_kill(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("pytorch_lightning", "jsonargparse"):
        pytest.importorskip(library)
    command = ["-W", "ignore", EXAMPLES / "lightning_module.py", photographs, tmp_path, *TINY]
    with ended(start(*command), signal.SIGKILL) as killed:
        wait_for((tmp_path / "last.ckpt").exists, killed)
    run_here(monkeypatch, "lightning_module.py", photographs, tmp_path, *TINY)
    rows = list(csv.DictReader((tmp_path / "log/version_1/metrics.csv").read_text().splitlines()))
    epochs = [int(row["epoch"]) for row in rows]
    assert epochs == list(range(epochs[0], 4)) and epochs[0] > 0
    check_model(tmp_path / "model.pt", photographs)


def test_detection_trains_and_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("torchvision", "pycocotools", "skimage", "jsonargparse"):
        pytest.importorskip(library)
    run_here(monkeypatch, "detection.py", "--kind", "maskrcnn", "--steps", 1, "--batch", 1, "--tests", 2)
    printed = capsys.readouterr().out
    assert re.search(r"^step 1/1  loss \d", printed)
    assert re.findall(r"(\w+) [01]\.\d{3}\n", printed)[-4:] == ["bbox_map", "bbox_map_50", "segm_map", "segm_map_50"]


@pytest.mark.parametrize("name", ["lightning_module.py", "accelerate_loop.py", "slurm_submitit.py"])
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 80


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return examples/slurm_submitit.py, which jobs can import too."""
    pytest.importorskip("submitit")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, EXAMPLES, Path(__file__).parent))))
    return __import__("slurm_submitit")


def test_slurm_gets_a_job_that_runs_torchrun_on_every_node(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch, srun = tmp_path / "bin/sbatch", tmp_path / "bin/srun"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 12345\n")
    srun.write_text("#!/bin/sh\n")
    for program in (sbatch, srun):
        program.chmod(0o755)
    path = os.pathsep.join((str(sbatch.parent), os.environ["PATH"]))
    monkeypatch.setenv("PATH", path)
    arguments = ["--nodes", "2", "--gpus", "8", "--hours", "5", "--partition", "gpu", "--logs", tmp_path / "logs"]
    pretrain = ["--data", "/data", "--output", "/runs/base", "--batch-size", "4096"]
    environment = {**os.environ, "PATH": path}
    command = [sys.executable, EXAMPLES / "slurm_submitit.py", *arguments, "--", *pretrain]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "job 12345\n"), done.stderr

    (script,) = (tmp_path / "logs").glob("*submission.sh")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE))
    expected = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "time": "300", "partition": "gpu"}
    assert expected.items() <= options.items()
    assert options["signal"] == "USR2@300" and "exclusive" in options

    (pickled,) = (tmp_path / "logs").glob("*.pkl")
    monkeypatch.setattr(sys.modules["__main__"], "Pretraining", slurm.Pretraining, raising=False)
    task = pickle.loads(pickled.read_bytes()).function
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8", "--max-restarts=3"]
    torchrun += ["--rdzv-endpoint=node1:29845", "--rdzv-backend=c10d", "--rdzv-id=12345"]
    command = [*torchrun, "-m", "sparsecnx", "pretrain", "--resume", "auto", *pretrain]
    assert task.command(["node1", "node2"], 12345) == command


STUB = """
    import os, pathlib, signal, sys, time
    log = pathlib.Path(sys.argv[-1])
    task = log.with_name("task")
    def stop(*_):
        with log.open("a") as file: file.write("saved ")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    again = log.exists()
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "270", "torchrun kills its processes after 30 s"
    with log.open("a") as file: file.write("resumed " if again else "started ")
    task.with_name("part").write_text(str(os.getppid()))
    task.with_name("part").rename(task)
    while not again: time.sleep(0.1)
"""


def test_a_job_that_is_preempted_saves_and_is_queued_again(slurm: Any, tmp_path: Path) -> None:
    submitit = sys.modules["submitit"]
    stub, log = tmp_path / "stub.py", tmp_path / "log"
    stub.write_text(textwrap.dedent(STUB))

    class Stub(slurm.Pretraining):  # type: ignore[misc, name-defined]
        def command(self, hosts: list[str], job: int) -> list[str]:
            return [sys.executable, str(stub), *super().command(hosts, job)]

        def checkpoint(self) -> Any:
            super().checkpoint()
            return submitit.helpers.DelayedSubmission(self.__class__(self.gpus, self.arguments))

    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=60, tasks_per_node=1)
    job = executor.submit(Stub(1, [str(log)]))
    wait_for((tmp_path / "task").exists)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR2)  # what Slurm sends
    job.result()
    assert log.read_text() == "started saved resumed "


def test_a_job_pretrains(slurm: Any, photographs: Path, tmp_path: Path) -> None:
    for library in ("tensorboard", "tqdm", "PIL"):
        pytest.importorskip(library)
    executor = sys.modules["submitit"].LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=60, tasks_per_node=1)
    small = ["--image-size", "64", "--batch-size", "4", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    job = executor.submit(slurm.Pretraining(1, ["--data", str(photographs), "--output", str(tmp_path / "run"), *small]))
    job.result()
    new = sparsecnx.load_encoder(convnextv2_atto(num_classes=2), tmp_path / "run/last.pt")
    assert sorted(new) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
