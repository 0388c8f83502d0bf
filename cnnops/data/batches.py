"""Whole uint8 batches on the device: cut, shifted and normalised there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.data.dataset import Dataset


class Batches:
    """The batches of a data set, kept on `device` as uint8.

    The order and the crops of an epoch depend on `seed` and the epoch's number only, and are drawn on the CPU: a run
    can go on from any step of any epoch without a generator's state, and sees the same images on every device.
    pad: training images are cropped at random from ones with this border of zeros; 0 leaves them as they are.
    flip: half of them, at random, are mirrored left to right.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        device: torch.device | str = "cpu",
        pad: int = 4,
        seed: int = 42,
        flip: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, but got batch_size={batch_size}")
        self.dataset, self.batch_size, self.pad, self.seed, self.flip = dataset, batch_size, pad, seed, flip
        self.device = torch.device(device)
        self._train_images = F.pad(dataset.train_images, (pad, pad, pad, pad)).to(self.device)
        self._train_labels = dataset.train_labels.to(self.device)
        self._test_images = dataset.test_images.to(self.device)
        self._test_labels = dataset.test_labels.to(self.device)
        # float32(x/255 - mean)/std as one multiplication and one addition
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (dataset.mean, dataset.std))
        self._scale = (1 / (255 * std)).float().to(self.device)[:, None, None]
        self._shift = (-mean / std).float().to(self.device)[:, None, None]

    @property
    def steps(self) -> int:
        """Batches in one epoch; the last may be smaller."""
        return -(-len(self._train_labels) // self.batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `start` on: images [B, C, H, W] float32 channels_last, labels [B] int64."""
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(mixed)
        count = len(self._train_labels)
        order = torch.randperm(count, generator=generator).to(self.device)
        corners = torch.randint(2 * self.pad + 1, (count, 2), generator=generator).to(self.device)
        # Drawn last, so that order and crops are the same with it and without.
        mirrored = torch.rand(count, generator=generator).lt(0.5).to(self.device) if self.flip else None
        for step in range(start, self.steps):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            mirror = None if mirrored is None else mirrored[chosen]
            yield self.normalised(self.crop(chosen, corners[chosen], mirror)), self._train_labels[chosen]

    def crop(self, chosen: Tensor, corners: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Images number `chosen` [B], each from its upper left corner [B, 2] in the padded one: uint8 [B, C, H, W].

        mirrored: which of them [B] are read from right to left.
        """
        H, W = self.dataset.train_images.shape[2:]
        rows = corners[:, 0, None] + torch.arange(H, device=self.device)
        across = torch.arange(W, device=self.device).expand(len(chosen), W)
        if mirrored is not None:
            across = torch.where(mirrored[:, None], W - 1 - across, across)
        columns = corners[:, 1, None] + across
        # Indices on both sides of a slice bring its dimension to the end: the result is channels_last as it comes.
        nhwc = self._train_images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return nhwc.permute(0, 3, 1, 2)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 of mean 0 and variance 1 over the training set, channels_last."""
        return torch.addcmul(self._shift, images.to(torch.float32, memory_format=torch.channels_last), self._scale)

    def test(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order: images [B, C, H, W] float32 channels_last, labels [B] int64."""
        for images, labels in zip(
            self._test_images.split(batch_size), self._test_labels.split(batch_size), strict=True
        ):
            yield self.normalised(images), labels
