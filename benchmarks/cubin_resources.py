"""What the compiled CUDA kernels need of a GPU, without a GPU: registers, spills, occupancy, width of their accesses.

    python benchmarks/cubin_resources.py --table docs/cuda-resources.md
    python benchmarks/cubin_resources.py --library build/lib/sparsecnx/_C_cuda.abi3.so --kernel halo

Reads the machine code in the library of GPU operators with cuobjdump, of Triton or of the CUDA toolkit. What a kernel
was designed for stands in its `__launch_bounds__`, which the library's PTX repeats: the threads of a block, and how
many blocks a multiprocessor is meant to hold. It ends with an error where one of these rules is broken:

    spills     no register lives in local memory: no LDL, no STL, an empty stack
    occupancy  registers and threads leave room for the blocks that the kernel was designed for, and for one in any case
    wide       a kernel that moves rows a pack at a time has copies of 16 bytes per thread from global memory (loads or
               asynchronous copies) and, where it writes rows, stores of 16 bytes. Anywhere in the kernel, which says
               that rows are staged so, not that all accesses are: single values stay for rows that are no whole
               packs and for an optional residual
    reuse      in the kernels whose arithmetic is to hide everything else (halos of squares of 8, 7x7), the hot loop has
               at least 8 FFMAs for every load from shared memory

The *hot loop* is the smallest loop with at least half of a kernel's FFMAs; the whole kernel where there is none.
Nothing here is a measurement of speed.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atomic import write
from occupancy import ARCHITECTURES, resident_blocks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparsecnx"
WIDTH = 16  # bytes per thread and access
REUSE = 8  # FFMAs for each load from shared memory
TYPES = {
    "__nv_bfloat16": "bf16",
    "__half": "fp16",
    "float": "fp32",
    "unsigned char": "8 bits",
    "unsigned short": "16 bits",
    "unsigned int": "32 bits",
    "unsigned long": "64 bits",
}


@dataclass
class Kernel:
    """A kernel on one architecture.

    Attributes:
        name: as in the sources, with its template arguments.
        threads: of a block at most; 0 where that is not known.
        blocks: that a multiprocessor is meant to hold; 0 where the sources do not say.
        shared: bytes that every block has, without the dynamic ones.
        spills: accesses to local memory.
        loads, stores: accesses to global memory by bytes per thread; asynchronous copies are loads.
        instructions: of the whole kernel.
        loop, loop_ffma, loop_lds: instructions of the hot loop, the FFMAs and the loads from shared memory among them.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    threads: int = 0
    blocks: int = 0
    spills: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    instructions: int = 0
    loop: int = 0
    loop_ffma: int = 0
    loop_lds: int = 0

    def resident_as(self, threads: int, shared: int = 0) -> int:
        """Blocks that a multiprocessor has room for, of so many threads and bytes of dynamic shared memory."""
        return resident_blocks(self.arch, -(-threads // 32), self.registers, self.shared + shared)

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has room for, as far as registers and threads go."""
        return self.resident_as(self.threads) if self.threads else 0

    @property
    def occupancy(self) -> float:
        """Warps that are then resident, of those that could be."""
        return self.resident * -(-self.threads // 32) / ARCHITECTURES[self.arch].warps


def find_tool(name: str) -> str:
    """Path of cuobjdump or its like.

    Raises:
        FileNotFoundError: neither Triton nor a toolkit on the PATH has it.
    """
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"{name} is neither in Triton's package nor on the PATH: install Triton or the CUDA toolkit"
        )
    return found


def find_library(package: Path = PACKAGE) -> Path:
    """The library of GPU operators in the package.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next(iter(sorted(package.glob("_C_cuda.*so"))), None)
    if found is None:
        raise FileNotFoundError(f"no _C_cuda library in {package}: build it, SPARSECNX_BUILD=cuda pip install -e .")
    return found


def dump(library: Path, *options: str) -> str:
    """What cuobjdump says of a library."""
    command = [find_tool("cuobjdump"), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(library: Path) -> list[Kernel]:
    """All kernels of a library, or of an object file, on all of its architectures."""
    kernels = dict(read_usage(dump(library, "--dump-resource-usage")))
    for key, instructions in read_sass(dump(library, "-sass")):
        describe(kernels[key], instructions)
    designs = read_designs(dump(library, "-ptx"))
    for (mangled, _), kernel in kernels.items():
        kernel.threads, kernel.blocks = designs.get(mangled, (0, 0))
    names = demangle([mangled for mangled, _ in kernels])
    for (mangled, _), kernel in kernels.items():
        kernel.name = names[mangled]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.arch))


def read_usage(text: str) -> Iterator[tuple[tuple[str, int], Kernel]]:
    """Kernels by mangled name and architecture, from `--dump-resource-usage`."""
    arch, name = 0, ""
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"\bREG:\d+", line):
            usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            stack = usage["STACK"] + usage["LOCAL"]
            yield (name, arch), Kernel(name, arch, usage["REG"], stack, usage["SHARED"])


Instruction = tuple[int, str, str]  # address, mnemonic, operands


def read_sass(text: str) -> Iterator[tuple[tuple[str, int], list[Instruction]]]:
    """Instructions by mangled name and architecture, from `-sass`."""
    arch, name = 0, ""
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", line):
            found.append((int(match[1], 16), match[2], match[3]))
        elif match := re.match(r"\s*Function : (\S+)", line):
            if found:
                yield (name, arch), found
            name, found = match[1], []
        elif match := re.match(r"arch = sm_(\d+)", line):
            if found:
                yield (name, arch), found
            arch, found = int(match[1]), []
    if found:
        yield (name, arch), found


def read_designs(text: str) -> dict[str, tuple[int, int]]:
    """Threads and blocks of `__launch_bounds__` by mangled name, from `-ptx`."""
    designs = {}
    for entry in re.split(r"\.entry\s+", text)[1:]:
        head = entry.partition("{")[0]
        threads = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", head)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", head)
        count = 1
        for number in threads.groups() if threads else ():
            count *= int(number or 1)
        designs[re.split(r"[\s(]", head, maxsplit=1)[0]] = (count if threads else 0, int(blocks[1]) if blocks else 0)
    return designs


def describe(kernel: Kernel, instructions: Sequence[Instruction]) -> None:
    """Add what the machine code says."""
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for _, mnemonic, _ in instructions:
        if mnemonic.startswith(("LDL", "STL")):
            kernel.spills += 1
        elif mnemonic.startswith("LDG"):  # LDGSTS, the asynchronous copy, too
            loads[width(mnemonic)] += 1
        elif mnemonic.startswith("STG"):
            stores[width(mnemonic)] += 1
    kernel.loads, kernel.stores = dict(sorted(loads.items())), dict(sorted(stores.items()))
    kernel.instructions = sum(mnemonic != "NOP" for _, mnemonic, _ in instructions)
    loop = hot_loop(instructions)
    kernel.loop = len(loop)
    kernel.loop_ffma = sum(is_ffma(mnemonic) for _, mnemonic, _ in loop)
    kernel.loop_lds = sum(mnemonic.split(".")[0] == "LDS" for _, mnemonic, _ in loop)


def width(mnemonic: str) -> int:
    """Bytes per thread of an access to global memory."""
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in mnemonic.split("."):
            return size
    return 4


def is_ffma(mnemonic: str) -> bool:
    """One float32 multiply-add, or two of them."""
    return mnemonic.split(".")[0] in ("FFMA", "FFMA2")


def hot_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """See above."""
    body = [one for one in instructions if one[1] != "NOP"]
    half = sum(is_ffma(mnemonic) for _, mnemonic, _ in body) / 2
    best = body
    for address, mnemonic, operands in body:
        target = re.search(r"0x([0-9a-f]+)", operands) if mnemonic.split(".")[0] == "BRA" else None
        begin = int(target[1], 16) if target else address
        if begin < address:  # a branch to itself is what stands behind the end
            loop = [one for one in body if begin <= one[0] <= address]
            if half and len(loop) < len(best) and sum(is_ffma(one[1]) for one in loop) >= half:
                best = loop
    return best


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Short names as in the sources: no namespaces, no parameters, the dtypes' usual names."""
    names = list(dict.fromkeys(names))
    tool = shutil.which("c++filt") or find_tool("cu++filt")
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(short, text.splitlines()), strict=True))


def short(name: str) -> str:
    """`void a::(anonymous namespace)::kernel<float, 4>(int)` without all but `kernel<fp32, 4>`."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").replace("sparsecnx::cuda::", "")
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:index]
            break
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
    for long, usual in TYPES.items():
        name = re.sub(rf"(?<![\w]){re.escape(long)}(?!\w)", usual, name)
    return name.replace(" >", ">")


def packs(name: str) -> bool:
    """Whether a kernel moves rows 16 bytes at a time, by its name."""
    return any(re.search(pattern, name) for pattern in PACKS)


# Which instances those are, by their template arguments.
PACKS = (
    r"^(square_sums|gradient_sums|apply|apply_backward)_kernel<\w+, [48]>",
    r"^(gather|scatter)_kernel<(16 bits, 8|32 bits, 4)>",
    r"^copy_kernel",
    r"\bSixteen<",
    r"^depthwise_(halo|window)_",  # both ways in one kernel
)
REUSES = r"^depthwise_halo_(grad_)?kernel<\w+, 7, 8>"
READS_ALONE = ("square_sums", "gradient_sums", "depthwise_halo_grad", "depthwise_window_grad")


def judge(kernel: Kernel) -> list[str]:
    """The rules that a kernel breaks, in words."""
    broken = []
    if kernel.spills or kernel.stack:
        broken.append(f"spills: {kernel.spills} accesses to local memory, {kernel.stack} bytes of stack")
    if kernel.threads and kernel.resident < max(1, kernel.blocks):
        broken.append(
            f"occupancy: {kernel.resident} blocks of {kernel.threads} threads with {kernel.registers} registers fit, "
            f"designed for {max(1, kernel.blocks)}"
        )
    if packs(kernel.name):
        if WIDTH not in kernel.loads:
            broken.append(f"wide: no 16-byte load, but of {words(kernel.loads)}")
        if WIDTH not in kernel.stores and not kernel.name.startswith(READS_ALONE):
            broken.append(f"wide: no 16-byte store, but of {words(kernel.stores)}")
    if re.search(REUSES, kernel.name) and kernel.loop_ffma < REUSE * max(1, kernel.loop_lds):
        broken.append(f"reuse: {kernel.loop_ffma} FFMAs for {kernel.loop_lds} loads from shared memory in the hot loop")
    return broken


def words(accesses: dict[int, int]) -> str:
    return ", ".join(f"{count} x {size}" for size, count in sorted(accesses.items(), reverse=True)) or "-"


def table(kernels: Sequence[Kernel]) -> str:
    """One line for each kernel, architectures side by side."""
    arches = sorted({kernel.arch for kernel in kernels})
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    head = ["kernel", "threads", "blocks meant"]
    for arch in arches:
        head += [f"sm_{arch} registers", "blocks", "occupancy", "loads x bytes", "stores x bytes", "hot loop", "FFMA"]
        head += ["LDS / FFMA"]
    rows = []
    for name, by_arch in by_name.items():
        first = next(iter(by_arch.values()))
        cells = [f"`{name}`", str(first.threads or "-"), str(first.blocks or "-")]
        for arch in arches:
            kernel = by_arch.get(arch)
            if kernel is None:
                cells += ["-"] * 8
                continue
            mark = " (!)" if judge(kernel) else ""
            cells += [f"{kernel.registers}{mark}", str(kernel.resident), f"{kernel.occupancy:.0%}"]
            cells += [words(kernel.loads), words(kernel.stores), str(kernel.loop)]
            cells += [f"{kernel.loop_ffma / kernel.loop:.0%}" if kernel.loop else "-"]
            cells += [f"{kernel.loop_lds / kernel.loop_ffma:.2f}" if kernel.loop_ffma else "-"]
        rows.append(cells)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


HEADER = """# What the CUDA kernels need

Written by `benchmarks/cubin_resources.py` from the machine code that nvcc {toolkit} makes, with no GPU. It says what
the rules are and how each number is read. *Threads* of a block and *blocks meant* for a multiprocessor are the kernel's
`__launch_bounds__`; *blocks* is how many fit by registers and threads (dynamic shared memory is the launch's affair),
*occupancy* the part of a multiprocessor's warps that they are. Accesses to global memory are counted by bytes per
thread, asynchronous copies among the loads, wherever in the kernel they stand: they show that rows are staged 16 bytes
at a time, not that nothing else is read. *FFMA* is their share of the instructions of the hot loop, *LDS / FFMA* how
many loads from shared memory there are in it for each FFMA.

{count} kernels, {spills}.
"""


def toolkit() -> str:
    """Version of the CUDA toolkit that the package's operators were compiled with."""
    from sparsecnx.backends import compiled

    return (compiled.build_info() or {}).get("cuda") or "(of a version that is not known)"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Read what every compiled CUDA kernel needs.")
    help = "libraries or object files, by default the library of the package"
    parser.add_argument("--library", nargs="+", type=Path, metavar="FILE", help=help)
    parser.add_argument("--kernel", default="", metavar="WORD", help="only kernels with this in their name")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--table", type=Path, help="the table as a file; printed otherwise")
    options = parser.parse_args(given)
    libraries = options.library or [find_library()]
    kernels = [kernel for library in libraries for kernel in read(library) if options.kernel in kernel.name]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.arch))
    if options.out:
        results: list[dict[str, Any]] = [asdict(kernel) | {"resident": kernel.resident} for kernel in kernels]
        write(options.out, json.dumps(results, indent=1) + "\n")
    if options.table:
        spilling = sum(bool(kernel.spills or kernel.stack) for kernel in kernels)
        spills = f"{spilling} of which spill" if spilling else "none of which spills a register"
        head = HEADER.format(toolkit=toolkit(), count=len({kernel.name for kernel in kernels}), spills=spills)
        write(options.table, f"{head}\n{table(kernels)}\n")
    else:
        print(table(kernels))
    broken = [f"{kernel.name} sm_{kernel.arch}: {rule}" for kernel in kernels for rule in judge(kernel)]
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(kernels)} kernels and architectures, {len(broken)} broken rules", file=sys.stderr)
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
