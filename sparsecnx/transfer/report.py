"""Tables and pictures of what classifiers find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

MOST_DRAWN = 40  # classes whose names a confusion picture shows
MOST_NUMBERS = 20  # classes of which it shows numbers


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text, the first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(map(str.rstrip, lines))


def draw_confusion(counts: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """Draw how many images of each class, a row, were taken for which, a column; each row adds up to 1."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 3 + 0.3 * min(len(names), MOST_DRAWN)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the images of a class")
    if len(names) <= MOST_DRAWN:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="taken for", ylabel="class", title=title)
    return figure
