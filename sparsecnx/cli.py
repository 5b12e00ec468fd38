"""The command line: `sparsecnx pretrain | probe | finetune | segment | evaluate | reconstruct | convert | doctor`.

Exit codes:
    0    done
    1    a run stopped: loss not finite, images or output folder gone, a reading process died, checkpoint, log or
         terminal not written; the message says which checkpoint is the last good one
    2    an argument or an installation that cannot work; nothing was changed
    130  Ctrl-C, 143 SIGTERM; `pretrain` saves first, and `--resume` goes on
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from sparsecnx import doctor
from sparsecnx.common.dtypes import DTYPES
from sparsecnx.common.errors import CheckpointError, InputError, MissingExtra, TrainingStopped
from sparsecnx.common.files import escape, printable
from sparsecnx.common.memory import keep_freed_memory
from sparsecnx.compat import checkpoints
from sparsecnx.models import SIZES
from sparsecnx.train.recipe import MAX_PIXELS

PUBLISHED_EPS = 1e-6  # of LayerNorm and GRN, which files of weights do not hold
FINETUNING = ("timm", "torchvision", "torchmetrics")  # the extra [finetune]
SEGMENTATION = ("segmentation-models-pytorch", "torchmetrics")  # the extra [segment]
# These are the choices of `doctor --explain`. The first is the default.
EXPLAINED = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": tuple(DTYPES),
    "model": ("tiny", *(size for size in SIZES if size != "tiny")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, see the top of this file."""
    code = _run(argv)
    try:
        sys.stdout.flush()
    except OSError:  # reported already; Python would fail once more at its exit, and with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(argv: Sequence[str] | None) -> int:
    typed = sys.argv[1:] if argv is None else list(argv)
    # The options of these come from recipes, and need the extra [train].
    trains = {"pretrain": _pretrain, "finetune": _finetune, "segment": _segment}.get("".join(typed[:1]))
    arguments = build_parser().parse_args(typed) if trains is None else argparse.Namespace(command=typed[0])
    command = f"sparsecnx {arguments.command}"
    try:
        return int(arguments.run(arguments)) if trains is None else trains(typed[1:])
    except (InputError, MissingExtra) as error:
        text = f"{_as_typed(error.argument)} {error.problem}" if isinstance(error, InputError) else str(error)
        if not error.elsewhere:
            print(printable(f"{command}: error: {text}"), file=sys.stderr)
        return 2
    except TrainingStopped as error:
        if not error.elsewhere:
            print(printable(f"{command}: stopped: {error}"), file=sys.stderr)
        return 1
    except _OutputError as error:
        print(f"{command}: stopped: standard output could not be written ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(prog="sparsecnx", description="Masked-autoencoder pretraining at the cost of the visible pixels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("pretrain", help="pretrain a ConvNet as a masked autoencoder")
    commands.add_parser("finetune", help="train a classifier from a pretrained network")
    commands.add_parser("segment", help="train a segmenter from a pretrained network")
    _add_evaluate(commands.add_parser("evaluate", help="test a classifier of sparsecnx finetune"))
    _add_probe(commands.add_parser("probe", help="classify images by the frozen features of checkpoints"))
    _add_reconstruct(commands.add_parser("reconstruct", help="draw how a checkpoint reconstructs masked images"))
    _add_convert(commands.add_parser("convert", help="convert a checkpoint to the format of another library"))
    _add_doctor(commands.add_parser("doctor", help="print what is available, and why the rest is missing"))
    return parser


def _pretrain(arguments: Sequence[str]) -> int:
    _require("train", doctor.TRAIN)
    from sparsecnx.train.command import PRETRAIN
    from sparsecnx.train.start import pretrain

    return _train(arguments, PRETRAIN, pretrain)


def _finetune(arguments: Sequence[str]) -> int:
    _require("train", doctor.TRAIN)
    _require("finetune", FINETUNING)
    from sparsecnx.transfer.start import FINETUNE, finetune

    return _train(_checkpoint_named(arguments), FINETUNE, finetune)


def _segment(arguments: Sequence[str]) -> int:
    _require("train", doctor.TRAIN)
    _require("segment", SEGMENTATION)
    from sparsecnx.transfer.segment.start import SEGMENT, segment

    return _train(_checkpoint_named(arguments), SEGMENT, segment)


def _checkpoint_named(arguments: Sequence[str]) -> Sequence[str]:
    """Return arguments in which a checkpoint that comes first is an option."""
    named = arguments[:1] and not arguments[0].startswith("-")
    return ["--checkpoint", *arguments] if named else arguments


def _train(arguments: Sequence[str], command: Any, train: Callable[[Any, Any], int]) -> int:
    """Run a command of `sparsecnx.train.command`."""
    from sparsecnx.train.command import parse

    try:
        options, given = parse(arguments, command)
    except InputError as error:
        error.elsewhere = os.environ.get("RANK", "0") != "0"  # of torchrun, whose processes have the same arguments
        raise
    keep_freed_memory()
    return train(options, given)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Test a classifier: top-1 and top-5 accuracy, the mean over the classes, cross entropy, calibration, and a "
        "table of the classes. Writes them and a confusion picture."
    )
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of sparsecnx finetune, such as last.pt")
    add("--data", metavar="DATA", help="a folder of images for each class, or an address (default: of the run)")
    add("--out", metavar="FOLDER", help="(default: evaluation, beside the checkpoint)")
    weights = "model, or ema for the moving average (default: ema, where there is one)"
    add("--weights", choices=("model", "ema"), metavar="NAME", help=weights)
    add("--image-size", type=int, metavar="N", help="side of the images (default: of the run)")
    add("--model", metavar="NAME", help="module:factory of the run, where it was one: it runs Python code")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or one GPU such as cuda:1 (default: auto)")
    add("--workers", type=int, default=1, metavar="N", help="processes that read images (default: 1)")


def _evaluate(arguments: argparse.Namespace) -> int:
    _require("train", doctor.TRAIN)
    _require("finetune", FINETUNING)
    from sparsecnx.transfer.evaluate import evaluate

    a = arguments
    options = {"weights": a.weights, "image_size": a.image_size, "model": a.model}
    options |= {"device": a.device, "workers": a.workers}
    evaluate(a.checkpoint, a.data, a.out, say=_print, **options)
    return 0


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Classify images by frozen features, with nearest neighbours (k-NN) and a linear classifier, from few labels "
        "to all; beside the same network with random weights, and the pixels alone. Writes a table, a confusion "
        "picture and learning curves."
    )
    parser.set_defaults(run=_probe)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of sparsecnx pretrain, or weights with --model")
    folder = "a folder of images for each class, in train and val or alone; or an address as for pretrain"
    add("--data", required=True, metavar="DATA", help=folder)
    add("--test", metavar="DATA", help="what to test on (default: val beside train, or a fifth of the images)")
    add("--out", default="runs/probe", metavar="FOLDER", help="(default: %(default)s)")
    add(
        "--model", metavar="NAME", help="the network of weights that are no run; or module:factory of a run, which runs"
    )
    add("--image-size", type=int, metavar="N", help="side that images are resized to (default: of the run)")
    shares = "shares of the labels to train on (default: 0.01 0.1 1)"
    add("--labels", type=float, nargs="+", default=(0.01, 0.1, 1), metavar="SHARE", help=shares)
    add("--seeds", type=int, default=3, metavar="N", help="draws of labels and of random weights (default: 3)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or one GPU such as cuda:1 (default: auto)")
    add("--workers", type=int, default=1, metavar="N", help="processes that read images (default: 1)")
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help="random weights and pixels too")


def _probe(arguments: argparse.Namespace) -> int:
    _require("train", doctor.TRAIN)
    from sparsecnx.transfer.probe import probe

    a = arguments
    options = {"test": a.test, "model": a.model, "image_size": a.image_size, "shares": a.labels, "seeds": a.seeds}
    options |= {"device": a.device, "workers": a.workers, "baselines": a.baselines}
    probe(a.checkpoints, a.data, a.out, say=_print, **options)
    return 0


def _add_reconstruct(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw images, their visible patches, and the reconstruction side by side; of volumes three slices through the "
        "centre. If the model predicts normalised patches, each takes mean and contrast from the true patch, as in "
        "MAE's demonstration."
    )
    parser.set_defaults(run=_reconstruct)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of sparsecnx pretrain, such as last.pt")
    add("images", nargs="*", metavar="IMAGE", help="image or volume files (default: six of the run)")
    add("--out", default="reconstruction.png", metavar="FILE", help="(default: %(default)s)")
    add("--mask-ratio", type=float, metavar="R", help="(default: the checkpoint's)")
    add("--seed", type=int, default=0, metavar="N", help="of the masks (default: 0)")
    largest = f"largest image, width x height, or compressed volume (default: {MAX_PIXELS}, volumes 10^9)"
    add("--max-pixels", type=int, metavar="N", help=largest)
    add(
        "--channels",
        type=int,
        nargs="+",
        metavar="N",
        help="one in grey or three in colour, from 0 (default: the first)",
    )
    add("--model", metavar="NAME", help="module:factory of the run, where it was one: it runs Python code")


def _reconstruct(arguments: argparse.Namespace) -> int:
    _require("train", doctor.TRAIN)
    from sparsecnx.train.reconstruct import reconstruct

    a = arguments
    options = {"mask_ratio": a.mask_ratio, "seed": a.seed, "max_pixels": a.max_pixels, "model": a.model}
    loss = reconstruct(a.checkpoint, a.images, a.out, channels=a.channels, **options)
    _print(f"{a.out}: loss {loss:.4f} on the masked patches")
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a checkpoint of ConvNeXt or its masked autoencoder to the format of another library, bit for bit: "
        "names and layouts change, values and dtypes do not. Entries without a place there, such as the decoder in a "
        "classifier, are left out and listed. A missing or unknown entry, or one of a wrong shape, is an error."
    )
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("source", metavar="IN", help=".pt, .pth, .ckpt, .safetensors, or a folder of transformers")
    ending = "the ending chooses: .pt, .pth, .safetensors; a folder for from_pretrained of transformers"
    add("target", metavar="OUT", help=ending)
    add("--to", required=True, metavar="FORMAT", help=", ".join(checkpoints.FORMATS))
    add("--from", dest="origin", metavar="FORMAT", help="of IN (default: recognised by its names)")
    key = "part of IN to convert, such as model_ema or model.net (default: model, or state_dict)"
    add("--key", metavar="NAME", help=key)
    prefix = "what stands before the names of the network, such as teacher (default: found)"
    add("--prefix", metavar="NAME", help=prefix)
    most = "memory that IN may take if it is compressed or its tensors share numbers (default: %(default)s)"
    add("--max-bytes", type=int, default=checkpoints.MOST_BYTES, metavar="N", help=most)
    conv_mlp = "for a timm model with conv_mlp=True (default: as timm builds that size)"
    add("--conv-mlp", action=argparse.BooleanOptionalAction, help=conv_mlp)


def _convert(arguments: argparse.Namespace) -> int:
    source, target, to = arguments.source, arguments.target, arguments.to
    for argument, name in (("to", to), ("from", arguments.origin)):
        if name not in (None, *checkpoints.FORMATS):
            raise InputError(argument, name, f"expected one of {', '.join(checkpoints.FORMATS)}")
    if arguments.conv_mlp is not None and to != "timm":
        raise InputError("to", to, "expected timm together with --conv-mlp or --no-conv-mlp")
    if (problem := checkpoints.path_problem(target, to)) is not None:
        raise InputError("target", target, problem)
    if checkpoints.overwrites(target, source):
        raise InputError("target", target, "the same file as IN; expected another one")
    if checkpoints.is_inside(target, source):
        raise InputError("target", target, "in the folder of IN, a sharded checkpoint; expected another one")
    if arguments.max_bytes < 1:
        raise InputError("max_bytes", arguments.max_bytes, "expected 1 or more")
    try:
        loaded = checkpoints.load(source, arguments.key, arguments.max_bytes, arguments.prefix)
        epsilons = [f"{name} {value:g}" for name, value in loaded.epsilons.items() if value != PUBLISHED_EPS]
        if epsilons and to == "transformers":
            raise InputError("to", to, f"has networks with epsilons of 1e-06 only, and IN has {', '.join(epsilons)}")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if loaded.foreign:
                if to != "timm":
                    raise InputError("to", to, "expected timm, since IN holds no ConvNeXt of sparsecnx")
                conversion = checkpoints.as_it_is(loaded.state_dict)
            else:
                conversion = checkpoints.convert(loaded.state_dict, to, arguments.origin, arguments.conv_mlp)
    except checkpoints.PartError as error:
        others = ", ".join(error.candidates[:3]) + (", ..." if error.candidates[3:] else "")
        raise InputError("source", source, f"{error}" + (f"; --key can be {others}" if others else "")) from error
    except CheckpointError as error:
        raise InputError("source", source, str(error)) from error
    try:
        checkpoints.save(target, conversion)
    except OSError as error:
        raise InputError("target", target, f"cannot be written ({error})") from error

    others = ", ".join(part for part in loaded.parts if not f"{loaded.key}.".startswith(f"{part}."))
    part = f", part {loaded.key}" if loaded.key is not None else ""
    part += f" (beside {others})" if others else ""
    names = "its names" if loaded.beside else "every name"
    part += f", without {loaded.prefix} before {names}" if loaded.prefix else ""
    network = conversion.architecture or "the encoder of a masked autoencoder"
    lines = [f"{source}{part}: {conversion.source.name}, {network}, {len(loaded.state_dict)} entries"]
    lines.append(f"{target}: {to}, {len(conversion.state_dict)} entries")
    if left_out := [*conversion.left_out, *loaded.beside]:
        lines.append(f"left out, because {to} has no place for them: {len(left_out)} entries")
        lines.extend(f"    {name}" for name in left_out)
    _print("\n".join(map(escape, lines)))
    said = [str(warning.message) for warning in warned]
    if epsilons:
        said.append(f"{target} holds weights alone: make the network with {', '.join(epsilons)}")
    for text in said:
        print(f"sparsecnx convert: warning: {printable(text)}", file=sys.stderr)
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what is available here, why the rest is missing, and what to do about it. With --explain, print instead "
        "which implementation each operator takes at the stages of a model, and why not the others."
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("--explain", action="store_true", help="print which implementation runs, and why")
    chosen = parser.add_argument_group("what to explain")
    for name, choices in EXPLAINED.items():
        chosen.add_argument(f"--{name}", metavar=name.upper(), help=f"{', '.join(choices)} (default: {choices[0]})")


def _doctor(arguments: argparse.Namespace) -> int:
    for name, choices in EXPLAINED.items():
        value = getattr(arguments, name)
        if value is not None and not arguments.explain:
            raise InputError(name, value, "expected together with --explain")
        if value not in (None, *choices):
            raise InputError(name, value, f"expected one of {', '.join(choices)}")
    if not arguments.explain:
        _print(doctor.report())
        return 0
    device, dtype, model = (getattr(arguments, name) or choices[0] for name, choices in EXPLAINED.items())
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", device, "this torch sees no CUDA device; expected auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _print(doctor.explain(torch.device(device), DTYPES[dtype], model))
    return 0


class _Parser(argparse.ArgumentParser):
    """Names the nearest option where one is unknown. Abbreviations are not accepted: a new option would change them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown is not None:
            known = [name for parser in _parsers(self) for name in parser._option_string_actions]
            ends = [name for name in known if name.endswith(unknown[1].removeprefix("-"))]  # --lr is --base-lr
            near = ends or difflib.get_close_matches(unknown[1], known, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _require(extra: str, libraries: Sequence[str]) -> None:
    """Raise MissingExtra, with the command that helps, unless every library of an extra is installed."""
    modules = {name: doctor.MODULES.get(name, name) for name in libraries}
    missing = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)} not installed: pip install sparsecnx[{extra}]")


class _OutputError(Exception):
    """Standard output could not be written: the disk is full, or its reader is gone."""


def _print(text: str) -> None:
    """Print lines, with what a terminal cannot show escaped.

    Raises:
        _OutputError: they could not be written.
    """
    try:
        print("\n".join(printable(line) for line in text.split("\n")), flush=True)
    except OSError as error:
        raise _OutputError(str(error)) from error


def _as_typed(argument: str) -> str:
    """Return the name of a Python argument on the command line."""
    positional = {"checkpoint": "CHECKPOINT", "images": "IMAGE", "source": "IN", "target": "OUT"}
    return positional.get(argument, f"--{argument.replace('_', '-')}")


if __name__ == "__main__":
    sys.exit(main())
