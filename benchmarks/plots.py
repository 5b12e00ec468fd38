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

from measure import print_table

Case = dict[str, Any]

MODES = {"forward": "forward", "forward_backward": "forward + backward"}
VARIANTS = {
    "dense": ("dense x mask, eager", "#b0b7bf"),
    "compiled": ("dense x mask, compiled", "#6c7a89"),
    "sparse": ("sparse", "#d1495b"),
    "sparse_graph": ("sparse, CUDA graph", "#8d2a3a"),
    "floor": ("its matrix products alone", "#edae49"),
}
# What makes two cases comparable, but for the one that a plot varies.
SETTING = ("size", "ratio", "batch", "image", "dtype", "device", "threads")


def print_tables(cases: Sequence[Case]) -> None:
    """Print times and memory, a line for each variant of each case, relative to the best dense encoder."""
    times, memory = [], []
    for case in cases:
        for mode, label in MODES.items():
            ms = {name: found["median"] for name, found in case["ms"][mode].items()}
            dense = min((ms[name] for name in ms if name.startswith(("dense", "compiled"))), default=None)
            for name, value in ms.items():
                rate = "" if name == "floor" else 1e3 * case["batch"] / value
                times.append([title(case), label, name, value, value / dense if dense else "", rate])
        for name, saved in case["saved_bytes"].items():
            memory.append([title(case), name, saved / 2**20, case["peak_bytes"][name] / 2**20])
    print_table(["case", "pass", "variant", "ms", "of the best dense", "images/s"], times)
    print_table(["case", "variant", "kept for backward, MiB", "peak, MiB"], memory)


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


def baseline(case: Case) -> str:
    """Name the variant that times are a fraction of: the compiled dense encoder where it was measured."""
    return "compiled" if "compiled" in case["ms"]["forward"] else "dense"


def draw(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Draw what the cases allow, see the head of this file, and return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    by_ratio = [found for found in series(cases, "ratio") if len(found) > 1]
    written = []
    if by_ratio:
        longest = [found for found in by_ratio if len(found) == len(by_ratio[0])]
        written.append(draw_ratios(longest, folder / "encoder-ratio.png"))
    if cases:
        sizes = sorted(series(cases, "size")[0], key=lambda case: case["ms"]["forward"]["sparse"]["median"])
        written.append(draw_times(sizes, folder / "encoder-size.png"))
        written.append(draw_memory(sizes, folder / "encoder-memory.png"))
    return written


def draw_ratios(panels: Sequence[Sequence[Case]], path: Path) -> Path:
    """Draw forward + backward against the mask ratio, a panel for each series, quartiles as a band."""
    from matplotlib import pyplot as plt

    size = (max(8.5, 5 * len(panels)), 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
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


def draw_times(cases: Sequence[Case], path: Path) -> Path:
    """Draw times by size, a panel for each pass, labelled in milliseconds."""
    panels = {}
    for mode, label in MODES.items():
        medians = [{name: ms["median"] for name, ms in case["ms"][mode].items()} for case in cases]
        base = [ms[baseline(case)] for case, ms in zip(cases, medians, strict=True)]
        panels[f"{label}, ms"] = (medians, base)
    return draw_bars(cases, panels, f"time, {VARIANTS[baseline(cases[0])][0]} = 1", 1.0, path)


def draw_memory(cases: Sequence[Case], path: Path) -> Path:
    """Draw what is kept for backward and the peak, by size, labelled in MiB."""
    fields = {"saved_bytes": "kept for backward, MiB", "peak_bytes": "peak of forward + backward, MiB"}
    panels = {
        label: ([case[field] for case in cases], [case[field]["dense"] for case in cases])
        for field, label in fields.items()
    }
    return draw_bars(cases, panels, f"memory, {VARIANTS['dense'][0]} = 1", 2.0**20, path)


def draw_bars(
    cases: Sequence[Case],
    panels: dict[str, tuple[Sequence[dict[str, float]], Sequence[float]]],
    label: str,
    unit: float,
    path: Path,
) -> Path:
    """Draw groups of bars: a panel for each entry of `panels`, a group for each case, a bar for each variant.

    Args:
        panels: by title the values of every case, and what they are drawn as fractions of.
        unit: what the numbers on the bars are divided by.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (heading, (values, base)) in zip(axes, panels.items(), strict=True):
        names = [name for name in VARIANTS if all(name in found for found in values)]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
            heights = [found[name] / one for found, one in zip(values, base, strict=True)]
            drawn = axis.bar(places, heights, width, label=VARIANTS[name][0], color=VARIANTS[name][1])
            axis.bar_label(drawn, [short(found[name] / unit) for found in values], fontsize=7, padding=1)
        axis.set_xticks(range(len(cases)), [case["size"] for case in cases])
        axis.set_title(heading)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(label)
    figure.suptitle(title(cases[0], without=["size"]))
    return save(figure, path)


def short(value: float) -> str:
    """Return a number in three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def save(figure: Any, path: Path) -> Path:
    """Write a figure with its legend below, and close it."""
    from matplotlib import pyplot as plt

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of a results file of encoder.py, and draw it.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for the plots")
    options = parser.parse_args()
    cases = list(json.loads(options.results.read_text())["cases"].values())
    print_tables(cases)
    if options.plot:
        for path in draw(cases, options.plot):
            print(path)


if __name__ == "__main__":
    main()
