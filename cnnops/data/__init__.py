"""Image sets, checked before use, and whole batches of them on the device."""

from collections.abc import Callable
from typing import Any

from cnnops.data.batches import Batches
from cnnops.data.cifar import cifar10, cifar100
from cnnops.data.dataset import DataError, Dataset
from cnnops.data.folder import image_folder
from cnnops.data.from_torch import from_torch
from cnnops.data.mnist import embedded_mnist
from cnnops.data.synthetic import synthetic

DATASETS: dict[str, Callable[..., Dataset]] = {
    "mnist-5k": embedded_mnist,
    "cifar10": lambda seed, data_dir: cifar10(data_dir),
    "cifar100": lambda seed, data_dir: cifar100(data_dir),
    "folder": lambda seed, data_dir, image_size: image_folder(data_dir, image_size, seed),
    "synthetic": synthetic,
}
"""What `load` knows: a name, and the function that takes a seed, and what else it needs, and returns the set."""


def load(name: str, seed: int = 42, **options: Any) -> Dataset:
    """The data set of a name in `DATASETS`; ValueError for another, DataError if it is missing or damaged.

    options: data_dir for cifar10, cifar100 and folder, and image_size for folder.
    """
    if name not in DATASETS:
        raise ValueError(f"data: unknown data set {name!r}; the data sets are {', '.join(DATASETS)}")
    return DATASETS[name](seed=seed, **options)


__all__ = [
    "DATASETS",
    "Batches",
    "DataError",
    "Dataset",
    "cifar10",
    "cifar100",
    "embedded_mnist",
    "from_torch",
    "image_folder",
    "load",
    "synthetic",
]
