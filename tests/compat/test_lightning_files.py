"""Checkpoints that a Trainer of pytorch-lightning writes, with what it keeps beside the weights."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecnx import models
from sparsecnx.cli import main
from sparsecnx.compat import checkpoints
from sparsecnx.compat.checkpoints import load_encoder

lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
DEPTHS, DIMS = (1, 1, 1, 1), (4, 8, 8, 8)
PARTS = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states")


@dataclass
class Augmentation:
    """A class of the training code, which is not there when the file is read."""

    crop: tuple[int, int] = (32, 32)


class Pretraining(lightning.LightningModule):
    def __init__(self, **settings):
        super().__init__()
        self.save_hyperparameters()
        encoder = models.ConvNeXtV2Encoder(DEPTHS, DIMS)
        self.model = models.FCMAE(encoder, decoder_dim=8)
        self.criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))

    def training_step(self, images, index):
        return self.model(images)[0]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Images(lightning.LightningDataModule):
    def __init__(self, root):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4, 3, 64, 64), batch_size=2)


def train(folder, *callbacks, **settings):
    """Train for two steps on a CPU, and return the module and the file of `ModelCheckpoint`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = Pretraining(**settings)
    saved = lightning.callbacks.ModelCheckpoint(dirpath=folder, filename="run")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=folder, callbacks=[saved, *callbacks], **options
    )
    trainer.fit(module, datamodule=Images(folder))
    return module, folder / "run.ckpt"


SETTINGS = {
    "plain": {"lr": 1e-3, "betas": (0.9, 0.95), "name": None},
    "objects": {
        "args": argparse.Namespace(root=Path("images"), epochs=3),
        "nested": lightning.utilities.parsing.AttributeDict(path=Path("a"), sizes=[1, 2]),
        "number": np.float64(0.5),
        "mean": np.ones(3),
        "dtype": torch.float32,
        "augmentation": Augmentation(),
        "loss": torch.nn.CrossEntropyLoss(weight=torch.ones(3)),
        "optimizer": torch.optim.AdamW,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_checkpoint_of_a_trainer(settings, tmp_path, capsys):
    module, source = train(tmp_path, **SETTINGS[settings])
    with pytest.raises(Exception, match="Weights only load failed"):  # for the path of the images at least
        torch.load(source, weights_only=True)
    loaded = checkpoints.load(source)
    assert (loaded.key, loaded.prefix, loaded.beside) == ("state_dict", "model.", ["criterion.pos_weight"])
    assert set(PARTS) < set(loaded.parts)
    expected = module.model.state_dict()
    assert loaded.state_dict.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict.items())

    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "out.pt"), "--to", "timm"]) == 0
    first, _, left, *names = capsys.readouterr().out.splitlines()
    assert ", part state_dict (beside epoch, " in first and ", without model. before its names: sparsecnx, " in first
    assert left == f"left out, because timm has no place for them: {len(names)} entries"
    assert names[-1].strip() == "criterion.pos_weight"
    encoder = models.ConvNeXtV2Encoder(DEPTHS, DIMS)
    assert load_encoder(encoder, source) == []
    assert torch.equal(encoder.stages[3][0].grn.gamma, module.model.encoder.stages[3][0].grn.gamma)


@pytest.mark.filterwarnings("ignore")
def test_the_average_and_the_model_of_a_trainer(tmp_path):
    """Lightning's callback puts the average into `state_dict`, and the model into `current_model_state`."""
    average = lightning.callbacks.EMAWeightAveraging(decay=0.5)
    _, source = train(tmp_path, average)
    contents = torch.load(source, weights_only=False)
    loaded = {key: checkpoints.load(source, key).state_dict for key in ("state_dict", "current_model_state")}
    for key, state_dict in loaded.items():
        assert all(torch.equal(tensor, contents[key][f"model.{name}"]) for name, tensor in state_dict.items())
    assert any(not torch.equal(tensor, loaded["state_dict"][n]) for n, tensor in loaded["current_model_state"].items())
