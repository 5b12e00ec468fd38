"""Say what is available here and why the rest is missing (`sparsecnx doctor`), or what runs and why (`--explain`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import platform
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import sparsecnx
from sparsecnx.backends import compiled, cuda, minkowski, triton_launch
from sparsecnx.geometry.layout import Layout
from sparsecnx.geometry.tiles import TileSet
from sparsecnx.models import SIZES
from sparsecnx.ops import (
    block,
    convolution,
    depthwise_convolution,
    drop_path,
    global_response_norm,
    layer_normalization,
    pooling,
    site_normalization,
)
from sparsecnx.tensor import SparseTensor

NOT_INSTALLED = "not installed"
INSTALL_MINKOWSKI = (
    "pip install setuptools==68.2.2 numpy==1.26.4 wheel ninja && CUDA_VISIBLE_DEVICES= "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation MinkowskiEngine==0.5.4"
)

# These are the distributions of the extra `[train]`, and those modules that have another name than their distribution.
TRAIN = (
    *("jsonargparse", "tensorboard", "tqdm", "matplotlib", "pillow", "tifffile", "imagecodecs"),
    *("scikit-image", "scikit-learn", "safetensors"),
)
MODULES = {
    "pillow": "PIL",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}

# These are the modules of the other extras, the extra of each, and what it adds to `pretrain`.
EXTRAS = {
    "nibabel": ("volumes", "volumes in NIfTI"),
    "zarr": ("volumes", "volumes in Zarr"),
    "datasets": ("hf", "data of Hugging Face"),
    "webdataset": ("webdataset", "WebDataset shards"),
    "rasterio": ("geo", "TIFF that tifffile refuses"),
    "wandb": ("wandb", "`--log wandb`, Weights & Biases"),
    "mlflow": ("mlflow", "`--log mlflow`"),
}

# These are the operators on tiles, which the models run. Those on explicit kernel maps are not explained.
EXPLAINED_OPERATORS = (
    block.operator,
    layer_normalization.operator,
    convolution.operator,
    convolution.patchify_operator,
    convolution.transposed_operator,
    convolution.unpatchify_operator,
    depthwise_convolution.operator,
    global_response_norm.operator,
    drop_path.operator,
    site_normalization.batch_norm_operator,
    site_normalization.group_norm_operator,
    site_normalization.instance_norm_operator,
    pooling.max_operator,
    pooling.sum_operator,
)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked for.
        ok: True if it is there and usable.
        detail: its version and what matters about it, or why it is missing.
        remedy: what to do where it is missing; None where nothing needs to be done.
    """

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


def checks() -> list[Check]:
    """Check everything that sparsecnx can make use of, in the order of the report."""
    python = Check("Python", True, f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    found = [python, _torch(), _gpu(), _triton_kernels(), _cpu_operators(), _cuda_operators(), _minkowski_engine()]
    return [*found, *_train(), _timm(), *_extras()]


def report() -> str:
    """Return a line for every check, and below it what to do where there is something to do."""
    lines = [f"sparsecnx {sparsecnx.__version__}", ""]
    found = checks()
    width = max(len(check.name) for check in found)
    for check in found:
        begin, indent = f"{'ok' if check.ok else '--'}  {check.name:{width}}  ", " " * (width + 6)
        lines += textwrap.wrap(begin + check.detail, 120, subsequent_indent=indent, break_on_hyphens=False)
        if check.remedy is not None:  # Commands can be copied as they are: they are broken after && alone.
            parts = check.remedy.replace(" && ", " &&\n").replace(". Or ", ".\nOr ").split("\n")
            lines.append(f"{indent}-> " + f"\n{indent}   ".join(parts))
    return "\n".join(lines)


def _torch() -> Check:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU only"
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__}, {build}; {torch.get_num_threads()} CPU threads, {capability}"
    if torch.__version__ < compiled.OLDEST_TORCH:
        detail += f"; {compiled.OLDEST_TORCH} or later is needed"
        return Check("torch", False, detail, "pip install --upgrade torch")
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
    name, problem = "Triton", _import_problem("triton")
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
    name, facts = "CPU operators", compiled.build_info() or {}
    if not compiled.loaded:
        return Check(name, False, f"{compiled.why_not}", compiled.remedy)
    if facts.get("version") != sparsecnx.__version__:
        return Check(name, False, _other_version(facts), compiled.reinstall())
    built = f"compiled by {facts['compiler']} ({facts['flags']}) {_built_for(facts)}"
    return Check(name, True, f"running on {torch.ops.sparsecnx.cpu_isa()}; {built}")


def _other_version(facts: dict[str, Any]) -> str:
    return f"compiled from sparsecnx {facts.get('version') or '(unknown version)'}"


def _built_for(facts: dict[str, Any]) -> str:
    return f"with torch {facts['torch']} for {facts['oldest_torch']} and later"


def _cuda_operators() -> Check:
    name, facts = "CUDA operators", compiled.build_info() or {}
    anew = compiled.reinstall(build="cuda")
    if not compiled.cuda_loaded:
        return Check(name, False, f"{compiled.cuda_why_not}", compiled.cuda_remedy)
    if facts.get("version") != sparsecnx.__version__:
        return Check(name, False, _other_version(facts), anew)
    if facts.get("cuda") is None:
        return Check(name, False, "left from another build than the CPU operators", anew)
    built = f"compiled by nvcc {facts['cuda']} ({facts['cuda_flags']}) {_built_for(facts)}"
    detail = f"architectures {facts['cuda_architectures']}; {built}"
    if not torch.cuda.is_available():
        return Check(name, True, f"{detail}; there is no GPU to run them on")
    driver = cuda.driver_version()
    if driver is not None and driver[0] < int(facts["cuda"].partition(".")[0]):
        detail += f"; the driver is for CUDA {driver[0]}.{driver[1]}, which is too old for them"
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
    name, problem = minkowski.NAME, minkowski.problem()
    if problem == minkowski.ANSWERED:
        remedy = f"For the library itself: {minkowski.STAND_IN}.uninstall(), or a process without install()."
        return Check(name, False, problem, remedy)
    if problem is not None:
        again = "" if problem == minkowski.NOT_INSTALLED else "Compile it for this torch and Python. "
        return Check(name, False, problem, f"{again}{_minkowski_remedy()}")
    library = minkowski.library()
    built = "built for CUDA too" if library.is_cuda_available() else "built for the CPU only"
    if library.is_cuda_available() and hasattr(library, "MinkowskiDepthwiseConvolution"):
        built += ", with a depthwise kernel"
    return Check(name, True, f"{_version(name, name)}, {built}; the backend `minkowski` runs on it")


def _minkowski_remedy() -> str:
    """Return how to get MinkowskiEngine for the CPU. For CUDA it takes CUDA 11, which no torch of ours is built for."""
    alone = "in a checkout of sparsecnx `make minkowski` makes an environment of its own"
    if not (3, 10) <= sys.version_info < (3, 12):
        return f"It compiles with Python 3.10 and 3.11 alone: {alone}, with PYTHON=python3.11."
    return f"For the CPU, with g++ and OpenBLAS: {INSTALL_MINKOWSKI}. Or {alone}."


def _train() -> Iterator[Check]:
    for distribution in TRAIN:
        module = MODULES.get(distribution, distribution)
        problem, remedy = _import_problem(module), f"pip install --force-reinstall --no-deps {distribution}"
        if problem == NOT_INSTALLED:
            remedy = "pip install 'sparsecnx[train]'"
        if problem is None:
            yield Check(distribution, True, _version(distribution, module))
        else:
            yield Check(distribution, False, problem, remedy)


def _version(distribution: str, module: str) -> str:
    """Return the version of a module that imports; another distribution may bring it, as pillow-simd does."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "version unknown"))


def _timm() -> Check:
    problem = _import_problem("sparsecnx.models.timm_models")
    if problem is None:
        return Check("timm", True, f"{_version('timm', 'timm')}, networks for `pretrain --model timm:NAME`")
    return Check("timm", False, _import_problem("timm") or problem, "pip install --upgrade timm")


def _extras() -> Iterator[Check]:
    for name, (extra, what) in EXTRAS.items():
        problem = _import_problem(name)
        if problem is None:
            yield Check(name, True, f"{_version(name, name)}, {what} for `pretrain`")
        else:
            remedy = (
                f"pip install 'sparsecnx[{extra}]'" if problem == NOT_INSTALLED else f"pip install --upgrade {name}"
            )
            yield Check(name, False, problem, remedy)


def _import_problem(module: str) -> str | None:
    """Return why `module` does not import; None where it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name is not None and module.startswith(error.name):
            return NOT_INSTALLED
        return f"installed, but does not import: {error}"
    return None


def explain(device: torch.device, dtype: torch.dtype, model: str) -> str:
    """Return the choices of every operator at the four stages of a model, and below them what was not taken and why.

    Args:
        model: one of `sparsecnx.models.SIZES`.
    """
    # The four stages of the model see one visible patch of 32 pixels.
    tiles = TileSet.all_visible(1, (1, 1), device)
    stages = [
        SparseTensor(torch.zeros(tile**2, channels, dtype=dtype, device=tiles.device), Layout(tiles, tile, 32 // tile))
        for channels, tile in zip(SIZES[model].dims, (8, 4, 2, 1), strict=True)
    ]
    table = [("operator", "C", "tile", "runs on", "why")]
    not_taken: dict[str, dict[str, None]] = {}  # operators, in order, by backend and reason
    for operator, x in itertools.product(EXPLAINED_OPERATORS, stages):
        choice = operator.explain(x)
        reasons = dict(choice.reasons)
        why = "; ".join(filter(None, (reasons.pop(choice.backend), choice.detail)))
        table.append((choice.operator, str(x.features.shape[1]), str(x.layout.side), choice.backend, why))
        for backend, reason in reasons.items():
            not_taken.setdefault(f"{backend}: {reason}", {})[choice.operator] = None
    where = f"{tiles.device} in {str(dtype).removeprefix('torch.')}"
    lines = [f"What runs on {where}, in the four stages of ConvNeXt V2 {model.capitalize()}", ""]
    o, c, t, b, _ = (max(map(len, column)) for column in zip(*table, strict=True))
    lines += [f"{name:{o}}  {width:>{c}}  {tile:>{t}}  {on:{b}}  {why}" for name, width, tile, on, why in table]
    lines += ["", "What does not, and why", ""]
    for reason, operators in not_taken.items():
        lines += [reason, f"    {', '.join(operators)}"]
    return "\n".join(lines)
