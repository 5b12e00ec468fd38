"""Run SparK's published code, unmodified but for its encoder, which becomes timm's own network on a SparseTensor.

    git clone https://github.com/keyu-tian/SparK
    python benchmarks/spark_code.py SparK --out benchmarks/results/spark-cpu.json

Both get the same weights, images and masks. In float64 loss and every gradient are compared; in float32 forward +
backward of the encoders are timed. The exit code is 0 if they agree. SparK asks for timm 0.5.4;
timm 1.0 serves as well.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from measure import say
from torch import Tensor

import sparsecnx

LIMIT = 1e-9
RATIO = 0.6
DECODER_WIDTH = 64  # the decoder is theirs on both sides


def ours(encoder: Any) -> type[torch.nn.Module]:
    """Return the encoder that replaces `encoder.SparseEncoder`; its `forward` is the change that a user makes."""

    class SparseEncoder(torch.nn.Module):
        def __init__(self, cnn: Any, input_size: int, sbn: bool = False, verbose: bool = False) -> None:
            super().__init__()
            self.sp_cnn, self.input_size = cnn, input_size
            self.downsample_raito = cnn.get_downsample_ratio()
            self.enc_feat_map_chs = cnn.get_feature_map_channels()

        def forward(self, x: Tensor) -> list[Tensor]:
            active = sparsecnx.sparse(x, encoder._cur_active, ones="visible")
            return [feature.dense() for feature in self.sp_cnn(active, hierarchical=True)]

    return SparseEncoder


def models(folder: Path, name: str, image: int) -> tuple[Any, Any, Any]:
    """Return SparK with their encoder and with ours, in their code from the checkout, and the module of their mask."""
    sys.path.insert(0, str(folder / "pretrain"))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", FutureWarning)  # of timm, about where its layers are
        layers = importlib.import_module("timm.models.layers")
        if not hasattr(layers, "drop"):  # which timm has moved since
            layers.drop = importlib.import_module("timm.layers.drop")
        encoder, decoder, spark, zoo = map(importlib.import_module, ("encoder", "decoder", "spark", "models"))
        zoo.pretrain_default_model_kwargs[name]["drop_path_rate"] = 0.0
        found = []
        for kind in (encoder.SparseEncoder, ours(encoder)):
            encoder.SparseEncoder = kind
            sparse_encoder = zoo.build_sparse_encoder(name, image)
            light = decoder.LightDecoder(sparse_encoder.downsample_raito, DECODER_WIDTH, sbn=False)
            found.append(spark.SparK(sparse_encoder, light, RATIO))
    theirs, replaced = found
    replaced.load_state_dict(theirs.state_dict())
    return theirs, replaced, encoder


def errors(theirs: Any, replaced: Any, images: Tensor) -> dict[str, Any]:
    """Compare loss, called output, and every gradient in float64.

    Raises:
        Mismatch: they differ.
    """
    found = []
    for model in (theirs, replaced):
        model = copy.deepcopy(model).double()
        mask = model.mask(len(images), "cpu", torch.Generator().manual_seed(0))
        loss = model(images.double(), mask)
        loss.backward()
        found.append({"output": loss, **measure.gradients(model)})
    return measure.compare("SparK on a SparseTensor", found[1], found[0], LIMIT, 1e-6)


def step(model: Any, encoder: Any, images: Tensor, grads: Sequence[Tensor], mask: Tensor) -> None:
    """Run forward and backward of the encoder, to the gradients of all parameters."""
    encoder._cur_active = mask
    torch.autograd.backward(model.sparse_encoder(images), list(grads))


def times(theirs: Any, replaced: Any, encoder: Any, images: Tensor, repeats: int, clock: str) -> dict[str, Any]:
    """Return milliseconds of both encoders."""
    mask = theirs.mask(len(images), "cpu", torch.Generator().manual_seed(0))
    side = images.shape[-1] // mask.shape[-1]
    masked = images * mask.repeat_interleave(side, 2).repeat_interleave(side, 3)
    encoder._cur_active = mask
    grads = [torch.randn_like(feature) for feature in theirs.sparse_encoder(masked)]
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(step, model, encoder, masked, grads, mask)
        for name, model in (("theirs", theirs), ("sparsecnx", replaced))
    }

    def drop_grads() -> None:
        theirs.zero_grad(set_to_none=True)
        replaced.zero_grad(set_to_none=True)

    return measure.interleaved(calls, repeats, torch.device("cpu"), drop_grads, clock)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout of keyu-tian/SparK")
    parser.add_argument("--model", default="resnet50", choices=("resnet50", "resnet101", "resnet152", "resnet200"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: on a busy machine")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args(arguments)
    if not (options.folder / "pretrain" / "spark.py").is_file():
        parser.error(f"folder is {options.folder}: it has no pretrain/spark.py")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    theirs, replaced, encoder = models(options.folder, options.model, options.image)
    images = torch.randn(options.batch, 3, options.image, options.image)
    try:
        error = errors(theirs, replaced, images[:2])
    except measure.Mismatch as mismatch:
        say(str(mismatch))
        return 1
    print(
        f"float64: loss differs by {error['output']:.1e}, gradients by {error['gradient']:.1e} ({error['parameter']})"
    )
    ms = times(theirs, replaced, encoder, images, options.repeats, options.clock)
    ratio = ms["sparsecnx"]["median"] / ms["theirs"]["median"]
    print(f"encoder, forward + backward: {ratio:.2f} of the time of theirs")
    setting = {"model": options.model, "batch": options.batch, "image": options.image, "threads": options.threads}
    case = {**setting, "ratio": RATIO, "clock": options.clock, "errors": error, "ms": ms}
    measure.Results(options.out).add(f"{options.model}-{options.image}px-{options.threads}threads", case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
