"""What batch norm moves, as the emulator counts it, is near the least that it can move.

DRAM's part: forward, x for the statistics, then x (+ residual) + y; backward, dy and x (+ y or residual) for the sums,
then the same + dx (+ dresidual); with fixed statistics, x (+ residual) + y, and backward the two sweeps. In one launch,
for tensors that L2 holds, each tensor once. L2's part: the sweeps of either form, and what each thread loads of its
channels' parameters. The shapes are not among tests/cases.py's. Planes of NCHW that are no whole sectors are moved by
16 bytes as all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd, prod
from types import ModuleType

import helpers
import pytest
import torch
from traffic import SECTOR, near, traffic

from cnnops.backends import simt

DRAM_SLACK = 1.15
LEAST_EFFICIENCY = 0.9
BLOCKS = {"batch_moments_kernel": 3 * 3, "batch_norm_sums_kernel": 3 * 4}
MAPPING_BLOCKS = 3 * 8
"""Of a sweep that sums up and of others, about: the emulator's device has 3 multiprocessors."""

SWEEPS = {
    "forward": ("batch_moments_kernel", "batch_norm_forward_kernel"),
    "backward": ("batch_norm_sums_kernel", "batch_norm_backward_kernel"),
}

Moved = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    activation: str = "relu"
    residual: bool = False
    training: bool = True

    @property
    def id(self) -> str:
        extras = ("residual",) * self.residual + ("eval",) * (not self.training)
        return "-".join(("x".join(map(str, self.shape)), self.activation, *extras))


CASES = (
    Case((3, 64, 18, 20)),
    Case((3, 48, 28, 16), "none"),
    Case((5, 144, 12, 12), "silu"),
    Case((3, 80, 16, 18), "relu", residual=True),
    Case((2, 272, 16, 12), "hardswish", residual=True),
    Case((3, 96, 16, 16), "relu6", training=False),
)
PLANES = (
    Case((33, 40, 7, 7)),
    Case((3, 24, 35, 33), "silu"),
    Case((5, 48, 13, 17), "relu", residual=True),
    Case((4, 64, 14, 14), "hardswish", residual=True),
    Case((24, 21, 9, 11), "relu6", training=False),
)
"""Of no whole sectors."""
EVERY = pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        pytest.param(case, dtype, layout, id=f"{case.id}-{str(dtype)[6:]}-{layout}")
        for case in CASES + PLANES
        for dtype in (torch.bfloat16, torch.float32)
        for layout in ("channels_last", "nchw")
        if layout == "nchw" or case not in PLANES
    ],
)


def moved(emulator: ModuleType, case: Case, dtype: torch.dtype, layout: str, l2_bytes: int) -> tuple[Moved, Moved]:
    """By the forward and the backward pass, with every result asked for that there is, on a device of so much L2."""
    emulator.set_device(l2_bytes=l2_bytes)
    random = helpers.generator(case.id)
    C = case.shape[1]
    x, dy, other = (helpers.laid_out(helpers.randn(case.shape, dtype, "cpu", random), layout) for _ in range(3))
    weight, bias, mean, var = (helpers.randn((C,), torch.float32, "cpu", random) for _ in range(4))
    residual = other if case.residual else None
    forward, backward = (simt.library.function(f"batch_norm_act_{each}") for each in ("forward", "backward"))
    results: list[torch.Tensor] = []
    there = traffic(
        lambda: results.extend(
            forward(x, weight, bias, residual, mean, var.square(), case.training, 0.1, 1e-5, case.activation)
        )
    )
    y, used_mean, rstd = results
    read_off_y = case.residual and case.activation == "relu"
    kept = (None, y) if read_off_y else (residual, None)
    back = traffic(
        lambda: backward(
            *(dy, x, weight, bias, *kept, used_mean, rstd, case.training, 1e-5, case.activation),
            *(True, True, True, case.residual),
        )
    )
    return there, back


def tensors(case: Case) -> dict[str, tuple[int, int]]:
    """How many tensors like x each kernel that sweeps over x reads and writes."""
    fused = case.residual and case.activation != "none"
    reads_x = case.training or case.activation != "none"
    sweeps = {
        "batch_norm_forward_kernel": (1 + case.residual, 1),
        "batch_norm_sums_kernel": (2 + fused, 0),
        "batch_norm_backward_kernel": (1 + reads_x + fused, 1 + case.residual),
    }
    return {"batch_moments_kernel": (1, 0), **sweeps} if case.training else sweeps


def bytes_of(case: Case, dtype: torch.dtype) -> int:
    return prod(case.shape) * dtype.itemsize


def in_planes(case: Case, dtype: torch.dtype, layout: str) -> bool:
    return layout == "nchw" and prod(case.shape[2:]) * dtype.itemsize % SECTOR > 0


@dataclass(frozen=True)
class Sweep:
    """How make_sweep of csrc/cuda/batch_norm_sums.cu cuts x."""

    columns: int
    tiles: int
    slices: int

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, layout: str, blocks: int) -> Sweep:
        N, C, H, W = case.shape
        width = 16 // dtype.itemsize
        units, count = (C // width, N * H * W) if layout == "channels_last" else (C, N * H * W // width)
        columns = 1 if layout == "nchw" else units if units <= 32 else ceil(units / ceil(units / 32) / 2) * 2
        lanes = 1
        if in_planes(case, dtype, layout):
            pieces = ceil((H * W + width - gcd(H * W, width)) / width)
            count = N * pieces
            if pieces <= 32:
                lanes, tiles = pieces, ceil(C / (min(128, 256 // pieces) // 8 * 8))
                columns = min(C, ceil(C / tiles / 8) * 8)
        rows, tiles = 256 // (columns * lanes) * lanes, ceil(units / columns)
        least = max(ceil(count / max(1, blocks // tiles)), min(count, max(128, rows * 4)))
        return cls(columns, tiles, ceil(count / (ceil(least / rows) * rows)))


def stated(case: Case, dtype: torch.dtype, layout: str, kernel: str, blocks: int = 0) -> float:
    """The L2 bytes of a sweep by about so many blocks, or as many as its own kernel has: beside the tensors, the parameters that each warp loads, and the sums of a block.

    In [N,L,C] a thread loads an array's values for its channels by 16 bytes, with neighbours 16 or 32 bytes away; in
    [N,C,L] one number for the whole warp. Where planes are no whole sectors, a map's warp loads them for each 512 bytes
    of x: those of the planes that its pieces begin in, and of those that they end in.
    """
    arrays = {"batch_moments_kernel": 0, "batch_norm_backward_kernel": 4 + 2 * case.training}.get(kernel, 4)
    sweep = Sweep.of(case, dtype, layout, blocks or BLOCKS.get(kernel, MAPPING_BLOCKS))
    if layout == "channels_last":
        loaded, left = sweep.columns * (64 if dtype.itemsize == 2 else 16), 4
    else:
        loaded, left = SECTOR, SECTOR if sweep.columns == 1 else 4
    parameters: float = sweep.tiles * sweep.slices * 8 * loaded * arrays
    if in_planes(case, dtype, layout) and kernel not in BLOCKS:
        planes = 512 / (prod(case.shape[2:]) * dtype.itemsize)
        parameters = arrays * bytes_of(case, dtype) / 512 * (1 + min(1, planes)) * (SECTOR + 4 * planes)
    sums = 2 * sweep.slices * case.shape[1] * left if kernel in BLOCKS else 0
    return sum(tensors(case)[kernel]) * bytes_of(case, dtype) + parameters + sums


def stated_together(case: Case, dtype: torch.dtype, layout: str, name: str) -> float:
    """The same of one launch: both sweeps, cut alike, and between them the sums of all slices, read again."""
    summing, mapping = SWEEPS[name]
    blocks = BLOCKS[summing]
    sums = 2 * Sweep.of(case, dtype, layout, blocks).slices * case.shape[1] * 4
    return stated(case, dtype, layout, summing) + sums + stated(case, dtype, layout, mapping, blocks)


def assert_whole_sectors(name: str, kernels: Moved) -> None:
    for way in ("read", "write"):
        used = sum(counted[f"global_{way}_bytes"] for counted in kernels.values())
        fetched = sum(counted[f"global_{way}_sectors"] for counted in kernels.values()) * SECTOR
        assert used >= LEAST_EFFICIENCY * fetched, f"{name}: {used / fetched:.2f} of the sectors of its {way}s"


@EVERY
def test_each_pass_moves_the_least(emulator: ModuleType, case: Case, dtype: torch.dtype, layout: str) -> None:
    for name, kernels in zip(("forward", "backward"), moved(emulator, case, dtype, layout, 0), strict=True):
        sweeps = {
            kernel.split("<")[0]: counted
            for kernel, counted in kernels.items()
            if kernel.split("<")[0] in tensors(case)
        }
        assert len(sweeps) == (2 if case.training or name == "backward" else 1)
        floor = sum(sum(tensors(case)[kernel]) for kernel in sweeps) * bytes_of(case, dtype)
        dram = sum(counted["dram_read_bytes"] + counted["dram_write_bytes"] for counted in kernels.values())
        near(f"{name}: DRAM", dram, floor, DRAM_SLACK)
        for kernel, counted in sweeps.items():
            l2 = (counted["global_read_sectors"] + counted["global_write_sectors"]) * SECTOR
            near(f"{kernel}: L2", l2, stated(case, dtype, layout, kernel))
        assert_whole_sectors(name, kernels)


@EVERY
def test_one_launch_moves_each_tensor_once(emulator: ModuleType, case: Case, dtype: torch.dtype, layout: str) -> None:
    for name, kernels in zip(SWEEPS, moved(emulator, case, dtype, layout, 1 << 30), strict=True):
        if name == "forward" and not case.training:
            continue
        assert {kernel.split("<")[0] for kernel in kernels} == {
            "clear_count_kernel",
            f"batch_norm_{name}_resident_kernel",
        }
        summing, mapping = (tensors(case)[sweep] for sweep in SWEEPS[name])
        floor = (max(summing[0], mapping[0]) + mapping[1]) * bytes_of(case, dtype)
        dram = sum(counted["dram_read_bytes"] + counted["dram_write_bytes"] for counted in kernels.values())
        near(f"{name}: DRAM", dram, floor, DRAM_SLACK)
        l2 = (
            sum(counted["global_read_sectors"] + counted["global_write_sectors"] for counted in kernels.values())
            * SECTOR
        )
        near(f"{name}: L2", l2, stated_together(case, dtype, layout, name))
        assert_whole_sectors(name, kernels)
