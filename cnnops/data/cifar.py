"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"), in both forms.

Every file has a checksum and is verified before it is read. The authors publish MD5 for the archives; the SHA-256 here
are the ones under which Keras, TensorFlow Datasets, Julia's MLDatasets and Ruby's torchvision fetch the same files.
For the unpacked python form only MD5 is in use (torchvision's): it finds damage, and the unpickler of
`cifar_pickle` sees to what is meant to harm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnops.data.cifar_pickle import read_batch
from cnnops.data.dataset import DataError, Dataset
from cnnops.data.published import Published, download, read_archive, read_file

SOURCE = "https://www.cs.toronto.edu/~kriz/"
"""Where the archives are."""

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Form:
    """One of the two forms of a set: the archive, the folder inside it, and that folder's files."""

    archive: Published
    folder: str
    train: tuple[Published, ...]
    test: tuple[Published, ...]
    pickled: bool


@dataclass(frozen=True)
class Cifar:
    """A set. labels: label bytes before each image in the binary form; label_at: ours among them; label_key: in a pickle.

    mean, std: of the training images, as published with torch's CIFAR recipes.
    """

    name: str
    classes: tuple[str, ...]
    labels: int
    label_at: int
    label_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    forms: tuple[Form, ...]


CIFAR10 = Cifar(
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    labels=1,
    label_at=0,
    label_key="labels",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    forms=(
        Form(
            Published(
                "cifar-10-binary.tar.gz",
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                170_052_171,
            ),
            "cifar-10-batches-bin",
            tuple(
                Published(f"data_batch_{i}.bin", f"sha256:{digest}", 30_730_000)
                for i, digest in enumerate(
                    (
                        "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                        "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                        "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                        "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                        "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
                    ),
                    start=1,
                )
            ),
            (
                Published(
                    "test_batch.bin",
                    "sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
                    30_730_000,
                ),
            ),
            pickled=False,
        ),
        Form(
            Published(
                "cifar-10-python.tar.gz",
                "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                170_498_071,
            ),
            "cifar-10-batches-py",
            (
                Published("data_batch_1", "md5:c99cafc152244af753f735de768cd75f"),
                Published("data_batch_2", "md5:d4bba439e000b95fd0a9bffe97cbabec"),
                Published("data_batch_3", "md5:54ebc095f3ab1f0389bbae665268c751"),
                Published("data_batch_4", "md5:634d18415352ddfa80567beed471001a"),
                Published("data_batch_5", "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
            ),
            (Published("test_batch", "md5:40351d587109b95175f43aff81a1287e"),),
            pickled=True,
        ),
    ),
)

_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""

COARSE_CLASSES = tuple(_COARSE.split())
"""The 20 groups of CIFAR-100's classes."""

CIFAR100 = Cifar(
    name="cifar100",
    classes=tuple(_FINE.split()),
    labels=2,
    label_at=1,
    label_key="fine_labels",
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    forms=(
        Form(
            Published(
                "cifar-100-binary.tar.gz",
                "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                168_513_733,
            ),
            "cifar-100-binary",
            (
                Published(
                    "train.bin",
                    "sha256:f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
                    153_700_000,
                ),
            ),
            (
                Published(
                    "test.bin",
                    "sha256:d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
                    30_740_000,
                ),
            ),
            pickled=False,
        ),
        Form(
            Published(
                "cifar-100-python.tar.gz",
                "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                169_001_437,
            ),
            "cifar-100-python",
            (Published("train", "md5:16019d7e3df5f24257cddd939b257f8d"),),
            (Published("test", "md5:f0ef6b0ae62326f3e7ffdfab6717acfc"),),
            pickled=True,
        ),
    ),
)


def cifar10(folder: str | Path = "data") -> Dataset:
    """CIFAR-10: 50,000 images [3, 32, 32] to train on and 10,000 to test, the same number of each of 10 classes.

    folder: holds the set in its binary or its python form, unpacked or as the archive, or is the unpacked folder
    itself; where it holds none, the binary archive (170 MB) is downloaded into it, and stays packed.
    Raises DataError if a file is missing, damaged, not to be trusted, or cannot be downloaded.
    """
    return _read(CIFAR10, Path(folder))


def cifar100(folder: str | Path = "data", coarse: bool = False) -> Dataset:
    """CIFAR-100: 50,000 images [3, 32, 32] to train on and 10,000 to test, the same number of each of 100 classes.

    folder: as for `cifar10` (169 MB). coarse: by `COARSE_CLASSES` instead, 5 classes in each.
    Raises DataError if a file is missing, damaged, not to be trusted, or cannot be downloaded.
    """
    if coarse:
        return _read(replace(CIFAR100, classes=COARSE_CLASSES, label_at=0, label_key="coarse_labels"), Path(folder))
    return _read(CIFAR100, Path(folder))


def _read(cifar: Cifar, folder: Path) -> Dataset:
    form, contents = _find(cifar, folder.expanduser())
    train, test = (_joined(cifar, form, files, contents) for files in (form.train, form.test))
    return Dataset(cifar.name, cifar.classes, *train, *test, cifar.mean, cifar.std)


def _find(cifar: Cifar, folder: Path) -> tuple[Form, dict[str, bytes]]:
    """The form in which the set is there, downloaded if it is in none, and its files' contents by name."""
    for form in cifar.forms:
        files = (*form.train, *form.test)
        for place in (folder, folder / form.folder):
            if any((place / file.name).is_file() for file in files):
                remedy = f"unpack {SOURCE}{form.archive.name} again"
                return form, {file.name: read_file(place / file.name, file, remedy) for file in files}
    for form in cifar.forms:
        if (folder / form.archive.name).is_file():
            return form, _unpacked(form, folder)
    form = cifar.forms[0]
    download(SOURCE + form.archive.name, folder / form.archive.name, form.archive)
    return form, _unpacked(form, folder)


def _unpacked(form: Form, folder: Path) -> dict[str, bytes]:
    members = {f"{form.folder}/{file.name}": file.name for file in (*form.train, *form.test)}
    contents = read_archive(folder / form.archive.name, form.archive, members)
    return {members[name]: content for name, content in contents.items()}


def _joined(cifar: Cifar, form: Form, files: Iterable[Published], contents: dict[str, bytes]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of some files, one after another."""
    pixels, labels = [], []
    for file in files:
        where = f"{form.folder}/{file.name}"
        decoded = _from_pickle if form.pickled else _from_records
        p, y = decoded(cifar, contents[file.name], where)
        if len(y) == 0 or not 0 <= int(y.min()) <= int(y.max()) < len(cifar.classes):
            raise DataError(
                f"{where} is not a batch of CIFAR's: its labels must be from 0 to {len(cifar.classes) - 1}, "
                f"but they are {'none' if len(y) == 0 else f'from {y.min()} to {y.max()}'}"
            )
        pixels.append(p)
        labels.append(y)
    images = torch.from_numpy(np.concatenate(pixels).reshape(-1, 3, 32, 32))
    return images, torch.from_numpy(np.concatenate(labels))


def _from_records(cifar: Cifar, content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The binary form: label bytes, then 1,024 bytes each of red, green and blue, row by row."""
    record = cifar.labels + _PIXELS
    if len(content) % record:
        raise DataError(f"{where} is not a batch of CIFAR's: {len(content)} bytes are no multiple of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, cifar.labels :], records[:, cifar.label_at].astype(np.int64)


def _from_pickle(cifar: Cifar, content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    pixels, labels = read_batch(content, cifar.label_key, where)
    # A number that no int64 holds is no label either.
    return pixels, np.array([label if 0 <= label < 2**31 else -1 for label in labels], np.int64)
