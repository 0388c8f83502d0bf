"""The options of a run: what each data set wants, what is refused, and how the command line asks for them."""

from __future__ import annotations

import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cnnops import cli, data
from cnnops.train import Reporter, Stopped, TrainConfig, Trainer


@pytest.mark.parametrize(
    ("name", "epochs", "flip", "smoothing"),
    [
        ("mnist-5k", 10, False, 0.0),
        ("cifar10", 20, True, 0.1),
        ("cifar100", 20, True, 0.1),
        ("synthetic", 10, False, 0.0),
    ],
)
def test_each_data_set_has_its_defaults(name: str, epochs: int, flip: bool, smoothing: float) -> None:
    config = TrainConfig(data=name)
    assert (config.epochs, config.flip, config.label_smoothing, config.pad) == (epochs, flip, smoothing, 4)
    given = TrainConfig(data=name, epochs=3, flip=not flip, label_smoothing=0.25)
    assert (given.epochs, given.flip, given.label_smoothing) == (3, not flip, 0.25)
    assert TrainConfig(**asdict(given)) == given


def test_data_dir_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/one")
    assert TrainConfig(data="cifar10").data_options() == {"data_dir": str(tmp_path / "data")}
    assert TrainConfig(data="cifar10", data_dir="~/data").data_dir == "/home/one/data"
    options = TrainConfig(data="folder", data_dir="x").data_options()
    assert options == {"data_dir": str(tmp_path / "x"), "image_size": 32}
    assert TrainConfig().data_options() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "x"}, "data_dir must be left out with data=mnist-5k, but got data_dir='x'"),
        ({"data": "cifar10", "image_size": 64}, "image_size must be left out with data=cifar10, but got image_size=64"),
        ({"data": "folder"}, "data_dir must be a folder with a sub-folder for each class, but got data_dir=None"),
        ({"data": "folder", "data_dir": "x", "image_size": 0}, "image_size must be at least 1, but got image_size=0"),
        (
            {"data": "folder", "data_dir": "x", "image_size": 64, "model": "simple_cnn"},
            "image_size must be 32 with model=simple_cnn, but got image_size=64",
        ),
        (
            {"data": "folder", "data_dir": "x", "image_size": 7, "model": "vgg_style"},
            "image_size must be at least 8 with model=vgg_style, but got image_size=7",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, but got label_smoothing=1.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be .* label_smoothing=nan"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**options)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        data.DATASETS, "synthetic", lambda seed: data.synthetic(train=64, test=20, classes=4, seed=seed)
    )
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize(("options", "flip"), [(["--flip"], True), (["--no-flip"], False), ([], False)])
def test_flip_on_the_command_line(options: list[str], flip: bool, tmp_path: Path) -> None:
    run = ["train", "--data", "synthetic", "--model", "simple_cnn", "--width", "0.125", "--epochs", "1", "--lr", "0.01"]
    assert cli.main([*run, *options, "--out", str(tmp_path / "run")]) == 0
    resumed = Trainer.resume(tmp_path / "run")
    assert (resumed.config.flip, resumed.batches.flip) == (flip, flip)


@pytest.mark.usefixtures("small_data")
def test_label_smoothing_is_in_the_training_loss_and_not_in_the_test(tmp_path: Path) -> None:
    config = TrainConfig(data="synthetic", model="resnet18", width=1 / 16, epochs=1, lr=1e-9, device="cpu", pad=0)
    for smoothing in (0.0, 0.3):
        trainer = Trainer(replace(config, label_smoothing=smoothing), tmp_path / str(smoothing))
        ((images, labels),) = trainer.batches.train(0)
        with torch.no_grad():
            expected = F.cross_entropy(trainer.model.train()(images), labels, label_smoothing=smoothing).item()
        (record,) = trainer.fit()
        assert record.train_loss == pytest.approx(expected, rel=1e-5)
        ((images, labels),) = trainer.batches.test()
        with torch.no_grad():
            plain = F.cross_entropy(trainer.model.eval()(images), labels).item()
        assert record.test_loss == pytest.approx(plain, rel=1e-5)


class StopAt(Reporter):
    """Asks the run to end after one step: (epoch from 0, step from 1)."""

    def __init__(self, epoch: int, step: int) -> None:
        self.when = (epoch, step)

    def stepped(self, trainer: Trainer, loss: float | None) -> None:
        if (trainer.epoch, trainer.step) == self.when:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("small_data")
def test_resume_is_bit_exact_with_every_augmentation(tmp_path: Path) -> None:
    config = TrainConfig(data="synthetic", model="simple_cnn", width=0.125, epochs=2, batch_size=16, lr=0.02)
    config = replace(config, flip=True, label_smoothing=0.1, device="cpu")
    whole = Trainer(config, tmp_path / "whole")
    whole.fit()
    with pytest.raises(Stopped):
        Trainer(config, tmp_path / "stopped", StopAt(1, 2)).fit()
    resumed = Trainer.resume(tmp_path / "stopped")
    assert (resumed.epoch, resumed.step) == (1, 2)
    resumed.fit()
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole.history[-1].train_loss == resumed.history[-1].train_loss
