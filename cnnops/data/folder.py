"""A folder of images, with a sub-folder for each class."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnops.data.dataset import DataError, Dataset

log = logging.getLogger("cnnops")

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names that end like this, in either case, are images; other files are skipped and reported."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What such a file may be, whatever its name says. Among Pillow's others is EPS, for which it runs another program."""

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""What the folder beside `train` may be called; the first that is there is taken."""

TEST_SHARE = 0.2
"""Of each class, where the folder has no test images of its own."""

Files = dict[str, list[Path]]
"""The images of each class, sorted."""


def image_folder(folder: str | Path, image_size: int = 32, seed: int = 42) -> Dataset:
    """Images by class: folder/train/CLASS/... and folder/test/CLASS/... (or val), or only folder/CLASS/...

    What has no test folder is split, a fifth of each class for the test, as `seed` decides. Classes are sorted by name; images may
    lie in folders below their class', and links are followed. Each image becomes RGB, upright by its EXIF tag,
    and image_size x image_size: the shorter side is scaled to it, and the middle is kept. All are held in memory.
    Raises DataError for a folder that is missing or has no classes, a class without images, an image that cannot be
    read; ValueError if image_size is below 1.
    """
    folder = Path(folder).expanduser()
    if image_size < 1:
        raise ValueError(f"image_folder: image_size must be at least 1, but got image_size={image_size}")
    skipped: list[Path] = []
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test_folder is not None and train_folder == folder:
        raise DataError(
            f"{test_folder} has no folder train beside it; add it, or rename {test_folder} if it is a class"
        )
    train = _classes(train_folder, skipped)
    if test_folder is not None:
        test = _classes(test_folder, skipped)
        if strange := sorted(set(test) - set(train)):
            raise DataError(f"{test_folder / strange[0]} is a class that {train_folder} has not; move or remove it")
    else:
        train, test = _split(train, train_folder, seed)
    if skipped:
        log.warning("%d files below %s are no images and are left out, such as %s", len(skipped), folder, skipped[0])
    classes = tuple(train)
    return Dataset.of(folder.name, classes, *_read(train, classes, image_size), *_read(test, classes, image_size))


def _classes(folder: Path, skipped: list[Path]) -> Files:
    """The images of each class in `folder`; adds what is none to `skipped`."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder of images {folder}: {error.strerror}") from error
    classes: Files = {}
    for place in inside:
        if place.name.startswith("."):
            continue
        if not place.is_dir():
            skipped.append(place)
            continue
        files = list(_files_below(place, frozenset()))
        classes[place.name] = [file for file in files if file.suffix.lower() in SUFFIXES]
        skipped += [file for file in files if file.suffix.lower() not in SUFFIXES]
        if not classes[place.name]:
            raise DataError(f"the class {place} has no images ({', '.join(SUFFIXES)}); add some or remove it")
    if not classes:
        raise DataError(f"{folder} has no classes: expected a sub-folder of images for each")
    return classes


def _files_below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """The files below `folder`, in order; hidden ones are left out, and folders that are among those `above` them."""
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        inside = [] if here in above else sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder of images {folder}: {error.strerror}") from error
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, above | {here})
        else:
            yield path


def _split(files: Files, folder: Path, seed: int) -> tuple[Files, Files]:
    """Take `TEST_SHARE` of each class, at least one image, for the test."""
    generator = torch.Generator().manual_seed(seed)
    train, test = {}, {}
    for name, paths in files.items():
        if len(paths) < 2:
            raise DataError(
                f"the class {folder / name} has a single image, and the test needs one too; add some or remove it"
            )
        order = torch.randperm(len(paths), generator=generator).tolist()
        count = max(1, round(TEST_SHARE * len(paths)))
        test[name] = [paths[i] for i in sorted(order[:count])]
        train[name] = [paths[i] for i in sorted(order[count:])]
    return train, test


def _read(files: Files, classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, size, size] uint8 and labels [N] int64."""
    labelled = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    images = np.empty((len(labelled), 3, size, size), np.uint8)
    for i, (path, _) in enumerate(labelled):
        images[i] = _pixels(path, size).transpose(2, 0, 1)
    return torch.from_numpy(images), torch.tensor([label for _, label in labelled])


def _pixels(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """One image [size, size, 3]."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("a folder of images needs the package pillow; run: pip install pillow") from None
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"image {path} is no file; remove it")
        with warnings.catch_warnings():
            # Pillow warns of an image too large to be honest, and reads on.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode[0] in "IF":
                    raise DataError(f"image {path} has more than 8 bits in a channel; convert or remove it")
                upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))
    except DataError:
        raise
    except Exception as error:  # each format's decoder raises what it likes
        reason = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)).split("\n")[0]
        raise DataError(f"image {path} cannot be read: {reason}; replace or remove it") from error
