"""Tiles of the Triton depthwise kernels. None was timed on a device yet: reasons are arithmetic and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cnnops.geometry import Conv2dProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class DepthwiseTile:
    """What one program computes at once: `rows` rows of block_m pixels, of block_c channels."""

    rows: int
    block_m: int
    block_c: int
    num_warps: int
    max_registers: int | None = None


Condition = Callable[[Conv2dProblem], bool]


def _always(p: Conv2dProblem) -> bool:
    return True


def _nchw(p: Conv2dProblem) -> bool:
    return not p.channels_last


def _small(p: Conv2dProblem) -> bool:
    return p.P <= 7 and p.Q <= 8


def _fp32(condition: Condition) -> Condition:
    return lambda p: p.dtype == torch.float32 and condition(p)


FORWARD = Table(
    "depthwise_conv2d.forward",
    (
        interpreted(
            _always,
            DepthwiseTile(3, 64, 32, 4),
            "the interpreter's time is per operation, whatever its size; small enough that tests have several tiles",
        ),
        Rule(
            _nchw, DepthwiseTile(4, 128, 8, 4), "lanes run along pixels, and a thread has one in each of eight channels"
        ),
        Rule(_fp32(_small), DepthwiseTile(7, 8, 64, 4), "a 7 x 7 map is one column of a tile for each of its seven"),
        Rule(
            _fp32(_always), DepthwiseTile(7, 32, 16, 4), "16 bytes a thread; 7 divides the maps of 7, 14, .. 112 rows"
        ),
        Rule(_small, DepthwiseTile(7, 8, 128, 4), "a 7 x 7 map is one column of a tile for each of its seven"),
        Rule(
            lambda p: p.K > p.C,
            DepthwiseTile(7, 32, 32, 4, 248),
            "as below, with registers for two programs on a multiprocessor: with those for three, Triton 3.6 spills",
        ),
        Rule(_always, DepthwiseTile(7, 32, 32, 4), "16 bytes a thread; 7 divides the maps of 7, 14, .. 112 rows"),
    ),
)
"""rows are those of filters whose taps are unrolled; of others a program has one."""

BACKWARD = Table(
    "depthwise_conv2d.backward",
    (
        interpreted(
            _always,
            DepthwiseTile(1, 128, 32, 4),
            "the interpreter's time is per operation, whatever its size; small enough that tests have several tiles",
        ),
        Rule(
            _nchw,
            DepthwiseTile(1, 128, 4, 4),
            "lanes run along pixels; four channels a thread leave registers for sums",
        ),
        Rule(_fp32(_always), DepthwiseTile(1, 32, 16, 4), "16 bytes a thread, and so four of each tap's sums"),
        Rule(
            _always,
            DepthwiseTile(1, 64, 32, 8),
            "16 bytes a thread, and so eight of each tap's sums; with four warps dx of stride 2 alone spills on sm_90",
        ),
    ),
)
"""Of the kernels that compute dx, dweight or both."""
