"""Tiles of the Triton pools and of unpooling. None was timed on a device: reasons are arithmetic and compiled code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cnnops.geometry import Pool2dProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class PoolTile:
    """One program's block: positions of the planes, of which each has `block_t` taps side by side, in some channels."""

    block_m: int
    block_t: int
    block_c: int
    num_warps: int


REDUCED = 8
"""Taps from which on an adaptive window is summed by several lanes."""


def _reduced(p: Pool2dProblem) -> bool:
    return p.R == 0 and p.H * p.W >= REDUCED * p.P * p.Q


def _planes(p: Pool2dProblem) -> bool:
    return not p.channels_last


# Where a program's lanes own a position each.
_BY_POSITION: tuple[Rule[Pool2dProblem, PoolTile], ...] = (
    interpreted(
        lambda p: p.N * p.H * p.W >= 1024,
        PoolTile(1024, 1, 64, 4),
        "the interpreter's time is per operation, up to some ten thousand numbers whatever its size",
    ),
    interpreted(lambda p: p.C >= 128, PoolTile(32, 1, 512, 4), "the same of small planes"),
    interpreted(lambda p: True, PoolTile(128, 1, 64, 4), "tests' small cases are one block or two"),
    Rule(
        _planes,
        PoolTile(32, 1, 32, 8),
        "offsets are NHWC: 32 channels of a position are a sector of bytes, 32 positions a warp's lanes along W; of twice"
        " as many, 3 x 3 taps spill on sm_100",
    ),
    Rule(lambda p: p.C < 16, PoolTile(128, 1, 4, 4), "few channels: narrow blocks waste least (an image's 3 to 4)"),
    Rule(lambda p: p.C < 64, PoolTile(64, 1, 16, 4), "two vectors of 16-bit numbers a position"),
    Rule(
        lambda p: p.dtype == torch.float32,
        PoolTile(8, 1, 64, 4),
        "a thread owns one vector, whose taps are all under way at once; of two, 3 x 3 taps spill on sm_80",
    ),
    Rule(
        lambda p: True,
        PoolTile(16, 1, 64, 4),
        "a thread owns one vector of 16-bit numbers, whose taps are all under way at once",
    ),
)

FORWARD = Table(
    "pool2d.forward",
    (
        interpreted(
            lambda p: _reduced(p) and p.C >= 128,
            PoolTile(2, 16, 512, 4),
            "the interpreter's time is per operation: few large steps over the channels of a network's last layer",
        ),
        interpreted(
            _reduced,
            PoolTile(8, 16, 64, 4),
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
        *_BY_POSITION,
    ),
)

BACKWARD = Table("pool2d.backward", _BY_POSITION)
INDICES = Table("pool2d.indices", _BY_POSITION)
UNPOOLING = Table("pool2d.unpooling", _BY_POSITION)
