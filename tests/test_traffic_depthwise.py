"""What the depthwise kernels move, as the emulator counts it, is near the least that they can move.

The layers are not among tests/cases.py's. A block goes down a strip with a ring of rows in shared memory, so that L2
moves the tensor with the halo once for each strip, with the columns on either side; DRAM moves everything once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil
from types import ModuleType

import helpers
import pytest
import torch
from cases import Conv2dCase
from traffic import SECTOR, SLACK, near, traffic

from cnnops.backends import simt

MULTIPROCESSORS = 3  # of the emulator's device


def layer(id: str, N: int, C: int, H: int, W: int, K: int, side: int, stride: int = 1, dilation: int = 1) -> Conv2dCase:
    pad = side // 2 * dilation
    return Conv2dCase(id, N, C, H, W, K, side, side, (stride,) * 2, (pad,) * 2, (dilation,) * 2, groups=C)


CASES = (
    layer("3x3", 2, 64, 29, 30, 64, 3),
    layer("3x3-wide", 1, 32, 20, 61, 32, 3),
    layer("3x3-small-map", 4, 96, 7, 7, 96, 3),
    layer("3x3-s2", 2, 48, 30, 31, 48, 3, stride=2),
    layer("5x5", 2, 64, 31, 29, 64, 5),
    layer("5x5-s2", 2, 64, 33, 32, 64, 5, stride=2),
    layer("7x7", 2, 64, 30, 31, 64, 7),
    layer("7x7-low-map", 4, 64, 8, 31, 64, 7),
    layer("7x7-s2", 1, 32, 40, 41, 32, 7, stride=2),
    layer("3x3-d2", 2, 64, 29, 30, 64, 3, dilation=2),
    layer("3x3-s2-d2", 2, 64, 35, 34, 64, 3, stride=2, dilation=2),
    layer("5x5-d2", 2, 64, 30, 29, 64, 5, dilation=2),
    layer("5x5-s2-d2", 2, 64, 45, 46, 64, 5, stride=2, dilation=2),
    layer("3x3-multiplier-2", 2, 32, 22, 23, 64, 3),
    layer("5x5-multiplier-2", 2, 32, 22, 23, 64, 5),
    layer("7x7-multiplier-2", 2, 32, 31, 29, 64, 7),
    layer("3x3-multiplier-4", 2, 32, 21, 22, 128, 3),
    layer("9x9-s2", 2, 32, 61, 62, 32, 9, stride=2),
    layer("9x9-d2", 2, 32, 45, 47, 32, 9, dilation=2),
    layer("11x11-multiplier-2", 1, 32, 45, 46, 64, 11),
    layer("13x13", 1, 32, 61, 63, 32, 13),
    layer("17x17-d3", 1, 16, 73, 77, 16, 17, dilation=3),
    layer("31x31", 1, 16, 71, 70, 16, 31),
    layer("31x31-s2", 1, 16, 121, 119, 16, 31, stride=2),
)
DTYPES = (torch.bfloat16, torch.float32)
PASSES = ("forward", "backward", "backward_input", "backward_weight")


def on_tensor_cores(case: Conv2dCase, dtype: torch.dtype) -> bool:
    """Whether tests/test_traffic_toeplitz.py has the kernels of a pass."""
    plain = case.K == case.C and case.stride == case.dilation == (1, 1) and case.R >= 7
    small = case.R == 7 and case.output_shape[2] <= 8
    return dtype != torch.float32 and plain and not small


def rows(passes: tuple[str, ...]) -> pytest.MarkDecorator:
    """The layers that these kernels take."""
    return pytest.mark.parametrize(
        ("case", "dtype", "each"),
        [
            pytest.param(case, dtype, each, id=f"{case.id}-{str(dtype)[6:]}-{each}")
            for case in CASES
            for dtype in DTYPES
            for each in passes
            if not on_tensor_cores(case, dtype)
        ],
    )


@dataclass(frozen=True)
class Moved:
    read: int
    written: int


@dataclass(frozen=True)
class Cut:
    """How a pass is cut: what it goes through in an image, its strips, and how many blocks share a tile's strips."""

    case: Conv2dCase
    each: str
    element: int

    @property
    def sized(self) -> bool:
        """Filters of this size and stride have a kernel of their own."""
        case = self.case
        return case.K == case.C and case.R in (3, 5, 7) and case.dilation == (1, 1) and case.stride[0] <= 2

    @property
    def of_x(self) -> bool:
        """Whether the strips are x's, and the halo dy's."""
        return self.each != "forward"

    @property
    def sums(self) -> bool:
        """Whether dweight's sums leave slabs."""
        return self.each in ("backward", "backward_weight")

    @property
    def positions(self) -> tuple[int, int]:
        case = self.case
        if not self.of_x:
            return case.output_shape[2], case.output_shape[3]
        each = case.stride[0] if self.sized else 1
        rows, columns = (
            (ceil((extent + pad) / case.stride[0]) - pad // case.stride[0]) * each
            for extent, pad in zip(case.x_shape[2:], case.padding, strict=True)
        )
        return rows, columns

    @property
    def tile_channels(self) -> int:
        """As many bytes of x's as a sector, or two where the kernel knows the filter; in y, their filters."""
        several = min(self.case.K // self.case.C, 4) if self.each == "forward" else 1
        return (64 if self.sized else SECTOR * several) // self.element

    def ring_columns(self, columns: int) -> int:
        case = self.case
        reach = (case.S - 1) * case.dilation[1]
        if self.of_x:
            return columns // (case.stride[1] if self.sized else 1) + reach // case.stride[1]
        return (columns - 1) * case.stride[1] + reach + 1

    @functools.cached_property
    def strip(self) -> tuple[int, int]:
        """Columns and the rows of a step: the width whose strips read the fewest columns, of blocks of twice the threads
        where 31 x 31 sums leave a multiprocessor one."""
        lone = self.sums and self.case.R == 31
        groups = (256 if lone else 128) // (self.tile_channels // 2)
        widths = [4 * across for across in (2, 4, 8) if across <= groups]
        columns = min(widths, key=lambda width: ceil(self.positions[1] / width) * self.ring_columns(width))
        return columns, groups * 4 // columns * (2 if self.sized else 1)

    @functools.cached_property
    def rows_and_parts(self) -> tuple[int, int]:
        """Rows of a strip, and the blocks that share its channels' strips: eight on a multiprocessor, or half as many
        that leave slabs, each worth them."""
        case, (rows, columns), (width, step) = self.case, self.positions, self.strip
        sums = self.sums
        tiles = ceil((case.C if self.of_x else case.K) / self.tile_channels)
        wanted = ceil((4 if sums else 8) * MULTIPROCESSORS / tiles)
        if sums:
            wanted = min(wanted, max(1, case.N * rows * columns // (16 * case.R * case.S)))
        steps, across = ceil(rows / step), ceil(columns / width)
        chunk = ceil(steps / min(max(ceil(wanted / (case.N * across)), 1), steps)) * step
        strips = case.N * ceil(rows / chunk) * across
        return chunk, ceil(strips / ceil(strips / min(wanted, strips)))

    @property
    def parts(self) -> int:
        return self.rows_and_parts[1]

    @property
    def halo(self) -> int:
        """Pixels of one image that strips read around their own."""

        def along(axis: int, length: int) -> int:
            case, extent = self.case, self.positions[axis]
            stride, pad = case.stride[axis], case.padding[axis]
            reach = ((case.R, case.S)[axis] - 1) * case.dilation[axis]
            total = 0
            for begin in range(0, extent, length):
                end = min(begin + length, extent)
                if self.of_x:
                    each = stride if self.sized else 1
                    first = begin // each + pad // stride - reach // stride
                    last = (end - 1) // each + pad // stride
                    size = case.output_shape[2 + axis]
                else:
                    first, last = begin * stride - pad, (end - 1) * stride - pad + reach
                    size = case.x_shape[2 + axis]
                total += max(0, min(last + 1, size) - max(first, 0))
            return total

        return along(0, self.rows_and_parts[0]) * along(1, self.strip[0])


def bytes_of(shape: tuple[int, ...], element: int) -> int:
    total = element
    for extent in shape:
        total *= extent
    return total


def stated(case: Conv2dCase, each: str, element: int) -> Moved:
    """The halo, weights and slabs for each block; the rest once."""
    cut = Cut(case, each, element)
    x, y, weights = (bytes_of(shape, element) for shape in (case.x_shape, case.output_shape, case.weight_shape))
    if each == "forward":
        return Moved(cut.halo * case.N * case.C * element + weights * cut.parts, y)
    read, written = cut.halo * case.N * case.K * element, 0
    if each != "backward_weight":
        read, written = read + weights * cut.parts, x
    if cut.sums:
        read, written = read + x, written + bytes_of(case.weight_shape, 4) * cut.parts
    return Moved(read, written)


@functools.cache
def counted(case: Conv2dCase, dtype: torch.dtype, each: str) -> dict[str, dict[str, int]]:
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "channels_last", "cpu")
    dy = helpers.laid_out(helpers.randn(case.output_shape, dtype, "cpu", helpers.generator(case.id)), "channels_last")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    if each == "forward":
        return traffic(lambda: simt.function("conv2d_forward")(x, weight, None, *geometry))
    wanted = (each != "backward_weight", each != "backward_input", False)
    return traffic(lambda: simt.function("conv2d_backward")(dy, x, weight, *geometry, *wanted))


def own(moved: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Of the kernels that are depthwise, not those that add their slabs."""
    sums = {name for name in moved if name.startswith("depthwise_add_slabs_kernel")}
    assert all(name.startswith("depthwise_") for name in moved), moved.keys()
    return {name: each for name, each in moved.items() if name not in sums}


@rows(PASSES)
def test_l2_moves_what_strips_read(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    [moved] = own(counted(case, dtype, each)).values()
    says = stated(case, each, dtype.itemsize)
    for direction, total in (("read", says.read), ("write", says.written)):
        near(f"{case.id} {each}: {direction}", moved[f"global_{direction}_sectors"] * SECTOR, total)


@rows(PASSES)
def test_dram_moves_everything_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """Also with slabs, which are a small part."""
    moved = counted(case, dtype, each)
    x, y, weight = (bytes_of(s, dtype.itemsize) for s in (case.x_shape, case.output_shape, case.weight_shape))
    least = {
        "forward": x + weight + y,
        "backward": 2 * x + y + 2 * weight,
        "backward_input": y + weight + x,
        "backward_weight": x + y + weight,
    }[each]
    dram = sum(kernel["dram_read_bytes"] + kernel["dram_write_bytes"] for kernel in moved.values())
    assert dram <= SLACK * least, f"DRAM moves {dram} bytes, {dram / least:.2f} times the {least} that are needed"


@rows(PASSES)
def test_whole_sectors_are_moved(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    for name, moved in own(counted(case, dtype, each)).items():
        for direction in ("read", "write"):
            moves = moved[f"global_{direction}_sectors"] * SECTOR
            assert moved[f"global_{direction}_bytes"] >= 0.9 * moves, f"{name} {direction}s parts of sectors"


@rows(("backward",))
def test_both_gradients_read_dy_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """And x."""
    x, y = (bytes_of(shape, dtype.itemsize) for shape in (case.x_shape, case.output_shape))
    [both] = own(counted(case, dtype, each)).values()
    assert both["dram_read_bytes"] <= 1.05 * (x + y) + bytes_of(case.weight_shape, dtype.itemsize)
