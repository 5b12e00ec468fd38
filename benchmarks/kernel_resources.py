"""What every Triton kernel needs of a GPU, without a GPU: registers, shared memory, spills, width of its accesses.

    python benchmarks/kernel_resources.py --out results.json --table docs/kernel-resources.md
    python benchmarks/kernel_resources.py --size atto.1 huge.4 --dtype bfloat16 --arch 90

The operators of every stage are run without computing (see launches.py), every kernel that they launch is compiled
for every architecture, and the machine code is read. It ends with an error where one of these rules is broken:

    compiles      the kernel compiles at all
    spills        no register lives in local memory: no LDL, no STL, an empty stack
    shared        shared memory is within what a block may have
    resident      a multiprocessor has room for at least one block: registers x threads, shared memory
    wide          every access to channels of rows and to the block's matrices moves 16 bytes per thread or more, where
                  their rows are a multiple of 16 bytes long (`launches.is_wide`). What is exempt is a small part of
                  the traffic: tables of integers, vectors (one number a channel or a row), sums over rows, the taps
                  of the depthwise kernel; and images, where channels are not side by side
    launched      every kernel of the package is launched by what was run

Which tensor an access belongs to is followed in the PTX, from the kernel's parameters through all arithmetic on
addresses. That the assembler leaves wide accesses wide is checked where a kernel has no others of the same kind.
Nothing here is a measurement of speed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import launches
import triton
from launches import Setting, Specialisation, Use
from occupancy import ARCHITECTURES, resident_blocks
from record import description, write
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsecnx.models import SIZES

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTH = 16  # bytes per thread and access


Facts = dict[str, Any]


def compile_and_read(specialisation: Specialisation, arch: int) -> Facts:
    """Compile for one architecture and read the result. What was read before is taken from the cache.

    Returns:
        `warps`, `registers`, `stack` and `shared` (bytes), `spills` (instructions), `sass` (global accesses by
        mnemonic), `accesses` (see `read_ptx`); or `error` where it does not compile.
    """
    room = importlib.import_module(specialisation.module)
    kernel = getattr(room, specialisation.name)
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    source = ASTSource(
        kernel,
        dict(specialisation.signature),
        dict(specialisation.constants),
        {path: [list(pair) for pair in attribute] for path, attribute in specialisation.attributes},
    )
    try:
        compiled = triton.compile(source, GPUTarget("cuda", arch, 32), dict(specialisation.options))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cached = Path(knobs.cache.dir) / "kernel-resources" / f"{compiled.hash}-{version}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    usage, sass = disassemble(compiled.asm["cubin"])
    arguments = [(name, kind) for name, kind in specialisation.signature if kind != "constexpr"]
    pointers = {index: name for index, (name, kind) in enumerate(arguments) if kind.startswith("*")}
    found = {
        "warps": compiled.metadata.num_warps * compiled.metadata.num_ctas,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "spills": sum(count for name, count in sass.items() if name.startswith(("LDL", "STL"))),
        "sass": {name: count for name, count in sorted(sass.items()) if sass_width(name)},
        "accesses": read_ptx(compiled.asm["ptx"], pointers),
    }
    write(cached, json.dumps(found))
    return found


def disassemble(cubin: bytes) -> tuple[dict[str, int], collections.Counter[str]]:
    """Registers (REG) and bytes of local memory (STACK, LOCAL) of a cubin, and how often it has each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    return usage, collections.Counter(mnemonics)


def sass_width(mnemonic: str) -> int:
    """Bytes that a global access of the machine code moves per thread; 0 of other instructions."""
    if mnemonic.startswith(("UTMA", "UBLKCP", "UBLKRED")):
        return WIDTH
    if not mnemonic.startswith(("LDG", "STG", "ATOMG", "REDG", "RED.")):
        return 0
    for part, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in mnemonic.split("."):
            return width
    return 4


SASS_KIND = {"ld": re.compile("LDG(?!STS)"), "st": re.compile("STG"), "cp": re.compile("LDGSTS")}
ACCESS = re.compile(r"^(ld|st|atom|red|cp)\.(?:[\w:]+\.)*global[\w:.]*$")
PTX_TYPE = re.compile(r"(?:\.v(\d))?\.[a-z]+(\d+)(?:x2)?$")
REGISTER = re.compile(r"%\w+")


def read_ptx(ptx: str, pointers: dict[int, str]) -> list[dict[str, Any]]:
    """Global accesses of a kernel, those alike counted together.

    Args:
        ptx: its code.
        pointers: names of the parameters that are pointers, by position.

    Returns:
        `kind` (ld, st, cp, atom, red), `bytes` per thread, `arguments` whose memory it may be, `line` of the source,
        `count`.
    """
    statements = list(_statements(ptx))
    origins: dict[str, frozenset[str]] = collections.defaultdict(frozenset)
    changed = True
    while changed:
        changed = False
        for opcode, operands, _ in statements:
            if opcode.startswith(("st.", "cp.", "red.", "bra", "setp", "call")):
                continue
            target, *rest = re.split(r",(?![^{]*\})", operands, maxsplit=1)
            sources = " ".join(rest)
            if opcode.startswith("ld.param"):
                number = re.search(r"_param_(\d+)", sources)
                assert number, operands
                name = pointers.get(int(number[1]))
                found = frozenset([name] if name else [])
            elif opcode.startswith(("ld.", "atom.")):
                continue  # what memory holds is no address
            else:
                found = frozenset().union(*(origins[register] for register in REGISTER.findall(sources)))
            for register in REGISTER.findall(target):
                if not found <= origins[register]:
                    origins[register] |= found
                    changed = True
    accesses: collections.Counter[tuple[str, int, tuple[str, ...], str]] = collections.Counter()
    for opcode, operands, line in statements:
        if not ACCESS.match(opcode):
            continue
        kind = opcode.partition(".")[0]
        if opcode.startswith("cp.async.bulk"):
            width = WIDTH
        elif kind == "cp":
            width = int(operands.split(",")[2].strip(), 0)
        else:
            shape = PTX_TYPE.search(opcode)
            assert shape, opcode
            width = int(shape[1] or 1) * int(shape[2]) // 8
        # Addresses in shared memory stand in brackets too, but no parameter is their origin.
        addresses = " ".join(re.findall(r"\[([^\]]*)\]", operands))
        arguments = frozenset().union(*(origins[register] for register in REGISTER.findall(addresses)))
        accesses[kind, width, tuple(sorted(arguments)), line] += 1
    return [
        {"kind": kind, "bytes": width, "arguments": list(arguments), "line": line, "count": count}
        for (kind, width, arguments, line), count in sorted(accesses.items())
    ]


def _statements(ptx: str) -> Iterator[tuple[str, str, str]]:
    """Opcode, operands and line of the source of every instruction."""
    line, assembly = "?", False
    for text in ptx.splitlines():
        text = text.strip()
        if "inline asm" in text:
            assembly = "begin" in text
        elif text.startswith(".loc"):
            # Within assembly the lines of the assembly itself are counted on.
            place = re.search(r"// (\S+:\d+):\d+", text)
            if place and not assembly:
                line = place[1]
        elif match := re.match(r"(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s+(.*);", text):
            yield match[1], match[2], line


def judge(facts: Facts, wide: Iterable[str], arch: int) -> list[str]:
    """The rules that a compiled kernel breaks, in words."""
    if "error" in facts:
        return [f"compiles: {facts['error']}"]
    broken, limits = [], ARCHITECTURES[arch]
    if facts["spills"] or facts["stack"]:
        broken.append(f"spills: {facts['spills']} accesses to local memory, {facts['stack']} bytes of stack")
    if facts["shared"] > limits.block_shared:
        broken.append(f"shared: {facts['shared']} bytes, a block may have {limits.block_shared}")
    if resident(facts, arch) == 0:
        threads = 32 * facts["warps"]
        broken.append(f"resident: {threads} threads with {facts['registers']} registers, {facts['shared']} bytes")
    wide = set(wide)
    for access in facts["accesses"]:
        names = wide.intersection(access["arguments"]) if access["arguments"] else {"an unknown tensor"}
        if names and access["bytes"] < WIDTH:
            name = " or ".join(sorted(names))
            broken.append(f"wide: {access['kind']} of {access['bytes']} bytes, {name}, at {access['line']}")
    for kind, mnemonic in SASS_KIND.items():
        widths = [access["bytes"] for access in facts["accesses"] if access["kind"] == kind]
        split = [name for name in facts["sass"] if mnemonic.match(name) and sass_width(name) < WIDTH]
        if split and widths and min(widths) >= WIDTH:
            broken.append(f"wide: the assembler has made {' '.join(split)} of wide accesses")
    return broken


def resident(facts: Facts, arch: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    return resident_blocks(arch, facts["warps"], facts["registers"], facts["shared"])


def occupancy(facts: Facts, arch: int) -> float:
    """Warps that a multiprocessor holds at a time, of those that it could."""
    return resident(facts, arch) * facts["warps"] / ARCHITECTURES[arch].warps


def compiled(uses: dict[Specialisation, Use], arches: Sequence[int], jobs: int) -> list[Facts]:
    """All specialisations on all architectures: what was read of each, where it is used, which rules it breaks."""
    tasks = list(itertools.product(uses, arches))
    found: dict[tuple[Specialisation, int], Facts] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(compile_and_read, *task): task for task in tasks}
        for number, done in enumerate(concurrent.futures.as_completed(running), start=1):
            specialisation, arch = running[done]
            found[specialisation, arch] = done.result()
            say(f"[{number}/{len(tasks)}] {specialisation.name} sm_{arch}")
    return [row(task[0], uses[task[0]], task[1], found[task]) for task in tasks]


def row(specialisation: Specialisation, use: Use, arch: int, facts: Facts) -> Facts:
    """What the results file holds of one compilation."""
    settings = [setting for places in use.settings.values() for setting in places]
    result = {
        "kernel": specialisation.name,
        "uses": {program: [setting.place for setting in places] for program, places in use.settings.items()},
        "dtypes": list(dict.fromkeys(setting.dtype for setting in settings)),
        "channels": sorted({setting.channels for setting in settings}),
        "tiles": sorted({setting.tile for setting in settings}),
        "arch": arch,
        "constants": {name: str(value) for name, value in specialisation.named_constants.items()},
        "options": dict(specialisation.options),
        "wide": sorted(use.wide),
        **facts,
    }
    if "error" not in facts:
        result |= {"resident": resident(facts, arch), "occupancy": round(occupancy(facts, arch), 4)}
    return {**result, "broken": judge(facts, use.wide, arch)}


def table(rows: Sequence[Facts], arches: Sequence[int]) -> str:
    """One line for each specialisation, architectures side by side."""
    head = ["kernel", "launched by", "C", "tile", "type", "warps"]
    head += [f"sm_{arch} registers, KiB, occupancy" for arch in arches]
    lines = []
    for _, group in itertools.groupby(rows, lambda row: (row["kernel"], row["constants"], row["options"], row["uses"])):
        by_arch = {row["arch"]: row for row in group}
        first = by_arch[arches[0]]
        cells = [
            first["kernel"].removesuffix("_kernel"),
            _programs(list(first["uses"])),
            " ".join(map(str, first["channels"])),
            " ".join(map(str, first["tiles"])),
            " ".join(DTYPES[dtype] for dtype in first["dtypes"]),
            str(first.get("warps", "-")),
        ]
        cells += [_cell(by_arch[arch]) for arch in arches]
        lines.append(cells)
    rows_of_text = [head, ["-" * len(name) for name in head], *sorted(lines, key=_order)]
    widths = [max(map(len, column)) for column in zip(*rows_of_text, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
        for cells in rows_of_text
    )


def _order(cells: Sequence[str]) -> tuple[Any, ...]:
    kernel, programs, channels, _, dtypes, *_ = cells
    return kernel, programs, list(DTYPES.values()).index(dtypes.split()[0]), int(channels.split()[0])


def _programs(names: Sequence[str]) -> str:
    """The program, or the operators of several programs."""
    return names[0] if len(names) == 1 else "; ".join(dict.fromkeys(name.partition(",")[0] for name in names))


def _cell(row: Facts) -> str:
    if "error" in row:
        return "does not compile"
    mark = " (!)" if row["broken"] else ""
    return f"{row['registers']}, {row['shared'] / 1024:g}, {row['occupancy']:.0%}{mark}"


def selected(sizes: Sequence[str], dtypes: Sequence[str]) -> list[Setting]:
    """The settings asked for by `SIZE` or `SIZE.STAGE`.

    Raises:
        ValueError: there is no such size or stage.
    """
    places = []
    for name in sizes:
        size, _, stage = name.partition(".")
        if size not in SIZES or (stage and stage not in launches.TILES):
            raise ValueError(f"--size is {name!r}: expected one of {', '.join(SIZES)}, or .1 .2 .3 .4 .decoder of it")
        places += [(size, stage)] if stage else [(size, stage) for stage in launches.TILES]
    places = list({(Setting(*place, "").channels, place[1]): place for place in reversed(places)}.values())[::-1]
    return [Setting(*place, dtype) for dtype in dtypes for place in places]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time and read what it needs.")
    parser.add_argument("--arch", nargs="+", type=int, choices=list(ARCHITECTURES), default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--size",
        nargs="+",
        default=["atto", "tiny", "base", "huge"],
        metavar="SIZE[.STAGE]",
        help="default %(default)s",
    )
    parser.add_argument("--kernel", default="", metavar="WORD", help="only kernels with this in their name")
    parser.add_argument("--out", type=Path, help="results file (JSON), written anew")
    parser.add_argument("--table", type=Path, help="the table as a file; printed otherwise")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--jobs", type=int, default=cores, help="compilations at a time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: expected 1 or more")
    try:
        options.settings = selected(options.size, options.dtype)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET=1 is set: nothing would be compiled")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    uses = {found: use for found, use in launches.trace(options.settings).items() if options.kernel in found.name}
    expected = {name for name in launches.entry_points() if options.kernel in name}
    missing = sorted(expected - {found.name for found in uses})
    rows = compiled(uses, options.arch, options.jobs)
    if options.out:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        run = description(_now()) | {"triton": triton.__version__}
        write(options.out, f'{{"run": {json.dumps(run)},\n "kernels": [\n  {lines}\n ]}}\n')
    text = table(rows, options.arch)
    if options.table:
        write(options.table, f"{HEADER.format(triton=triton.__version__)}\n{text}\n")
    else:
        print(text)
    broken = [f"{_name(row)}: {words}" for row in rows for words in row["broken"]]
    broken += [f"launched: nothing that was run launches {name}" for name in missing]
    for line in broken:
        say(line)
    say(f"{len(rows)} compilations of {len({row['kernel'] for row in rows})} kernels, {len(broken)} broken rules")
    return 1 if broken else 0


HEADER = """# What the Triton kernels need

Written by `benchmarks/kernel_resources.py` with Triton {triton}, which says what the rules are and how each number is
read from the compiled code. For every architecture: registers per thread, shared memory per block in KiB, and the part
of a multiprocessor's warps that can be resident. Where one compilation serves several widths, all are named.
"""


def _name(row: Facts) -> str:
    where = ", ".join(f"{program} ({places[0]})" for program, places in list(row["uses"].items())[:1])
    return f"{row['kernel']} {'/'.join(row['dtypes'])} sm_{row['arch']} in {where}"


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
