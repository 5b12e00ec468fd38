"""Pretrain FCMAE with PyTorch Lightning: all GPUs, bfloat16, a checkpoint after every epoch.

    pip install 'sparsecnx[train]' torchvision jsonargparse pytorch-lightning
    python lightning_module.py FOLDER runs/lightning --size tiny --batch 512

Run it again to go on. `--batch` is that of all processes, `--lr` for 256 images of it. Nodes share the disk of OUT.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from PIL import Image, ImageOps
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import sparsecnx
from sparsecnx.train.schedule import BETAS, learning_rate, param_groups


class Images(Dataset[torch.Tensor]):
    """Random crops of the photographs in a folder and below it."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        crop = v2.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        flip, norm = v2.RandomHorizontalFlip(), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.transform = v2.Compose([v2.ToImage(), crop, flip, v2.ToDtype(torch.float32, scale=True), norm])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(ImageOps.exif_transpose(Image.open(self.paths[index])).convert("RGB"))


class Pretraining(pl.LightningModule):
    def __init__(self, size: str, images: Images, batch: int, lr: float) -> None:
        super().__init__()
        self.model = sparsecnx.models.create_fcmae(size)
        self.images, self.batch, self.lr = images, batch, lr

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        share, rest = divmod(self.batch, world := self.trainer.world_size)
        if rest or self.batch > (most := len(self.images)):
            raise ValueError(f"batch is {self.batch}: expected a multiple of {world} processes, at most {most} images")
        return DataLoader(self.images, share, shuffle=True, drop_last=True, num_workers=4, persistent_workers=True)

    def training_step(self, images: torch.Tensor, index: int) -> torch.Tensor:
        seed = self.global_step * self.trainer.world_size + self.global_rank
        loss, _, _ = self.model(images, mask_ratio=0.6, generator=torch.Generator().manual_seed(seed))
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        peak, steps = self.lr * self.batch / 256, int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(param_groups(self.model, weight_decay=0.05), lr=peak, betas=BETAS)
        published = partial(learning_rate, peak=1.0, warmup_steps=steps / 20, total_steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, published)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(
    data: Path, out: Path, size: str = "atto", side: int = 224, batch: int = 64, epochs: int = 800, lr: float = 1.5e-4
) -> None:
    saving, log = ModelCheckpoint(out, save_last=True), CSVLogger(out, name="log")
    trainer = pl.Trainer(precision="bf16-mixed", max_epochs=epochs, callbacks=[saving], logger=log)
    trainer.fit(module := Pretraining(size, Images(data, side), batch, lr), ckpt_path="last")
    if trainer.is_global_zero:
        torch.save({"model": module.model.state_dict()}, out / "model.pt")


if __name__ == "__main__":
    auto_cli(main)
