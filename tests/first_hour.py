"""Do what the README says with an installed wheel and its extra `[train]`, for `make wheel-test`. Argument: the torch.

python tests/first_hour.py 2.13.0
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import sparsecnx

README = Path(__file__).parents[1] / "README.md"
COMMAND = Path(sys.executable).with_name("sparsecnx")

assert torch.__version__.partition("+")[0] == sys.argv[1], f"torch {sys.argv[1]} was replaced by {torch.__version__}"
assert importlib.util.find_spec("torchvision") is None, "sparsecnx[train] brought torchvision"
names: dict[str, object] = {}
for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
    if "import timm" not in block:  # which brings torchvision; tests/test_docs.py runs these blocks
        exec(compile(block, "README.md", "exec"), names)

with tempfile.TemporaryDirectory() as folder:
    data, run = Path(folder, "images"), Path(folder, "run")
    data.mkdir()
    for i in range(6):
        Image.linear_gradient("L").rotate(60 * i).convert("RGB").save(data / f"{i}.jpg")
    few = ["--small-data", "--epochs", "1", "--epoch-repeats", "2", "--image-size", "64"]
    subprocess.check_call([COMMAND, "pretrain", "--data", data, "--output", run, *few])
    subprocess.check_call([COMMAND, "pretrain", "--output", run, "--resume", "--extend", "1"])
    subprocess.check_call([COMMAND, "reconstruct", run / "last.pt", data / "0.jpg", "--out", run / "picture.png"])
    subprocess.check_call([COMMAND, "convert", run / "last.pt", run / "timm.safetensors", "--to", "timm"])
    new = sparsecnx.load_encoder(sparsecnx.models.convnextv2_atto(), run / "last.pt")
    assert new == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
print(f"first hour: Python {sys.version.split()[0]}, torch {torch.__version__}")
