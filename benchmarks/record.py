"""The results file: cases by key, and the runs they come from. Written whole or not at all, after every case.

{"runs": {RUN: {"date", "command", "machine", "versions"}}, "cases": {KEY: {"run": RUN, ...}}}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from atomic import write

import sparsecnx

ROOT = Path(__file__).resolve().parent.parent


class Results:
    """A results file; cases measured again replace their earlier selves.

    Args:
        path: read where it exists, made with its folder otherwise.
        run: the run that cases added belong to, where it spans several processes; by default a new one.
    """

    def __init__(self, path: Path, run: str | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"runs": {}, "cases": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
        self.run = run or datetime.now(timezone.utc).isoformat(timespec="seconds")

    def add(self, key: str, case: dict[str, Any]) -> None:
        """Add a case of this run, forget runs of which no case is left, and write the file.

        Raises:
            OSError: it could not be written; the file is as before.
        """
        runs, cases = self.content["runs"], self.content["cases"]
        runs[self.run] = description(self.run)
        cases[key] = {"run": self.run, **case}
        used = {case["run"] for case in cases.values()}
        self.content["runs"] = {run: runs[run] for run in sorted(used)}
        self.content["cases"] = dict(sorted(cases.items()))
        # A list of numbers, the repeats, on one line.
        text = json.dumps(self.content, indent=1)
        text = re.sub(r"\[([\s\d.,]+)\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        write(self.path, text + "\n")


def description(date: str) -> dict[str, Any]:
    """When, how and on what this process measures."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return {
        "date": date,
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("triton", "transformers", "MinkowskiEngine")},
            "sparsecnx": sparsecnx.__version__,
            "commit": commit(),
        },
    }


def version(package: str) -> str | None:
    """Version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPU."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
