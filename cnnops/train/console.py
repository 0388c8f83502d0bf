"""What a run shows on a console. It needs the package rich, which nothing else in `cnnops.train` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from cnnops.train.progress import Reporter

if TYPE_CHECKING:
    from cnnops.train.trainer import EpochRecord, Trainer

_COLUMNS = (
    ("epoch", 7),
    ("train loss", 12),
    ("train acc", 11),
    ("test loss", 11),
    ("test acc", 10),
    ("images/s", 10),
    ("lr", 9),
    ("time", 8),
)


class ConsoleReporter(Reporter):
    """A table with one line for each epoch; on a terminal, also a live line for the run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._loss = float("nan")

    def started(self, trainer: Trainer) -> None:
        config, dataset = trainer.config, trainer.dataset
        H, W = dataset.train_images.shape[2:]
        parameters = sum(p.numel() for p in trainer.model.parameters())
        line = self._line
        line("model", f"{config.model}, width {config.width:g}, {parameters:,} parameters, on {trainer.device}")
        line(
            "data",
            f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
            f"{dataset.channels} x {H} x {W}",
        )
        line("run", str(trainer.folder))
        if trainer.history or trainer.step:
            line("resume", f"after epoch {trainer.epoch}, step {trainer.step} of the next")
        self.console.print()
        self.console.print("".join(name.rjust(width) for name, width in _COLUMNS), style="bold", soft_wrap=True)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[cyan]epoch {task.fields[epoch]}"),
                BarColumn(bar_width=24),
                TextColumn("step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[speed]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("[cyan]left"),
                console=self.console,
                transient=True,
            )
            steps, done = trainer.batches.steps, trainer.epoch * trainer.batches.steps + trainer.step
            self._task = self._progress.add_task(
                "", total=config.epochs * steps, completed=done, epoch="", step="", loss="", speed=""
            )
            self._progress.start()

    def _line(self, name: str, value: str) -> None:
        text = Text(f"{name:<8}", style="dim")
        text.append(value, style="none")
        self.console.print(text, soft_wrap=True)

    def stepped(self, trainer: Trainer, loss: float | None) -> None:
        if self._progress is None:
            return
        if loss is not None:
            # The mean over about the last 20 steps: single losses jump too much to read.
            self._loss = loss if self._loss != self._loss else 0.95 * self._loss + 0.05 * loss
        epochs, steps = trainer.config.epochs, trainer.batches.steps
        self._progress.update(
            self._task,
            completed=trainer.epoch * steps + trainer.step,
            epoch=f"{trainer.epoch + 1}/{epochs}",
            step=f"{trainer.step}/{steps}",
            loss=f"{self._loss:.3f}",
            speed=f"{trainer.images_per_s:,.0f} images/s",
        )

    def epoch_done(self, record: EpochRecord, best: bool) -> None:
        values = (
            f"{record.epoch}",
            f"{record.train_loss:.4f}",
            f"{100 * record.train_accuracy:.2f} %",
            f"{record.test_loss:.4f}",
            f"{100 * record.test_accuracy:.2f} %",
            f"{record.images_per_s:,.0f}",
            f"{record.lr:.4f}",
            f"{record.seconds:.1f} s",
        )
        text = Text()
        for (name, width), value in zip(_COLUMNS, values, strict=True):
            text.append(value.rjust(width), style="green" if best and name == "test acc" else "none")
        text.append("  best" if best else "", style="green")
        self.console.print(text, soft_wrap=True)

    def ended(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
