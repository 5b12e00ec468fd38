"""Phantoms: volumes made of ellipsoids by a formula, to try `sparsecnx pretrain` without a download.

    python -m sparsecnx.train.phantoms FOLDER

As the phantom of Shepp and Logan is a sum of ellipses (IEEE Trans. Nucl. Sci. 21, 1974), each of these is a sum of soft
ellipsoids over x in [-1, 1]^3,

    v(x) = sum_k a_k / (1 + exp((|D_k R_k (x - c_k)| - 1) / w)),    w = 0.04

The first is a body around the origin with half axes of 0.6 to 0.9 and a_0 = 1. Twenty others have centers within 0.6 of
the origin, half axes of 0.08 to 0.35, uniform rotations R_k, and a_k of -0.5 to 0.8. All of them are functions of the
seed and the number of the volume.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsecnx.train.data.crops import mix

ELLIPSOIDS = 20
SOFTNESS = 0.04
UNIT = 1000  # a value of 1 is saved as this number


def phantom(number: int, side: int = 96, seed: int = 0) -> Tensor:
    """Return phantom `number` as int16 `(side, side, side)`, in thousandths."""
    generator = torch.Generator().manual_seed(mix(seed, "phantom", number))

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    axes = torch.cat([drawn(0.6, 0.9, 1, 3), drawn(0.08, 0.35, ELLIPSOIDS, 3)])
    heights = torch.cat([torch.ones(1), drawn(-0.5, 0.8, ELLIPSOIDS)])
    centers = torch.randn(ELLIPSOIDS + 1, 3, generator=generator)
    centers *= torch.cat([torch.zeros(1), drawn(0, 0.6, ELLIPSOIDS)])[:, None] / centers.norm(dim=1, keepdim=True)
    rotations = torch.linalg.qr(torch.randn(ELLIPSOIDS + 1, 3, 3, generator=generator)).Q

    places = (torch.arange(side) + 0.5) * (2 / side) - 1
    grid = (places.view(-1, 1, 1), places.view(-1, 1), places)
    v = torch.zeros(side, side, side)
    for axis, height, center, rotation in zip(axes, heights, centers, rotations, strict=True):
        rows = rotation / axis[:, None]
        squares = sum((sum(row[i] * grid[i] for i in range(3)) - row @ center) ** 2 for row in rows)
        v += height * torch.sigmoid((1 - squares.sqrt()) / SOFTNESS)
    return (v * UNIT).round().to(torch.int16)


def main(argv: Sequence[str] | None = None) -> int:
    """Write phantoms that are not there yet to a folder."""
    parser = argparse.ArgumentParser(prog="python -m sparsecnx.train.phantoms", description="Write phantoms as .npy.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--side", type=int, default=96, metavar="VOXELS", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        path = arguments.folder / f"phantom-{number:03d}.npy"
        if not path.exists():
            np.save(path, phantom(number, arguments.side, arguments.seed).numpy())
    print(f"{arguments.folder}: {arguments.count} phantoms, {arguments.side}^3 voxels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
