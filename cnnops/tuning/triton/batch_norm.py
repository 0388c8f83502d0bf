"""Tiles of the Triton batch norm kernels. None was timed on a device yet: reasons are arithmetic and compiled code."""

from __future__ import annotations

from dataclasses import dataclass

from cnnops.geometry import NormProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class NormTile:
    """One program's block of x as [N, C, L]. Where channels are contiguous, positions are images, and L is 1."""

    block_n: int
    block_c: int
    block_l: int
    num_warps: int


def by_lines(p: NormProblem) -> bool:
    """Whether x is read as positions of C contiguous channels. One position or one channel is dense in both layouts."""
    return p.L == 1 or (p.channels_last and p.C > 1)


def _plane(p: NormProblem) -> int:
    """Contiguous positions of one channel."""
    return p.N * p.L if p.C == 1 else p.L


TILES = Table(
    "batch_norm.tiles",
    (
        interpreted(
            lambda p: by_lines(p) and p.N * p.L <= 1024,
            NormTile(64, 128, 1, 8),
            "small enough that tests merge the parts of several steps and programs",
        ),
        interpreted(
            by_lines,
            NormTile(512, 64, 1, 8),
            "the interpreter's time is per operation, whatever its size: few large steps",
        ),
        interpreted(
            lambda p: _plane(p) <= 64,
            NormTile(2, 64, 32, 8),
            "small enough that tests merge the parts of several steps and programs",
        ),
        interpreted(
            lambda p: True,
            NormTile(2, 32, 512, 8),
            "the interpreter's time is per operation, whatever its size: few large steps",
        ),
        Rule(
            lambda p: by_lines(p) and p.C <= 32,
            NormTile(128, 32, 1, 8),
            "32 channels fill no wider row; 4096 elements are 16 a thread, which leaves registers for three tensors",
        ),
        Rule(by_lines, NormTile(64, 64, 1, 8), "a row of 64 channels is 128 bytes or more, whole lines of the cache"),
        Rule(
            lambda p: _plane(p) <= 64,
            NormTile(16, 4, 64, 8),
            "planes of 7x7 and 8x8 fill no longer run, and those of neighbouring channels lie side by side",
        ),
        Rule(lambda p: _plane(p) <= 256, NormTile(16, 1, 256, 8), "planes of 14x14 and 16x16 fill no longer run"),
        Rule(
            lambda p: True,
            NormTile(8, 1, 512, 8),
            "of planes of 28x28, 56x56 and 112x112 it leaves a quarter, an eighth and a 50th idle",
        ),
    ),
)
