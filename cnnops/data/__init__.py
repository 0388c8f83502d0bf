"""Image sets, checked before use, and whole batches of them on the device."""

from collections.abc import Callable

from cnnops.data.batches import Batches
from cnnops.data.dataset import DataError, Dataset
from cnnops.data.mnist import embedded_mnist
from cnnops.data.synthetic import synthetic

DATASETS: dict[str, Callable[..., Dataset]] = {"mnist-5k": embedded_mnist, "synthetic": synthetic}
"""What `load` knows: a name, and the function that takes a seed and returns the set."""


def load(name: str, seed: int = 42) -> Dataset:
    """The data set of a name in `DATASETS`; ValueError for another, DataError if it is missing or damaged."""
    if name not in DATASETS:
        raise ValueError(f"data: unknown data set {name!r}; the data sets are {', '.join(DATASETS)}")
    return DATASETS[name](seed=seed)


__all__ = ["DATASETS", "Batches", "DataError", "Dataset", "embedded_mnist", "load", "synthetic"]
