"""Tiles of the Triton kernels of batch norm and a pool in one. None was timed on a device: reasons are arithmetic and
compiled code."""

from __future__ import annotations

from dataclasses import dataclass

from cnnops.geometry import NormPool2dProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class NormPoolTile:
    """One program's block of outputs, or of inputs: positions of the planes in some channels."""

    block_m: int
    block_c: int
    num_warps: int


TILES: Table[NormPool2dProblem, NormPoolTile] = Table(
    "bn_act_max_pool2d.tiles",
    (
        interpreted(
            lambda p: p.norm.N * p.norm.L <= 256,
            NormPoolTile(32, 128, 8),
            "small enough that tests add the sums of several steps and programs",
        ),
        interpreted(
            lambda p: True,
            NormPoolTile(512, 64, 8),
            "the interpreter's time is per operation, whatever its size: few large steps",
        ),
        Rule(lambda p: p.norm.C <= 32, NormPoolTile(64, 32, 8), "32 channels fill no wider row"),
        Rule(
            lambda p: True,
            NormPoolTile(32, 64, 8),
            "a thread owns one vector of 16-bit numbers, two of fp32, whose taps or windows are all under way at once",
        ),
    ),
)
