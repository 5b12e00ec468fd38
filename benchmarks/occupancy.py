"""How many blocks of a kernel a multiprocessor holds at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Of a multiprocessor (CUDA C++ programming guide, table of technical specifications per compute capability).

    Attributes:
        block_shared: bytes of shared memory that a block may have.
        shared: bytes of shared memory, of which every block takes RESERVED more than it asked for.
    """

    block_shared: int
    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


ARCHITECTURES = {
    80: Architecture(163 * 1024, 164 * 1024),
    86: Architecture(99 * 1024, 100 * 1024, warps=48, blocks=16),
    89: Architecture(99 * 1024, 100 * 1024, warps=48, blocks=24),
    90: Architecture(227 * 1024, 228 * 1024),
    100: Architecture(227 * 1024, 228 * 1024),
}
RESERVED = 1024
REGISTER_UNIT = 256  # registers are handed to warps in multiples of it


def resident_blocks(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time.

    Args:
        arch: a key of `ARCHITECTURES`.
        warps: of a block.
        registers: of a thread.
        shared: bytes of shared memory of a block.
    """
    limits = ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // per_warp // warps,
        limits.shared // (shared + RESERVED),
    )
