"""A run that trains a pretrained network on labels and tests it: what fine-tuning and segmentation share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.crops import Batch
from sparsecnx.train.data.order import mix
from sparsecnx.train.learner import Learner, Pass
from sparsecnx.train.log import SKIPPED, TESTS, RunLog, read_line
from sparsecnx.train.loop import MOST_NAMED, Trainer


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
    extends = False

    def __init__(self, *others: Any, trained: Any, tested: Any, start: Callable[[Any], None], **options: Any) -> None:
        self.trained, self.tested, self.start = trained, tested, start
        super().__init__(*others, **options)
        try:
            tested.source.check(self.recipe)
        except InputError as error:
            raise InputError("test", *error.args[1:]) from error
        begun = self.options.checkpoint
        self.pretrained = begun and os.path.abspath(begun)
        if self.saved is not None:
            self.pretrained = self.saved.data.pretrained

    @abstractmethod
    def test(self, network: Any) -> tuple[dict[str, float], dict[str, str]]:
        """Return what a test of a network finds, by name, and the images that cannot be read; all processes call it."""

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

    def tests_after(self, epoch: int) -> bool:
        """Return whether the network is tested after so many epochs."""
        every = self.options.test_every
        return epoch == self.recipe.epochs or (every > 0 and epoch % every == 0)

    def epoch_ended(self) -> bool:
        path = self.folder.folder / TESTS
        lines = path.read_text().splitlines() if path.exists() else []
        tested = {line["step"] for line in map(read_line, lines) if line is not None}
        return not self.tests_after(self.step // self.steps_per_epoch) or self.step in tested

    def end_epoch(self, epoch: int, log: RunLog) -> None:
        """Test the network, and its moving average where there is one."""
        if not self.tests_after(epoch):
            return
        networks = {"": self.learner.model}
        if self.learner.average is not None:
            networks["ema_"] = self.learner.average.module
        values: dict[str, float] = {}
        unread: dict[str, str] = {}
        for prefix, network in networks.items():
            found, skipped = self.test(network)
            values |= {f"{prefix}{name}": value for name, value in found.items()}
            unread |= skipped
        told = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if "/" not in name)
        self.processes.together(lambda: log.evaluation(values))
        for name in sorted(unread)[:MOST_NAMED] if self.processes.main else []:
            log.say(f"{SKIPPED} {self.tested.source.noun} {name} ({unread[name]})")
        tested = len(self.tested.source) - len(unread)
        log.say(f"epoch {epoch}: tested on {tested} {self.tested.source.noun}s: {told}")
