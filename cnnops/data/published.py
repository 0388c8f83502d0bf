"""Files that others publish: fetched, verified, and taken out of their archives without writing anything else."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import logging
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cnnops.data.dataset import DataError

log = logging.getLogger("cnnops")

MOST_UNPACKED = 1 << 29
"""Bytes that an archive may unpack to, all its members together; CIFAR's unpack to less than 200 million."""

_CHUNK = 1 << 20
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Published:
    """A file as its authors made it. checksum: "sha256:..." or "md5:...". size: in bytes, None where not published."""

    name: str
    checksum: str
    size: int | None = None


def verify(file: BinaryIO, expected: Published, where: object, remedy: str) -> None:
    """Raise DataError, ending in `remedy`, unless the open `file` is the expected one; leaves it at its start."""
    size = file.seek(0, os.SEEK_END)
    if expected.size is not None and size != expected.size:
        raise DataError(f"{where} has {size} bytes, expected {expected.size}; {remedy}")
    algorithm, _, digest = expected.checksum.partition(":")
    found = hashlib.new(algorithm, usedforsecurity=False)
    file.seek(0)
    while chunk := file.read(_CHUNK):
        found.update(chunk)
    if found.hexdigest() != digest:
        raise DataError(f"{where} is damaged (its {algorithm.upper()} is wrong); {remedy}")
    file.seek(0)


def read_file(path: Path, expected: Published, remedy: str) -> bytes:
    """The bytes of a verified file. Raises DataError."""
    try:
        with open(path, "rb") as file:
            verify(file, expected, path, remedy)
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {remedy}") from error


def read_archive(path: Path, archive: Published, members: Collection[str]) -> dict[str, bytes]:
    """The named members of a verified .tar.gz; nothing is unpacked onto the disk.

    Raises DataError if the archive or a member is not what it should be.
    """
    remedy = "delete it, and it will be downloaded again"
    try:
        with open(path, "rb") as file:
            verify(file, archive, path, remedy)
            found = _members(file, path, members)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:  # the last: a header's odd number
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {remedy}") from error
    for name in members:
        if name not in found:
            raise DataError(f"{path} has no member {name}; {remedy}")
    return found


def _members(file: BinaryIO, path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with gzip.GzipFile(fileobj=file) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, path), mode="r|") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{path} is not to be trusted: its member {member.name!r} points outside")
            # A sparse member's size is a mere claim: a few bytes can ask for terabytes of zeros.
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise DataError(f"{path} is not to be trusted: its member {member.name!r} is no plain file")
            # tarfile would walk to the end of whatever size is claimed, be the file long over.
            if not 0 <= member.size <= MOST_UNPACKED:
                raise DataError(f"{path} is not to be trusted: its member {member.name!r} claims {member.size} bytes")
            if str(name) in found:
                raise DataError(f"{path} is not to be trusted: its member {member.name!r} is there twice")
            if str(name) in wanted:
                content = tar.extractfile(member)
                found[str(name)] = content.read() if content else b""
    return found


class _Bounded(io.RawIOBase):
    """A stream that ends in a DataError where more than `MOST_UNPACKED` bytes come out of it."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._path, self._left = stream, path, MOST_UNPACKED

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(content)
        if self._left < 0:
            raise DataError(f"{self._path} is not to be trusted: it unpacks to more than {MOST_UNPACKED} bytes")
        return content


def download(url: str, path: Path, expected: Published) -> None:
    """Fetch a file of known size to `path`: received as <path>.part, and renamed once it is whole and verified.

    However it ends, nothing half done is ever called `path`. Raises DataError.
    """
    part = path.with_name(path.name + ".part")
    remedy = f"get {url} by other means, put it into {path.parent}, and run this again"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            log.warning("downloading %s (%d MB)", url, (expected.size or 0) // 10**6)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "w+b") as file:
                try:
                    # One chunk too many shows that the file is too long; the rest is of no interest.
                    while (expected.size is None or file.tell() <= expected.size) and (chunk := response.read(_CHUNK)):
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                    verify(file, expected, f"what came from {url}", remedy)
                    os.replace(part, path)
                except BaseException:
                    part.unlink()
                    raise
    except urllib.error.HTTPError as error:
        raise DataError(f"cannot download {path}: the server says {error.code} {error.reason}; {remedy}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # no server, a reset, a full disk, a bad redirect
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise DataError(f"cannot download {path}: {reason}; {remedy}") from error
