"""`sparsecnx doctor`: what is available here, and for everything missing why, and what to do.

With --explain: the backend that runs each operator here, and why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

import sparsecnx
from sparsecnx.backends import compiled, cuda, minkowski, triton_launch
from sparsecnx.backends.dispatch import Choice
from sparsecnx.geometry.layout import Layout, TileSet
from sparsecnx.models import SIZES
from sparsecnx.ops import (
    block,
    convolution,
    depthwise_convolution,
    drop_path,
    global_response_norm,
    layer_normalization,
)
from sparsecnx.tensor import SparseTensor

TORCHVISION_RELEASES = "https://github.com/pytorch/vision#installation"
NOT_INSTALLED = "not installed"
INSTALL_MINKOWSKI = (
    "pip install setuptools==68.2.2 numpy==1.26.4 wheel ninja && CUDA_VISIBLE_DEVICES= "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation MinkowskiEngine==0.5.4"
)

# Distribution and module of everything in the extra `[train]`.
TRAIN = {
    "torchvision": "torchvision",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "safetensors": "safetensors",
}

# The operators on tiles, which the models run; none of those on explicit kernel maps.
EXPLAINED_OPERATORS = (
    block.operator,
    layer_normalization.operator,
    convolution.operator,
    convolution.patchify_operator,
    depthwise_convolution.operator,
    global_response_norm.operator,
    drop_path.operator,
)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked for.
        ok: whether it is there and usable.
        detail: its version and what matters about it, or why it is missing.
        remedy: what to do where it is missing; None where nothing needs to be done.
    """

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


def checks() -> list[Check]:
    """Everything that sparsecnx can make use of, in the order of the report."""
    return [
        _python(),
        _torch(),
        _gpu(),
        _triton_kernels(),
        _cpu_operators(),
        _cuda_operators(),
        _minkowski_engine(),
        *_train(),
    ]


def report() -> str:
    """The report as text: one line per check, and below it what to do where there is something to do."""
    lines = [f"sparsecnx {sparsecnx.__version__}", ""]
    found = checks()
    width = max(len(check.name) for check in found)
    for check in found:
        lines.append(f"{'ok' if check.ok else '--'}  {check.name:{width}}  {check.detail}")
        if check.remedy is not None:
            lines.append(f"{'':{width + 6}}-> {check.remedy}")
    return "\n".join(lines)


def run() -> int:
    """Print the report. Returns the exit code of the command: 0, since nothing optional has to be there."""
    print(report())
    return 0


def _python() -> Check:
    return Check("Python", True, f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def _torch() -> Check:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU only"
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__}, {build}; {torch.get_num_threads()} CPU threads, {capability}"
    if torch.__version__ < compiled.OLDEST_TORCH:
        return Check(
            "torch",
            False,
            f"{detail}; {compiled.OLDEST_TORCH} or later is needed",
            "pip install --upgrade torch",
        )
    return Check("torch", True, detail)


def _gpu() -> Check:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check("GPU", True, ", ".join(f"{device.name}, sm_{device.major}{device.minor}" for device in devices))
    if torch.version.cuda is None:
        remedy = f"With an NVIDIA GPU, install a CUDA build of torch: {compiled.CUDA_BUILDS}"
        return Check("GPU", False, "this torch is built for CPU only", remedy)
    remedy = "With an NVIDIA GPU, install or update its driver until `nvidia-smi` lists it."
    return Check("GPU", False, "torch finds no CUDA device", remedy)


def _triton_kernels() -> Check:
    name = "Triton"
    problem = _import_problem("triton")
    if problem is not None:
        return Check(name, False, problem, f"Install a CUDA build of torch, which brings it: {compiled.CUDA_BUILDS}")
    version = _version("triton", "triton")
    if triton_launch.interpreting:
        detail = f"{version}, kernels run in its interpreter: on the CPU, slowly, where `triton` is asked for by name"
        return Check(name, True, detail, "Unset TRITON_INTERPRET to run them on a GPU.")
    if not torch.cuda.is_available():
        return Check(name, False, f"{version}, but there is no GPU to run its kernels on", "See GPU.")
    refusals = [triton_launch.device_refusal(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    if all(refusals):
        return Check(name, False, f"{version}, but {refusals[0]}", "Its kernels need a newer GPU.")
    refused = "".join(f"; {refusal}" for refusal in refusals if refusal)
    return Check(name, True, f"{version}, kernels run on the GPU, compiled on first use{refused}")


def _cpu_operators() -> Check:
    name = "CPU operators"
    if not compiled.loaded:
        return Check(name, False, f"{compiled.why_not}", compiled.remedy)
    facts = compiled.build_info() or {}
    if facts.get("version") != sparsecnx.__version__:
        detail = f"compiled from sparsecnx {facts.get('version', '(unknown version)')}"
        return Check(name, False, detail, compiled.reinstall())
    detail = (
        f"running on {torch.ops.sparsecnx.cpu_isa()}; compiled by {facts['compiler']} ({facts['flags']})"
        f" with torch {facts['torch']} for {facts['oldest_torch']} and later"
    )
    return Check(name, True, detail)


def _cuda_operators() -> Check:
    name = "CUDA operators"
    if not compiled.cuda_loaded:
        return Check(name, False, f"{compiled.cuda_why_not}", compiled.cuda_remedy)
    facts = compiled.build_info() or {}
    anew = compiled.reinstall(build="cuda")
    if facts.get("version") != sparsecnx.__version__:
        return Check(name, False, f"compiled from sparsecnx {facts.get('version', '(unknown version)')}", anew)
    if facts.get("cuda") is None:
        return Check(name, False, "left from another build than the CPU operators", anew)
    detail = (
        f"architectures {facts['cuda_architectures']}; compiled by nvcc {facts['cuda']} ({facts['cuda_flags']})"
        f" with torch {facts['torch']} for {facts['oldest_torch']} and later"
    )
    if not torch.cuda.is_available():
        return Check(name, True, f"{detail}; there is no GPU to run them on")
    driver = cuda.driver_version()
    if driver is not None and driver[0] < int(facts["cuda"].partition(".")[0]):
        detail = f"{detail}; the driver is for CUDA {driver[0]}.{driver[1]}, which is too old for them"
        remedy = f"Update the NVIDIA driver, or compile with the CUDA {driver[0]} toolkit: {anew}"
        return Check(name, False, detail, remedy)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    refusals = {device: refusal for device in devices if (refusal := cuda.device_refusal(device)) is not None}
    if not refusals:
        return Check(name, True, f"{detail}; they run on the GPU")
    detail += "".join(f"; {refusal}" for refusal in refusals.values())
    remedy = "They are made for compute capability 8.0 and later."
    if any(torch.cuda.get_device_capability(device) >= (8, 0) for device in refusals):
        capabilities = sorted({torch.cuda.get_device_capability(device) for device in devices})
        architectures = ";".join(f"{major}.{minor}" for major, minor in capabilities if major >= 8)
        remedy = f"TORCH_CUDA_ARCH_LIST='{architectures}' {anew}"
    return Check(name, len(refusals) < len(devices), detail, remedy)


def _minkowski_engine() -> Check:
    name = minkowski.NAME
    problem = minkowski.problem()
    if problem == minkowski.ANSWERED:
        remedy = f"For the library itself: {minkowski.STAND_IN}.uninstall(), or a process without install()."
        return Check(name, False, problem, remedy)
    if problem is not None:
        again = "" if problem == minkowski.NOT_INSTALLED else "Compile it for this torch and Python. "
        return Check(name, False, problem, f"{again}{_minkowski_remedy()}")
    library = minkowski.library()
    if not library.is_cuda_available():
        built = "built for the CPU only"
    elif hasattr(library, "MinkowskiDepthwiseConvolution"):
        built = "built for CUDA too, with a depthwise kernel"
    else:
        built = "built for CUDA too"
    return Check(name, True, f"{_version(name, name)}, {built}; the backend `minkowski` runs on it")


def _minkowski_remedy() -> str:
    """How to get MinkowskiEngine for the CPU; for CUDA it takes CUDA 11, which no torch of ours is built for."""
    alone = "in a checkout of sparsecnx `make minkowski` makes an environment of its own"
    if not (3, 10) <= sys.version_info < (3, 12):
        return f"It compiles with Python 3.10 and 3.11 alone: {alone}, with PYTHON=python3.11."
    return f"For the CPU, with g++ and OpenBLAS: {INSTALL_MINKOWSKI}. Or {alone}."


def _train() -> Iterator[Check]:
    for distribution, module in TRAIN.items():
        problem = _import_problem(module)
        if problem is None:
            yield Check(distribution, True, _version(distribution, module))
        elif problem == NOT_INSTALLED:
            yield Check(distribution, False, problem, "pip install 'sparsecnx[train]'")
        elif distribution == "torchvision":
            remedy = f"Install the one that belongs to torch {torch.__version__}: {TORCHVISION_RELEASES}"
            yield Check(distribution, False, problem, remedy)
        else:
            yield Check(distribution, False, problem, f"pip install --force-reinstall --no-deps {distribution}")


def _version(distribution: str, module: str) -> str:
    """Version of a module that imports; other distributions bring it too, such as pillow-simd and pytorch-triton."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "version unknown"))


def _import_problem(module: str) -> str | None:
    """Why `module` does not import; None where it does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return NOT_INSTALLED
        return f"installed, but does not import: {error}"
    except Exception as error:  # what a broken installation raises is its own choice
        return f"installed, but does not import: {error}"
    return None


def explain(device: torch.device, dtype: torch.dtype, model: str) -> str:
    """Return the choices of every operator at the four stages of a model, and below them what was not taken and why.

    Args:
        model: one of `sparsecnx.models.SIZES`.
    """
    inputs = _stages(device, dtype, model)
    found = [(x, operator.explain(x)) for operator in EXPLAINED_OPERATORS for x in inputs]
    table = [("operator", "C", "tile", "runs on", "why"), *(_line(x, choice) for x, choice in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    where = f"{inputs[0].device} in {str(dtype).removeprefix('torch.')}"
    lines = [f"What runs on {where}, in the four stages of ConvNeXt V2 {model.capitalize()}", ""]
    for operator, channels, tile, backend, why in table:
        left, right = f"{operator:{widths[0]}}  {channels:>{widths[1]}}", f"{tile:>{widths[2]}}  {backend:{widths[3]}}"
        lines.append(f"{left}  {right}  {why}")
    lines += ["", "What does not, and why", ""]
    for (backend, reason), operators in _not_taken(choice for _, choice in found).items():
        lines += [f"{backend}: {reason}", f"    {', '.join(operators)}"]
    return "\n".join(lines)


def _stages(device: torch.device, dtype: torch.dtype, model: str) -> list[SparseTensor]:
    """Return one visible patch of 32 pixels, as the four stages of a model see it."""
    tiles = TileSet.all_visible(1, (1, 1), device)
    return [
        SparseTensor(torch.zeros(tile**2, channels, dtype=dtype, device=tiles.device), Layout(tiles, tile, 32 // tile))
        for channels, tile in zip(SIZES[model].dims, (8, 4, 2, 1), strict=True)
    ]


def _line(x: SparseTensor, choice: Choice) -> tuple[str, ...]:
    why = "; ".join(filter(None, (choice.reasons[choice.backend], choice.detail)))
    return choice.operator, str(x.features.shape[1]), str(x.layout.tile), choice.backend, why


def _not_taken(choices: Iterable[Choice]) -> dict[tuple[str, str], dict[str, None]]:
    """Return the operators, in order, that a backend does not run for a reason."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for choice in choices:
        for backend, reason in choice.reasons.items():
            if backend != choice.backend:
                reasons.setdefault((backend, reason), {})[choice.operator] = None
    return reasons
