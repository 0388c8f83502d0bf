"""Any torch Dataset of images and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cnnops.data.dataset import DataError, Dataset


def from_torch(
    train: TorchDataset[Any], test: TorchDataset[Any], classes: Sequence[str] | None = None, name: str = "torch"
) -> Dataset:
    """The images of two torch datasets (map-style or iterable, of any package), taken into memory as uint8.

    An item is (image, label). image: uint8, or floating from 0 to 1; a tensor [C, H, W] or [H, W], an array [H, W, C]
    or [H, W], or a PIL image; all of one size. Leave random transforms and normalisation out: both happen on the device.
    label: a whole number from 0. classes: their names; by default `train.classes`, or the numbers.
    To train on it by name: ``cnnops.data.DATASETS["mine"] = lambda seed: from_torch(train, test)``.
    Raises DataError, naming the item, for one that is not like this.
    """
    images, labels = _items(train, "train")
    test_images, test_labels = _items(test, "test")
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"test images are of {list(test_images.shape[1:])}, but training images of {list(images.shape[1:])}; "
            "bring them to one size"
        )
    highest = int(torch.cat([labels, test_labels]).max())
    names = classes if classes is not None else getattr(train, "classes", [str(c) for c in range(highest + 1)])
    if highest >= len(names):
        raise DataError(f"a label is {highest}, but there are only {len(names)} classes; name them all in `classes`")
    return Dataset.of(name, tuple(map(str, names)), images, labels, test_images, test_labels)


def _items(dataset: TorchDataset[Any], part: str) -> tuple[Tensor, Tensor]:
    """All images [N, C, H, W] uint8 and labels [N] int64."""
    images: list[Tensor] = []
    labels: list[int] = []
    for i, item in enumerate(_in_order(dataset)):
        where = f"item {i} of the {part} set"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} is of {type(item).__name__}; expected a pair of image and label")
        image = _uint8(item[0], where)
        if images and image.shape != images[0].shape:
            raise DataError(f"{where} is of {list(image.shape)}, but the first of {list(images[0].shape)}; resize them")
        images.append(image)
        labels.append(_label(item[1], where))
    if not images:
        raise DataError(f"the {part} set is empty")
    return torch.stack(images), torch.tensor(labels)


def _in_order(dataset: Any) -> Iterator[Any]:
    # A map-style dataset need not raise IndexError at its end, so that iterating over it might never stop.
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def _label(label: Any, where: str) -> int:
    try:
        value = label.item() if isinstance(label, (Tensor, np.generic)) else label
        if isinstance(value, int) and value >= 0:
            return value
    except RuntimeError:  # a tensor of several values
        pass
    raise DataError(f"{where} has the label {label!r}; expected a whole number from 0")


def _uint8(image: Any, where: str) -> Tensor:
    """An image in any of the forms that `from_torch` takes, as uint8 [C, H, W]."""
    if hasattr(image, "getbands"):  # PIL, which need not be there
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image.copy())
        image = image.permute(2, 0, 1) if image.dim() == 3 else image
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        kind = f"shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise DataError(
            f"{where} has an image of {kind}; expected a tensor, an array or a PIL image of 2 or 3 dimensions"
        )
    image = image if image.dim() == 3 else image[None]
    if image.dtype == torch.uint8:
        return image
    if image.is_floating_point() and bool(((image >= 0) & (image <= 1)).all()):
        return (image * 255).round().to(torch.uint8)
    raise DataError(
        f"{where} has an image of {image.dtype} from {image.min().item():g} to {image.max().item():g}; "
        "expected uint8, or floating values from 0 to 1: leave normalisation out"
    )
