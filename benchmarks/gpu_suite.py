"""Run all that needs a GPU: build, tests, kernels, encoder, training step. Takes about half an hour.

    python benchmarks/gpu_suite.py OUT [PART ...]

Needs Python, torch with Triton, pytest, hypothesis and rich, and g++ and nvcc to compile the operators. OUT gets
summary.json, a log and a results file of every part; all are written as soon as they are known. A part that fails or
runs out of time does not stop the next. The exit code is 0 only if all parts went well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Each part has a time limit in seconds and a command. OUT stands for the folder of the results.
GPU = "--device cuda --dtype bfloat16 --batch 64 --by-block"
PARTS = {
    "build": (400, "setup.py build_ext --inplace"),
    "tests": (900, "-m pytest -q -rf -p no:cacheprovider tests -k 'triton or cuda or graph or stream or gpu'"),
    "kernels": (400, "benchmarks/kernels.py --out OUT/kernels.json"),
    "encoder": (580, f"benchmarks/encoder.py {GPU} --size tiny base --out OUT/encoder.json"),
    "training_step": (400, f"benchmarks/training_step.py {GPU} --size tiny base --out OUT/training_step.json"),
}


def run(name: str, out: Path) -> dict[str, object]:
    """Run a part and return how it ended, with its results."""
    limit, command = PARTS[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPARSECNX_BUILD": "cuda"}
    begin = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        words = f"exec '{sys.executable}' {command.replace('OUT', str(out))}"
        try:
            done = subprocess.run(
                words, shell=True, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            )
            status = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"ended after {limit} s"
    results = out / f"{name}.json"
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin),
        "log": (out / f"{name}.log").read_text().splitlines()[-20:],
        "results": json.loads(results.read_text()) if results.exists() else None,
    }


def main() -> int:
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= PARTS.keys():
        sys.exit(f"usage: python benchmarks/gpu_suite.py OUT [PART ...], parts: {' '.join(PARTS)}")
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for name in sys.argv[2:] or PARTS:
        summary[name] = run(name, out)
        print(f"{name}: {summary[name]['status']} ({summary[name]['seconds']} s)", flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(part["status"] != "ok" for part in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
