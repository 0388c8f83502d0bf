"""What the convolutions move, as the emulator counts it, is near the least that they can move.

DRAM's part: inputs and outputs once, and slabs of partial sums written and read. L2's part: besides, what the tiles
read again, as each kernel states it below. The layers are not among tests/cases.py's, on which kernels are tuned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from types import ModuleType

import helpers
import pytest
import torch
from cases import Conv2dCase

from cnnops.backends import simt

SLACK = 1.3
SECTOR = 32

CASES = (
    Conv2dCase("3x3", 2, 64, 14, 15, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("3x3-s2", 2, 32, 21, 23, 96, 3, 3, stride=(2, 2), padding=(1, 1)),
    Conv2dCase("1x1", 3, 96, 13, 14, 80, 1, 1),
    Conv2dCase("5x3-dilated", 1, 48, 22, 19, 64, 5, 3, padding=(4, 2), dilation=(2, 2)),
    Conv2dCase("3x3-grouped", 2, 128, 11, 13, 160, 3, 3, padding=(1, 1), groups=2),
)


@dataclass(frozen=True)
class Layer:
    """A case in one dtype: the bytes of its tensors, and what tiles read of them."""

    case: Conv2dCase
    element: int  # bytes

    @property
    def x(self) -> int:
        return self.case.N * self.case.C * self.case.H * self.case.W * self.element

    @property
    def y(self) -> int:
        N, K, P, Q = self.case.output_shape
        return N * K * P * Q * self.element

    @property
    def weights(self) -> int:
        K, C, R, S = self.case.weight_shape
        return K * C * R * S

    @property
    def weight(self) -> int:
        return self.weights * self.element

    @property
    def pixels(self) -> int:
        N, _, P, Q = self.case.output_shape
        return N * P * Q

    @property
    def channels(self) -> int:
        return self.case.C // self.case.groups

    @property
    def filters(self) -> int:
        return self.case.K // self.case.groups

    @property
    def taps(self) -> int:
        return self.case.R * self.case.S * self.channels

    @property
    def pairs(self) -> int:
        """Of an output's pixel and an input's that meet in a tap of the filter."""
        case, (N, _, P, Q) = self.case, self.case.output_shape

        def inside(positions: int, extent: int, taps: int, axis: int) -> int:
            reach = [
                p * case.stride[axis] - case.padding[axis] + r * case.dilation[axis]
                for p in range(positions)
                for r in range(taps)
            ]
            return sum(0 <= at < extent for at in reach)

        return N * inside(P, case.H, case.R, 0) * inside(Q, case.W, case.S, 1)

    @property
    def tapped_x(self) -> int:
        """x as its taps read it, once."""
        return self.pairs * self.case.C * self.element

    @property
    def tapped_dy(self) -> int:
        return self.pairs * self.case.K * self.element

    @property
    def largest_class(self) -> int:
        """Pixels of dx with the same taps: those at one residue modulo the stride."""
        return self.case.N * ceil(self.case.H / self.case.stride[0]) * ceil(self.case.W / self.case.stride[1])


@dataclass(frozen=True)
class Moved:
    """Bytes between L2 and the multiprocessors, in whole sectors."""

    read: float
    written: float


TILE = 64
WANTED_BLOCKS = 4 * 3  # four on each of the emulator's multiprocessors


def slabs(tiles: int, pixels: int, least_pixels: int) -> int:
    """Slabs that a sum over pixels is cut into: enough for WANTED_BLOCKS, each of at least `least_pixels`."""
    each = ceil(pixels / min(ceil(WANTED_BLOCKS / tiles), ceil(pixels / least_pixels)))
    return ceil(pixels / each)


def weight_slabs(layer: Layer) -> int:
    """Bytes of floats that backward_weight's kernel hands to add_slabs."""
    tiles = ceil(layer.filters / TILE) * ceil(layer.taps / TILE) * layer.case.groups
    return slabs(tiles, layer.pixels, 256) * layer.weights * 4


def bias_slabs(layer: Layer) -> int:
    return slabs(ceil(layer.case.K / 32), layer.pixels, 128) * layer.case.K * 4


def forward(layer: Layer) -> Moved:
    """A tile reads its taps of x for each TILE filters, and its filters for each TILE pixels.

    A warp's instruction writes every second element of eight rows, in float eight elements that follow each other.
    """
    read = layer.tapped_x * ceil(layer.filters / TILE) + layer.weight * ceil(layer.pixels / TILE)
    return Moved(read, layer.y * (1 if layer.element == 4 else 4))


def backward_input(layer: Layer) -> Moved:
    """As forward, of dy and of the filters' rows; the tiles of all residues together read each filter once.

    In float a lane writes one element in four.
    """
    read = layer.tapped_dy * ceil(layer.channels / TILE) + layer.weight * ceil(layer.largest_class / TILE)
    return Moved(read, layer.x * 4)


def backward_weight(layer: Layer) -> Moved:
    """dy is read for each TILE taps and channels, x's taps for each TILE filters. Slabs are of float."""
    read = layer.y * ceil(layer.taps / TILE) + layer.tapped_x * ceil(layer.filters / TILE)
    return Moved(read, weight_slabs(layer) * (4 if layer.element == 4 else 2))


STATED: dict[str, Callable[[Layer], Moved]] = {
    r"conv2d_forward_kernel<\w+>": forward,
    r"conv2d_backward_input_kernel<\w+>": backward_input,
    r"conv2d_backward_weight_kernel<\w+>": backward_weight,
    r"add_slabs_kernel<\w+>": lambda layer: Moved(weight_slabs(layer), layer.weight),
}
"""What each kernel moves, by its name. Which pass it belongs to is in the name too, or in that of its neighbours."""

BIAS_STATED: dict[str, Callable[[Layer], Moved]] = {
    # Rows of 32 elements may begin within a sector.
    r"conv2d_backward_bias_kernel<\w+>": lambda layer: Moved(
        layer.y * (layer.element + 1) / layer.element, bias_slabs(layer)
    ),
    r"add_slabs_kernel<\w+>": lambda layer: Moved(bias_slabs(layer), layer.case.K * layer.element),
}


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    module = simt.module()
    module.count_accesses(True)
    yield module
    module.count_accesses(False)
    module.reset_counters()


def counted(emulator: ModuleType, run: Callable[[], object]) -> dict[str, dict[str, int]]:
    emulator.reset_counters()
    run()
    return emulator.counters()["traffic"]


def near(what: str, moved: float, least: float) -> None:
    assert moved <= SLACK * least, f"{what}: {moved} bytes, {moved / least:.2f} times the {least:.0f} that it needs"


def check(
    traffic: dict[str, dict[str, int]], stated: dict[str, Callable[[Layer], Moved]], layer: Layer, floor: int
) -> None:
    assert traffic
    for kernel, moved in traffic.items():
        names = [name for name in stated if re.fullmatch(name, kernel)]
        assert names, f"{kernel} moves data, and nobody states how much"
        says = stated[names[0]](layer)
        near(f"{kernel} reads", moved["global_read_sectors"] * SECTOR, says.read)
        near(f"{kernel} writes", moved["global_write_sectors"] * SECTOR, says.written)
    dram = sum(moved["dram_read_bytes"] + moved["dram_write_bytes"] for moved in traffic.values())
    near("DRAM", dram, floor)
    assert dram >= floor, "whatever is needed is moved, or the counting is wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_pass_moves_little_more_than_it_must(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "channels_last", "cpu")
    random = helpers.generator(case.id)
    dy = helpers.laid_out(helpers.randn(case.output_shape, dtype, "cpu", random), "channels_last")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    layer = Layer(case, dtype.itemsize)

    def backward(dx: bool, dweight: bool, dbias: bool) -> dict[str, dict[str, int]]:
        return counted(emulator, lambda: simt.function("conv2d_backward")(dy, x, weight, *geometry, dx, dweight, dbias))

    traffic = counted(emulator, lambda: simt.function("conv2d_forward")(x, weight, None, *geometry))
    check(traffic, STATED, layer, layer.x + layer.weight + layer.y)
    check(backward(True, False, False), STATED, layer, layer.y + layer.weight + layer.x)
    partial = 2 * weight_slabs(layer)
    check(backward(False, True, False), STATED, layer, layer.y + layer.x + partial + layer.weight)
    partial = 2 * bias_slabs(layer)
    check(backward(False, False, True), BIAS_STATED, layer, layer.y + partial + case.K * layer.element)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tensor_cores_multiply_little_more_than_they_must(emulator: ModuleType, case: Conv2dCase) -> None:
    """Whole tiles are multiplied, their tails beyond the layer with them."""
    x, weight, _ = helpers.conv2d_inputs(case, torch.bfloat16, "channels_last", "cpu")
    layer = Layer(case, 2)
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    traffic = counted(emulator, lambda: simt.function("conv2d_forward")(x, weight, None, *geometry))
    tiles = ceil(layer.pixels / TILE) * ceil(layer.filters / TILE) * case.groups
    step = 32
    assert sum(moved["flops"] for moved in traffic.values()) == 2 * tiles * TILE**2 * ceil(layer.taps / step) * step
    assert sum(moved["flops"] for moved in traffic.values()) >= case.flops
