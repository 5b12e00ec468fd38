"""Print the tables of a results file of encoder.py, and draw it.

python benchmarks/plots.py benchmarks/results/encoder-cpu.json --plot benchmarks/results

encoder-ratio.png   time at every mask ratio, as a fraction of the compiled dense encoder's
encoder-size.png    time of every model size, likewise
encoder-memory.png  what autograd keeps for backward, and the peak of a forward + backward
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measure import print_anatomies, print_table

Case = dict[str, Any]

MODES = {"forward": "forward", "forward_backward": "forward + backward"}
MEMORY = {"saved_bytes": "kept for backward, MiB", "peak_bytes": "peak of forward + backward, MiB"}
VARIANTS = {
    "dense": ("dense x mask, eager", "#b0b7bf"),
    "compiled": ("dense x mask, compiled", "#6c7a89"),
    "sparse": ("sparse", "#d1495b"),
    "sparse_graph": ("sparse, CUDA graph", "#8d2a3a"),
    "floor": ("its matrix products alone", "#edae49"),
}
STAGE = ("channels", "tile", "rows", "blocks", "ms", "products", "depthwise", "rest")
# Cases are comparable if these are equal, except the one that a plot varies.
SETTING = ("size", "ratio", "batch", "image", "dtype", "device", "threads")


def print_tables(cases: Sequence[Case]) -> None:
    """Print times and memory, a line for each variant of each case, relative to the best dense encoder."""
    times, memory = [], []
    for case in cases:
        for mode, label in MODES.items():
            ms = medians(case, mode)
            dense = min((ms[name] for name in ms if name.startswith(("dense", "compiled"))), default=None)
            for name, value in ms.items():
                rate = "" if name == "floor" else 1e3 * case["batch"] / value
                times.append([title(case), label, name, value, value / dense if dense else "", rate])
        for name, saved in case["saved_bytes"].items():
            memory.append([title(case), name, saved / 2**20, case["peak_bytes"][name] / 2**20])
    print_table(["case", "pass", "variant", "ms", "of the best dense", "images/s"], times)
    print_table(["case", "variant", "kept for backward, MiB", "peak, MiB"], memory)
    anatomies = {title(case): case["anatomy"] for case in cases if "anatomy" in case}
    print_stages(anatomies)
    print_anatomies(anatomies)


def print_stages(anatomies: dict[str, dict[str, Any]]) -> None:
    """Print the blocks of every stage in sum with their parts, and what the encoder takes beside them."""
    rows: list[list[object]] = []
    for case, found in anatomies.items():
        for stage in found["stages"]:
            rows.append([case, "blocks", *stage.values(), stage["ms"] / stage["products"]])
        total = {name: sum(stage[name] for stage in found["stages"]) for name in STAGE[3:]}
        rows.append([case, "all blocks", "", "", "", *total.values(), total["ms"] / total["products"]])
        for name in ("downsampling", "outside"):
            rows.append([case, name, *[""] * 4, found[name], *[""] * 4])
        rows.append([case, "encoder", *[""] * 4, found["encoder"], *[""] * 3, found["encoder"] / total["products"]])
    if rows:
        print_table(["forward + backward", "of", *STAGE, "ms / products"], rows)


def medians(case: Case, mode: str) -> dict[str, float]:
    return {name: found["median"] for name, found in case["ms"][mode].items()}


def title(case: Case, without: Sequence[str] = ()) -> str:
    """Return the setting of a case in words, without the parts named."""
    words = {
        "size": case["size"],
        "ratio": f"mask {case['ratio']:g}",
        "batch": f"batch {case['batch']}",
        "image": f"{case['image']} px",
        "dtype": case["dtype"],
        "device": case["device"] if case["device"] != "cpu" else f"{case['threads']} threads",
    }
    return ", ".join(word for name, word in words.items() if name not in without)


def series(cases: Iterable[Case], axis: str) -> list[list[Case]]:
    """Return cases that differ in `axis` alone, the longest such series first."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case[name] for name in SETTING if name != axis), []).append(case)
    return sorted(groups.values(), key=len, reverse=True)


def baseline(cases: Iterable[Case]) -> str:
    """Name the variant that times are a fraction of: the compiled dense encoder where all cases have it."""
    return "compiled" if all("compiled" in case["ms"]["forward"] for case in cases) else "dense"


def draw(cases: Sequence[Case], folder: Path) -> None:
    """Draw what the cases allow, see the head of this file."""
    if not cases:
        return
    folder.mkdir(parents=True, exist_ok=True)
    by_ratio = series(cases, "ratio")
    if len(by_ratio[0]) > 1:
        draw_ratios([found for found in by_ratio if len(found) == len(by_ratio[0])], folder / "encoder-ratio.png")
    sizes = sorted(series(cases, "size")[0], key=lambda case: case["ms"]["forward"]["sparse"]["median"])
    times = {f"{label}, ms": [medians(case, mode) for case in sizes] for mode, label in MODES.items()}
    draw_bars(sizes, times, "time", baseline(sizes), 1.0, folder / "encoder-size.png")
    memory = {label: [case[field] for case in sizes] for field, label in MEMORY.items()}
    draw_bars(sizes, memory, "memory", "dense", 2.0**20, folder / "encoder-memory.png")


def draw_ratios(panels: Sequence[Sequence[Case]], path: Path) -> None:
    """Draw forward + backward against the mask ratio, a panel for each series, quartiles as a band."""
    figure, axes = new_figure(max(8.5, 5 * len(panels)), len(panels))
    for axis, unordered in zip(axes, panels, strict=True):
        cases = sorted(unordered, key=lambda case: case["ratio"])
        ratios, base = [case["ratio"] for case in cases], baseline(cases)
        times = [case["ms"]["forward_backward"] for case in cases]
        for name, (label, colour) in VARIANTS.items():
            if name not in times[0]:
                continue
            low, middle, high = (
                [ms[name][part] / ms[base]["median"] for ms in times] for part in ("q1", "median", "q3")
            )
            axis.plot(ratios, middle, "o-", color=colour, label=label, markersize=4)
            axis.fill_between(ratios, low, high, color=colour, alpha=0.2, linewidth=0)
        visible = [case["visible"] / case["patches"] for case in cases]
        axis.plot(ratios, visible, "k:", label="visible fraction")
        axis.set(title=title(cases[0], without=["ratio"]), xlabel="mask ratio", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"forward + backward, {VARIANTS[base][0]} = 1")
    save(figure, path)


def draw_bars(
    cases: Sequence[Case], panels: dict[str, list[dict[str, float]]], what: str, base: str, unit: float, path: Path
) -> None:
    """Draw groups of bars: a panel for each entry of `panels`, a group for each case, a bar for each variant.

    Args:
        panels: by title the values of every case, by variant.
        base: the variant that the heights are fractions of.
        unit: what the numbers on the bars are divided by.
    """
    figure, axes = new_figure(11, len(panels))
    for axis, (heading, values) in zip(axes, panels.items(), strict=True):
        names = [name for name in VARIANTS if all(name in found for found in values)]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
            label, colour = VARIANTS[name]
            drawn = axis.bar(places, [found[name] / found[base] for found in values], width, label=label, color=colour)
            axis.bar_label(drawn, [short(found[name] / unit) for found in values], fontsize=7, padding=1)
        axis.set_xticks(range(len(cases)), [case["size"] for case in cases])
        axis.set_title(heading)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(f"{what}, {VARIANTS[base][0]} = 1")
    figure.suptitle(title(cases[0], without=["size"]))
    save(figure, path)


def short(value: float) -> str:
    """Return a number in three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def new_figure(width: float, panels: int) -> tuple[Any, Any]:
    """Return a figure and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def save(figure: Any, path: Path) -> None:
    """Write a figure with its legend below."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of a results file of encoder.py, and draw it.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for the plots")
    options = parser.parse_args()
    cases = list(json.loads(options.results.read_text())["cases"].values())
    print_tables(cases)
    if options.plot:
        draw(cases, options.plot)


if __name__ == "__main__":
    main()
