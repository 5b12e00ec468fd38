"""The command where the package cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = "sys.modules['torch'] = None"
INTERRUPTED = """
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
"""
MISSING = "sparsecnx: error: sparsecnx needs torch 2.11 or later, which is not installed: pip install torch"


@pytest.mark.parametrize(
    ("before", "code", "line"),
    [(WITHOUT_TORCH, 2, MISSING), (INTERRUPTED, 130, "sparsecnx: interrupted")],
    ids=["no torch", "Ctrl-C while torch is imported"],
)
def test_command_ends_in_one_line(before: str, code: int, line: str) -> None:
    script = f"import sys\n{before}\nimport sparsecnx_command\nsys.exit(sparsecnx_command.main())"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.strip()) == (code, line)
