"""What the depthwise kernels move, as the emulator counts it, is near the least that they can move.

The layers are not among tests/cases.py's. A block goes down a strip with a ring of rows in shared memory, so that L2
moves the tensor with the halo once for each strip, with the columns on either side; DRAM moves everything once.
"""

from __future__ import annotations

import functools
import re
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
SHARED_BYTES = 227 << 10  # that a block may have there


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
    layer("7x7-s2", 1, 32, 40, 41, 32, 7, stride=2),
    layer("3x3-d2", 2, 64, 29, 30, 64, 3, dilation=2),
    layer("3x3-multiplier-2", 2, 32, 22, 23, 64, 3),
    layer("13x13", 1, 32, 37, 36, 32, 13),
)
DTYPES = (torch.bfloat16, torch.float32)
PASSES = ("forward", "backward", "backward_input", "backward_weight")
LAYERS = [pytest.param(case, dtype, id=f"{case.id}-{str(dtype)[6:]}") for case in CASES for dtype in DTYPES]


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
        return self.each == "backward_input" or (self.each in ("backward", "backward_weight") and self.sized)

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
        return (64 if self.sized else 32) // self.element

    def ring_columns(self, columns: int) -> int:
        case = self.case
        reach = (case.S - 1) * case.dilation[1]
        if self.of_x:
            return columns // (case.stride[1] if self.sized else 1) + reach // case.stride[1]
        return (columns - 1) * case.stride[1] + reach + 1

    @functools.cached_property
    def strip(self) -> tuple[int, int]:
        """Columns and the rows of a step: the width whose strips read the fewest columns."""
        groups = 128 // (self.tile_channels // 2)
        widths = [4 * across for across in (2, 4, 8)]
        columns = min(widths, key=lambda width: ceil(self.positions[1] / width) * self.ring_columns(width))
        return columns, groups * 4 // columns * (2 if self.sized else 1)

    @functools.cached_property
    def rows_and_parts(self) -> tuple[int, int]:
        """Rows of a strip, and the blocks that share its channels' strips: eight on a multiprocessor, or half as many
        that leave slabs, each worth them."""
        case, (rows, columns), (width, step) = self.case, self.positions, self.strip
        sums = self.each in ("backward", "backward_weight")
        tap_tiles = ceil(case.R / 8) if sums and not self.sized else 1
        tiles = ceil((case.C if self.each == "backward_input" else case.K) / self.tile_channels) * tap_tiles
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

    def halo(self, first_tap: int = 0, taps: int | None = None) -> int:
        """Pixels of one image that strips read around their own for some rows of the filter, or all of them."""

        def along(axis: int, length: int) -> int:
            case, extent = self.case, self.positions[axis]
            stride, pad = case.stride[axis], case.padding[axis]
            reach = ((case.R, case.S)[axis] - 1) * case.dilation[axis]
            if axis == 0 and taps:
                reach, pad = (taps - 1) * case.dilation[0], pad - first_tap * case.dilation[0]
            total = 0
            for begin in range(0, extent, length):
                end = min(begin + length, extent)
                if self.of_x:
                    each = stride if self.sized else 1
                    first, last = begin // each + pad // stride - reach // stride, (end - 1) // each + pad // stride
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
    # A tile of filters has less than a sector of channels where there are several filters to each.
    of_x = case.N * case.C * element * max(1, SECTOR * case.K // (case.C * cut.tile_channels * element))
    if each == "forward":
        return Moved(cut.halo() * of_x + weights * cut.parts, y)
    slabs = bytes_of(case.weight_shape, 4) * cut.parts
    if not cut.of_x:  # dweight of a filter of any size, eight rows at a time
        halo = sum(cut.halo(r, min(8, case.R - r)) for r in range(0, case.R, 8))
        return Moved(halo * of_x + y * ceil(case.R / 8), slabs)
    dy = cut.halo() * case.N * case.K * element
    if each == "backward_input":
        return Moved(dy + weights * cut.parts, x)
    if each == "backward_weight":
        return Moved(dy + x, slabs)
    return Moved(dy + x + weights * cut.parts, x + slabs)


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
    assert all(re.match(r"depthwise_|add_slabs_kernel", name) for name in moved), moved.keys()
    return {name: each for name, each in moved.items() if name.startswith("depthwise_")}


@pytest.mark.parametrize("each", PASSES)
@pytest.mark.parametrize(("case", "dtype"), LAYERS)
def test_l2_moves_what_strips_read(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    kernels = own(counted(case, dtype, each))
    passes = [each]
    if each == "backward" and not Cut(case, each, dtype.itemsize).sized:
        passes = ["backward_input", "backward_weight"]
    assert len(kernels) == len(passes)
    says = [stated(case, name, dtype.itemsize) for name in passes]
    for direction, total in (("read", sum(s.read for s in says)), ("write", sum(s.written for s in says))):
        sectors = sum(moved[f"global_{direction}_sectors"] for moved in kernels.values())
        near(f"{case.id} {each}: {direction}", sectors * SECTOR, total)


@pytest.mark.parametrize("each", PASSES)
@pytest.mark.parametrize(("case", "dtype"), LAYERS)
def test_dram_moves_everything_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    moved = counted(case, dtype, each)
    x, y, weight = (bytes_of(s, dtype.itemsize) for s in (case.x_shape, case.output_shape, case.weight_shape))
    slabs = 0 if each in ("forward", "backward_input") else bytes_of(case.weight_shape, 4)
    slabs *= Cut(case, each, dtype.itemsize).parts
    least = {
        "forward": x + weight + y,
        "backward": 2 * x + y + 2 * weight,
        "backward_input": y + weight + x,
        "backward_weight": x + y + weight,
    }[each] + 2 * slabs
    if each == "backward" and not Cut(case, each, dtype.itemsize).sized:
        least += y
    dram = sum(kernel["dram_read_bytes"] + kernel["dram_write_bytes"] for kernel in moved.values())
    assert dram <= SLACK * least, f"DRAM moves {dram} bytes, {dram / least:.2f} times the {least} that are needed"


@pytest.mark.parametrize("each", PASSES)
@pytest.mark.parametrize(("case", "dtype"), LAYERS)
def test_whole_sectors_are_moved(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """But where a tile's filters have less than a sector of channels, since each has several; and in slabs of eight rows
    of each filter, which begin anywhere."""
    for name, moved in own(counted(case, dtype, each)).items():
        weight = name.startswith("depthwise_any_backward_weight")
        for direction in ("read", "write"):
            if (direction == "read" and case.K > case.C) or (direction == "write" and weight and case.R > 8):
                continue
            moves = moved[f"global_{direction}_sectors"] * SECTOR
            assert moved[f"global_{direction}_bytes"] >= 0.9 * moves, f"{name} {direction}s parts of sectors"


@pytest.mark.parametrize(("case", "dtype"), LAYERS)
def test_both_gradients_read_dy_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    """Where the filter has a kernel of its own: as much as dx alone, and x."""
    if not Cut(case, "backward", dtype.itemsize).sized:
        assert len(own(counted(case, dtype, "backward"))) == 2
        return
    [both] = own(counted(case, dtype, "backward")).values()
    x, y = (bytes_of(shape, dtype.itemsize) for shape in (case.x_shape, case.output_shape))
    assert both["dram_read_bytes"] <= 1.05 * (x + y) + bytes_of(case.weight_shape, dtype.itemsize)
