"""Tiles of the Triton conv2d kernels. None was timed on a device yet: reasons are arithmetic and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cnnops.geometry import Conv2dProblem
from cnnops.tuning import Rule, Table, interpreted


@dataclass(frozen=True)
class ConvTile:
    """One program's block of the implicit GEMM, as its pass defines gemm_m, gemm_n and gemm_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


Condition = Callable[[Conv2dProblem], bool]


def _group_c(p: Conv2dProblem) -> int:
    return p.C // p.groups


def _group_k(p: Conv2dProblem) -> int:
    return p.K // p.groups


def _fp32(condition: Condition) -> Condition:
    return lambda p: p.dtype == torch.float32 and condition(p)


def _always(p: Conv2dProblem) -> bool:
    return True


# A pass that gathers: gemm_m counts pixels, gemm_n output channels, gemm_k (tap, input channel). A kernel walks gemm_k
# tap by tap where a tap fills block_k, and element by element, without vector loads, where it does not.
def _gather(
    inner: Callable[[Conv2dProblem], int], outer: Callable[[Conv2dProblem], int]
) -> tuple[Rule[Conv2dProblem, ConvTile], ...]:
    return (
        interpreted(
            lambda p: inner(p) < 32,
            ConvTile(256, 32, 128, 4, 1),
            "the interpreter's time is per operation, whatever its size: few large steps",
        ),
        interpreted(
            _always,
            ConvTile(128, 64, 32, 4, 1),
            "small enough that tests of 32 channels walk tap by tap",
        ),
        Rule(
            _fp32(lambda p: outer(p) <= 16),
            ConvTile(64, 16, 16, 4, 2),
            "16 is tl.dot's least width: grouped and depthwise waste least; longer steps spill on sm_90",
        ),
        Rule(
            _fp32(_always), ConvTile(64, 64, 16, 8, 2), "exact fp32 multiplies in registers: 16 accumulators a thread"
        ),
        Rule(
            lambda p: outer(p) <= 16,
            ConvTile(64, 16, 32, 4, 3),
            "16 is tl.dot's least width: grouped and depthwise waste least",
        ),
        Rule(
            lambda p: inner(p) < 64,
            ConvTile(128, 64, 32, 8, 3),
            "few channels: short steps pad gemm_k least (the stem's 27 to 32)",
        ),
        Rule(lambda p: outer(p) <= 64, ConvTile(128, 64, 64, 8, 3), "64 outputs fill no wider tile"),
        Rule(
            _always,
            ConvTile(128, 128, 64, 8, 3, 248),
            "two warpgroups of 64x128; three stages take 96 KiB, which every architecture since sm_80 has; bounded, the "
            "assembler for sm_100 does not spill",
        ),
    )


FORWARD = Table("conv2d.forward", _gather(_group_c, _group_k))

BACKWARD_INPUT = Table("conv2d.backward_input", _gather(_group_k, _group_c))

# gemm_m counts filters, gemm_n pixels, gemm_k (channel, tap).
FORWARD_NCHW = Table(
    "conv2d.forward_nchw",
    (
        interpreted(_always, ConvTile(32, 256, 64, 4, 1), "the interpreter's time is per operation: large steps"),
        Rule(
            _fp32(lambda p: _group_k(p) <= 16),
            ConvTile(16, 128, 32, 8, 2),
            "16 is tl.dot's least height; 16 addresses a thread, where 32 spill",
        ),
        Rule(
            _fp32(_always), ConvTile(64, 64, 16, 8, 2), "exact fp32 multiplies in registers: 16 accumulators a thread"
        ),
        Rule(lambda p: _group_k(p) <= 16, ConvTile(16, 128, 32, 4, 2), "16 is tl.dot's least height"),
        Rule(
            _always,
            ConvTile(64, 64, 32, 8, 2),
            "each element has an address and a mask of its own: 8 of each a thread leave registers for two programs on a "
            "multiprocessor, where 16 spill",
        ),
    ),
)

# gemm_m counts filters, gemm_n (tap, channel) columns, gemm_k pixels.
BACKWARD_WEIGHT = Table(
    "conv2d.backward_weight",
    (
        interpreted(
            lambda p: _group_c(p) < 32,
            ConvTile(32, 128, 64, 4, 1),
            "the interpreter's time is per operation, whatever its size: one tile for all taps of few channels",
        ),
        interpreted(
            _always,
            ConvTile(64, 32, 64, 4, 1),
            "small enough that tests of 32 channels have a tile for each tap",
        ),
        Rule(
            _fp32(lambda p: _group_k(p) <= 16),
            ConvTile(16, 64, 32, 4, 2),
            "16 is tl.dot's least height: grouped and depthwise waste least",
        ),
        Rule(
            _fp32(lambda p: _group_c(p) < 64),
            ConvTile(64, 64, 16, 8, 2, 128),
            "columns that mix taps hold an address each: 16 accumulators a thread leave registers for them, bounded to "
            "what lets two programs on a multiprocessor",
        ),
        Rule(
            _fp32(_always), ConvTile(64, 64, 16, 4, 2), "exact fp32 multiplies in registers: 32 accumulators a thread"
        ),
        Rule(
            lambda p: _group_k(p) <= 16,
            ConvTile(16, 32, 64, 4, 3),
            "16 is tl.dot's least height: grouped and depthwise waste least",
        ),
        Rule(
            lambda p: _group_c(p) < 64,
            ConvTile(64, 64, 32, 4, 3),
            "columns that mix taps hold an address each: longer steps spill on sm_80",
        ),
        Rule(lambda p: _group_k(p) <= 64, ConvTile(64, 64, 64, 4, 3), "64 filters fill no taller tile"),
        Rule(_always, ConvTile(128, 64, 64, 8, 3), "two warpgroups; a tile of 64 columns is one tap of 64 channels"),
    ),
)


@dataclass(frozen=True)
class TmaTile:
    """One tile of the kernels that load boxes, as ConvTile, and how many programs share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    resident: int = 1

    @property
    def max_registers(self) -> int:
        """What a thread may have, so that so many programs fit the 64 Ki of a multiprocessor, which come by eights.

        Said of one program too: left to itself, the assembler for sm_100 takes fewer and spills.
        """
        return min(2**16 // (32 * self.num_warps * self.resident), 255) // 8 * 8


_WIDE = 128 * 256
"""Outputs of the widest tile."""


# As _gather, by boxes. 128 bytes of channels are a row of the widest swizzle: 64 in 16 bits, 32 in fp32.
def _gather_boxes(
    inner: Callable[[Conv2dProblem], int], outer: Callable[[Conv2dProblem], int]
) -> tuple[Rule[Conv2dProblem, TmaTile], ...]:
    return (
        interpreted(_always, TmaTile(64, 16, 16, 4, 1), "small enough that tests walk over several tiles"),
        Rule(_fp32(lambda p: outer(p) <= 64), TmaTile(128, 64, 32, 8, 3, 2), "64 outputs fill no wider tile; 72 KiB"),
        Rule(
            _fp32(_always),
            TmaTile(128, 128, 32, 8, 4),
            "the statistics' 174 registers leave room for one program, whose four stages take 128 KiB",
        ),
        Rule(
            lambda p: inner(p) % 64 != 0 and inner(p) <= 96,
            TmaTile(128, 64, 32, 8, 4, 2),
            "blocks of 64 would be half empty: 32 pads 16, 48 and 96 channels least",
        ),
        Rule(lambda p: outer(p) <= 64, TmaTile(128, 64, 64, 8, 4, 2), "64 outputs fill no wider tile; 96 KiB"),
        Rule(
            lambda p: outer(p) % 256 == 0 and p.R * p.S * inner(p) >= 512 and p.N * p.P * p.Q * outer(p) >= 128 * _WIDE,
            TmaTile(128, 256, 64, 8, 3),
            "43 products for each byte from L2, where 128x128 has 32: where sums are long and 128 tiles fill a device",
        ),
        Rule(_always, TmaTile(128, 128, 64, 8, 3, 2), "96 KiB: two programs, one's stores beside the other's loads"),
    )


FORWARD_TMA = Table("conv2d.forward_tma", _gather_boxes(_group_c, _group_k))

BACKWARD_INPUT_TMA = Table("conv2d.backward_input_tma", _gather_boxes(_group_k, _group_c))

# gemm_m counts filters, gemm_n the channels of one tap, gemm_k pixels.
BACKWARD_WEIGHT_TMA = Table(
    "conv2d.backward_weight_tma",
    (
        interpreted(_always, TmaTile(16, 16, 16, 4, 1), "small enough that tests have several tiles and splits"),
        Rule(_fp32(_always), TmaTile(64, 64, 32, 4, 3), "transposed fp32 operands pass through registers"),
        Rule(lambda p: _group_k(p) <= 64, TmaTile(64, 64, 64, 4, 4), "64 filters fill no taller tile"),
        Rule(_always, TmaTile(128, 64, 64, 8, 4), "two warpgroups; 64 channels are a row of the widest swizzle"),
    ),
)
