"""Any torch Dataset, in the forms that an image and a label come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from cnnops import data
from cnnops.data import DataError, from_torch
from cnnops.train import TrainConfig, Trainer

IMAGES = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


class Items(TorchDataset[Any]):
    """Map-style, and without an end of its own."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]

    def __len__(self) -> int:
        return len(self.items)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(IMAGES, LABELS, strict=True))


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def as_pil(image: torch.Tensor) -> Any:
    return Image.fromarray(as_array(image))


@pytest.mark.parametrize(
    "form",
    [
        lambda image: image,
        lambda image: image.float() / 255,
        lambda image: image.double() / 255,
        as_array,
        lambda image: as_array(image).astype(np.float32) / 255,
        lambda image: as_array(image)[::-1][::-1],
        as_pil,
        lambda image: as_pil(image).convert("RGBA"),
    ],
)
@pytest.mark.parametrize("label", [int, torch.tensor, np.int64])
def test_forms_of_an_item(form: Any, label: Any) -> None:
    items = Items(*[(form(image), label(int(y))) for image, y in zip(IMAGES, LABELS, strict=True)])
    found = from_torch(items, items)
    assert torch.equal(found.train_images, IMAGES)
    assert torch.equal(found.test_labels, LABELS)
    assert found.train_images.dtype == torch.uint8
    assert found.classes == ("0", "1", "2")


def test_grey_images_have_one_channel() -> None:
    grey = IMAGES[:, 0]
    for form in (lambda t: t, lambda t: t.numpy(), lambda t: Image.fromarray(t.numpy())):
        items = Items(*[(form(image), 0) for image in grey])
        assert torch.equal(from_torch(items, items).train_images, grey[:, None])


def test_streams_and_tensor_datasets() -> None:
    found = from_torch(Stream(), TensorDataset(IMAGES, LABELS), classes=["a", "b", "c", "d"], name="mine")
    assert (found.name, found.classes) == ("mine", ("a", "b", "c", "d"))
    assert torch.equal(found.train_images, found.test_images)


def test_classes_of_the_dataset() -> None:
    items = Items((IMAGES[0], 1))
    items.classes = ["cat", "dog"]
    assert from_torch(items, items).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the train set is empty"),
        ([IMAGES[0]], "item 0 of the train set is of Tensor; expected a pair of image and label"),
        (
            [(IMAGES[0], 0), (IMAGES[0, :, 1:], 0)],
            r"item 1 of the train set is of \[3, 3, 5\], but the first of \[3, 4",
        ),
        ([(IMAGES[0].float(), 0)], "torch.float32 from 1 to 255; expected uint8, or floating values from 0 to 1"),
        ([(IMAGES[0].float() / 255 - 0.5, 0)], "leave normalisation out"),
        ([(torch.full((1, 2, 2), torch.nan), 0)], "torch.float32 from nan to nan"),
        ([(IMAGES[0].long(), 0)], "an image of torch.int64"),
        ([(torch.tensor([]), 0)], r"an image of shape \[0\]"),
        ([("file.png", 0)], "an image of str"),
        ([(IMAGES[0], -1)], "the label -1; expected a whole number from 0"),
        ([(IMAGES[0], 0.5)], "the label 0.5"),
        ([(IMAGES[0], "cat")], "the label 'cat'"),
        ([(IMAGES[0], torch.tensor([0, 1]))], r"the label tensor\(\[0, 1\]\)"),
        ([(IMAGES[0], 3)], "a label is 3, but there are only 3 classes"),
        ([(IMAGES[0, :, :2], 0)], r"test images are of \[3, 4, 5\], but training images of \[3, 2, 5\]"),
    ],
)
def test_bad_items(items: list[Any], message: str) -> None:
    good = Items((IMAGES[0], 0))
    with pytest.raises(DataError, match=message) as error:
        from_torch(Items(*items), good, classes=["a", "b", "c"])
    assert "\n" not in str(error.value)


def test_training_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    mine = TensorDataset(images, torch.arange(20) % 2)
    monkeypatch.setitem(data.DATASETS, "mine", lambda seed: from_torch(mine, mine))
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)
    config = TrainConfig(data="mine", model="simple_cnn", width=0.125, epochs=1, flip=True, device="cpu", lr=0.01)
    Trainer(config, tmp_path).fit()
    assert Trainer.resume(tmp_path).config == config
