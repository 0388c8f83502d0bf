"""What decides a training run. The command line is made of these fields: see `cnnops.cli`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnnops.data import DATASETS
from cnnops.models import list_models
from cnnops.models.registry import STEMS


def _option(default: Any, help: str, shown: str = "") -> Any:
    """shown: how --help puts a default that depends on the data set."""
    return field(default=default, metadata={"help": help, "shown": shown or str(default)})


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True)
class _Recipe:
    """What a data set has for the options that are not given."""

    epochs: int = 10
    flip: bool = False
    label_smoothing: float = 0.0
    data_dir: str | None = None
    image_size: int | None = None


# A mirrored digit is another sign. Label smoothing as in Szegedy et al. 2015 (arXiv:1512.00567, section 7).
_CIFAR = _Recipe(epochs=20, flip=True, label_smoothing=0.1, data_dir="data")
_RECIPES = {"cifar10": _CIFAR, "cifar100": _CIFAR, "folder": _Recipe(flip=True, image_size=32)}
_READS = {"cifar10": ("data_dir",), "cifar100": ("data_dir",), "folder": ("data_dir", "image_size")}
# A linear layer of the first counts on its size; the second halves the resolution three times.
_SIZES = {"simple_cnn": (32, 32), "vgg_style": (8, math.inf)}
# What a float32 weight can be multiplied by.
_MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run; ValueError, naming the option and its value, for one that is out of range.

    What is None is filled in as the data set wants it, and data_dir is made absolute: a run can be resumed from any
    folder, and under other defaults.
    """

    model: str = _option("resnet18", f"name of the network: {_either(list_models())}")
    data: str = _option(
        "mnist-5k",
        f"data set: {_either(DATASETS)}; mnist-5k has 5,000 real digits, folder takes images of yours",
    )
    data_dir: str | None = _option(
        None,
        "where CIFAR is, and is downloaded to if it is not there; or a folder of images: DIR/CLASS/*, "
        "or DIR/train/CLASS/* and DIR/test/CLASS/*",
        "cifar: data; folder: none",
    )
    image_size: int | None = _option(None, "height and width to which images of a folder are brought", "32")
    epochs: int = _option(None, "passes over the training set", "10; cifar: 20")
    batch_size: int = _option(64, "images in a step")
    lr: float = _option(0.1, "learning rate at the start; it falls along a cosine to zero")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(5e-4, "weight decay of SGD")
    pad: int = _option(4, "border in pixels for the random crop; 0 for none")
    flip: bool = _option(None, "mirror half of the training images, at random", "cifar and folder: yes; else no")
    label_smoothing: float = _option(
        None, "share of each training target that is spread over all classes", "0; cifar: 0.1"
    )
    width: float = _option(1.0, "factor on every channel count of the network")
    stem: str = _option(
        "cifar", "start of the network: cifar keeps the resolution; imagenet, for a ResNet, quarters it"
    )
    checkpoint_every: int = _option(0, "steps between checkpoints within an epoch; 0 for one at each epoch's end")
    seed: int = _option(42, "decides weights, order, crops and the split")
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: cuda where torch sees it")

    def __post_init__(self) -> None:
        def check(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {expected}, but got {name}={getattr(self, name)!r}")

        check(self.model in list_models(), "model", f"one of {', '.join(list_models())}")
        check(self.data in DATASETS, "data", f"one of {', '.join(DATASETS)}")
        for name, value in asdict(_RECIPES.get(self.data, _Recipe())).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        reads = _READS.get(self.data, ())
        for name in ("data_dir", "image_size"):
            check(name in reads or getattr(self, name) is None, name, f"left out with data={self.data}")
        if "data_dir" in reads:
            check(bool(self.data_dir), "data_dir", "a folder with a sub-folder for each class")
            object.__setattr__(self, "data_dir", str(Path(self.data_dir or "").expanduser().absolute()))
        check(self.image_size is None or self.image_size >= 1, "image_size", "at least 1")
        least, most = _SIZES.get(self.model, (1, math.inf))
        fits = self.image_size is None or least <= self.image_size <= most
        check(fits, "image_size", f"{'' if least == most else 'at least '}{least} with model={self.model}")
        check(self.stem in STEMS, "stem", f"one of {', '.join(STEMS)}")
        check(self.epochs >= 1, "epochs", "at least 1")
        check(self.batch_size >= 1, "batch_size", "at least 1")
        check(0 < self.lr <= _MOST, "lr", "positive and finite in float32")
        check(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        check(0 <= self.weight_decay <= _MOST, "weight_decay", "at least 0 and finite in float32")
        check(self.pad >= 0, "pad", "at least 0")
        check(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")
        check(0 < self.width < math.inf, "width", "positive and finite")
        check(self.checkpoint_every >= 0, "checkpoint_every", "at least 0")
        check(0 <= self.seed < 2**63, "seed", "at least 0 and below 2**63")
        kind, _, number = self.device.partition(":")
        known = self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and number.isdecimal())
        check(known, "device", "cpu, cuda, cuda:N or auto")
        if kind == "cuda":
            seen = torch.cuda.device_count()
            check(int(number or 0) < seen, "device", f"one that torch sees (it sees {seen} CUDA devices)")

    def data_options(self) -> dict[str, Any]:
        """What `data.load` takes beside name and seed."""
        return {name: getattr(self, name) for name in _READS.get(self.data, ())}

    def torch_device(self) -> torch.device:
        """The device to train on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)
