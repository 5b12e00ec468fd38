"""A short run of the fuzzer of the compiled CPU operators; benchmarks/results/fuzz-cpu.json records the long one."""

from __future__ import annotations

import fuzz_operators
from cases import needs_cpu

CALLS = 600


@needs_cpu
def test_no_crash_no_hang_and_no_wrong_number():
    counts, faults = fuzz_operators.fuzz(CALLS, seed=1)
    assert faults == []
    assert sum(counts.values()) == CALLS and counts["equal"] > 30
