"""What the convolutions move, as the emulator counts it, is near the least that they can move.

DRAM's part: inputs and outputs once, and slabs of partial sums written and read. L2's part: besides, what the tiles
read again, as each kernel states it below. The layers are not among tests/cases.py's, on which kernels are tuned.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import helpers
import pytest
import torch
from cases import Conv2dCase
from traffic import SECTOR, SLACK, near, pieces, sectors, traffic

from cnnops.backends import simt

MULTIPROCESSORS = 3  # of the emulator's device


CASES = (
    Conv2dCase("3x3", 2, 64, 14, 15, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("3x3-64-to-64", 2, 64, 18, 16, 64, 3, 3, padding=(1, 1)),
    Conv2dCase("3x3-s2", 2, 64, 22, 20, 128, 3, 3, stride=(2, 2), padding=(1, 1)),
    Conv2dCase("3x3-few-pixels", 1, 128, 6, 7, 64, 3, 3, padding=(1, 1)),
    Conv2dCase("3x3-grouped", 2, 128, 11, 13, 128, 3, 3, padding=(1, 1), groups=2),
    Conv2dCase("3x3-groups-of-8", 2, 64, 13, 14, 64, 3, 3, padding=(1, 1), groups=8),
    Conv2dCase("5x3-dilated", 1, 48, 22, 19, 96, 5, 3, padding=(4, 2), dilation=(2, 2)),
    Conv2dCase("1x1", 3, 96, 13, 14, 80, 1, 1),
    Conv2dCase("1x1-wide", 2, 64, 14, 16, 256, 1, 1),
    Conv2dCase("1x1-s2", 2, 64, 20, 22, 128, 1, 1, stride=(2, 2)),
    Conv2dCase("3x3-stem", 2, 3, 24, 32, 48, 3, 3, padding=(1, 1)),
    Conv2dCase("7x7-stem-s2", 1, 3, 40, 48, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
)


@dataclass(frozen=True)
class Plan:
    """How the native plan cuts a pass."""

    kernel: str
    block_m: int
    block_n: int
    cluster: int
    slabs: int

    @classmethod
    def of(cls, line: str) -> Plan:
        found = re.search(r": (\w+) (\d+)x(\d+) \d+ stages, clusters of (\d+), (\d+) slabs: ", line)
        assert found, line
        return cls(found[1], *map(int, found.groups()[1:]))


@dataclass(frozen=True)
class Variant:
    """What the kernels of a layer depend on beside its geometry."""

    id: str
    dtype: torch.dtype
    architecture: int
    tf32: bool = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        switch = helpers.tf32() if self.tf32 else contextlib.nullcontext()
        with helpers.variant("simt-sm80" if self.architecture == 80 else "simt"), switch:
            yield


FLOAT = Variant("float32-sm90", torch.float32, 90)
TF32 = Variant("tf32-sm80", torch.float32, 80, tf32=True)
PORTABLE = Variant("bfloat16-sm80", torch.bfloat16, 80)
HOPPER = Variant("bfloat16-sm90", torch.bfloat16, 90)
VARIANTS = (FLOAT, TF32, PORTABLE, HOPPER)
PASSES = ("forward", "backward_input", "backward_weight", "backward_bias")


@dataclass(frozen=True)
class Layer:
    """A case in a variant: the bytes of its tensors, what taps read of them, and how each pass is cut."""

    case: Conv2dCase
    variant: Variant

    @property
    def id(self) -> str:
        return f"{self.case.id}-{self.variant.id}"

    @functools.cached_property
    def plans(self) -> dict[str, Plan]:
        with self.variant.used():
            problem = helpers.problem_of("conv2d_forward", self.case, self.variant.dtype, "channels_last", "cpu")
            lines = simt.plan("conv2d_forward", problem) + simt.plan("conv2d_backward", problem)
        return {line.split(" ")[0]: Plan.of(line) for line in lines}

    @property
    def element(self) -> int:
        return self.variant.dtype.itemsize

    @property
    def x(self) -> int:
        return self.case.N * self.case.C * self.case.H * self.case.W * self.element

    @property
    def y(self) -> int:
        return self.pixels * self.case.K * self.element

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
        return self.case.R * self.case.S

    def reads(self, axis: int) -> list[int]:
        """The places of x that outputs read along one axis, one for each output and tap; those beside x left out."""
        case = self.case
        return [
            at
            for p in range(case.output_shape[2 + axis])
            for r in range((case.R, case.S)[axis])
            if 0
            <= (at := p * case.stride[axis] - case.padding[axis] + r * case.dilation[axis])
            < case.x_shape[2 + axis]
        ]

    @property
    def reached_x(self) -> int:
        """The part of x that any output reads."""
        return self.case.N * len(set(self.reads(0))) * len(set(self.reads(1))) * self.case.C * self.element

    @property
    def pairs(self) -> int:
        """Of an output's pixel and an input's that meet in a tap of the filter."""
        return self.case.N * len(self.reads(0)) * len(self.reads(1))

    @property
    def tapped_x(self) -> int:
        """x as its taps read it, once."""
        return self.pairs * self.case.C * self.element

    @property
    def tapped_dy(self) -> int:
        return self.pairs * self.case.K * self.element

    @property
    def classes(self) -> list[tuple[int, int]]:
        """Of dx's pixels, those at one residue modulo the stride: how many there are, and the taps that reach them."""
        case = self.case

        def along(axis: int) -> list[tuple[int, int]]:
            stride, padding, dilation = case.stride[axis], case.padding[axis], case.dilation[axis]
            extent, taps = case.x_shape[2 + axis], (case.R, case.S)[axis]
            return [
                (ceil((extent - at) / stride), sum((at + padding - r * dilation) % stride == 0 for r in range(taps)))
                for at in range(min(stride, extent))
            ]

        return [(case.N * h * w, taps_h * taps_w) for h, taps_h in along(0) for w, taps_w in along(1)]


@dataclass(frozen=True)
class Moved:
    """Bytes between L2 and the multiprocessors, in whole sectors."""

    read: float
    written: float


def weight_slabs(layer: Layer) -> int:
    """Bytes of floats that backward_weight's kernels hand to add_slabs."""
    return layer.plans["backward_weight"].slabs * layer.weights * 4


def forward_slabs(layer: Layer) -> int:
    plan = layer.plans["forward"]
    return plan.slabs * layer.pixels * layer.case.K * 4 if plan.kernel == "portable" and plan.slabs > 1 else 0


def bias_slabs(layer: Layer) -> int:
    """As many as give each multiprocessor four blocks of 32 filters, each of at least 128 pixels."""
    each = ceil(layer.pixels / min(ceil(4 * MULTIPROCESSORS / ceil(layer.case.K / 32)), ceil(layer.pixels / 128)))
    return ceil(layer.pixels / each) * layer.case.K * 4


def forward(layer: Layer) -> Moved:
    """A tile reads its taps of x for each block_n filters, and its filters for each block_m pixels."""
    plan = layer.plans["forward"]
    read = layer.tapped_x * ceil(layer.filters / plan.block_n) + layer.weight * ceil(layer.pixels / plan.block_m)
    return Moved(read, forward_slabs(layer) or layer.y)


def backward_input(layer: Layer) -> Moved:
    """As forward, of dy and of the filters at the taps of each class of pixels."""
    plan = layer.plans["backward_input"]
    filters = sum(ceil(pixels / plan.block_m) * taps for pixels, taps in layer.classes) * layer.weight / layer.taps
    return Moved(layer.tapped_dy * ceil(layer.channels / plan.block_n) + filters, layer.x)


def backward_weight(layer: Layer) -> Moved:
    """dy is read for each block_n taps and channels, x's taps for each block_m filters. Slabs are of float."""
    plan = layer.plans["backward_weight"]
    read = layer.y * ceil(layer.taps * layer.channels / plan.block_n)
    return Moved(read + layer.tapped_x * ceil(layer.filters / plan.block_m), weight_slabs(layer))


def squares(layer: Layer) -> int:
    """A pack's filters, fetched tap by tap: of one tap all filters have little, in sectors of their own if they are
    long."""
    filter_bytes = layer.taps * layer.channels * layer.element
    return layer.case.K * layer.taps * min(sectors(0, layer.channels * layer.element), filter_bytes)


def packed_forward(layer: Layer) -> Moved:
    """x for each tap, and the filters for each 128 pixels."""
    return Moved(layer.tapped_x + squares(layer) * ceil(layer.pixels / 128), layer.y)


def packed_backward_input(layer: Layer) -> Moved:
    filters = sum(ceil(pixels / 128) * taps for pixels, taps in layer.classes) * squares(layer) / layer.taps
    return Moved(layer.tapped_dy + filters, layer.x)


def packed_backward_weight(layer: Layer) -> Moved:
    """dy for each four taps, x for each tap. A filter's floats are written four taps at a time."""
    rows = layer.plans["backward_weight"].slabs * layer.case.K
    slabs = pieces(rows, layer.taps * layer.channels, 4 * layer.channels, 4)
    return Moved(layer.y * ceil(layer.taps / 4) + layer.tapped_x, slabs)


def halo_of_stem(layer: Layer) -> int:
    """x as tiles of 8 x 8 outputs read it: the rows of a tile's halo, each in whole sectors."""
    case = layer.case
    _, _, P, Q = case.output_shape

    def spans(axis: int, positions: int, scale: int) -> list[range]:
        reach = 7 * case.stride[axis] + ((case.R, case.S)[axis] - 1) * case.dilation[axis] + 1
        firsts = [p * case.stride[axis] - case.padding[axis] for p in range(0, positions, 8)]
        return [range(max(first, 0) * scale, min(first + reach, case.x_shape[2 + axis]) * scale) for first in firsts]

    rows = sum(len(span) for span in spans(0, P, 1))
    columns = sum(sectors(span.start, span.stop) for span in spans(1, Q, case.C * layer.element))
    return case.N * rows * columns


def stem_forward(layer: Layer) -> Moved:
    """The halo for each 64 filters; the filters for each block, of which four are on a multiprocessor, 32 elements at a
    time wherever they begin."""
    _, _, P, Q = layer.case.output_shape
    filter_tiles = ceil(layer.case.K / 64)
    blocks = min(layer.case.N * ceil(P / 8) * ceil(Q / 8), ceil(4 * MULTIPROCESSORS / filter_tiles))
    filters = pieces(layer.case.K, layer.taps * layer.channels, 32, layer.element)
    return Moved(halo_of_stem(layer) * filter_tiles + filters * blocks, layer.y)


def stem_backward_weight(layer: Layer) -> Moved:
    return Moved(halo_of_stem(layer) * ceil(layer.case.K / 64) + layer.y, weight_slabs(layer))


class Divided(NamedTuple):
    """What a divided wave of Hopper's tiles has beside whole ones."""

    slabs: int  # bytes of partial sums
    parts: int  # that blocks leave there, each of which is counted
    counters: int


def divided(layer: Layer, each: str) -> Divided:
    """The steps of the last wave's tiles, dealt evenly: a worker may have a part of a tile, or parts of several."""
    plan = layer.plans[each]
    if plan.kernel != "wgmma" or plan.slabs == 1 or each == "backward_weight":
        return Divided(0, 0, 0)
    channels, columns, classes = layer.channels, layer.filters, [(layer.pixels, layer.taps)]
    if each == "backward_input":
        channels, columns, classes = columns, channels, sorted(layer.classes, key=lambda at: -at[1])
    costs: list[int] = []
    for pixels, taps in classes:
        tiles = ceil(pixels / (128 * plan.cluster)) * layer.case.groups * ceil(columns / plan.block_n)
        costs += [max(taps * ceil(channels / 64), 1)] * tiles
    workers = ceil(MULTIPROCESSORS / plan.cluster)
    tail = costs[len(costs) - len(costs) % workers :]
    sharers = min(workers, sum(tail) // 4)
    share, longer = divmod(sum(tail), sharers)
    shares = {sharer * share + min(sharer, longer) for sharer in range(sharers + 1)}
    ends = set(itertools.accumulate(tail, initial=0))
    parts = sum(not {begin, end} <= ends for begin, end in itertools.pairwise(sorted(shares | ends))) * plan.cluster
    return Divided(parts * 128 * plan.block_n * 4, parts, len(tail) * plan.cluster)


def hopper_forward(layer: Layer) -> Moved:
    """As the portable one, but the blocks of a cluster share their filters. Parts of a divided tile are added."""
    plan, slabs = layer.plans["forward"], divided(layer, "forward").slabs
    read = layer.tapped_x * ceil(layer.filters / plan.block_n)
    return Moved(read + layer.weight * ceil(layer.pixels / (128 * plan.cluster)) + slabs, layer.y + slabs)


def hopper_backward_input(layer: Layer) -> Moved:
    plan, slabs = layer.plans["backward_input"], divided(layer, "backward_input").slabs
    filters = sum(ceil(pixels / (128 * plan.cluster)) * taps for pixels, taps in layer.classes)
    read = layer.tapped_dy * ceil(layer.channels / plan.block_n) + filters * layer.weight / layer.taps
    return Moved(read + slabs, layer.x + slabs)


def halo_tiles(layer: Layer, each: str) -> tuple[int, int, int]:
    """An image's tiles, each of 256 pixels, and their rows and columns."""
    H, W = layer.case.output_shape[2:] if each == "forward" else layer.case.x_shape[2:]
    tiles, columns = min((ceil(H / (256 // columns)) * ceil(W / columns), columns) for columns in (8, 16, 32))
    return tiles, 256 // columns, columns


def halo(layer: Layer, each: str) -> int:
    """What tiles read: for each column of the filter, the pixels that its taps reach; and the filters for each block."""
    case = layer.case
    tiles, rows, columns = halo_tiles(layer, each)
    read, written = case.x_shape[2:], case.output_shape[2:]
    R, S, (pad_h, pad_w) = case.R, case.S, case.padding
    if each == "backward_input":
        read, written, pad_h, pad_w = written, read, R - 1 - pad_h, S - 1 - pad_w

    def inside(first: int, count: int, extent: int) -> int:
        return max(0, min(first + count, extent) - max(first, 0))

    down = sum(inside(p - pad_h, rows + R - 1, read[0]) for p in range(0, written[0], rows))
    across = sum(inside(q - pad_w + s, columns, read[1]) for q in range(0, written[1], columns) for s in range(S))
    return case.N * down * across * 64 * layer.element + layer.weight * min(case.N * tiles, MULTIPROCESSORS)


def hopper_taps(layer: Layer) -> Moved:
    """dy for each 64 channels; x three times, with the halo of each box of rows, for the filters of a cluster."""
    case, plan = layer.case, layer.plans["backward_weight"]
    P = case.output_shape[2]
    step = 2 if P % 2 == 0 else 1
    rows, halo_rows = next(
        (rows, halo_rows)
        for most in range(min(P, 14), 0, -1)
        for rows in [ceil(ceil(P / ceil(P / most)) / step) * step]
        for halo_rows in [(rows - 1) * case.stride[0] + 2 * case.dilation[0] + 1]
        if (rows + 3 * halo_rows) * (3 - step) <= 75  # KB, of which a block has three
    )
    firsts = [p * case.stride[0] - case.padding[0] for p in range(0, P, rows)]
    down = sum(0 <= h < case.H for first in firsts for h in range(first, first + halo_rows))
    x = case.N * down * len(layer.reads(1)) * layer.channels * layer.element
    read = layer.y * ceil(layer.channels / 64) + x * ceil(case.K / 64) / plan.cluster
    return Moved(read, weight_slabs(layer))


def hopper_columns(layer: Layer) -> Moved:
    """dy for each block_n / 64 chunks, each of a tap and up to 64 channels; x's taps for each block_m filters."""
    plan = layer.plans["backward_weight"]
    read = layer.y * ceil(layer.taps * ceil(layer.channels / 64) / (plan.block_n // 64))
    return Moved(read + layer.tapped_x * ceil(layer.filters / plan.block_m), weight_slabs(layer))


STATED: dict[str, dict[str, Callable[[Layer], Moved]]] = {
    "forward": {
        r"conv2d_forward_kernel<.*>": forward,
        r"conv2d_add_slabs_kernel<.*>": lambda layer: Moved(forward_slabs(layer), layer.y),
        r"conv2d_packed_forward_kernel<.*>": packed_forward,
        r"conv2d_stem_forward_kernel<.*>": stem_forward,
        r"conv2d_forward_sm90_kernel<.*>": hopper_forward,
        r"clear_counters_kernel": lambda layer: Moved(0, sectors(0, divided(layer, "forward").counters * 4)),
        r"conv2d_forward_halo_sm90_kernel<.*>": lambda layer: Moved(halo(layer, "forward"), layer.y),
    },
    "backward_input": {
        r"conv2d_backward_input_kernel<.*>": backward_input,
        r"conv2d_packed_backward_input_kernel<.*>": packed_backward_input,
        r"conv2d_backward_input_sm90_kernel<.*>": hopper_backward_input,
        r"clear_counters_kernel": lambda layer: Moved(0, sectors(0, divided(layer, "backward_input").counters * 4)),
        r"conv2d_backward_input_halo_sm90_kernel<.*>": lambda layer: Moved(halo(layer, "backward_input"), layer.x),
    },
    "backward_weight": {
        r"conv2d_backward_weight_kernel<.*>": backward_weight,
        r"conv2d_packed_backward_weight_kernel<.*>": packed_backward_weight,
        r"conv2d_stem_backward_weight_kernel<.*>": stem_backward_weight,
        r"conv2d_backward_weight_taps_kernel<.*>": hopper_taps,
        r"conv2d_backward_weight_columns_kernel<.*>": hopper_columns,
        r"add_slabs_kernel<.*>": lambda layer: Moved(weight_slabs(layer), layer.weight),
    },
    "backward_bias": {
        r"conv2d_backward_bias_kernel<.*>": lambda layer: Moved(
            pieces(layer.pixels, layer.case.K, 32, layer.element), bias_slabs(layer)
        ),
        r"add_slabs_kernel<.*>": lambda layer: Moved(bias_slabs(layer), layer.case.K * layer.element),
    },
}
"""What each kernel of a pass moves, by its name."""


def slabs(layer: Layer, each: str) -> int:
    """Bytes of partial sums, which are written and read."""
    if each == "backward_weight":
        return weight_slabs(layer)
    if each == "backward_bias":
        return bias_slabs(layer)
    return (forward_slabs(layer) if each == "forward" else 0) + divided(layer, each).slabs


def floor(layer: Layer, each: str) -> int:
    """What DRAM moves at least: the parts of the inputs that are read, the output, and slabs."""
    tensors = {
        "forward": layer.reached_x + layer.weight + layer.y,
        "backward_input": layer.y + layer.weight + layer.x,
        "backward_weight": layer.y + layer.reached_x + layer.weight,
        "backward_bias": layer.y + layer.case.K * layer.element,
    }
    return tensors[each] + 2 * slabs(layer, each)


@functools.cache
def counted(layer: Layer, each: str) -> dict[str, dict[str, int]]:
    """What each kernel of a pass moved."""
    case, variant = layer.case, layer.variant
    x, weight, _ = helpers.conv2d_inputs(case, variant.dtype, "channels_last", "cpu")
    dy = helpers.laid_out(
        helpers.randn(case.output_shape, variant.dtype, "cpu", helpers.generator(case.id)), "channels_last"
    )
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)

    def run() -> None:
        if each == "forward":
            simt.function("conv2d_forward")(x, weight, None, *geometry)
        else:
            wanted = [each == name for name in PASSES[1:]]
            simt.function("conv2d_backward")(dy, x, weight, *geometry, *wanted)

    with variant.used():
        return traffic(run)


def fits_the_design(layer: Layer, each: str) -> bool:
    """All but the gradient of an image, which nobody trains: its few channels are handled one by one."""
    return layer.case.C > 4 or each != "backward_input"


LAYERS = [Layer(case, variant) for case in CASES for variant in VARIANTS]
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)


@EVERY_LAYER
@pytest.mark.parametrize("each", PASSES)
def test_a_pass_moves_little_more_than_it_must(layer: Layer, each: str) -> None:
    traffic = counted(layer, each)
    assert traffic
    for kernel, moved in traffic.items():
        stated = [says for name, says in STATED[each].items() if re.fullmatch(name, kernel)]
        assert stated, f"{kernel} moves data, and nobody states how much"
        if not fits_the_design(layer, each):
            continue
        says = stated[0](layer)
        near(f"{kernel} reads", moved["global_read_sectors"] * SECTOR, says.read)
        near(f"{kernel} writes", moved["global_write_sectors"] * SECTOR, says.written)
    dram = sum(moved["dram_read_bytes"] + moved["dram_write_bytes"] for moved in traffic.values())
    least = floor(layer, each)
    assert dram <= SLACK * least, f"DRAM moves {dram} bytes, {dram / least:.2f} times the {least} that are needed"
    assert dram >= least, "whatever is needed is moved, or the counting is wrong"


IN_VECTORS = r"conv2d_(forward|backward_input|backward_weight)_((halo_)?sm90_|taps_|columns_|)kernel<.*>"
"""The kernels that copy 16 bytes at a time, by themselves or by TMA, and write as much."""


OF_WHOLE_SECTORS = [layer for layer in LAYERS if layer.channels % 16 == layer.filters % 16 == 0]


@pytest.mark.parametrize("layer", OF_WHOLE_SECTORS, ids=lambda layer: layer.id)
@pytest.mark.parametrize("each", PASSES[:3])
def test_whole_sectors_are_moved(layer: Layer, each: str) -> None:
    """What lies beside the channels of a pixel or of a tap is not fetched with them, nor written by halves."""
    kernels = {name: moved for name, moved in counted(layer, each).items() if re.fullmatch(IN_VECTORS, name)}
    assert kernels
    for kernel, moved in kernels.items():
        # A part of a divided tile is counted by an atomic of 4 bytes.
        counters = divided(layer, each).parts * (SECTOR - 4)
        for direction in ("read", "write"):
            beside = moved[f"global_{direction}_sectors"] * SECTOR - moved[f"global_{direction}_bytes"]
            assert beside <= counters, f"{kernel} moves {beside} bytes of sectors that it does not {direction}"


def pixels_of_slabs(layer: Layer, depth: int) -> int:
    """The pixels that backward_weight sums over, each slab's rounded up to whole steps."""
    most = ceil(layer.pixels / layer.plans["backward_weight"].slabs)
    slabs = [min(most, layer.pixels - begin) for begin in range(0, layer.pixels, most)]
    return sum(ceil(slab / depth) * depth for slab in slabs)


def packed_products(layer: Layer, each: str) -> int:
    """Those of the fragments that have anything of a group: a pack's groups lie along the diagonal of its tile."""
    slots = 64 // layer.element  # channels or filters of a pack
    groups = slots // max(layer.channels, layer.filters)
    packs = ceil(layer.case.groups / groups)

    def meeting(step_a: int, slots_a: int, step_b: int, slots_b: int) -> int:
        return sum(
            a // slots_a <= (b + step_b - 1) // slots_b and b // slots_b <= (a + step_a - 1) // slots_a
            for a in range(0, slots, step_a)
            for b in range(0, slots, step_b)
        )

    if each == "backward_weight":
        fragments = meeting(16, layer.filters, 8, layer.channels) * 16 * 8
        return packs * ceil(layer.taps / 4) * 4 * fragments * pixels_of_slabs(layer, slots)
    depth = slots // 2
    if each == "forward":
        fragments, classes = meeting(8, layer.filters, depth, layer.channels), [(layer.pixels, layer.taps)]
    else:
        fragments, classes = meeting(8, layer.channels, depth, layer.filters), layer.classes
    return packs * fragments * 8 * depth * sum(ceil(pixels / 128) * 128 * taps for pixels, taps in classes)


def multiplied(layer: Layer, each: str) -> int:
    """Products that a pass's tiles are made of: whole ones, their tails beyond the layer with them."""
    case, plan = layer.case, layer.plans[each]
    _, _, P, Q = case.output_shape
    hopper = plan.kernel in ("wgmma", "halo")
    depth = 64 if hopper else 64 // layer.element  # of the sum, in one step
    block_m = plan.block_m * (plan.cluster if hopper else 1)
    tile = block_m * plan.block_n

    def whole(size: int, step: int) -> int:
        return ceil(size / step) * step

    def of_pixels(columns: int, terms: int, classes: Sequence[tuple[int, int]]) -> int:
        across = ceil(columns / plan.block_n) * case.groups * tile
        if hopper:
            return across * sum(ceil(pixels / block_m) * taps * whole(terms, depth) for pixels, taps in classes)
        return across * sum(ceil(pixels / block_m) * whole(taps * terms, depth) for pixels, taps in classes)

    if plan.kernel == "packed":
        return packed_products(layer, each)
    if plan.kernel == "stem":
        tiles = case.N * ceil(P / 8) * ceil(Q / 8) * ceil(case.K / 64)
        sums = whole(layer.taps * case.C, depth) if each == "forward" else plan.block_n
        return tiles * 64 * 64 * sums
    if plan.kernel == "halo":
        return case.N * halo_tiles(layer, each)[0] * tile * layer.taps * 64
    if each == "forward":
        return of_pixels(layer.filters, layer.channels, [(layer.pixels, layer.taps)])
    if each == "backward_input":
        return of_pixels(layer.channels, layer.filters, layer.classes)
    if plan.kernel == "wgmma" and plan.block_n == 9 * 64:  # groups of eight columns, of two rows or else two images
        pairs = case.N * P // 2 if P % 2 == 0 else ceil(case.N / 2) * P
        return pairs * 16 * ceil(Q / 8) * ceil(case.K / 64) * ceil(layer.channels / 64) * 64 * 9 * 64
    if plan.kernel == "wgmma":
        columns = layer.taps * ceil(layer.channels / 64) * 64
    else:
        columns = layer.taps * layer.channels
    pixels = whole(layer.pixels, 64) if hopper else pixels_of_slabs(layer, depth)
    return ceil(layer.filters / plan.block_m) * ceil(columns / plan.block_n) * case.groups * tile * pixels


@EVERY_LAYER
@pytest.mark.parametrize("each", PASSES[:3])
def test_tensor_cores_multiply_little_more_than_they_must(layer: Layer, each: str) -> None:
    flops = sum(moved["flops"] for moved in counted(layer, each).values())
    if layer.variant is FLOAT:
        assert flops == 0, "exact floats are for the CUDA cores"
        return
    assert flops == 2 * multiplied(layer, each)
    if each != "backward_input":  # which multiplies nothing with the padding's outputs
        assert flops >= layer.case.flops


@pytest.mark.parametrize("each", PASSES)
def test_every_statement_is_of_a_kernel_that_runs(each: str) -> None:
    ran = {kernel for case in CASES for variant in VARIANTS for kernel in counted(Layer(case, variant), each)}
    assert [name for name in STATED[each] if not any(re.fullmatch(name, kernel) for kernel in ran)] == []
