"""Where a `Trainer` says what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnnops.train.trainer import EpochRecord, Trainer


class Reporter:
    """Is told what a `Trainer` does, and shows nothing; override what you want to see."""

    def started(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def stepped(self, trainer: Trainer, loss: float | None) -> None:
        """After a step. loss: of this step, where knowing it costs nothing (on CUDA it is None most of the time)."""

    def epoch_done(self, record: EpochRecord, best: bool) -> None:
        """After the test at an epoch's end. best: whether no epoch had a higher test accuracy."""

    def ended(self) -> None:
        """After the last step, or before an exception leaves the trainer."""
