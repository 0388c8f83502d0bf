"""Tiles of the Triton pools and of unpooling. None was timed on a device: reasons are arithmetic and compiled code."""

from __future__ import annotations

from dataclasses import dataclass

from cnnops.geometry import Pool2dProblem
from cnnops.tuning import Rule


@dataclass(frozen=True)
class PoolTile:
    """One program's block: positions of the planes, of which each has `block_t` taps side by side, in some channels."""

    block_m: int
    block_t: int
    block_c: int
    num_warps: int


REDUCED = 8
"""Taps from which on an adaptive window is summed by several lanes."""


def _interpreted(p: Pool2dProblem) -> bool:
    return p.device == "cpu"


def _reduced(p: Pool2dProblem) -> bool:
    return p.R == 0 and p.H * p.W >= REDUCED * p.P * p.Q


def _planes(p: Pool2dProblem) -> bool:
    return not p.channels_last


# Where a program's lanes own a position each.
BY_POSITION: tuple[Rule[Pool2dProblem, PoolTile], ...] = (
    Rule(
        lambda p: _interpreted(p) and p.N * p.H * p.W >= 4096,
        PoolTile(2048, 1, 32, 4),
        "the interpreter's time is per operation, up to some ten thousand numbers whatever its size",
    ),
    Rule(_interpreted, PoolTile(128, 1, 32, 4), "so few positions fill no larger block"),
    Rule(
        _planes,
        PoolTile(64, 1, 32, 8),
        "offsets are NHWC: 32 channels of a position are a sector of bytes, 64 positions two warps' lanes along W",
    ),
    Rule(lambda p: p.C < 16, PoolTile(128, 1, 4, 4), "few channels: narrow blocks waste least (an image's 3 to 4)"),
    Rule(lambda p: p.C < 64, PoolTile(64, 1, 16, 4), "two vectors of 16-bit numbers a position"),
    Rule(
        lambda p: True, PoolTile(16, 1, 64, 4), "a thread owns one vector of 16-bit numbers, two of fp32, whose taps are"
        " all under way at once",
    ),
)  # fmt: skip

FORWARD: tuple[Rule[Pool2dProblem, PoolTile], ...] = (
    Rule(
        lambda p: _interpreted(p) and _reduced(p),
        PoolTile(16, 16, 32, 4),
        "small enough that tests take several steps over a window",
    ),
    Rule(
        lambda p: _planes(p) and _reduced(p),
        PoolTile(1, 64, 16, 4),
        "lanes along the plane: 7 x 7 values are one step, two or more values a lane",
    ),
    Rule(
        _reduced,
        PoolTile(1, 32, 64, 4),
        "7 x 7 values are two steps; a thread has two vectors of 16-bit numbers, four of fp32, under way",
    ),
    *BY_POSITION,
)
