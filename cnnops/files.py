"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` on the disk as `path`: written beside it, fsynced, renamed.

    On any failure the old file stays and nothing else is left. Raises OSError with `path` as its file name.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what failed first is what the user must hear
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`."""
    for part in folder.glob(".*.part"):
        part.unlink()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; if another one holds it, wait, or BlockingIOError, which names it.

    The kernel lets go when the process ends, however it ends. A file system without locks is taken as free.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process trains into this folder", str(folder)) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Put a rename inside `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
