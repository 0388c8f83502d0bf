"""What the pools' kernels move, as the emulator counts it, is near the least that they can move.

DRAM's part: x and y (and offsets) once, forward and backward. L2's part: forward what windows read again, of which NHWC's
unrolled 3 x 3 windows share the rows between two outputs, and NCHW's tiles share columns; backward what each input asks of
its windows. Channels and rows are multiples of 16, in max pools' NCHW of 32, so that a position's offsets fill sectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import helpers
import pytest
import torch
from cases import LAYOUTS
from traffic import SECTOR, near, traffic

from cnnops.backends import simt

MOST = 1.15
"""DRAM bytes beside what is needed."""
FULL = 0.9
"""Of the sectors that are moved, the part that is asked for."""
TILE = 64
"""Columns of a tile of the NCHW kernels."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Windows of R x R; R = 0: adaptive, P = Q."""

    id: str
    N: int
    C: int
    H: int
    W: int
    R: int
    stride: int = 1
    pad: int = 0
    P: int = 0

    def spans(self, size: int) -> list[range]:
        """The inputs of each window along an axis of this size."""
        if self.R == 0:
            return [range(p * size // self.P, ceil((p + 1) * size / self.P)) for p in range(self.P)]
        count = (size + 2 * self.pad - self.R) // self.stride + 1
        firsts = [p * self.stride - self.pad for p in range(count)]
        return [range(max(first, 0), min(first + self.R, size)) for first in firsts]

    @property
    def rows(self) -> list[range]:
        return self.spans(self.H)

    @property
    def columns(self) -> list[range]:
        return self.spans(self.W)

    @property
    def window(self) -> tuple[int, ...]:
        return self.R, self.R, self.stride, self.stride, self.pad, self.pad

    @property
    def split(self) -> bool:
        """Whether threads share a window's positions."""
        return 32 * len(self.rows) * len(self.columns) <= self.H * self.W

    def over(self, spans: list[range], at: int) -> list[int]:
        """The windows that have an input."""
        return [p for p, span in enumerate(spans) if at in span]


CASES = (
    Case("2x2-s2", 2, 64, 12, 64, 2, 2),
    Case("3x3-s2", 2, 32, 16, 64, 3, 2, 1),
    Case("3x3-s2-many-channels", 1, 256, 8, 32, 3, 2, 1),
    Case("3x3-s1", 1, 64, 9, 32, 3, 1, 1),
    Case("5x5-s1", 1, 32, 11, 48, 5, 1, 2),
    Case("map", 3, 160, 16, 16, 16),
    Case("adaptive-16", 2, 32, 32, 64, 0, P=16),
    Case("adaptive-1", 3, 160, 7, 16, 0, P=1),
)


@dataclass(frozen=True)
class Moved:
    """Bytes: those of DRAM, and those between L2 and the multiprocessors, in whole sectors."""

    dram: float
    l2: float


@dataclass(frozen=True)
class Pool:
    case: Case
    maximum: bool
    dtype: torch.dtype
    layout: str

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    @property
    def offset(self) -> int:
        """Bytes of a window's."""
        if not self.maximum:
            return 0
        return 1 if 0 < self.case.R**2 <= 256 else 4

    @property
    def vector(self) -> int:
        """Bytes of x that a thread of the NHWC kernels moves at once: 16, or as many as its offsets fill that."""
        return min(16, 4 * self.element) if self.offset == 4 else 16

    @property
    def nhwc(self) -> bool:
        return self.layout == "channels_last"

    @property
    def x(self) -> int:
        return self.case.N * self.case.C * self.case.H * self.case.W * self.element

    @property
    def y(self) -> int:
        return self.case.N * self.case.C * len(self.case.rows) * len(self.case.columns) * (self.element + self.offset)

    def run(self) -> Iterator[tuple[str, dict[str, int]]]:
        """What its forward and its backward pass move, in all kernels."""
        case, name = self.case, "max_pool2d" if self.maximum else "avg_pool2d"
        x = helpers.randn((case.N, case.C, case.H, case.W), self.dtype, "cpu", helpers.generator(case.id))
        x = helpers.laid_out(x, self.layout)
        window: tuple[object, ...] = case.window
        if case.R == 0:
            name, window = "adaptive_" + name, ()
        tail = ((1, 1) if self.maximum else (False, True, 0)) if case.R else ()
        size = (case.P, case.P) if case.R == 0 else ()
        wanted = (*(False,) * bool(case.R), True) if self.maximum else ()
        simt.module()
        forward, backward = (simt.library.function(f"{name}_{each}") for each in ("forward", "backward"))
        found: list[torch.Tensor] = []

        def remember() -> None:
            result = forward(x, *window, *size, *tail, *wanted)
            found.extend(result if self.maximum else (result,))

        yield "forward", total(traffic(remember))
        shape = case.H, case.W, self.nhwc
        yield "backward", total(traffic(lambda: backward(*found, *shape, *window, *tail)))

    def forward(self) -> Moved:
        case = self.case
        rows, columns = case.rows, case.columns
        row_reads = sum(map(len, rows))
        if case.split:
            read = row_reads * sum(map(len, columns))
        elif self.nhwc:
            if self.maximum and (case.R, case.stride) == (3, 2):
                row_reads = sum(len({*above, *below}) for above, below in pairs(rows))
            read = row_reads * sum(map(len, columns))
        else:
            tiles = [columns[i : i + TILE] for i in range(0, len(columns), TILE)]
            read = row_reads * sum(tile[-1].stop - tile[0].start for tile in tiles)
        return Moved(self.x + self.y, case.N * case.C * read * self.element + self.y)

    def backward(self) -> Moved:
        """An input asks all windows over it, in NHWC those of lanes that ask together once; NCHW's tiles have their rows in
        shared memory."""
        case = self.case
        asked = sum(len(case.over(case.rows, h)) for h in range(case.H))
        windows = len(case.columns)
        if self.nhwc:
            together = max(1, 32 // (case.C * self.element // self.vector))  # positions of a warp
            windows = sum(len(set(at)) for at in self.requests(together))
        return Moved(self.x + self.y, case.N * case.C * asked * windows * (self.element + self.offset) + self.x)

    def requests(self, together: int) -> Iterator[list[int]]:
        """The windows along a row that so many neighbours ask for at once: each its first one, each its second one .."""
        case = self.case
        for first in range(0, case.W, together):
            over = [case.over(case.columns, w) for w in range(first, min(first + together, case.W))]
            for each in itertools.count():
                at = [windows[each] for windows in over if each < len(windows)]
                if not at:
                    break
                yield at


def pairs(rows: list[range]) -> Iterator[tuple[range, range]]:
    """Two and two; an odd last one by itself."""
    for i in range(0, len(rows), 2):
        yield rows[i], rows[i + 1] if i + 1 < len(rows) else range(0)


def total(moved: dict[str, dict[str, int]]) -> dict[str, int]:
    assert moved
    assert all("pool2d" in kernel for kernel in moved), moved.keys()
    return {name: sum(counts[name] for counts in moved.values()) for name in next(iter(moved.values()))}


def check(what: str, counts: dict[str, int], stated: Moved, whole: tuple[str, ...] = ("read", "write")) -> None:
    dram = counts["dram_read_bytes"] + counts["dram_write_bytes"]
    assert stated.dram / MOST <= dram <= MOST * stated.dram, f"{what}: DRAM moves {dram}, {dram / stated.dram:.2f}"
    near(f"{what}: L2 moves", SECTOR * (counts["global_read_sectors"] + counts["global_write_sectors"]), stated.l2)
    for direction in whole:
        used = counts[f"global_{direction}_bytes"] / (SECTOR * counts[f"global_{direction}_sectors"])
        assert used >= FULL, f"{what}: {direction}s use {used:.2f} of the sectors"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximum", [True, False], ids=["max", "avg"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_pools(case: Case, maximum: bool, dtype: torch.dtype, layout: str) -> None:
    pool = Pool(case, maximum, dtype, layout)
    for direction, counts in pool.run():
        check(direction, counts, pool.forward() if direction == "forward" else pool.backward())


@pytest.mark.parametrize("R", [3, 17])
def test_indices(R: int) -> None:
    """A byte or four of an offset are read for eight of an index."""
    offsets = torch.zeros(2, 32, 9, 16, dtype=torch.uint8 if R == 3 else torch.int32)
    offsets = offsets.to(memory_format=torch.channels_last)
    simt.module()
    function = simt.library.function("max_pool2d_indices")
    counts = total(traffic(lambda: function(offsets, 9 + R, 16 + R, R, R, 1, 1, 0, 0, 1, 1)))
    moved = offsets.numel() * (offsets.itemsize + 8)
    check("indices", counts, Moved(moved, moved))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpooling(dtype: torch.dtype, layout: str) -> None:
    """Of a pool of 2 x 2, whose indices are looked at once before. Blocks own rows of y that no other block's inputs point
    to. Backward, four positions of dy are looked at for each input; together they have all sectors."""
    simt.module()
    x = helpers.laid_out(helpers.randn((2, 32, 16, 64), dtype, "cpu", helpers.generator("unpooling")), layout)
    y, offsets = simt.library.function("max_pool2d_forward")(x, 2, 2, 2, 2, 0, 0, 1, 1, False, True)
    indices = simt.library.function("max_pool2d_indices")(offsets, 16, 64, 2, 2, 2, 2, 0, 0, 1, 1)
    indices = helpers.laid_out(indices, layout)
    forward = traffic(lambda: simt.library.function("max_unpool2d_forward")(y, indices, 16, 64))
    backward = traffic(lambda: simt.library.function("max_unpool2d_backward")(x, indices, layout == "channels_last"))
    scan = 8 * indices.numel()
    own = scan + y.nbytes
    for moved, read in ((forward, own), (backward, own)):
        for kernel, counts in moved.items():
            if "scan" in kernel:
                check(kernel, counts, Moved(scan, scan), ("read",))  # a block writes one line
            elif "bounds" not in kernel:
                dram = counts["dram_read_bytes"] + counts["dram_write_bytes"]
                assert dram <= MOST * (read + x.nbytes), f"{kernel}: DRAM moves {dram}"
                if "forward" in kernel:
                    check(kernel, counts, Moved(read + x.nbytes, read + x.nbytes))
