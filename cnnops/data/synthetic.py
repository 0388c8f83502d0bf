"""A data set made of random numbers that a network can learn: no file, any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.data.dataset import Dataset


def synthetic(
    train: int = 2000, test: int = 500, classes: int = 10, channels: int = 3, size: int = 32, seed: int = 42
) -> Dataset:
    """Each class is a smooth random pattern; an image is its class' pattern, shifted by up to size/8, under noise.

    train, test: number of images. size: height and width in pixels. The seed decides every value.
    Raises ValueError for a number below 1.
    """
    for argument, value in (
        ("train", train), ("test", test), ("classes", classes), ("channels", channels), ("size", size)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"synthetic: {argument} must be at least 1, but got {argument}={value}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, channels, 5, 5, generator=generator)
    patterns = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (count,), generator=generator)
        shifts = torch.randint(-(size // 8), size // 8 + 1, (count, 2), generator=generator)
        positions = (torch.arange(size) + shifts[:, :, None]) % size
        rows, columns = positions[:, 0, :, None], positions[:, 1, None, :]
        images = patterns[labels[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        images = images + 0.5 * torch.randn(images.shape, generator=generator)
        return (128 + 48 * images).clamp(0, 255).byte(), labels

    return Dataset.of("synthetic", tuple(str(c) for c in range(classes)), *draw(train), *draw(test))
