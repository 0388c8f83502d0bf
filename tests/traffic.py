"""What kernels move between memory and the multiprocessors, as the emulator counts it, beside what they say they move."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from cnnops.backends import simt

SLACK = 1.3
SECTOR = 32
"""Bytes that L2 moves at least."""


def traffic(run: Callable[[], object]) -> dict[str, dict[str, int]]:
    """What each kernel moved that run() launched under the emulator: the counters of csrc/simt/trace.h, by its name."""
    emulator = simt.module()
    emulator.reset_counters()
    emulator.count_accesses(True)
    try:
        run()
        return dict(emulator.counters()["traffic"])
    finally:
        emulator.count_accesses(False)
        emulator.reset_counters()


def near(what: str, moved: float, stated: float, slack: float = SLACK) -> None:
    """Neither more, nor so little that the statement hides something."""
    assert moved <= slack * stated, f"{what} {moved} bytes, {moved / stated:.2f} times the {stated:.0f} stated"
    assert stated <= slack * moved, f"{what} {moved} bytes, far from the {stated:.0f} stated"


def sectors(begin: int, end: int) -> int:
    """Bytes of the sectors that hold [begin, end)."""
    return max(0, ceil(end / SECTOR) - begin // SECTOR) * SECTOR


def pieces(rows: int, length: int, each: int, element: int) -> int:
    """Bytes of the sectors of `rows` contiguous rows, whose elements are moved `each` at a time."""
    size = length * element
    period = min(rows, SECTOR)  # after which rows begin at the same place within a sector
    once = [
        sum(
            sectors(row * size + i * element, row * size + min(i + each, length) * element)
            for i in range(0, length, each)
        )
        for row in range(period)
    ]
    return sum(once) * (rows // period) + sum(once[: rows % period])
