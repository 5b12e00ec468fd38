"""The results of gpu_suite.sh as tables: OUT/summary.md from what is in OUT by now.

python benchmarks/gpu_summary.py OUT
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atomic import write

LEAST_SHARE = 0.005  # of a program's time, below which a kernel is summed up with others
VIT = ("vit", "vit_torch")
DENSE = ("dense", "dense_cast", "dense_whole")
LOG_LINES = 40


def table(head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> Iterator[str]:
    """A Markdown table whose first columns are words and the others numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---' if index < words else '---:' for index in range(len(head)))}|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
    yield ""


def load(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def parts(folder: Path) -> Iterator[str]:
    """What ran and how it ended."""
    lines = (folder / "parts.tsv").read_text().splitlines() if (folder / "parts.tsv").exists() else []
    yield from table(["part", "status", "seconds", ""], [line.split("\t") for line in lines], 2)


def parity(found: dict[str, Any]) -> Iterator[str]:
    """The largest error by operator and dtype, and all that is wrong."""
    worst: dict[str, dict[str, float]] = {}
    wrong: list[tuple[str, str, str]] = []
    for stage, result in found.get("stages", {}).items():
        dtype = stage.split()[-1]
        if "operators" not in result:
            error = result["error"].strip().splitlines()
            wrong.append((stage, "", f"{result['status']}: {error[-1] if error else ''}"))
        for operator, one in result.get("operators", {}).items():
            errors = one.get("errors", {})
            if not one["agrees"]:
                text = one.get("error") or ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
                wrong.append((stage, operator, text + ("" if one.get("same_bits", True) else "; other bits again")))
            elif errors:
                by_dtype = worst.setdefault(operator, {})
                by_dtype[dtype] = max(by_dtype.get(dtype, 0.0), *errors.values())
    dtypes = list(found.get("bounds", {}))
    rows = [[name, *(f"{by[dtype]:.1e}" if dtype in by else "-" for dtype in dtypes)] for name, by in worst.items()]
    bounds = ", ".join(f"{bound:g} in {dtype}" for dtype, bound in found["bounds"].items())
    yield f"Largest relative error of an output or gradient against float64, where all agree (bounds: {bounds}):"
    yield ""
    yield from table(["operator", *dtypes], rows)
    if wrong:
        yield f"**{len(wrong)} do not agree or did not run:**"
        yield ""
        yield from table(["stage", "operator", "what"], wrong, 3)


def kernels(found: dict[str, Any]) -> Iterator[str]:
    """Programs, then every kernel of every program."""
    cases = list(found.get("cases", {}).values())
    if not cases:
        return
    rates = cases[0]["rates"]
    yield (
        f"Measured: copies {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix products "
        f"{rates['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s in {cases[0]['dtype']}, float32 FMAs "
        f"{rates['vector_flops_per_s'] / 1e12:.1f} TFLOP/s, a kernel that does nothing "
        f"{1e3 * rates['empty_ms']:.1f} us."
    )
    yield ""
    yield from depthwise(cases)
    yield from side_by_side(cases)
    order = sorted(cases, key=lambda c: (c["program"] != "block", c["program"], c["size"], c["stage"], c["backend"]))
    rows = [
        [
            title(c),
            c["channels"],
            c["batch"],
            f"{c['ms']:.3f}",
            f"{c['queued_ms']:.3f}",
            f"{c['gap_ms']:.3f}",
            f"{c['sum_ms']:.3f}",
            f"{sum(k['floor_ms'] * k['launches'] for k in c['kernels']) / c['sum_ms']:.2f}" if c["sum_ms"] else "-",
        ]
        for c in order
    ]
    head = ["forward + backward", "C", "batch", "ms", "queued", "gap", "sum of kernels", "floor / sum"]
    yield from table(head, rows)
    for c in order:
        yield f"**{title(c)}**, C {c['channels']}, batch {c['batch']}"
        yield ""
        rows, rest, rest_share = [], 0, 0.0
        for k in c["kernels"]:
            if k["share"] < LEAST_SHARE:
                rest += k["launches"]
                rest_share += k["share"]
                continue
            rows.append(
                [
                    k["name"],
                    k["launches"],
                    f"{1e3 * k['ms']:.1f}",
                    f"{k['bytes'] / 2**20:.1f}",
                    f"{k['matrix_flops'] / 1e9:.2f}",
                    f"{k['vector_flops'] / 1e9:.2f}",
                    f"{1e3 * k['floor_ms']:.1f}",
                    k["bound"],
                    f"{k['fraction']:.2f}",
                    f"{100 * k['share']:.1f}%",
                ]
            )
        if rest:
            rows.append([f"{rest} small launches", "", "", "", "", "", "", "", "", f"{100 * rest_share:.1f}%"])
        head = ["kernel", "launches", "us", "MiB", "matrix GF", "vector GF", "floor us", "bound", "fraction", "share"]
        yield from table(head, rows)


def title(case: dict[str, Any]) -> str:
    """What a case of kernels.py measured."""
    images = f" of {case['images']}" if "images" in case else ""
    return f"{case['size']} stage {case['stage']}, {case['program']}{images}, {case['backend']}"


DIRECTIONS = ("forward", "input gradient", "weight gradient")
WEIGHT_GRADIENT = ("torch.sum", "sum_partials_kernel")  # beside what has it in its name: its second stage


def direction(kernel: dict[str, Any]) -> str | None:
    """What a kernel of program `depthwise_conv` computes; None of what only prepares it."""
    name = kernel["name"]
    if "weight_grad" in name or (kernel["phase"] == "backward" and name in WEIGHT_GRADIENT):
        return DIRECTIONS[2]
    if "depthwise_conv" not in name:
        return None
    return DIRECTIONS[0] if kernel["phase"] == "forward" else DIRECTIONS[1]


def depthwise(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The depthwise convolution on every backend, and torch's dense one."""
    columns = {
        "Triton": ("depthwise_conv", "triton", None),
        "CUDA": ("depthwise_conv", "cuda", None),
        "dense, equal sites": ("dense_depthwise_conv", "torch", "equal sites"),
        "dense, whole batch": ("dense_depthwise_conv", "torch", "whole batch"),
    }
    places = sorted({(c["size"], c["stage"], c["channels"], c["dtype"]) for c in cases if "depthwise" in c["program"]})
    rows = []
    for size, stage, channels, dtype in places:
        here = {
            (c["program"], c["backend"], c.get("images")): c["kernels"]
            for c in cases
            if (c["size"], c["stage"], c["channels"], c["dtype"]) == (size, stage, channels, dtype)
        }
        for wanted in DIRECTIONS:
            times = {}
            cells = []
            for name, key in columns.items():
                kernels = [k for k in here.get(key, ()) if direction(k) == wanted]
                times[name] = sum(k["ms"] * k["launches"] for k in kernels)
                least = sum(k["floor_ms"] * k["launches"] for k in kernels)
                cells.append(f"{1e3 * times[name]:.1f} ({least / times[name]:.2f})" if times[name] else "-")
            cells.append(ratio(times["CUDA"] or None, times["Triton"]))
            cells.append(ratio(times["CUDA"] or None, times["dense, equal sites"]))
            rows.append([f"{size} stage {stage}", wanted, channels, *cells])
    if rows:
        yield "Depthwise convolution 7x7, microseconds and in brackets the fraction of the floor:"
        yield ""
        yield from table(["where", "", "C", *columns, "CUDA / Triton", "CUDA / dense, equal sites"], rows, 2)


def side_by_side(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Programs that were measured on more than one backend: the sums of their kernels."""
    found: dict[tuple[str, int, str, str, int], dict[str, dict[str, Any]]] = {}
    for c in cases:
        if "images" not in c:
            key = (c["size"], c["stage"], c["program"], c["dtype"], c["batch"])
            found.setdefault(key, {})[c["backend"]] = c
    rows = []
    for (size, stage, program, _, batch), by_backend in sorted(found.items()):
        if "cuda" not in by_backend or len(by_backend) < 2:
            continue
        cuda = by_backend.pop("cuda")
        ((name, other),) = by_backend.items()
        rows.append(
            [
                f"{size} stage {stage}, {program}",
                cuda["channels"],
                batch,
                f"{other['sum_ms']:.3f} ({name})",
                f"{cuda['sum_ms']:.3f}",
                ratio(cuda["sum_ms"], other["sum_ms"]),
                ratio(cuda["queued_ms"], other["queued_ms"]),
            ]
        )
    if rows:
        head = ["forward + backward", "C", "batch", "other ms", "CUDA ms", "ratio of kernels", "ratio of queued"]
        yield from table(head, rows)


def steps(found: dict[str, Any], baselines: Sequence[str], rival: Sequence[str] = ()) -> Iterator[str]:
    """Variants of every case, against the fastest of the baselines there; time per image against a rival of another
    case, where one of those names was measured."""
    rows = []
    speeds = [
        v["images_per_s"]
        for case in found.get("cases", {}).values()
        for name, v in case["variants"].items()
        if name in rival and "ms" in v
    ]
    for key, case in found.get("cases", {}).items():
        measured = {name: v for name, v in case["variants"].items() if "ms" in v}
        base = min((measured[name]["ms"]["median"] for name in baselines if name in measured), default=None)
        names = [name for name in baselines if name in measured]
        least = {
            field: min((measured[name][field] for name in names if field in measured[name]), default=None)
            for field in ("peak_bytes", "saved_bytes")
        }
        for name, v in case["variants"].items():
            if "ms" not in v:
                rows.append([key, name, f"{v['status']}: {v['error']}", *[""] * (9 if speeds else 8)])
                continue
            rows.append(
                [
                    key,
                    name + ("" if v.get("agrees", True) else " **wrong**"),
                    f"{v['ms']['median']:.2f}",
                    f"{v['images_per_s']:.0f}",
                    ratio(v["ms"]["median"], base),
                    gib(v.get("peak_bytes")),
                    ratio(v.get("peak_bytes"), least["peak_bytes"]),
                    gib(v.get("saved_bytes")),
                    ratio(v.get("saved_bytes"), least["saved_bytes"]),
                    gib(v.get("total_bytes")),
                    f"{v['first_s']:.1f}",
                    *([ratio(max(speeds), v["images_per_s"])] if speeds else []),
                ]
            )
    head = ["case", "variant", "ms", "images/s", "/ dense", "peak GiB", "/ dense", "saved GiB", "/ dense", "all GiB"]
    yield from table([*head, "first step s", *(["s per image / ViT"] if speeds else [])], rows, 2)
    wrong = [
        [key, name, json.dumps(v.get("errors", {k: v[k] for k in ("loss",) if k in v}))]
        for key, case in found.get("cases", {}).items()
        for name, v in case["variants"].items()
        if not v.get("agrees", True)
    ]
    if wrong:
        yield "**Wrong:**"
        yield ""
        yield from table(["case", "variant", "errors"], wrong, 3)


def chosen(found: dict[str, Any]) -> Iterator[str]:
    """CUDA's time as a fraction of Triton's, of the latest run, by step and shape."""
    run = found["runs"][-1]
    times: dict[tuple[str, int, str], dict[str, str]] = {}
    for entry in run["times"]:
        key = (entry["dtype"], entry["channels"], str(entry["tile"] or "-"))
        times.setdefault(key, {})[entry["step"]] = f"{entry['cuda_ms'] / entry['triton_ms']:.2f}"
    names = list(dict.fromkeys(entry["step"] for entry in run["times"]))
    yield f"CUDA's time over Triton's on {run['gpu']}, below 1 where CUDA is faster:"
    yield ""
    rows = [[*key, *(by_step.get(name, "-") for name in names)] for key, by_step in sorted(times.items())]
    yield from table(["dtype", "C", "tile", *names], rows)


def overhead(found: dict[str, Any]) -> Iterator[str]:
    """How busy the device is in each mode."""
    rows = [
        [
            key,
            name + ("" if mode.get("agrees", True) else " **wrong**"),
            f"{mode['ms']['median']:.3f}",
            *(f"{mode[field]:.3f}" if field in mode else "-" for field in ("kernel_ms", "queued_ms")),
            f"{mode['launches']:.0f}" if "launches" in mode else "-",
            f"{mode['busy']:.1%} ({mode['busy_by']})" if "busy" in mode else "-",
        ]
        for key, case in found.get("cases", {}).items()
        for name, mode in case["modes"].items()
    ]
    yield from table(["case", "mode", "ms", "kernel ms", "queued ms", "launches", "busy"], rows, 2)


def minkowski(found: dict[str, Any]) -> Iterator[str]:
    """The encoder as code for MinkowskiEngine has it, and its depthwise convolutions alone."""
    rows = []
    for name, case in found["cases"].items():
        for kind, times in case["ms"].items():
            medians = {variant: spread["median"] for variant, spread in times.items()}
            for variant, median in medians.items():
                against = ratio(median, medians.get("fused")), ratio(median, medians.get("minkowski"))
                rows.append([name, kind, variant, f"{median:.2f}", *against])
    yield from table(["case", "what", "variant", "ms", "of fused", "of MinkowskiEngine"], rows, 3)


def ratio(value: float | None, base: float | None) -> str:
    """A quotient in words."""
    return f"{value / base:.3f}" if value is not None and base else "-"


def gib(value: float | None) -> str:
    """Bytes in GiB."""
    return "-" if value is None else f"{value / 2**30:.2f}"


def summary(folder: Path) -> str:
    """All that is known, as Markdown."""
    lines = ["# GPU suite", "", *parts(folder)]
    sections = {
        "Parity, Triton": ("parity.json", parity),
        "Parity, CUDA": ("parity-cuda.json", parity),
        "Kernels": ("kernels.json", kernels),
        "Choices": ("gpu_choices.json", chosen),
        "Encoder, forward + backward": ("encoder.json", lambda found: steps(found, DENSE)),
        "Pretraining step": ("fcmae.json", lambda found: steps(found, DENSE, VIT)),
        "Launch overhead": ("overhead.json", overhead),
        "Code for MinkowskiEngine": ("minkowski.json", minkowski),
    }
    for title, (name, section) in sections.items():
        if (found := load(folder / name)) and any(found.get(key) for key in ("cases", "stages", "runs")):
            lines += [f"## {title}", "", *section(found)]
    log = folder / "log.txt"
    if log.exists():
        lines += ["## End of the log", "", "```", *log.read_text(errors="replace").splitlines()[-LOG_LINES:], "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write OUT/summary.md.")
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    write(folder / "summary.md", summary(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
