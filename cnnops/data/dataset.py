"""What a data set is."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(Exception):
    """A data set is missing or is not what it should be; the message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))  # a file's name may have more


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W] uint8 and labels [N] int64, for training and for the test.

    mean, std: of the training images in each channel, on a scale from 0 to 1; std is at least one grey level.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of classes, images and labels: a run that goes on can tell whether it sees the same ones."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        digest = hashlib.sha256(repr((self.classes, [tuple(tensor.shape) for tensor in tensors])).encode())
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def of(
        cls,
        name: str,
        classes: tuple[str, ...],
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
    ) -> Dataset:
        """Measure mean and standard deviation of the training images, and put all together."""
        # By counting grey levels: exact, and without a copy of the images in floating point.
        levels = torch.arange(256, dtype=torch.float64) / 255
        channels = (train_images[:, c].flatten() for c in range(train_images.shape[1]))
        shares = torch.stack([torch.bincount(c, minlength=256).double() / c.numel() for c in channels])
        mean = (shares * levels).sum(1)
        std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
        return cls(
            name,
            classes,
            train_images,
            train_labels,
            test_images,
            test_labels,
            tuple(mean.tolist()),
            tuple(std.clamp(min=1 / 255).tolist()),
        )
