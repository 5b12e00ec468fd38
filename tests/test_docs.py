"""The documentation for users: its Python runs as written, and its links lead to files."""

from __future__ import annotations

import inspect
import re
import shlex
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sparsecnx
from sparsecnx import cli, models
from sparsecnx.compat import checkpoints

ROOT = Path(__file__).parents[1]
# The pages, and the libraries that they need. minkowski.md is not among them: half of its Python needs MinkowskiEngine,
# and the other half hides it.
PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("timm",),
    "docs/training-loop.md": (),
    "docs/targets.md": (),
    "docs/networks.md": ("timm", "torchvision"),
    "docs/images.md": ("tifffile", "imagecodecs", "skimage"),
    "docs/volumes.md": (),
    "docs/backends.md": (),
    "docs/wrapping.md": (),
    "docs/after-pretraining.md": ("timm", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime"),
    "docs/detection.md": ("torchvision",),
    "docs/segmentation.md": ("timm", "segmentation_models_pytorch"),
    "docs/elsewhere.md": ("huggingface_hub", "safetensors"),
    "docs/checkpoints.md": ("transformers", "safetensors"),
}
# A block of Python, or a line that converts a checkpoint for the block after it.
CODE = re.compile(r"^```python\n(.*?)^```$|^    (sparsecnx convert (?!IN)[^\n]*)$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the pages read: of a run, of published pretraining, and of other code."""
    folder = tmp_path_factory.mktemp("docs")
    state_dict = models.fcmae_convnextv2_atto().state_dict()
    checkpoints.save(folder / "checkpoint-799.pth", checkpoints.convert(state_dict, "fcmae"))
    (folder / "runs/mine").mkdir(parents=True)
    torch.save({"model": state_dict, "step": 1}, folder / "runs/mine/last.pt")
    torch.save({"model_ema": state_dict, "model": {}}, folder / "checkpoint-best.pth")
    torch.save({"state_dict": {}, "state_dict_ema": state_dict}, folder / "model_best.pth.tar")
    both = {f"{prefix}.{name}": value for prefix in ("student", "teacher") for name, value in state_dict.items()}
    torch.save({"state_dict": both, "hyper_parameters": {"folder": folder}}, folder / "last.ckpt")
    torch.save({"model": models.convnextv2_atto()}, folder / "in.pt")
    return folder


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per_tensor)")  # from torch's own tools
def test_python_of_a_page_runs_as_written(page: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in PAGES[page]:
        pytest.importorskip(library)
    monkeypatch.chdir(files)
    # Inductor would compile for minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, Any] = {}
    found = CODE.findall((ROOT / page).read_text())
    assert found
    for python, command in found:
        if command:
            assert cli.main(shlex.split(command, comments=True)[1:]) == 0
        else:
            exec(compile(python, page, "exec"), names)


@pytest.mark.parametrize("module", [sparsecnx, sparsecnx.nn, sparsecnx.ops])
def test_api_reference_names_everything_public(module: ModuleType) -> None:
    page = (ROOT / f"docs/api/{module.__name__.rpartition('.')[2]}.rst").read_text()
    documented = re.findall(r"auto(?:class|function|exception):: (\w+)", page)
    assert sorted(documented) == sorted(name for name in module.__all__ if not inspect.ismodule(getattr(module, name)))


def test_links_lead_to_files() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    link = re.compile(r"\]\(([^):#]+)[)#]")
    links = [(page.parent / found, page) for page in pages for found in link.findall(page.read_text())]
    folders, endings = ("sparsecnx", "csrc", "benchmarks", "examples", "tests"), ("py", "cpp", "h", "cu", "cuh")
    sources = [path for folder in folders for ending in endings for path in ROOT.glob(f"{folder}/**/*.{ending}")]
    sources += [ROOT / "setup.py", ROOT / "Makefile"]
    mention = re.compile(r"\bdocs/[\w/-]+\.md")
    links += [(ROOT / found, path) for path in sources for found in mention.findall(path.read_text())]
    assert len(links) > 50
    assert [f"{path}: {target}" for target, path in links if not target.exists()] == []


def test_promises_name_tests_that_exist() -> None:
    file = ""
    for path, name in re.findall(r"`(tests/[\w/*]+\.py)?(?:::)?(test_\w+)?`", (ROOT / "docs/promises.md").read_text()):
        file = path or file
        files = list(ROOT.glob(file))
        assert files, file
        assert not name or any(f"def {name}(" in found.read_text() for found in files), f"{file}::{name}"
