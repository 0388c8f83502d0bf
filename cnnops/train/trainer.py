"""The training loop, which can stop after any step and go on as if it had not."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops import data, models
from cnnops.data import Batches
from cnnops.files import locked, remove_parts, write_atomically
from cnnops.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    settle_sum,
)
from cnnops.train.config import TrainConfig
from cnnops.train.progress import Reporter

_LOOK_EVERY = 20
"""Steps between two looks at the loss on CUDA, where each waits for the device."""


class TrainingError(Exception):
    """Training cannot go on; the message is one line."""


class Stopped(Exception):
    """A signal ended training after a step, and `last.pt` in the run folder holds it. signum: the signal."""

    def __init__(self, signum: int, folder: Path, where: str) -> None:
        super().__init__(f"stopped {where}")
        self.signum, self.folder = signum, folder


@dataclass(frozen=True)
class EpochRecord:
    """One line of metrics.jsonl. Losses are means over images, accuracies shares of 1.

    train_loss, train_accuracy: as seen by the steps, in training mode. lr: at the epoch's first step.
    images_per_s: training only. seconds: training and test. Both are of every process that had a part in the epoch.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    images_per_s: float
    lr: float
    seconds: float


class _StopRequest:
    """While entered, SIGINT and SIGTERM only set `signum`; a SIGINT after that interrupts at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> _StopRequest:
        # Python delivers signals to the main thread only, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Trainer:
    """Trains one network on one data set, by SGD along a cosine, into a run folder.

    The folder holds config.json, metrics.jsonl (an `EpochRecord` a line), best.pt (the highest test accuracy) and
    last.pt (written before the first step, at each epoch's end, and as often as `checkpoint_every` says), and after the
    last epoch curves.png, filters.png and samples.png.
    `epoch` counts finished epochs, `step` finished steps of the epoch that runs.
    """

    def __init__(self, config: TrainConfig, folder: Path, reporter: Reporter | None = None) -> None:
        """Draw the weights. Writes nothing yet.

        Raises ValueError for a model that cannot be built, DataError for a data set that cannot be used.
        """
        self.config, self.folder, self.reporter = config, folder, reporter or Reporter()
        self.device = config.torch_device()
        self.dataset = data.load(config.data, config.seed, **config.data_options())
        self.batches = Batches(self.dataset, config.batch_size, self.device, config.pad, config.seed, config.flip)
        seed_everything(config.seed)
        self.model = models.create_model(
            config.model, len(self.dataset.classes), self.dataset.channels, config.stem, config.width
        ).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._cosine)
        self.history: list[EpochRecord] = []
        self.epoch = self.step = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._seconds = 0.0
        self._holds_folder = False
        self._random = random_state()

    @classmethod
    def resume(
        cls, path: Path, reporter: Reporter | None = None, device: str | None = None, data_dir: str | None = None
    ) -> Trainer:
        """Go on from a checkpoint, or from `last.pt` of a run folder, in that folder.

        On the same device every later number is the same, bit for bit, as without the stop. device: another one.
        data_dir: where the same images are now.
        Raises CheckpointError if the checkpoint cannot be used or the images are others, DataError as `Trainer` does.
        """
        state = load_checkpoint(path)
        changes = {name: value for name, value in (("device", device), ("data_dir", data_dir)) if value is not None}
        try:
            config = TrainConfig(**{**state["config"], **changes})
            trainer = cls(config, path if path.is_dir() else path.parent, reporter)
            trainer.load_state(state)
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n", 1)[0]
            raise CheckpointError(f"cannot go on from checkpoint {path}: {reason}") from error
        return trainer

    def _cosine(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / (self.config.epochs * self.batches.steps)))

    def state(self) -> dict[str, Any]:
        """All that a resume needs, in types that `torch.load(weights_only=True)` takes."""
        return {
            "config": asdict(self.config),
            "data": self.dataset.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(),
            "history": [asdict(record) for record in self.history],
            "epoch": self.epoch,
            "step": self.step,
            "sums": self._sums,
            "seconds": self._seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. For another one, raises what torch does, or ValueError."""
        if state["data"] != self.dataset.fingerprint:
            raise ValueError(
                f"the data set {self.dataset.name} has changed: its images or labels are not those of the run"
            )
        epoch, step, records = state["epoch"], state["step"], len(state["history"])
        if not (0 <= epoch <= self.config.epochs and 0 <= step <= self.batches.steps and records == epoch):
            raise ValueError(f"no run of these options is in epoch {epoch}, step {step} with {records} records")
        restore_random_state(state["random"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.epoch, self.step = epoch, step
        self._sums.copy_(state["sums"])
        self._seconds = float(state["seconds"])
        self._random = state["random"]
        self._holds_folder = True

    def fit(self) -> list[EpochRecord]:
        """Train to the last epoch, and return one record for each.

        Raises TrainingError if the folder holds another run or the loss is no longer finite, Stopped after SIGINT or
        SIGTERM, and OSError if the folder cannot be written or another process trains into it. The last checkpoint
        stays good for `resume`; after Stopped and OSError, `fit` goes on too.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            with _StopRequest() as stop:
                restore_random_state(self._random)
                self._prepare_folder()
                self._train(stop)
            self._draw()
        return self.history

    def _prepare_folder(self) -> None:
        """Write what the folder of a run holds before its first step, or mend what a resume finds there."""
        last = self.folder / "last.pt"
        if last.exists() and not self._holds_folder:
            raise TrainingError(f"{self.folder} holds a run already: resume that one, or choose another folder")
        self._holds_folder = True
        remove_parts(self.folder)
        for path in (self.folder / "best.pt", last):
            settle_sum(path)
        write_atomically(self.folder / "config.json", (json.dumps(asdict(self.config), indent=2) + "\n").encode())
        self._write_metrics(self.history)
        if not last.exists():
            # From here on a resume works, and a disk that is full is known before any work is done.
            save_checkpoint(self.state(), last)

    def _write_metrics(self, history: list[EpochRecord]) -> None:
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in history)
        write_atomically(self.folder / "metrics.jsonl", lines.encode())

    def _train(self, stop: _StopRequest) -> None:
        """Train to the last epoch, or raise Stopped after the step in which a signal came."""
        self.reporter.started(self)
        try:
            while self.epoch < self.config.epochs:
                self._train_epoch(stop)
                if not stop.signum:
                    self._end_epoch()
                if stop.signum:
                    self._stop(stop.signum)
        finally:
            self.reporter.ended()
            self._random = random_state()

    @property
    def images_per_s(self) -> float:
        """Training speed in the epoch that runs; 0 before its first step."""
        images = min(self.step * self.config.batch_size, len(self.dataset.train_labels))
        return images / self._seconds if self._seconds else 0.0

    def _train_epoch(self, stop: _StopRequest) -> None:
        """Train from the current step to the end of the epoch, or to a stop."""
        self.model.train()
        start = time.perf_counter()
        for images, labels in self.batches.train(self.epoch, self.step):
            self._train_step(images, labels)
            self._seconds += time.perf_counter() - start
            if stop.signum:
                break
            every = self.config.checkpoint_every
            if every and self.step % every == 0 and self.step < self.batches.steps:
                self._check_finite()
                save_checkpoint(self.state(), self.folder / "last.pt")
            start = time.perf_counter()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            self._sums += torch.stack((loss.double() * len(labels), right.double()))
        seen = self.device.type == "cpu" or self.step % _LOOK_EVERY == 0 or self.step == self.batches.steps
        if seen:
            self._check_finite()
        self.reporter.stepped(self, loss.item() if seen else None)

    def _check_finite(self, loss: float | None = None) -> None:
        """Raise TrainingError unless `loss` is finite, or all training losses of the epoch, by their sum."""
        if not math.isfinite(self._sums[0].item() if loss is None else loss):
            raise TrainingError(
                f"the loss is no longer finite (epoch {self.epoch + 1}, step {self.step}): "
                f"try a smaller --lr, it was {self.config.lr:g}"
            )

    def _end_epoch(self) -> None:
        """Test, record, save."""
        start = time.perf_counter()
        test_loss, test_accuracy = self.evaluate()
        self._check_finite(test_loss)  # the last step may have broken the weights after its own loss
        count = len(self.dataset.train_labels)
        train_loss, train_accuracy = (self._sums / count).tolist()
        record = EpochRecord(
            self.epoch + 1,
            train_loss,
            train_accuracy,
            test_loss,
            test_accuracy,
            self.images_per_s,
            self.config.lr * self._cosine(self.epoch * self.batches.steps),
            self._seconds + time.perf_counter() - start,
        )
        best = all(test_accuracy > earlier.test_accuracy for earlier in self.history)
        history = [*self.history, record]
        ended = {
            **self.state(),
            "history": [asdict(record) for record in history],
            "epoch": self.epoch + 1,
            "step": 0,
            "sums": torch.zeros_like(self._sums),
            "seconds": 0.0,
        }
        self._write_metrics(history)
        # best.pt first: if the process dies between the two, the epoch is done again and both are written.
        last = self.folder / "last.pt"
        save_checkpoint(ended, *([self.folder / "best.pt", last] if best else [last]))
        # Only now: if a file cannot be written, `fit` does the epoch's end again.
        self.history, self.epoch, self.step, self._seconds = history, self.epoch + 1, 0, 0.0
        self._sums.zero_()
        self.reporter.epoch_done(record, best)

    def _stop(self, signum: int) -> None:
        self._check_finite()
        save_checkpoint(self.state(), self.folder / "last.pt")
        where = f"after epoch {self.epoch} of {self.config.epochs}"
        if self.step:
            where = f"in epoch {self.epoch + 1} of {self.config.epochs}, after step {self.step} of {self.batches.steps}"
        raise Stopped(signum, self.folder, where)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (a share of 1) over the test set."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in self.batches.test():
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((loss.double(), (logits.argmax(1) == labels).sum().double()))
        loss_sum, right = sums.tolist()
        count = len(self.dataset.test_labels)
        return loss_sum / count, right / count

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """The predicted class of each test image, int64 [N] on the CPU."""
        self.model.eval()
        return torch.cat([self.model(images).argmax(1).cpu() for images, _ in self.batches.test()])

    def _draw(self) -> None:
        from cnnops import viz  # matplotlib takes a second to import

        first = next(m for m in self.model.modules() if isinstance(m, torch.nn.Conv2d))
        viz.save_curves([asdict(record) for record in self.history], self.folder / "curves.png")
        viz.save_filters(first.weight.detach().cpu(), self.folder / "filters.png")
        viz.save_samples(
            self.dataset.test_images,
            self.dataset.test_labels,
            self.predictions(),
            self.dataset.classes,
            self.folder / "samples.png",
        )
