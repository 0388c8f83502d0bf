"""The python form of CIFAR: pickles, read by an unpickler that knows only what those files are made of.

A pickle is a program that may call any function by name. Here each name leads to a stand-in of ours or is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnops.data.dataset import DataError


class _UInt8:
    """Stands for numpy.dtype("u1"), the only one there is."""

    def __init__(self, code: str, *_: object) -> None:
        if code != "u1":
            raise pickle.UnpicklingError(f"an array of {reprlib.repr(code)}, expected 'u1'")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, of which a byte has none."""


class _Array:
    """Stands for numpy.ndarray, and for the function that makes an empty one; takes shape and bytes afterwards."""

    def __init__(self, *_: object) -> None:
        """Type, shape and code of the empty array, of which the state says all."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], _UInt8, bool, str | bytes]) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _UInt8) or column_major:
            raise pickle.UnpicklingError("an array of another layout than the published ones")
        # Python 2's strings are read as latin-1, which keeps each byte.
        raw = content.encode("latin1") if isinstance(content, str) else memoryview(content)
        self.values = np.frombuffer(raw, np.uint8).reshape(shape)


def _encoded(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, which is how Python 3 puts bytes into an old pickle."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {reprlib.repr(encoding)}, expected 'latin1'")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _UInt8,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encoded,
}


class _Refused(pickle.UnpicklingError):
    """The pickle asks for a name that is not allowed."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def _check_memo(content: bytes) -> None:
    """Raise UnpicklingError for a memo with gaps: it is an array, and ten bytes that name a far place fill the memory."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"it remembers {argument} things in {len(content)} bytes")


def read_batch(content: bytes, label_key: str, where: object) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Pixels [N, 3072] and labels [N] of one pickled batch. Raises DataError, naming the global that is not allowed."""
    try:
        _check_memo(content)
        batch = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = batch["data"].values, batch[label_key]
    except _Refused as error:
        raise DataError(f"{where} is not to be trusted: {error}, which no data of CIFAR's does") from error
    except Exception as error:  # what a broken pickle raises is anyone's guess
        raise DataError(f"{where} is not a batch of CIFAR's: {type(error).__name__}: {error}") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{where} is not a batch of CIFAR's: its {label_key} are no list of whole numbers")
    if pixels.shape != (len(labels), 3072):
        raise DataError(f"{where} is not a batch of CIFAR's: pixels {pixels.shape} with {len(labels)} labels")
    return pixels, labels
