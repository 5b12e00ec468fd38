"""A run that trains a pretrained network on labels and tests it: what fine-tuning and segmentation share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from sparsecnx.train.data.crops import Batch
from sparsecnx.train.data.order import mix
from sparsecnx.train.learner import Learner, Pass
from sparsecnx.train.log import RunLog
from sparsecnx.train.loop import Trainer


class Transfer(Trainer):
    """A run of `sparsecnx finetune` or `segment`, see `Trainer`.

    Attributes:
        learns: class of the learner.

    Args:
        *others: of `Trainer`.
        trained, tested: the images, each with a `source` and the `names` of all classes; the source of the run is that
            of `trained`.
        start: gives a new network the weights that it begins with.
        **options: of `Trainer`.
    """

    learns: ClassVar[type[Learner]]

    def __init__(self, *others: Any, trained: Any, tested: Any, start: Callable[[Any], None], **options: Any) -> None:
        self.trained, self.tested, self.start = trained, tested, start
        super().__init__(*others, **options)
        begun = self.options.checkpoint
        self.pretrained = begun and os.path.abspath(begun)
        if self.saved is not None:
            self.pretrained = self.saved.data.pretrained

    @abstractmethod
    def test(self, network: Any) -> dict[str, float]:
        """Return what a test of a network finds, by name; all processes call it."""

    def make_learner(self) -> Learner:
        learner = self.learns(self.recipe, self.options, self.processes, self.saved)
        if self.saved is None:
            self.start(learner.model)
            if learner.average is not None:
                learner.average.module.load_state_dict(learner.model.state_dict())
        return learner

    def ready(self, batch: Batch, number: int) -> Pass:
        seed = mix(self.recipe.seed, "network", number, self.processes.rank)
        return Pass(batch.images, batch.targets, None, seed)

    def checked(self) -> dict[str, Any]:
        places = self.places()
        return {"classes": list(self.trained.names), "test": places["test"], "pretrained": places["checkpoint"]}

    def places(self) -> dict[str, str | None]:
        apart = self.tested.source.place != self.source.place
        test = self.tested.source.place if apart else None
        return super().places() | {"test": test, "checkpoint": self.pretrained}

    def end_epoch(self, epoch: int, log: RunLog) -> None:
        """Test the network, and its moving average where there is one."""
        every = self.options.test_every or 0
        if epoch != self.recipe.epochs and (not every or epoch % every):
            return
        networks = {"": self.learner.model}
        if self.learner.average is not None:
            networks["ema_"] = self.learner.average.module
        values: dict[str, float] = {}
        for prefix, network in networks.items():
            values |= {f"{prefix}{name}": value for name, value in self.test(network).items()}
        told = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if "/" not in name)
        self.processes.together(lambda: log.evaluation(values))
        log.say(f"epoch {epoch}: tested on {len(self.tested.source)} images: {told}")
