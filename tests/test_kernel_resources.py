"""Every Triton kernel compiled ahead of time: no spills, shared memory within limits, accesses 16 bytes wide; and that
benchmarks/kernel_resources.py, which says so, can say otherwise."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsecnx.backends import triton_launch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "kernel_resources.py"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Narrow, usual and wide channels, among them no multiples of 16 and no powers of two, and tile sides 8, 2 and 1. What a
# cold compiler gets through in minutes: bfloat16 everywhere once and on every architecture, float32 where shared memory
# is scarcest. benchmarks/kernel_resources.py itself does the whole product.
SELECTIONS = {
    "bfloat16": (["tiny.1"], [80, 90, 100]),
    "bfloat16-other-shapes": (["atto.1", "base.3", "huge.4"], [90]),
    "float16": (["base.3"], [100]),
    "float32": (["atto.1"], [80]),
}

pytestmark = pytest.mark.skipif(not triton_launch.available, reason="needs Triton")


def run(script: Path, *arguments: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """A Python script without Triton's interpreter, which conftest.py asks for, with these folders to import from."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, *path]))
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)


def jitted() -> set[str]:
    """Names of the kernels of the package: by convention they end in `_kernel`."""
    text = "".join(path.read_text() for path in (ROOT / "sparsecnx").rglob("triton*.py"))
    return set(re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", text))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_kernel_fits(selection: str, tmp_path: Path) -> None:
    places, arches = SELECTIONS[selection]
    dtype = selection.partition("-")[0]
    out, table = tmp_path / "resources.json", tmp_path / "resources.md"
    options = [
        "--size",
        *places,
        "--dtype",
        dtype,
        "--arch",
        *map(str, arches),
        "--out",
        str(out),
        "--table",
        str(table),
    ]
    done = run(SCRIPT, *options)
    assert done.returncode == 0, done.stderr[-20_000:]

    rows = json.loads(out.read_text())["kernels"]
    compiled = {(row["kernel"], row["arch"]) for row in rows}
    assert compiled == {(kernel, arch) for kernel in jitted() for arch in arches}
    for row in rows:
        where = f"{row['kernel']} {row['uses']} sm_{row['arch']}"
        assert row["dtypes"] == [dtype], where
        assert row["spills"] == 0 and row["stack"] == 0, where
        assert row["shared"] <= SHARED[row["arch"]], where
        assert 16 <= row["registers"] <= 255 and 0 < row["occupancy"] <= 1, where
        narrow = [access for access in row["accesses"] if access["bytes"] < 16]
        assert not [access for access in narrow if set(access["arguments"]) & set(row["wide"])], where
        if row["wide"]:
            assert any(re.search(r"\.128|\.256|^UTMA|^UBLKCP", name) for name in row["sass"]), where
    wide = {(row["kernel"], name) for row in rows for name in row["wide"]}
    assert {"x_ptr", "out_ptr"} <= {name for kernel, name in wide if kernel == "depthwise_conv_kernel"}
    assert "| depthwise_conv " in table.read_text()


SAMPLES = """
import triton
import triton.language as tl


@triton.jit
def good_kernel(x_ptr, out_ptr, count, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def narrow_kernel(x_ptr, out_ptr, C, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=tl.arange(0, BLOCK) < C))


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(BLOCK):
        total = total * tl.load(x_ptr + at).to(tl.float32) + 1
        at += BLOCK
    tl.store(out_ptr + tl.arange(0, BLOCK), total.to(tl.bfloat16))


@triton.jit
def greedy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x_ptr + at).to(tl.float32)
    tl.store(out_ptr + at, (values + _transposed(values)).to(tl.bfloat16))


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0)


@triton.jit
def idle_kernel(x_ptr):
    tl.store(x_ptr, 0)


@triton.jit
def _transposed(values):
    return tl.trans(values)
"""

DRIVER = """
import sys
from pathlib import Path

import kernel_resources
import launches
import torch
from sparsecnx.backends import triton_launch


def programs(setting):
    from samples import triton as samples

    def run():
        x = torch.empty(setting.rows, setting.channels, dtype=torch.bfloat16)
        triton_launch.launch(samples.good_kernel, (8,), x, x, x.numel(), C=setting.channels, BLOCK=1024, num_warps=4)
        triton_launch.launch(samples.narrow_kernel, (8,), x, x, setting.channels, BLOCK=64, num_warps=1)
        triton_launch.launch(samples.spilling_kernel, (8,), x, x, BLOCK=8192, num_warps=1)
        triton_launch.launch(samples.greedy_kernel, (8,), x, x, BLOCK=256, num_warps=16)
        triton_launch.launch(samples.wrong_kernel, (8,), x, BLOCK=1)

    return {"sample": run}


if __name__ == "__main__":
    launches.programs = programs
    found = launches.entry_points(Path(sys.argv.pop()))
    launches.entry_points = lambda: found
    sys.exit(kernel_resources.main())
"""


def test_broken_rules_are_found(tmp_path: Path) -> None:
    package = tmp_path / "samples"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "triton.py").write_text(SAMPLES)
    (tmp_path / "driver.py").write_text(DRIVER)
    out = tmp_path / "out.json"
    options = ["--size", "atto.1", "--dtype", "bfloat16", "--arch", "80", "--out", str(out), str(package)]
    done = run(tmp_path / "driver.py", *options, path=[tmp_path, SCRIPT.parent])
    assert done.returncode == 1, done.stderr

    broken: dict[str, Any] = {row["kernel"]: row["broken"] for row in json.loads(out.read_text())["kernels"]}
    assert broken["good_kernel"] == []
    assert [line.partition(", at ")[0] for line in broken["narrow_kernel"]] == [
        "wide: ld of 2 bytes, x_ptr",
        "wide: st of 2 bytes, out_ptr",
    ]
    assert re.match(r"spills: [1-9]\d* accesses to local memory, [1-9]\d* bytes of stack", broken["spilling_kernel"][0])
    assert any(line.startswith("shared: ") for line in broken["greedy_kernel"])
    assert broken["wrong_kernel"][0].startswith("compiles: ")
    assert "launched: nothing that was run launches idle_kernel\n" in done.stderr
    assert "_transposed" not in done.stderr
    for kernel in ("narrow_kernel", "spilling_kernel", "greedy_kernel", "wrong_kernel"):
        assert f"{kernel} bfloat16 sm_80 in sample (atto 1): " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "small"], "--size is 'small': expected one of atto, "),
        (["--size", "atto.5"], "--size is 'atto.5': expected one of atto, "),
        (["--arch", "70"], "invalid choice: 70"),
        (["--jobs", "0"], "--jobs is 0: expected 1 or more"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit):
        importlib.import_module("kernel_resources").parse(arguments)
    assert complaint in capsys.readouterr().err
