"""What a fine-tuning run reads and writes and where it computes."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecnx.common.errors import InputError
from sparsecnx.train.options import Options

# Options of pretraining that fine-tuning has not.
UNUSED = ("extend", "small_data", "draw_every", "cuda_graphs")


@dataclass(frozen=True)
class FinetuneOptions(Options):
    """Data, output folder and device of a run; the recipe decides everything else.

    Attributes:
        checkpoint: of sparsecnx pretrain, or weights with --model; none for random weights.
        data: a folder of images for each class, in train and val or alone; or an address as for sparsecnx pretrain.
        test: what to test on; none for val beside train, or for a fifth of the images.
        output: folder of checkpoints and logs; None for that of the resumed checkpoint, or `runs/finetune`.
        test_every: epochs between tests; 0 for one at the end.

    Raises:
        InputError: a field is out of range, or there is no CUDA device.
    """

    checkpoint: str | None = None
    test: str | None = None
    test_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_every < 0:
            raise InputError("test_every", self.test_every, "expected 0 or more")
        for field in ("checkpoint", "test"):
            if getattr(self, field) == "":
                raise InputError(field, "''", "expected a name")
