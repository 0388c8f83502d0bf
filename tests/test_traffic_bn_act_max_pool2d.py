"""What bn_act_max_pool2d moves, as the emulator counts it, is near the least that it can move.

DRAM's part: forward, x for the statistics, then x, y and the offsets; backward, dy, offsets and x for the sums, then
the same and dx; with fixed statistics forward x is read once. L2's part: y's sweep reads x once for each tap of a
window inside the input, and the sweeps over x read dy and an offset for each of the same pairs of a window and a tap;
besides, what each thread loads of its channels' parameters. The shapes are not among tests/cases.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import ModuleType

import helpers
import pytest
import torch
from test_traffic_batch_norm import DRAM_SLACK, Moved, Sweep, assert_whole_sectors
from test_traffic_batch_norm import Case as NormCase
from traffic import SECTOR, near, traffic

from cnnops.backends import simt

SUMMING_BLOCKS, MAPPING_BLOCKS = 3 * 4, 3 * 8
"""Of a sweep, at most: the emulator's device has 3 multiprocessors."""


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: int
    padding: int
    activation: str = "relu"
    training: bool = True

    @property
    def id(self) -> str:
        R, S = self.kernel
        name = f"{'x'.join(map(str, self.shape))}-{R}x{S}-s{self.stride}-{self.activation}"
        return name + "-eval" * (not self.training)

    def along(self, axis: int) -> tuple[int, int]:
        """Outputs, and the taps of all of them that lie inside the input."""
        size, kernel = self.shape[2 + axis], self.kernel[axis]
        out = (size + 2 * self.padding - kernel) // self.stride + 1
        first = [p * self.stride - self.padding for p in range(out)]
        return out, sum(min(begin + kernel, size) - max(begin, 0) for begin in first)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return (*self.shape[:2], self.along(0)[0], self.along(1)[0])

    @property
    def taps(self) -> int:
        """Of all windows and channels."""
        return self.shape[0] * self.shape[1] * self.along(0)[1] * self.along(1)[1]

    @property
    def offset(self) -> int:
        """Bytes of one."""
        return 1 if prod(self.kernel) <= 256 else 4


CASES = (
    Case((2, 64, 44, 52), (3, 3), 2, 1),
    Case((2, 64, 38, 46), (3, 3), 2, 1, training=False),
    Case((3, 48, 30, 36), (2, 2), 2, 0, "none"),
    Case((2, 144, 20, 22), (3, 3), 1, 1, "silu"),
    Case((1, 272, 26, 24), (5, 2), 2, 1, "sigmoid"),
)
LONG = (
    Case((2, 32, 40, 44), (17, 16), 8, 8),
    Case((1, 272, 36, 38), (19, 17), 6, 6, "none"),
)
"""Their offsets take 4 bytes each, by as many of which a thread moves bfloat16, too. The positions of a warp lie in the
same windows, whose dy they read together."""


def every(*cases: Case) -> pytest.MarkDecorator:
    found = [
        pytest.param(case, dtype, id=f"{case.id}-{str(dtype)[6:]}")
        for case in cases
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return pytest.mark.parametrize(("case", "dtype"), found)


def moved(case: Case, dtype: torch.dtype) -> tuple[Moved, Moved]:
    """By the forward and the backward pass, with every result asked for that there is."""
    random = helpers.generator(case.id)
    x, dy = (
        helpers.laid_out(helpers.randn(shape, dtype, "cpu", random), "channels_last")
        for shape in (case.shape, case.y_shape)
    )
    weight, bias, mean, var = (helpers.randn(case.shape[1:2], torch.float32, "cpu", random) for _ in range(4))
    forward, backward = (simt.library.function(f"bn_act_max_pool2d_{each}") for each in ("forward", "backward"))
    window = (*case.kernel, case.stride, case.stride, case.padding, case.padding, 1, 1)
    fixed = case.training, 1e-5, case.activation, *window
    results: list[torch.Tensor] = []
    there = traffic(
        lambda: results.extend(
            forward(x, weight, bias, mean, var.square(), case.training, 0.1, *fixed[1:], False, True)
        )
    )
    y, used_mean, rstd, offsets = results
    assert y.shape == dy.shape
    back = traffic(lambda: backward(dy, offsets, x, weight, bias, used_mean, rstd, *fixed, True, True, True))
    return there, back


def floors(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    x, y = prod(case.shape) * dtype.itemsize, prod(case.y_shape) * (dtype.itemsize + case.offset)
    return (1 + case.training) * x + y, 2 * (x + y) + x


def stated(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The L2 bytes of each sweep."""
    x, y = prod(case.shape) * dtype.itemsize, prod(case.y_shape) * (dtype.itemsize + case.offset)

    def swept(shape: tuple[int, int, int, int], blocks: int, arrays: int, sums: int) -> int:
        """Parameters, by eight warps of each block, and sums of a block."""
        sweep = Sweep.of(NormCase(shape), dtype, "channels_last", blocks)
        loaded = sweep.columns * (64 if dtype.itemsize == 2 else 16)
        return sweep.slices * (sweep.tiles * 8 * loaded * arrays + sums * 4 * shape[1])

    gathered = case.taps * (dtype.itemsize + case.offset)
    maps = swept(case.y_shape, MAPPING_BLOCKS, 4, 0)
    found: dict[str, float] = {
        "bn_act_max_pool2d_forward_kernel": case.taps * dtype.itemsize + y + maps,
        "bn_act_max_pool2d_sums_kernel": x + gathered + swept(case.shape, SUMMING_BLOCKS, 4, 2),
        "bn_act_max_pool2d_backward_kernel": 2 * x
        + gathered
        + swept(case.shape, MAPPING_BLOCKS, 4 + 2 * case.training, 0),
    }
    return found | ({"batch_moments_kernel": x} if case.training else {})


@every(*CASES, *LONG)
def test_dram_moves_the_least(emulator: ModuleType, case: Case, dtype: torch.dtype) -> None:
    for name, kernels, floor in zip(("forward", "backward"), moved(case, dtype), floors(case, dtype), strict=True):
        dram = sum(counted["dram_read_bytes"] + counted["dram_write_bytes"] for counted in kernels.values())
        near(f"{name}: DRAM", dram, floor, DRAM_SLACK)


@every(*CASES)
def test_l2_moves_what_is_stated(emulator: ModuleType, case: Case, dtype: torch.dtype) -> None:
    expected, met = stated(case, dtype), set()
    for kernels in moved(case, dtype):
        for kernel, counted in kernels.items():
            if (stem := kernel.split("<")[0]) in expected:
                met.add(stem)
                sectors = counted["global_read_sectors"] + counted["global_write_sectors"]
                near(f"{kernel}: L2", sectors * SECTOR, expected[stem])
    assert met == set(expected)


@every(*CASES, *LONG)
def test_whole_sectors_are_moved(emulator: ModuleType, case: Case, dtype: torch.dtype) -> None:
    for name, kernels in zip(("forward", "backward"), moved(case, dtype), strict=True):
        assert_whole_sectors(name, kernels)
