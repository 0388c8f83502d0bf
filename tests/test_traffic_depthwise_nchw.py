"""What the depthwise kernels of NCHW move, as the emulator counts it, is near the least that they can move; and that
all of it is right, strips of large planes and what is fused included.

The layers are not among tests/cases.py's. A block moves ranges of memory: all of a tile's planes in an image, or some
rows of a plane and those that they share with the next ones. The width of a row, which need not be a multiple of
anything, decides nothing but the ends of a range.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil, prod
from types import ModuleType

import helpers
import pytest
import torch
import torch.nn.functional as F
from cases import Conv2dCase
from tolerance import assert_exact
from traffic import SECTOR, SLACK, near, sectors, traffic

from cnnops.backends import simt

MULTIPROCESSORS = 3  # of the emulator's device


def layer(id: str, N: int, C: int, H: int, W: int, K: int, side: int, stride: int = 1, dilation: int = 1) -> Conv2dCase:
    pad = side // 2 * dilation
    return Conv2dCase(id, N, C, H, W, K, side, side, (stride,) * 2, (pad,) * 2, (dilation,) * 2, groups=C)


CASES = (
    layer("3x3", 2, 24, 28, 48, 24, 3),
    layer("3x3-s2", 2, 24, 29, 48, 24, 3, stride=2),
    layer("3x3-odd", 2, 20, 35, 33, 20, 3),
    layer("3x3-small-map", 4, 96, 7, 7, 96, 3),
    layer("3x3-s2-small-map", 4, 64, 13, 17, 64, 3, stride=2),
    layer("3x3-large-map", 1, 3, 90, 160, 3, 3),
    layer("3x3-s2-large-map", 1, 2, 131, 173, 2, 3, stride=2),
    layer("3x3-multiplier-2", 2, 16, 21, 23, 32, 3),
    layer("3x3-multiplier-3-large-map", 1, 2, 70, 101, 6, 3),
    layer("3x3-d2", 2, 16, 29, 31, 16, 3, dilation=2),
    layer("3x3-s2-d2", 2, 16, 35, 33, 16, 3, stride=2, dilation=2),
    layer("5x5", 2, 24, 31, 33, 24, 5),
    layer("5x5-s2", 2, 24, 33, 37, 24, 5, stride=2),
    layer("5x5-small-map", 4, 64, 7, 9, 64, 5),
    layer("7x7", 2, 16, 35, 33, 16, 7),
    layer("7x7-s2", 2, 16, 45, 47, 16, 7, stride=2),
    layer("7x7-large-map", 1, 2, 128, 112, 2, 7),
    layer("7x7-multiplier-2", 2, 16, 31, 29, 32, 7),
)
DTYPES = (torch.bfloat16, torch.float32)
PASSES = ("forward", "backward", "backward_input", "backward_weight")
ROWS = pytest.mark.parametrize(
    ("case", "dtype", "each"),
    [
        pytest.param(case, dtype, each, id=f"{case.id}-{str(dtype)[6:]}-{each}")
        for case in CASES
        for dtype in DTYPES
        for each in PASSES
    ],
)


@functools.cache
def counted(case: Conv2dCase, dtype: torch.dtype, each: str) -> dict[str, dict[str, int]]:
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "nchw", "cpu")
    dy = helpers.randn(case.output_shape, dtype, "cpu", helpers.generator(case.id))
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    if each == "forward":
        return traffic(lambda: simt.function("conv2d_forward")(x, weight, None, *geometry))
    wanted = (each != "backward_weight", each != "backward_input", False)
    return traffic(lambda: simt.function("conv2d_backward")(dy, x, weight, *geometry, *wanted))


@functools.cache
def cut(case: Conv2dCase, dtype: torch.dtype, each: str) -> tuple[int, int, int]:
    """Rows of y in a strip, channels of a tile, and the slabs of dweight: as the plan has them."""
    name = "backward_weight" if each == "backward" else each
    extents = *case.x_shape, case.K, case.R, case.S
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    plan: str = simt.function("conv2d_plan")(name, *extents, *geometry, dtype, False, False, 0, 0, 0)
    family, tile, *words = plan.split()
    assert family == "nchw", plan
    rows, planes = map(int, tile.split("x"))
    return rows, planes, int(words[words.index("slabs:") - 1])


def halo(case: Conv2dCase, rows: int) -> tuple[int, int]:
    """Rows of x that the strips of a plane's y read, and of dy that those of its x read."""
    (P, H), stride, pad = (case.output_shape[2], case.H), case.stride[0], case.padding[0]
    if rows >= P:
        return H, P
    reach, x, dy = (case.R - 1) * case.dilation[0], 0, 0
    for begin in range(0, P, rows):
        end = min(P, begin + rows)
        x += min(H, (end - 1) * stride - pad + reach + 1) - max(0, begin * stride - pad)
        dy += end - max(0, begin - reach // stride)
    return x, dy


@dataclass(frozen=True)
class Moved:
    read: int
    written: int


def slab_sectors(case: Conv2dCase, planes: int, slabs: int) -> int:
    """Bytes of the sectors that warps write slabs to. A tile's part of one begins anywhere in a sector."""
    warp, each = 32 * 4, case.R * case.S * case.K // case.C * 4
    return sum(
        sectors(at, min(at + warp, begin + size))
        for slab in range(slabs)
        for c in range(0, case.C, planes)
        for begin, size in [((slab * case.C + c) * each, min(planes, case.C - c) * each)]
        for at in range(begin, begin + size, warp)
    )


def stated(case: Conv2dCase, dtype: torch.dtype, each: str) -> Moved:
    """A strip's rows; weights for each block, and slabs; the rest once."""
    element, (rows, planes, slabs) = dtype.itemsize, cut(case, dtype, each)
    x, y, weights = (prod(shape) * element for shape in (case.x_shape, case.output_shape, case.weight_shape))
    rows_x, rows_dy = halo(case, rows)
    x_read, dy_read = x * rows_x // case.H, y * rows_dy // case.output_shape[2]
    if each in ("forward", "backward_input"):
        strips = case.N * ceil(case.output_shape[2] / rows)
        wanted = min(strips, ceil(8 * MULTIPROCESSORS / ceil(case.C / planes)))
        weights *= ceil(strips / ceil(strips / wanted))
        return Moved(x_read + weights, y) if each == "forward" else Moved(dy_read + weights, x)
    read, written = dy_read + x_read, slab_sectors(case, planes, slabs)
    return Moved(read, written) if each == "backward_weight" else Moved(read + weights * slabs, written + x)


def own(moved: dict[str, dict[str, int]]) -> dict[str, int]:
    """The pass's kernel, beside which there is at most the one that adds its slabs: nothing is copied."""
    others = {name for name in moved if name.startswith("depthwise_nchw_add_slabs_kernel")}
    [name] = set(moved) - others
    assert name.startswith(("depthwise_nchw_forward_kernel", "depthwise_nchw_backward_kernel")), name
    return moved[name]


@ROWS
def test_l2_moves_what_strips_read(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    moved, says = own(counted(case, dtype, each)), stated(case, dtype, each)
    near(f"{case.id} {each}: read", moved["global_read_sectors"] * SECTOR, says.read)
    near(f"{case.id} {each}: write", moved["global_write_sectors"] * SECTOR, says.written)


@ROWS
def test_strips_share_few_rows(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    rows_x, rows_dy = halo(case, cut(case, dtype, each)[0])
    assert rows_x <= 1.15 * case.H and rows_dy <= 1.15 * case.output_shape[2]


@ROWS
def test_dram_moves_everything_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    x, y, weight = (prod(s) * dtype.itemsize for s in (case.x_shape, case.output_shape, case.weight_shape))
    least = {
        "forward": x + weight + y,
        "backward": 2 * x + y + 2 * weight,
        "backward_input": y + weight + x,
        "backward_weight": x + y + weight,
    }[each]
    dram = sum(kernel["dram_read_bytes"] + kernel["dram_write_bytes"] for kernel in counted(case, dtype, each).values())
    assert dram <= SLACK * least, f"DRAM moves {dram} bytes, {dram / least:.2f} times the {least} that are needed"


@ROWS
def test_whole_sectors_are_moved(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype, each: str) -> None:
    """In rows of any width. But slabs of dweight, a small part of what moves, are in sectors of several tiles."""
    moved = own(counted(case, dtype, each))
    for direction in ("read", "write") if each != "backward_weight" else ("read",):
        moves = moved[f"global_{direction}_sectors"] * SECTOR
        assert moved[f"global_{direction}_bytes"] >= 0.9 * moves, f"{direction}s parts of sectors"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_both_gradients_read_dy_and_x_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    x, y, weight = (prod(s) * dtype.itemsize for s in (case.x_shape, case.output_shape, case.weight_shape))
    assert own(counted(case, dtype, "backward"))["dram_read_bytes"] <= 1.05 * (x + y) + weight


def test_the_bias_gradient_reads_dy_once(emulator: ModuleType) -> None:
    case = layer("3x3", 2, 24, 28, 48, 24, 3)
    x, weight, _ = helpers.conv2d_inputs(case, torch.bfloat16, "nchw", "cpu")
    dy = helpers.randn(case.output_shape, torch.bfloat16, "cpu", helpers.generator(case.id))
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    moved = traffic(lambda: simt.function("conv2d_backward")(dy, x, weight, *geometry, False, False, True))
    near("dy", moved["depthwise_nchw_bias_kernel<BFloat16>"]["global_read_sectors"] * SECTOR, dy.numel() * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_strips_are_exact(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    """In every pass, of small integers."""
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "nchw", "cpu", helpers.integers)
    dy = helpers.integers(case.output_shape, dtype, "cpu", helpers.generator(case.id))
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    bias = torch.ones(case.K, dtype=dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, case.stride, case.padding, case.dilation, case.groups)
    names = ("y", "dx", "dweight", "dbias")
    expected = dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy.double())), strict=True))
    forward, backward = simt.function("conv2d_forward"), simt.function("conv2d_backward")
    found = [("y", forward(x, weight, bias, *geometry))]
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        found += zip(names[1:], backward(dy, x, weight, *geometry, *wanted), strict=True)
    for name, ours in found:
        if ours is not None:
            assert ours.is_contiguous(), name
            assert_exact(ours, expected[name].to(dtype).double(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_strips_are_counted_once(emulator: ModuleType, case: Conv2dCase, dtype: torch.dtype) -> None:
    """By statistics and by pooled means."""
    x, weight, _ = helpers.conv2d_inputs(case, dtype, "nchw", "cpu")
    geometry = (*case.stride, *case.padding, *case.dilation, case.groups, 0)
    y, mean, m2 = simt.function("conv2d_statistics_forward")(x, weight, None, *geometry)
    helpers.check_moments(y, mean, m2)
    ones = torch.ones(case.K)
    norm = (None, None, torch.zeros(case.K), ones, ones, torch.zeros(case.K))
    y, pooled = simt.function("conv2d_bn_act_pooled_forward")(x, weight, *norm, *geometry, 0.0, "relu")
    helpers.check_pooled(y, pooled)
