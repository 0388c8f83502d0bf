"""Tiles of the Triton squeeze_excite kernels. None was timed on a device yet: reasons are arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cnnops.geometry import SqueezeExciteProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class SweepTile:
    """The positions and channels that one program reads or writes at once."""

    block_l: int
    block_c: int
    num_warps: int


def _nchw(p: SqueezeExciteProblem) -> bool:
    return not p.channels_last and p.L > 1


SWEEP = Table(
    "squeeze_excite.sweep",
    (
        interpreted(
            lambda p: True,
            SweepTile(256, 64, 4),
            "the interpreter's time is per operation, whatever its size; small enough that tests have several tiles",
        ),
        Rule(
            lambda p: _nchw(p) and p.L <= 64,
            SweepTile(64, 64, 4),
            "lanes run along positions, of which maps up to 8 x 8 have no more",
        ),
        Rule(_nchw, SweepTile(512, 8, 4), "lanes run along positions: 1 KiB of a row of bf16, 32 values a thread"),
        Rule(
            lambda p: p.dtype == torch.float32,
            SweepTile(64, 32, 4),
            "128 bytes of channels a position, and 64 bytes a thread in flight",
        ),
        Rule(lambda p: True, SweepTile(64, 64, 4), "128 bytes of channels a position, and 64 bytes a thread in flight"),
    ),
)
