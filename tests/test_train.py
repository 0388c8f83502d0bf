"""Training: learning, stopping and going on, and files that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnops import data
from cnnops.files import write_atomically
from cnnops.train import (
    CheckpointError,
    EpochRecord,
    Reporter,
    Stopped,
    TrainConfig,
    Trainer,
    TrainingError,
    checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cnnops.viz import save_samples

RESNET = TrainConfig(model="resnet18", data="synthetic", width=1 / 16, epochs=3, batch_size=16, lr=0.05, device="cpu")
SIMPLE = replace(RESNET, model="simple_cnn", width=1 / 8, lr=0.02)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(seed: int) -> data.Dataset:
        return data.synthetic(train=88, test=40, classes=4, size=32, seed=seed)

    monkeypatch.setitem(data.DATASETS, "synthetic", small)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs do."""
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


class At(Reporter):
    """Does something after one step: (epoch from 0, step from 1)."""

    def __init__(self, epoch: int, step: int, action: Callable[[], None]) -> None:
        self.when, self.action = (epoch, step), action

    def stepped(self, trainer: Trainer, loss: float | None) -> None:
        if (trainer.epoch, trainer.step) == self.when:
            self.action()


def without_times(history: list[EpochRecord]) -> list[EpochRecord]:
    return [replace(record, images_per_s=0.0, seconds=0.0) for record in history]


def assert_equal(a: Any, b: Any, at: str = "state") -> None:
    """Bit for bit, through dicts, lists and tuples."""
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
        assert a.stride() == b.stride(), at
    elif isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            assert_equal(a[key], b[key], f"{at}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{at}[{i}]")
    else:
        assert a == b, at


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("config", "width"), [(RESNET, 1 / 8), (SIMPLE, 1 / 4)])
def test_training_learns(tmp_path: Path, config: TrainConfig, width: float) -> None:
    history = Trainer(replace(config, pad=0, epochs=6, lr=0.05, width=width), tmp_path).fit()
    assert history[-1].train_loss < 0.3 * history[0].train_loss
    assert history[0].test_accuracy < 0.6 < 0.8 < history[-1].test_accuracy


def test_training_fills_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    trainer = Trainer(RESNET, folder)
    history = trainer.fit()
    assert [r.epoch for r in history] == [1, 2, 3]
    assert [round(r.lr, 6) for r in history] == [0.05, 0.0375, 0.0125]
    assert {p.name for p in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "curves.png", "filters.png", "samples.png"),
        *("best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256"),
    }
    assert TrainConfig(**json.loads((folder / "config.json").read_text())) == RESNET
    assert [EpochRecord(**json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()] == history
    best = max(history, key=lambda r: r.test_accuracy)
    assert load_checkpoint(folder / "best.pt")["epoch"] == best.epoch
    assert load_checkpoint(folder)["epoch"] == 3
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    Trainer(replace(SIMPLE, epochs=1), tmp_path).fit()
    for name in ("curves.png", "filters.png", "samples.png"):
        pixels = image.imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 50, name
        assert pixels.std() > 0.02, name


@pytest.mark.filterwarnings("error")
def test_a_class_of_any_name_can_be_drawn(tmp_path: Path) -> None:
    """The name of a folder may be read as a formula, hold what no font has, or be as long as a line."""
    names = ("$\\frac$", "{\\x", "two\nlines", "\udcff\x1b[31m", "x" * 200, "")
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    for predictions in (torch.arange(6), torch.arange(6).flip(0)):
        save_samples(images, torch.arange(6), predictions, names, tmp_path / "samples.png")
        assert (tmp_path / "samples.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_evaluate_counts_what_predictions_say(tmp_path: Path) -> None:
    trainer = Trainer(RESNET, tmp_path)
    loss, accuracy = trainer.evaluate()
    right = (trainer.predictions() == trainer.dataset.test_labels).double().mean().item()
    assert accuracy == pytest.approx(right)
    assert loss > 0


@pytest.mark.usefixtures("no_pictures")
def test_same_seed_same_run(tmp_path: Path) -> None:
    a, b = (Trainer(replace(SIMPLE, epochs=1), tmp_path / name) for name in "ab")
    a.fit(), b.fit()
    assert_equal(a.model.state_dict(), b.model.state_dict())
    c = Trainer(replace(SIMPLE, seed=1), tmp_path / "c")
    assert not torch.equal(next(c.model.parameters()), next(Trainer(SIMPLE, tmp_path / "d").model.parameters()))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("config", "when", "signum"),
    [(RESNET, (1, 2), signal.SIGTERM), (SIMPLE, (0, 1), signal.SIGINT), (SIMPLE, (1, 6), signal.SIGTERM)],
)
def test_resume_is_bit_exact(
    tmp_path: Path, config: TrainConfig, when: tuple[int, int], signum: signal.Signals
) -> None:
    """SIMPLE draws dropout masks; step 6 is an epoch's last, so that only the test and the record are left to do."""
    whole = Trainer(config, tmp_path / "whole")
    whole.fit()
    stopped = Trainer(config, tmp_path / "stopped", At(*when, lambda: signal.raise_signal(signum)))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stop:
        stopped.fit()
    assert stop.value.signum == signum
    assert stop.value.folder == tmp_path / "stopped"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    torch.randn(5), np.random.rand(5), random.random()
    resumed = Trainer.resume(tmp_path / "stopped")
    assert (resumed.epoch, resumed.step) == when
    resumed.fit()
    assert without_times(resumed.history) == without_times(whole.history)
    states = [trainer.state() for trainer in (whole, resumed)]
    for state in states:
        del state["history"]
    assert_equal(*states)


@pytest.mark.usefixtures("no_pictures")
def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(replace(SIMPLE, epochs=1), tmp_path)
    history = trainer.fit()
    before = (tmp_path / "last.pt").read_bytes()
    assert Trainer.resume(tmp_path / "best.pt").fit() == history
    assert (tmp_path / "last.pt").read_bytes() == before


def test_second_interrupt_is_immediate(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(SIMPLE, tmp_path, At(1, 1, twice)).fit()
    assert load_checkpoint(tmp_path)["epoch"] == 1


@pytest.mark.usefixtures("no_pictures")
def test_console_shows_one_line_an_epoch_and_a_live_line_on_a_terminal(tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console")
    from cnnops.train.console import ConsoleReporter

    texts = []
    for terminal in (False, True):
        screen = console.Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
        Trainer(replace(SIMPLE, epochs=2), tmp_path / str(terminal), ConsoleReporter(screen)).fit()
        texts.append(screen.file.getvalue())
    plain, live = texts
    assert [line.split()[0] for line in plain.splitlines() if " % " in line] == ["1", "2"]
    assert "\x1b" not in plain
    assert "step 6/6" not in plain
    assert "step 6/6" in live
    assert "images/s" in live


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = replace(SIMPLE, epochs=1)
    Trainer(config, tmp_path).fit()
    with pytest.raises(TrainingError, match="holds a run already"):
        Trainer(config, tmp_path).fit()


@pytest.mark.parametrize(("broken_after", "seen_at"), [(2, 3), (6, 6)])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, broken_after: int, seen_at: int
) -> None:
    """What breaks in an epoch's last step shows in its test only."""
    trainer = Trainer(SIMPLE, tmp_path)

    def break_weights() -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(torch.nan)

    trainer.reporter = At(1, broken_after, break_weights)
    message = rf"no longer finite \(epoch 2, step {seen_at}\): try a smaller --lr, it was 0.02"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path)["model"].values())


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(SIMPLE, tmp_path)

    def fill_disk() -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    trainer.reporter = At(1, 3, fill_disk)
    with pytest.raises(OSError, match="No space left on device") as error:
        trainer.fit()
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename).parent == tmp_path
    assert load_checkpoint(tmp_path / name)["epoch"] == 1
    assert not list(tmp_path.glob(".*"))


def test_real_limit_on_file_size_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    script = """
import resource, sys, torch
from pathlib import Path
from cnnops.train import save_checkpoint
path = Path(sys.argv[1])
save_checkpoint({"x": torch.zeros(10)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_checkpoint({"x": torch.ones(100_000)}, path)
except OSError as error:
    print(error.filename, error.strerror)
"""
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} File too large\n"
    assert torch.equal(load_checkpoint(path)["x"], torch.zeros(10))
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "last.pt.sha256"}


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_death_between_any_two_writes_leaves_a_checkpoint_that_loads(
    tmp_path: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": 1}, path)
    left = iter(range(writes))

    def dying(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"x": 2}, path)
    assert load_checkpoint(path)["x"] == (2 if writes == 2 else 1)
    monkeypatch.undo()
    save_checkpoint({"x": 3}, path)
    assert load_checkpoint(path)["x"] == 3


def test_write_atomically_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def replace_fails(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_fails)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_checksum_is_sha256sums_format(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": 1}, path)
    checked = subprocess.run(["sha256sum", "-c", "last.pt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout == "last.pt: OK\n"


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_sum(path: Path) -> None:
    path.with_name("last.pt.sha256").unlink()


def not_a_checkpoint(path: Path) -> None:
    torch.save([1, 2], path)
    resum(path)


def unsafe(path: Path) -> None:
    torch.save({"format": 1, "x": os.system}, path)
    resum(path)


def garbage(path: Path) -> None:
    path.write_bytes(b"not a zip file")
    resum(path)


def resum(path: Path) -> None:
    path.with_name("last.pt.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "  last.pt\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "is damaged: its SHA-256 is not the one in last.pt.sha256"),
        (without_sum, "cannot be verified: last.pt.sha256 is not beside it"),
        (Path.unlink, "last.pt does not exist"),
        (not_a_checkpoint, "expected format 1, but got None"),
        (unsafe, "is not a checkpoint that can be read"),
        (garbage, "is not a checkpoint that can be read"),
    ],
)
def test_unusable_checkpoints(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"x": 1}, path)
    harm(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_pictures")
def test_resume_on_another_device_is_checked(tmp_path: Path) -> None:
    Trainer(replace(SIMPLE, epochs=1), tmp_path).fit()
    assert Trainer.resume(tmp_path, device="auto").config.device == "auto"
    with pytest.raises(CheckpointError, match="device must be one that torch sees"):
        Trainer.resume(tmp_path, device="cuda:99")


@pytest.mark.usefixtures("no_pictures")
def test_a_resume_notices_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every data set, because the trainer asks the set itself. A changed grey level of one pixel is enough."""
    Trainer(replace(SIMPLE, epochs=1), tmp_path).fit()
    small = data.DATASETS["synthetic"](seed=42)
    small.test_images[-1, -1, -1, -1] ^= 1
    monkeypatch.setitem(data.DATASETS, "synthetic", lambda seed: small)
    with pytest.raises(CheckpointError, match="the data set synthetic has changed: its images or labels") as error:
        Trainer.resume(tmp_path)
    assert "\n" not in str(error.value)


def test_data_dir_of_a_run_without_one(tmp_path: Path) -> None:
    save_checkpoint(Trainer(SIMPLE, tmp_path).state(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="data_dir must be left out with data=synthetic"):
        Trainer.resume(tmp_path, data_dir="x")


def test_checkpoint_of_another_network_does_not_fit(tmp_path: Path) -> None:
    state = Trainer(SIMPLE, tmp_path).state()
    save_checkpoint({**state, "config": asdict(RESNET)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="cannot go on from checkpoint") as error:
        Trainer.resume(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("model", "alexnet"), ("data", "cifar"), ("stem", "none"), ("epochs", 0), ("batch_size", -1), ("lr", 0.0)),
        *(("lr", float("nan")), ("lr", 1e39), ("weight_decay", -1.0)),
        *(("momentum", 1.0), ("weight_decay", 1e39), ("pad", -1), ("width", 0.0), ("seed", -1)),
        ("checkpoint_every", -1),
        *(("device", "tpu"), ("device", "cuda:99"), ("device", "cuda:x")),
    ],
)
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be .*, but got {re.escape(f'{option}={value!r}')}$"):
        TrainConfig(**{option: value})
