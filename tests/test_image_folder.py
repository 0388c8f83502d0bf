"""A folder of images by class: what is found, how it is split and scaled, and what is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image as PIL
import pytest
import torch

from cnnops import cli
from cnnops.data import DataError, image_folder

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def draw(path: Path, colour: tuple[int, ...] | int = RED, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two levels: three red training images and two green ones, one of each for the test."""
    root = tmp_path / "images"
    for i in range(3):
        draw(root / "train" / "red" / f"{i}.png")
    for i in range(2):
        draw(root / "train" / "green" / f"{i}.PNG", GREEN)
    draw(root / "test" / "red" / "x.png")
    draw(root / "test" / "green" / "deeper" / "y.png", GREEN)
    return root


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_two_levels(folder: Path, test: str) -> None:
    (folder / "test").rename(folder / test)
    found = image_folder(folder, image_size=8)
    assert found.name == "images"
    assert found.classes == ("green", "red")
    assert found.train_images.shape == (5, 3, 8, 8)
    assert (found.train_images.dtype, found.train_labels.dtype) == (torch.uint8, torch.int64)
    assert found.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 1]
    colours = torch.tensor([GREEN, RED])
    assert torch.equal(found.train_images[:, :, 3, 3], colours[found.train_labels].byte())
    assert torch.equal(found.test_images[:, :, 0, 7], colours[found.test_labels].byte())
    assert found.mean == pytest.approx((0.6, 0.4, 0.0))
    assert found.std == pytest.approx((0.24**0.5, 0.24**0.5, 1 / 255))


def test_one_level_is_split_by_the_seed(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 2), ("c", 13)):
        for i in range(count):
            draw(tmp_path / name / f"{i}.bmp", (ord(name), i, 0))
    found = image_folder(tmp_path, image_size=2)
    assert found.train_labels.bincount().tolist() == [8, 1, 10]
    assert found.test_labels.bincount().tolist() == [2, 1, 3]

    def pixels(seed: int) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        d = image_folder(tmp_path, image_size=2, seed=seed)
        train, test = ({tuple(image[:, 0, 0].tolist()) for image in x} for x in (d.train_images, d.test_images))
        return train, test

    train, test = pixels(42)
    assert not train & test
    assert len(train | test) == 25
    assert pixels(42) == (train, test)
    assert pixels(7) != (train, test)


def test_a_train_folder_alone_is_split(folder: Path) -> None:
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "test").rmdir()
    found = image_folder(folder)
    assert found.classes == ("green", "red")
    assert found.test_labels.tolist() == [0, 1]


def test_the_middle_is_kept_upright_in_rgb(folder: Path) -> None:
    """A wide image: red on the left, green in the middle, blue on the right."""
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10], pixels[:, 10:20], pixels[:, 20:] = RED, GREEN, BLUE
    wide = PIL.fromarray(pixels)
    wide.save(folder / "test" / "red" / "x.png")
    for name, image in (("grey", PIL.new("L", (9, 9), 70)), ("palette", wide.convert("P"))):
        image.save(folder / "test" / "red" / f"{name}.png")
    PIL.new("RGBA", (4, 4), (*BLUE, 0)).save(folder / "test" / "red" / "transparent.png")
    turned = PIL.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise, so that the stored left is the top
    PIL.fromarray(pixels[:10, :20]).save(folder / "test" / "red" / "turned.png", exif=turned)
    found = image_folder(folder, image_size=10)
    grey, palette, transparent, upright, x = found.test_images[found.test_labels == 1].float()
    assert torch.equal(x, torch.tensor(GREEN).float()[:, None, None].expand(3, 10, 10))
    assert torch.equal(palette, x)
    assert torch.equal(grey, torch.full((3, 10, 10), 70.0))
    assert transparent[:, 5, 5].tolist() == list(BLUE)
    assert upright[:, 1, 5].tolist() == list(RED)
    assert upright[:, 8, 5].tolist() == list(GREEN)


def test_what_is_no_image_is_skipped_and_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train" / "red" / "notes.txt").write_text("x")
    (folder / "test" / "README").write_text("x")
    (folder / "train" / "red" / ".DS_Store").write_text("x")
    (folder / "train" / ".cache").mkdir()
    with caplog.at_level(logging.WARNING):
        found = image_folder(folder)
    assert found.classes == ("green", "red")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"2 files below {folder} are no images and are left out, such as ")
    assert message.endswith("notes.txt")


def test_links_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "far.png", BLUE)
    (folder / "train" / "red" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "red" / "file.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "train" / "red" / "loop").symlink_to(folder / "train")
    (folder / "train" / "red" / "itself").symlink_to(folder / "train" / "red")
    found = image_folder(folder)
    blue = (found.train_images[:, :, 0, 0] == torch.tensor(BLUE)).all(1)
    assert int(blue.sum()) == 2


def broken(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:40])
    return path


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def claiming(pixels: int, path: Path) -> Path:
    """A header that claims pixels x pixels."""
    content = path.read_bytes()
    header = content[12:16] + pixels.to_bytes(4, "big") * 2 + content[24:29]
    path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])
    return path


def text(path: Path) -> Path:
    path.write_text("no image")
    return path


def deep(path: Path) -> Path:
    return draw(path, 300, mode="I;16")


def dangling(path: Path) -> Path:
    path.unlink()
    path.symlink_to("nowhere")
    return path


@pytest.mark.parametrize("harm", [broken, flipped, text, deep, dangling])
def test_images_that_cannot_be_read_are_named(folder: Path, harm: Callable[[Path], Path]) -> None:
    path = harm(folder / "train" / "red" / "1.png")
    with pytest.raises(DataError, match=f"image {path} .*(replace|convert) or remove it$") as error:
        image_folder(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(folder: Path) -> None:
    """A folder is looked into whatever its name; a pipe or a device would be read without end."""
    draw(folder / "train" / "red" / "folder.png" / "4.png")
    assert len(image_folder(folder).train_labels) == 6
    path = folder / "train" / "red" / "pipe.png"
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        put(path)
        with pytest.raises(DataError, match=f"image {path} is no file; remove it"):
            image_folder(folder)
        path.unlink()


def test_no_program_is_run_for_an_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, which is a program in a language of its own."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    path = folder / "train" / "red" / "1.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(DataError, match=f"image {path} cannot be read: cannot identify"):
        image_folder(folder)
    with contextlib.suppress(OSError), PIL.open(path) as image:
        image.load()
    assert (tmp_path / "ran").exists()  # by Pillow left to itself, so that the test shows something
    (tmp_path / "ran").unlink()
    with pytest.raises(DataError):
        image_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_modes_of_other_uses(folder: Path) -> None:
    """CMYK of printers, a GIF that moves (its first picture), one bit, and grey with alpha."""
    test = folder / "test" / "red"
    (test / "x.png").unlink()
    PIL.new("CMYK", (8, 8), (0, 255, 255, 0)).save(test / "a.tif")
    PIL.new("RGB", (8, 8), RED).save(test / "b.gif", save_all=True, append_images=[PIL.new("RGB", (8, 8), BLUE)])
    PIL.new("1", (8, 8), 1).save(test / "c.png")
    PIL.new("LA", (8, 8), (70, 0)).save(test / "d.png")
    found = image_folder(folder, image_size=4)
    colours = found.test_images[found.test_labels == 1][:, :, 2, 2]
    assert colours.tolist() == [[255, 0, 0], [255, 0, 0], [255, 255, 255], [70, 70, 70]]


def test_any_name_makes_one_line(folder: Path) -> None:
    (folder / "train" / "red" / "two\nlines.png").touch()
    with pytest.raises(DataError) as error:
        image_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pixels", [11_000, 50_000])
def test_an_image_too_large_to_be_honest_is_not_read(folder: Path, pixels: int) -> None:
    """Pillow itself only warns of the smaller one."""
    path = claiming(pixels, folder / "train" / "red" / "1.png")
    with pytest.raises(DataError, match=f"image {path} cannot be read: .* bomb .*; replace or remove it$"):
        image_folder(folder)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    def assert_refused(place: Path, message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            image_folder(place)
        assert "\n" not in str(error.value)

    assert_refused(tmp_path / "absent", "cannot read the folder of images .*absent: No such file or directory")
    assert_refused(folder / "test" / "red", "red has no classes: expected a sub-folder of images for each")
    draw(tmp_path / "one" / "a" / "x.png")
    assert_refused(tmp_path / "one", "the class .*a has a single image, and the test needs one too")
    draw(tmp_path / "half" / "val" / "a" / "x.png")
    assert_refused(tmp_path / "half", "half/val has no folder train beside it; add it, or rename .* if it is a class")
    draw(folder / "test" / "pink" / "x.png")
    assert_refused(folder, "test/pink is a class that .*train has not")
    (folder / "train" / "pink").mkdir()
    assert_refused(folder, "the class .*train/pink has no images .*; add some or remove it")
    with pytest.raises(ValueError, match="image_size must be at least 1, but got image_size=0"):
        image_folder(folder, image_size=0)


def test_missing_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        image_folder(folder)


def test_train_on_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "resnet18", "--width", "0.0625", "--epochs", "1", "--batch-size", "5", "--device", "cpu"]
    run = ["train", "--data", "folder", "--data-dir", str(folder), "--image-size", "16", *options]
    assert cli.main([*run, "--out", str(tmp_path / "run")]) == 0
    assert "images: 5 training and 2 test images, 3 x 16 x 16" in capsys.readouterr().out


def test_a_resume_finds_a_folder_that_moved_and_notices_one_that_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    options = ["--model", "resnet18", "--width", "0.0625", "--epochs", "1", "--batch-size", "5", "--device", "cpu"]
    train = ["train", "--data", "folder", "--data-dir", str(folder), "--image-size", "16", *options]
    assert cli.main([*train, "--out", run]) == 0
    moved = folder.rename(tmp_path / "moved")

    def assert_fails(message: str, *arguments: str) -> None:
        capsys.readouterr()
        assert cli.main(["train", "--resume", run, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    assert_fails("cannot read the folder of images")
    assert cli.main(["train", "--resume", run, "--data-dir", str(moved)]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data_dir"] == str(moved)
    changed = "cannot go on from checkpoint"
    draw(moved / "train" / "red" / "1.png", (254, 0, 0))
    assert_fails(changed, "--data-dir", str(moved))
    draw(moved / "train" / "red" / "1.png")
    (moved / "train" / "red").rename(moved / "train" / "rot"), (moved / "test" / "red").rename(moved / "test" / "rot")
    assert_fails(changed, "--data-dir", str(moved))
    draw(moved / "train" / "yellow" / "1.png")
    assert_fails(
        "the data set moved has changed: its images or labels are not those of the run", "--data-dir", str(moved)
    )
