"""Run ConvNeXt V2's published model files, unmodified, on MinkowskiEngine's API here, and compare with our own FCMAE.

    git clone https://github.com/facebookresearch/ConvNeXt-V2
    python benchmarks/published_code.py ConvNeXt-V2

Both get the same weights (converted), images and mask in float64, and GRN over the batch as in the published code. The
exit code is 0 if loss, prediction and every gradient agree, and the loss falls over a few steps of training. A timm is
needed that still has `timm.models.layers`, such as 1.0.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder import randomize
from measure import gradients, relative_error

from sparsecnx.compat import checkpoints, minkowski
from sparsecnx.models import create_fcmae

TOLERANCE = 1e-9
STEPS = 5


def published(folder: Path, size: str) -> Any:
    """Return the published FCMAE of a size, from the checkout in `folder`."""
    minkowski.install()
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of timm, about where its layers are
        models = importlib.import_module("models.fcmae")
    return getattr(models, f"convnextv2_{size}")(norm_pix_loss=True)


def differences(theirs: Any, size: str, device: str) -> dict[str, float]:
    """Return relative errors of loss, prediction, and every gradient by our name."""
    ours = create_fcmae(size, grn_scope="batch").to(device, torch.float64)
    randomize(ours)
    theirs.load_state_dict(checkpoints.convert(ours.state_dict(), "fcmae").state_dict)
    images = torch.randn(4, 3, 224, 224, dtype=torch.float64, device=device)
    loss, pred, mask = theirs(images)
    loss.backward()
    expected_loss, expected_pred, _ = ours(images, mask=mask.bool())
    expected_loss.backward()
    found = checkpoints.convert(gradients(theirs), "sparsecnx").state_dict
    errors = {f"gradient of {name}": relative_error(found[name], grad) for name, grad in gradients(ours).items()}
    return {"loss": relative_error(loss, expected_loss), "prediction": relative_error(pred, expected_pred), **errors}


def train(theirs: Any, device: str) -> list[float]:
    """Return the losses of a few steps on one batch, always under the same mask."""
    theirs.float()
    images = torch.randn(4, 3, 224, 224, device=device)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(0)
        loss, _, _ = theirs(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout of facebookresearch/ConvNeXt-V2")
    parser.add_argument("--size", default="atto")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if not (options.folder / "models" / "fcmae.py").is_file():
        parser.error(f"folder is {options.folder}: it has no models/fcmae.py")
    torch.manual_seed(0)
    theirs = published(options.folder, options.size).to(options.device, torch.float64)
    errors = differences(theirs, options.size, options.device)
    worst = max(errors, key=lambda name: errors[name])
    print(f"loss differs by {errors['loss']:.1e}, prediction by {errors['prediction']:.1e}")
    print(f"{len(errors) - 2} gradients, the largest difference {errors[worst]:.1e}: {worst}")
    losses = train(theirs, options.device)
    print("loss of training steps:", " ".join(f"{loss:.4f}" for loss in losses))
    agree = errors[worst] <= TOLERANCE and losses[-1] < losses[0]
    print("ok" if agree else "NOT ok")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
