"""What decides a training run. The command line is made of these fields: see `cnnops.cli`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from cnnops.data import DATASETS
from cnnops.models import list_models
from cnnops.models.registry import STEMS


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run; ValueError, naming the option and its value, for one that is out of range."""

    model: str = _option("resnet18", "name of the network: resnet18, resnet34, resnet50 or simple_cnn")
    data: str = _option("mnist-5k", "data set: mnist-5k (5,000 real digits) or synthetic")
    epochs: int = _option(10, "passes over the training set")
    batch_size: int = _option(64, "images in a step")
    lr: float = _option(0.1, "learning rate at the start; it falls along a cosine to zero")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(5e-4, "weight decay of SGD")
    pad: int = _option(4, "border in pixels for the random crop; 0 for no augmentation")
    width: float = _option(1.0, "factor on every channel count of the network")
    stem: str = _option("cifar", "start of the network: cifar (keeps the resolution) or imagenet")
    checkpoint_every: int = _option(0, "steps between checkpoints within an epoch; 0 for one at each epoch's end")
    seed: int = _option(42, "decides weights, order, crops and the split")
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: cuda where torch sees it")

    def __post_init__(self) -> None:
        def check(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {expected}, but got {name}={getattr(self, name)!r}")

        check(self.model in list_models(), "model", f"one of {', '.join(list_models())}")
        check(self.data in DATASETS, "data", f"one of {', '.join(DATASETS)}")
        check(self.stem in STEMS, "stem", f"one of {', '.join(STEMS)}")
        check(self.epochs >= 1, "epochs", "at least 1")
        check(self.batch_size >= 1, "batch_size", "at least 1")
        check(0 < self.lr < math.inf, "lr", "positive and finite")
        check(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        check(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0 and finite")
        check(self.pad >= 0, "pad", "at least 0")
        check(0 < self.width < math.inf, "width", "positive and finite")
        check(self.checkpoint_every >= 0, "checkpoint_every", "at least 0")
        check(0 <= self.seed < 2**63, "seed", "at least 0 and below 2**63")
        kind, _, number = self.device.partition(":")
        known = self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and number.isdecimal())
        check(known, "device", "cpu, cuda, cuda:N or auto")
        if kind == "cuda":
            seen = torch.cuda.device_count()
            check(int(number or 0) < seen, "device", f"one that torch sees (it sees {seen} CUDA devices)")

    def torch_device(self) -> torch.device:
        """The device to train on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)
