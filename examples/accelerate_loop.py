"""Pretrain FCMAE with Accelerate: any number of processes, bfloat16, a checkpoint after every epoch.

    pip install 'sparsecnx[train]' torchvision jsonargparse accelerate
    accelerate launch accelerate_loop.py FOLDER runs/accelerate --size tiny --batch 512

Run it again to go on. `--batch` is that of all processes, `--lr` for 256 images of it. Nodes share the disk of OUT.
"""

import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from jsonargparse import auto_cli
from PIL import Image, ImageOps
from torch.optim.lr_scheduler import LambdaLR
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


def main(
    data: Path, out: Path, size: str = "atto", side: int = 224, batch: int = 64, epochs: int = 800, lr: float = 1.5e-4
) -> None:
    # Every process takes its part of each batch, so that the order of images does not depend on their number.
    order = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(mixed_precision="bf16", dataloader_config=order)
    model = sparsecnx.models.create_fcmae(size)
    loader = DataLoader(Images(data, side), batch, shuffle=True, drop_last=True, num_workers=4, persistent_workers=True)
    if not len(loader):
        raise ValueError(f"batch is {batch}: expected at most the number of images in {data}")
    steps, peak = epochs * len(loader), lr * batch / 256
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=peak, betas=BETAS)
    schedule = LambdaLR(optimizer, partial(learning_rate, peak=1.0, warmup_steps=steps / 20, total_steps=steps))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)
    if saved := sorted(out.glob("epoch-*")):
        accelerator.load_state(str(saved[-1]))
    for epoch in range(schedule.last_epoch // len(loader), epochs):
        loader.set_epoch(epoch)
        for images in loader:
            seed = schedule.last_epoch * accelerator.num_processes + accelerator.process_index
            loss, _, _ = model(images, mask_ratio=0.6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        accelerator.print(f"epoch {epoch + 1}/{epochs}  last loss {accelerator.reduce(loss.detach(), 'mean'):.4f}")
        accelerator.save_state(str(saving := out / "saving"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # The new checkpoint is whole before the one before it goes.
            saving.rename(out / f"epoch-{epoch + 1:05}")
            for old in sorted(out.glob("epoch-*"))[:-1]:
                shutil.rmtree(old)
    accelerator.save({"model": accelerator.unwrap_model(model).state_dict()}, out / "model.pt")
    accelerator.end_training()


if __name__ == "__main__":
    auto_cli(main)
