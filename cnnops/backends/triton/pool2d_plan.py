"""What each launch of the Triton pools and of unpooling takes: tile, grid, arguments. Imports no triton.

What a network fixes (channels, windows) is constant to the compiler; what a batch fixes (N, H, W, P, Q) is not.
"""

from __future__ import annotations

import dataclasses
import math

from cnnops.backends.triton.launch import Launch, cdiv
from cnnops.geometry import Pool2dProblem
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.pool2d import BACKWARD, FORWARD, INDICES, UNPOOLING, PoolTile

# Loops of so many steps are unrolled, so that all of their loads are under way at once; of longer ones, some steps.
_UNROLLED = 16
_UNROLLED_OF_MANY = 4


def _unroll(steps: int) -> int:
    return steps if steps <= _UNROLLED else _UNROLLED_OF_MANY


def _tile(p: Pool2dProblem, tile: PoolTile) -> dict[str, int | bool]:
    return {"C": p.C, "CHANNELS_LAST": p.channels_last, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c}


def _windows(p: Pool2dProblem) -> dict[str, int | bool]:
    # An axis with one window has no stride and one with a single tap no dilation, whatever the call says: with huge
    # numbers there, products would leave 32 bits.
    wide = any(size * count + size + count >= 2**31 for size, count in ((p.H, p.P), (p.W, p.Q)))
    return {
        "R": p.R, "S": p.S,
        "STRIDE_H": p.stride_h if p.P > 1 else 1, "STRIDE_W": p.stride_w if p.Q > 1 else 1,
        "PAD_H": p.pad_h, "PAD_W": p.pad_w,
        "DILATION_H": p.dilation_h if p.R > 1 else 1, "DILATION_W": p.dilation_w if p.S > 1 else 1,
        "WIDE": p.R == 0 and wide,
    }  # fmt: skip


def _programs(p: Pool2dProblem, tile: PoolTile, positions: int) -> int:
    return cdiv(positions, tile.block_m) * cdiv(p.C, tile.block_c)


def most_programs(p: Pool2dProblem) -> int:
    """The largest grid that any pass takes."""
    inputs, outputs = p.N * p.H * p.W, p.N * p.P * p.Q
    nhwc = dataclasses.replace(p, channels_last=True)  # as the offsets are
    return max(
        _programs(p, choose(FORWARD, p), outputs),
        _programs(p, choose(BACKWARD, p), inputs),
        _programs(p, choose(INDICES, nhwc), outputs),
        _programs(p, choose(UNPOOLING, p), max(inputs, outputs)),
    )


def most_covered(size: int, windows: int) -> int:
    """Elements in the longest of adaptive `windows` over `size`: ceil((i + 1) size / windows) - floor(i size / windows)."""
    return cdiv(windows - math.gcd(size, windows) + size, windows)


def _sizes(p: Pool2dProblem) -> dict[str, int | float]:
    return {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q}


@cached
def forward(p: Pool2dProblem, **more: bool | float) -> Launch:
    """A pass that owns outputs and walks over their windows' taps; `more` are constants of its kernel."""
    tile = choose(FORWARD, p)
    outputs = p.N * p.P * p.Q
    taps = p.R * p.S or most_covered(p.H, p.P) * most_covered(p.W, p.Q)
    constants = _tile(p, tile) | {"BLOCK_T": tile.block_t} | _windows(p)
    constants["UNROLL"] = _unroll(cdiv(p.R * p.S, tile.block_t)) if p.R else _UNROLLED_OF_MANY
    return Launch(
        _programs(p, tile, outputs),
        _sizes(p) | {"outputs": outputs, "steps": cdiv(taps, tile.block_t)},
        constants | more,
        tile.num_warps,
    )


def _over(taps: int, stride: int, dilation: int) -> int:
    """Sliding windows that are asked whether they have an input: all that span it, or one for each tap."""
    return cdiv(taps, stride) if dilation == 1 else taps


@cached
def backward(p: Pool2dProblem, **more: bool | float) -> Launch:
    """A pass that owns inputs and asks the windows over them."""
    tile = choose(BACKWARD, p)
    pixels = p.N * p.H * p.W
    constants = _tile(p, tile) | _windows(p)
    if p.R:
        high, wide = (
            _over(taps, int(constants[f"STRIDE_{axis}"]), int(constants[f"DILATION_{axis}"]))
            for axis, taps in (("H", p.R), ("W", p.S))
        )
    else:
        high, wide = most_covered(p.P, p.H), most_covered(p.Q, p.W)
    constants["WINDOWS_H"], constants["WINDOWS_W"] = (high, wide) if p.R else (0, 0)
    constants["UNROLL"] = _unroll(high * wide) if p.R else 1  # few adaptive windows have an input
    return Launch(
        _programs(p, tile, pixels),
        _sizes(p) | {"pixels": pixels, "wide": wide, "steps": high * wide},
        constants | more,
        tile.num_warps,
    )


@cached
def indices(p: Pool2dProblem) -> Launch:
    """A pass over the offsets, which are NHWC."""
    tile = choose(INDICES, p)
    outputs = p.N * p.P * p.Q
    constants = _tile(p, tile) | _windows(p)
    return Launch(_programs(p, tile, outputs), _sizes(p) | {"outputs": outputs}, constants, tile.num_warps)


@cached
def unpooling(p: Pool2dProblem, over_outputs: bool) -> Launch:
    """A pass of max_unpool2d over all inputs, or over all outputs."""
    tile = choose(UNPOOLING, p)
    places, positions = p.H * p.W, p.P * p.Q
    count = p.N * (positions if over_outputs else places)
    return Launch(
        _programs(p, tile, count),
        {"places": places, "positions": positions, "count": count},
        _tile(p, tile),
        tile.num_warps,
    )
