"""What large depthwise filters move and multiply on the tensor cores, as the emulator counts it, is what the design says.

DRAM's part: x, the filters and y once. L2's part: a tile reads its outputs' taps, so that the halo of R - 1 rows and
S - 1 columns is read again; the filters of its 16 channels; y is written once. Both gradients come from one read of dy and
x: a block sums dweight over several tiles, in a slab of its own. The layers are not among tests/cases.py's,
and the kernels are of 16-bit numbers alone. Channels are read and written in whole sectors of L2 where 16 divides them.
Where 8 does, a pixel's last 8 channels have half a sector, and rows of pixels begin in the midst of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import ceil
from types import ModuleType

import helpers
import pytest
import torch
from cases import Conv2dCase
from traffic import SECTOR, SLACK, near, sectors, traffic

from cnnops.backends import simt

CASES = (
    Conv2dCase("7x7", 2, 48, 30, 32, 48, 7, 7, padding=(3, 3), groups=48),
    Conv2dCase("7x7-wide", 1, 32, 24, 64, 32, 7, 7, padding=(3, 3), groups=32),
    Conv2dCase("7x7-small", 2, 32, 14, 15, 32, 7, 7, padding=(3, 3), groups=32),
    Conv2dCase("9x9-unpadded", 2, 16, 22, 40, 16, 9, 9, groups=16),
    Conv2dCase("13x13", 1, 48, 28, 29, 48, 13, 13, padding=(6, 6), groups=48),
    Conv2dCase("7x31", 1, 16, 18, 35, 16, 7, 31, padding=(3, 15), groups=16),
    Conv2dCase("31x31", 1, 32, 26, 27, 32, 31, 31, padding=(15, 15), groups=32),
    Conv2dCase("7x7-of-24-channels", 2, 24, 15, 16, 24, 7, 7, padding=(3, 3), groups=24),
)
GRADIENTS = (
    Conv2dCase("7x7", 2, 48, 30, 32, 48, 7, 7, padding=(3, 3), groups=48),
    Conv2dCase("9x9-unpadded", 2, 16, 22, 40, 16, 9, 9, groups=16),
    Conv2dCase("7x9", 1, 32, 33, 31, 32, 7, 9, padding=(3, 4), groups=32),
    Conv2dCase("13x13", 1, 48, 41, 43, 48, 13, 13, padding=(6, 6), groups=48),
    Conv2dCase("17x8", 2, 16, 34, 47, 16, 17, 8, padding=(8, 3), groups=16),
    Conv2dCase("7x31", 1, 16, 41, 50, 16, 7, 31, padding=(3, 15), groups=16),
    Conv2dCase("31x31", 2, 16, 70, 67, 16, 31, 31, padding=(15, 15), groups=16),
    Conv2dCase("7x7-of-24-channels", 2, 24, 31, 32, 24, 7, 7, padding=(3, 3), groups=24),
)
RAGGED = Conv2dCase("7x7-of-19-channels", 2, 19, 15, 16, 19, 7, 7, padding=(3, 3), groups=19)
DTYPES = (torch.bfloat16, torch.float16)
PASSES = ("forward", "backward_input")
CHANNELS = 16  # of a block
GRADIENT_SIDE = 16  # of a tile where dweight is summed
MULTIPROCESSORS = 3  # of the emulator's device

EVERY = (
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.id),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("each", PASSES),
)


def every(test: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda marked, mark: mark(marked), EVERY, test)


@functools.cache
def counted(case: Conv2dCase, dtype: torch.dtype, each: str) -> tuple[int, dict[str, int]]:
    """The side of the tiles, and what the one kernel of a pass moved."""
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "channels_last", "cpu")
    random = helpers.generator(case.id)
    dy = helpers.laid_out(helpers.randn(case.output_shape, dtype, "cpu", random), "channels_last")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)

    def run() -> None:
        if each == "forward":
            simt.function("conv2d_forward")(x, weight, None, *geometry)
        else:
            simt.function("conv2d_backward")(dy, x, weight, *geometry, True, False, False)

    ((kernel, moved),) = traffic(run).items()
    number = {torch.bfloat16: "BFloat16", torch.float16: "Half"}[dtype]
    sides = {f"conv2d_toeplitz_kernel<{number}, {side}>": side for side in (16, 32)}
    return sides[kernel], moved


def axes(case: Conv2dCase, each: str) -> tuple[tuple[int, int, int, int], ...]:
    """(inputs, outputs, taps, padding) down and across; backward_input is a convolution with turned filters."""
    pairs = zip(case.x_shape[2:], case.output_shape[2:], (case.R, case.S), case.padding, strict=True)
    return tuple(
        (size, outputs, taps, pad) if each == "forward" else (outputs, size, taps, taps - 1 - pad)
        for size, outputs, taps, pad in pairs
    )


def halos(case: Conv2dCase, each: str, side: int) -> list[list[range]]:
    """The rows, and the columns, that each tile reads."""
    return [
        [range(max(first - pad, 0), min(first + side + taps - 1 - pad, size)) for first in range(0, outputs, side)]
        for size, outputs, taps, pad in axes(case, each)
    ]


def pixels_of(case: Conv2dCase, count: int, pixels: list[int]) -> int:
    """Bytes of the sectors that hold `count` times these pixels' channels, read or written in 16s."""
    size = 2 * case.C
    return count * sum(
        sectors(pixel * size + 2 * c, pixel * size + 2 * min(c + CHANNELS, case.C))
        for pixel in pixels
        for c in range(0, case.C, CHANNELS)
    )


@every
def test_a_pass_moves_little_more_than_it_must(case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    side, moved = counted(case, dtype, each)
    down, across = halos(case, each, side)
    (height, outputs_h, _, _), (width, outputs_w, _, _) = axes(case, each)
    columns = [column for tile in across for column in tile]
    halo = sum(pixels_of(case, case.N, [row * width + column for column in columns]) for tile in down for row in tile)
    weight = 2 * case.R * case.S * case.C
    near("reads", moved["global_read_sectors"] * SECTOR, halo + weight * case.N * len(down) * len(across), 1.01)
    written = pixels_of(case, case.N, list(range(outputs_h * outputs_w)))
    near("writes", moved["global_write_sectors"] * SECTOR, written, 1.01)

    least = 2 * case.N * case.C * (height * width + outputs_h * outputs_w) + weight
    dram = moved["dram_read_bytes"] + moved["dram_write_bytes"]
    assert least <= dram <= 1.01 * least


@every
def test_whole_sectors_are_moved(case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    _, moved = counted(case, dtype, each)
    for direction in ("read", "write"):
        efficiency = moved[f"global_{direction}_bytes"] / (moved[f"global_{direction}_sectors"] * SECTOR)
        assert efficiency == 1 or (case.C % CHANNELS and efficiency > 0.5), direction


@every
def test_bands_are_no_longer_than_their_taps_need(case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """Products of a tile's outputs with 16, 32 or 48 columns for each row of taps, of which 8 outputs need S + 7."""
    side, moved = counted(case, dtype, each)
    down, across = halos(case, each, side)
    channels = ceil(case.C / CHANNELS) * CHANNELS
    outputs = case.N * len(down) * len(across) * side * side * channels
    columns = next(columns for columns in (16, 32, 48) if columns >= case.S + 7)
    assert moved["flops"] == 2 * outputs * case.R * columns


@every
def test_banks_are_met_by_sums_and_filters_alone(case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """Sums are written as floats and read once, in twice the time; two copies of the filters are written, in 3 times
    theirs. x and the bands meet no bank twice, which are far more than these."""
    side, moved = counted(case, dtype, each)
    down, across = halos(case, each, side)
    blocks = case.N * len(down) * len(across) * ceil(case.C / CHANNELS)
    sums, filters = side * side * CHANNELS * 4 / 128, CHANNELS * case.R * case.S / 32
    assert moved["bank_conflicts"] <= blocks * (2 * sums + 2 * 2 * filters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", PASSES)
def test_channels_that_16_bytes_do_not_divide_come_once_from_memory(dtype: torch.dtype, each: str) -> None:
    """They are moved one by one, so that L2 is asked for each sector up to 16 times."""
    case = RAGGED
    _, moved = counted(case, dtype, each)
    (height, outputs_h, _, _), (width, outputs_w, _, _) = axes(case, each)
    least = 2 * case.C * (case.N * (height * width + outputs_h * outputs_w) + case.R * case.S)
    assert least <= moved["dram_read_bytes"] + moved["dram_write_bytes"] <= SLACK * least


gradients = pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.id)
gradient_passes = pytest.mark.parametrize("each", ("backward", "backward_weight"))


@functools.cache
def counted_gradients(case: Conv2dCase, each: str) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel of both gradients, or of dweight alone, moved in bfloat16, and what the one that adds slabs did."""
    x, weight, _ = helpers.conv2d_inputs(case, torch.bfloat16, "channels_last", "cpu")
    random = helpers.generator(case.id)
    dy = helpers.laid_out(helpers.randn(case.output_shape, x.dtype, "cpu", random), "channels_last")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    wanted = (each == "backward", True, False)
    moved = traffic(lambda: simt.function("conv2d_backward")(dy, x, weight, *geometry, *wanted))
    [adds] = [name for name in moved if name == "conv2d_toeplitz_add_slabs_kernel<BFloat16>"]
    [sums] = [name for name in moved if name.startswith("conv2d_toeplitz_backward_kernel<BFloat16, ")]
    assert len(moved) == 2, moved.keys()
    return moved[sums], moved[adds]


def slabs_of(case: Conv2dCase) -> int:
    """Blocks that share a channel's tiles: two to a multiprocessor, each with eight pixels or more for a tap."""
    N, _, H, W = case.x_shape
    tiles = N * ceil(H / GRADIENT_SIDE) * ceil(W / GRADIENT_SIDE)
    wanted = ceil(2 * MULTIPROCESSORS / ceil(case.C / CHANNELS))
    parts = min(wanted, max(1, N * H * W // (8 * case.R * case.S)))
    return ceil(tiles / ceil(tiles / parts))


@gradients
@gradient_passes
def test_gradients_move_little_more_than_they_must(emulator: ModuleType, case: Conv2dCase, each: str) -> None:
    moved, added = counted_gradients(case, each)
    down, across = halos(case, "backward_input", GRADIENT_SIDE)
    (height, outputs_h, _, _), (width, outputs_w, _, _) = axes(case, "backward_input")
    columns = [column for tile in across for column in tile]
    halo = sum(pixels_of(case, case.N, [row * width + column for column in columns]) for tile in down for row in tile)
    image = pixels_of(case, case.N, list(range(outputs_h * outputs_w)))
    taps, both = case.R * case.S * case.C, each == "backward"
    slabs = 4 * taps * slabs_of(case)
    reads = halo + image + 2 * taps * slabs_of(case) * both
    near("reads", moved["global_read_sectors"] * SECTOR, reads, 1.01)
    near("writes", moved["global_write_sectors"] * SECTOR, image * both + slabs, 1.01)
    near("slabs read", added["global_read_sectors"] * SECTOR, slabs, 1.01)

    least = 2 * case.N * case.C * (height * width + (1 + both) * outputs_h * outputs_w) + 2 * (1 + both) * taps
    dram = sum(kernel["dram_read_bytes"] + kernel["dram_write_bytes"] for kernel in (moved, added))
    near("DRAM", dram, least + 2 * slabs, 1.01)
    assert dram <= SLACK * least, f"{dram / least:.2f} times the {least} bytes that are needed"


@gradients
@gradient_passes
def test_gradients_move_whole_sectors(emulator: ModuleType, case: Conv2dCase, each: str) -> None:
    for moved in counted_gradients(case, each):
        for direction in ("read", "write"):
            efficiency = moved[f"global_{direction}_bytes"] / (moved[f"global_{direction}_sectors"] * SECTOR)
            assert efficiency >= 0.9 or (case.C % CHANNELS and efficiency > 0.5), direction


@gradients
def test_dweight_multiplies_what_its_taps_need(emulator: ModuleType, case: Conv2dCase) -> None:
    """For each row of x products of 32 columns, of which 16 + 7 are for 8 neighbouring taps: with 8 rows of taps and 8
    columns, of which 7 and 8 are taps, with 16 by 16, or with 32 by 32."""
    moved, _ = counted_gradients(case, "backward_weight")
    tiles = case.N * ceil(case.H / GRADIENT_SIDE) * ceil(case.W / GRADIENT_SIDE) * ceil(case.C / CHANNELS)
    taps = 32 * 32 if max(case.R, case.S) > 16 else 8 * 8 if case.R <= 7 and case.S <= 8 else 16 * 16
    assert moved["flops"] == 2 * tiles * CHANNELS * GRADIENT_SIDE * taps * 32
