"""Tables and plots of a results file of encoder.py.

python benchmarks/report.py benchmarks/results/encoder-cpu.json --plot benchmarks/results

encoder-ratio.png    time at every mask ratio, as a fraction of the compiled dense encoder's
encoder-size.png     time of every model size, likewise
encoder-memory.png   what autograd keeps for backward, and the peak of a forward + backward
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Case = dict[str, Any]

MODES = {"forward": "forward", "forward_backward": "forward + backward"}
VARIANTS = {
    "dense": ("dense x mask, eager", "#b0b7bf"),
    "compiled": ("dense x mask, compiled", "#6c7a89"),
    "sparse": ("sparse", "#d1495b"),
    "floor": ("its matrix products alone", "#edae49"),
}
# What makes two cases comparable, but for the one that a plot varies.
SETTING = ("size", "ratio", "batch", "image", "dtype", "device", "threads")


def tables(cases: Iterable[Case]) -> str:
    """Times and memory as text, in the order of the cases."""
    cases = list(cases)
    times = [["case", "pass", *(f"{name} ms" for name in VARIANTS), "/dense", "/compiled", "/floor", "images/s"]]
    memory = [["case", "", *(f"{name} MiB" for name in VARIANTS if name != "floor"), "/dense", "/compiled"]]
    for case in cases:
        for mode, label in MODES.items():
            ms = {name: case["ms"][mode][name]["median"] for name in case["ms"][mode]}
            ratios = [fraction(ms, "sparse", name) for name in ("dense", "compiled", "floor")]
            cells = [f"{ms[name]:.1f}" if name in ms else "-" for name in VARIANTS]
            times.append([title(case), label, *cells, *ratios, f"{1e3 * case['batch'] / ms['sparse']:.1f}"])
        for field, label in (("saved_bytes", "saved for backward"), ("peak_bytes", "peak")):
            found = case[field]
            cells = [f"{found[name] / 2**20:.1f}" if name in found else "-" for name in VARIANTS if name != "floor"]
            ratios = [fraction(found, "sparse", name) for name in ("dense", "compiled")]
            memory.append([title(case), label, *cells, *ratios])
    return f"{aligned(times)}\n\n{aligned(memory)}"


def fraction(values: dict[str, float], name: str, other: str) -> str:
    """values[name] / values[other] as text."""
    return f"{values[name] / values[other]:.3f}" if values.get(other) else "-"


def title(case: Case, without: Sequence[str] = ()) -> str:
    """The setting of a case in words, without the parts named."""
    words = {
        "size": case["size"],
        "ratio": f"mask {case['ratio']:g}",
        "batch": f"batch {case['batch']}",
        "image": f"{case['image']} px",
        "dtype": case["dtype"],
        "device": case["device"] if case["device"] != "cpu" else f"{case['threads']} threads",
    }
    return ", ".join(word for name, word in words.items() if name not in without)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table under each other: two columns of words, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def series(cases: Iterable[Case], axis: str) -> list[list[Case]]:
    """Cases that differ in `axis` alone, ordered along it, the longest such series first."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case[name] for name in SETTING if name != axis), []).append(case)
    return sorted(groups.values(), key=len, reverse=True)


def baseline(case: Case) -> str:
    """What times are a fraction of: the compiled dense encoder where it was measured."""
    return "compiled" if "compiled" in case["ms"]["forward"] else "dense"


def plot(cases: Iterable[Case], folder: Path) -> list[Path]:
    """Draw what the cases allow into `folder`, see the head of this file. Returns the files written."""
    cases = list(cases)
    folder.mkdir(parents=True, exist_ok=True)
    by_ratio = [found for found in series(cases, "ratio") if len(found) > 1]
    written = []
    if by_ratio:
        longest = [found for found in by_ratio if len(found) == len(by_ratio[0])]
        written.append(plot_ratios(longest, folder / "encoder-ratio.png"))
    if cases:
        sizes = sorted(series(cases, "size")[0], key=lambda case: case["ms"]["forward"]["sparse"]["median"])
        written.append(plot_times(sizes, folder / "encoder-size.png"))
        written.append(plot_memory(sizes, folder / "encoder-memory.png"))
    return written


def plot_ratios(panels: Sequence[Sequence[Case]], path: Path) -> Path:
    """A panel per series: forward + backward against the mask ratio, quartiles as a band."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(8.5, 5 * len(panels)), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, unordered in zip(axes[0], panels, strict=True):
        cases = sorted(unordered, key=lambda case: case["ratio"])
        ratios, base = [case["ratio"] for case in cases], baseline(cases[0])
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
    axes[0][0].set_ylabel(f"forward + backward, {VARIANTS[base][0]} = 1")
    return save(figure, path)


def plot_times(cases: Sequence[Case], path: Path) -> Path:
    """A panel per pass: bars by size as fractions of the dense encoder's time, labelled in milliseconds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODES), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (mode, label) in zip(axes, MODES.items(), strict=True):
        medians = [{name: ms["median"] for name, ms in case["ms"][mode].items()} for case in cases]
        base = [ms[baseline(case)] for case, ms in zip(cases, medians, strict=True)]
        bars(axis, cases, medians, base, short)
        axis.set_title(f"{label}, ms")
    axes[0].set_ylabel(f"time, {VARIANTS[baseline(cases[0])][0]} = 1")
    figure.suptitle(title(cases[0], without=["size"]))
    return save(figure, path)


def plot_memory(cases: Sequence[Case], path: Path) -> Path:
    """A panel for what is kept for backward, one for the peak: bars by size, labelled in MiB."""
    from matplotlib import pyplot as plt

    panels = {"saved_bytes": "kept for backward, MiB", "peak_bytes": "peak of forward + backward, MiB"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (field, label) in zip(axes, panels.items(), strict=True):
        base = [case[field]["dense"] for case in cases]
        bars(axis, cases, [case[field] for case in cases], base, lambda value: short(value / 2**20))
        axis.set_title(label)
    axes[0].set_ylabel(f"memory, {VARIANTS['dense'][0]} = 1")
    figure.suptitle(title(cases[0], without=["size"]))
    return save(figure, path)


def bars(
    axis: Any,
    cases: Sequence[Case],
    values: Sequence[dict[str, float]],
    base: Sequence[float],
    text: Callable[[float], str],
) -> None:
    """Groups of bars, one group a case and one bar a variant, as fractions of `base`."""
    names = [name for name in VARIANTS if all(name in found for found in values)]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        label, colour = VARIANTS[name]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
        heights = [found[name] / one for found, one in zip(values, base, strict=True)]
        drawn = axis.bar(places, heights, width, label=label, color=colour)
        axis.bar_label(drawn, [text(found[name]) for found in values], fontsize=7, padding=1)
    axis.set_xticks(range(len(cases)), [case["size"] for case in cases])
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def short(value: float) -> str:
    """A number in three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def save(figure: Any, path: Path) -> Path:
    """Write a figure, its legend below, and let go of it."""
    from matplotlib import pyplot as plt

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of a results file of encoder.py, and plot it.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for the plots")
    options = parser.parse_args()
    cases = list(json.loads(options.results.read_text())["cases"].values())
    print(tables(cases))
    if options.plot:
        for path in plot(cases, options.plot):
            print(path)


if __name__ == "__main__":
    main()
