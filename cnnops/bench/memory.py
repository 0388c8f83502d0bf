"""The two malloc settings that a CPU benchmark is run under.

glibc maps every block of 32 MiB or more afresh and returns it when freed, so each call's large output is paid for in
page faults. A process that keeps freed memory pays them once. Which of the two a user has depends on the environment
(MALLOC_ variables, a preloaded allocator), so both are measured.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

MAPPED_BYTES = 32 << 20
"""Size from which glibc always maps a block afresh: the cap of its dynamic threshold."""

KINDS = ("fresh", "reused")

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65536
_INT_MAX = 2**31 - 1


def _mallopt(*settings: tuple[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for name, value in settings:
        libc.mallopt(name, value)
    libc.malloc_trim(0)  # a free chunk that an earlier setting kept would be handed out before anything is mapped


@contextmanager
def outputs(kind: str) -> Iterator[None]:
    """Allocate on the CPU as `kind` says; glibc's steady state is restored afterwards.

    fresh: glibc's defaults once its dynamic threshold has grown; large outputs are mapped afresh for each call.
    reused: freed memory is kept, so an output lands where the one before it was. No effect on other allocators.
    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"outputs: kind must be one of {', '.join(KINDS)}, but got kind={kind!r}")
    fresh = ((_M_MMAP_MAX, _DEFAULT_MMAP_MAX), (_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TRIM_THRESHOLD, 2 * MAPPED_BYTES))
    _mallopt(*(fresh if kind == "fresh" else ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _INT_MAX))))
    try:
        yield
    finally:
        _mallopt(*fresh)


def describe() -> str:
    """The process's allocator and every setting of it in the environment."""
    settings = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
    ]
    return " ".join([" ".join(platform.libc_ver()).strip() or "unknown", *settings])
