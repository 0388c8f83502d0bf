"""What each launch of the Triton depthwise kernels takes: tile, grid, arguments. Imports no triton.

What a network fixes (channels, filters, geometry) is constant to the compiler; what a batch fixes (N, H, W) is not.
"""

from __future__ import annotations

from typing import Any

from cnnops.backends.triton.launch import Launch, SplitLaunch, cdiv, power_of_2, total_of
from cnnops.geometry import Conv2dProblem
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.depthwise_conv2d import BACKWARD, FORWARD, DepthwiseTile

MOST_UNROLLED = 49
"""Taps of the largest filter that is unrolled: 7 x 7."""

_MOST_SUMS = 9
"""Taps of the largest filter whose sums of dweight one program has all of: 3 x 3, 72 registers a thread."""

_MOST_TAPS = 8
"""Taps of a row that one program has the sums of, where it has not all."""

# Programs that are to be in flight on each multiprocessor: four warps each, which have to wait for memory.
_PROGRAMS_PER_PROCESSOR = 8
_MOST_SPLITS = 1024

_LEAST_PIXELS = 16
"""That a split sums for each of a filter's taps, so that slabs are a small part of what moves."""


def takes(p: Conv2dProblem) -> bool:
    """Whether the depthwise kernels compute `p`: each group has one channel, and one or several filters."""
    return p.groups == p.C > 1 and p.pad_mode == "zeros"


def _geometry(p: Conv2dProblem) -> dict[str, Any]:
    # An axis with one output has no stride and one with a single tap no dilation, whatever the call says: with huge
    # numbers there, products would leave 32 bits.
    return {
        "C": p.C, "K": p.K, "R": p.R, "S": p.S,
        "STRIDE_H": p.stride_h if p.P > 1 else 1, "STRIDE_W": p.stride_w if p.Q > 1 else 1,
        "PAD_H": p.pad_h, "PAD_W": p.pad_w,
        "DILATION_H": p.dilation_h if p.R > 1 else 1, "DILATION_W": p.dilation_w if p.S > 1 else 1,
        "NCHW": not p.channels_last,
    }  # fmt: skip


def _blocks(tile: DepthwiseTile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c}


def _narrow(geometry: dict[str, Any]) -> bool:
    """Whether classes of pixels of equal remainder by the strides are few, and the taps too."""
    return max(geometry["STRIDE_H"], geometry["STRIDE_W"]) <= 2 and geometry["R"] * geometry["S"] <= MOST_UNROLLED


@cached
def forward(p: Conv2dProblem, activation: str) -> Launch:
    tile, geometry = choose(FORWARD, p), _geometry(p)
    unrolled = _narrow(geometry) and geometry["DILATION_H"] == geometry["DILATION_W"] == 1
    rows = tile.rows if unrolled else 1
    tiles = cdiv(cdiv(p.P, rows) * p.Q, tile.block_m)
    return Launch(
        p.N * tiles * cdiv(p.K, tile.block_c),
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "tiles": tiles},
        geometry | {"ACTIVATION": activation, "FLIPPED": False, "UNROLLED": unrolled, "ROWS": rows} | _blocks(tile),
        tile.num_warps,
        max_registers=tile.max_registers,
    )


def parts_of(launch: Launch) -> int:
    """How many parts of each filter's statistics or sums a forward pass writes."""
    return launch.programs // cdiv(launch.constants["K"], launch.constants["BLOCK_C"])


@cached
def means(p: Conv2dProblem, parts: int) -> Launch:
    """The adding of an image's `parts` sums of each filter."""
    block = 256
    return Launch(
        cdiv(p.N * p.K, block),
        {"count": p.N * p.K, "steps": parts, "area": float(p.P * p.Q)},
        {"K": p.K, "BLOCK": block},
    )


def shares_dy(p: Conv2dProblem) -> bool:
    """Whether one kernel computes dx and dweight from one read of dy."""
    return p.K == p.C and p.R * p.S <= _MOST_SUMS and _narrow(_geometry(p))


def _splits(p: Conv2dProblem, tiles: int, steps: int, block_m: int, processors: int) -> int:
    """Shares of a sum of `steps` blocks of pixels, given the tiles of dweight: a power of two."""
    return min(
        _MOST_SPLITS,
        power_of_2(cdiv(_PROGRAMS_PER_PROCESSOR * processors, tiles)),
        power_of_2(cdiv(steps, cdiv(_LEAST_PIXELS * p.R * p.S, block_m))),
    )


@cached
def backward(p: Conv2dProblem, processors: int) -> SplitLaunch:
    """dx and dweight, of problems that `shares_dy` holds for."""
    tile = choose(BACKWARD, p)
    launch, steps = _positions(p, tile)
    tiles = cdiv(p.C, tile.block_c)
    splits = _splits(p, tiles, steps, tile.block_m, processors)
    scalars = launch.scalars | {"steps": cdiv(steps, splits)}
    return SplitLaunch(
        splits,
        Launch(splits * tiles, scalars, launch.constants, launch.num_warps),
        total_of(p.K * p.R * p.S, splits),
    )


def _positions(p: Conv2dProblem, tile: DepthwiseTile) -> tuple[Launch, int]:
    """A launch of `backward_kernel` with one step for each program, and how many there are along the pixels."""
    geometry = _geometry(p)
    extents = []
    for axis, extent in (("H", p.H), ("W", p.W)):
        stride, pad = geometry[f"STRIDE_{axis}"], geometry[f"PAD_{axis}"]
        extents.append(cdiv(extent + pad % stride, stride))
    rows, columns = extents
    steps = cdiv(p.N * rows * columns, tile.block_m)
    scalars: dict[str, int | float] = {
        "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "rows": rows, "columns": columns,
        "positions": p.N * rows * columns, "steps": 1,
    }  # fmt: skip
    return Launch(steps * cdiv(p.C, tile.block_c), scalars, geometry | _blocks(tile), tile.num_warps), steps


@cached
def backward_input(p: Conv2dProblem) -> tuple[str, Launch]:
    """dx alone: the name of the kernel, and its launch."""
    geometry = _geometry(p)
    if p.K == p.C and not shares_dy(p) and geometry["STRIDE_H"] == geometry["STRIDE_W"] == 1:
        return "forward_kernel", _flipped(p)
    tile = choose(BACKWARD, p)
    if p.K == p.C and _narrow(geometry):
        return "backward_kernel", _positions(p, tile)[0]
    pixels = p.N * p.H * p.W
    scalars: dict[str, int | float] = {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels}
    programs = cdiv(pixels, tile.block_m) * cdiv(p.C, tile.block_c)
    return "backward_input_kernel", Launch(programs, scalars, geometry | _blocks(tile), tile.num_warps)


def _flipped(p: Conv2dProblem) -> Launch:
    """dx of stride 1: the convolution of dy with the filter turned round, whose padding may be negative."""
    geometry = _geometry(p)
    tile = choose(FORWARD, p)
    unrolled = p.R * p.S <= MOST_UNROLLED and geometry["DILATION_H"] == geometry["DILATION_W"] == 1
    rows = tile.rows if unrolled else 1
    tiles = cdiv(cdiv(p.H, rows) * p.W, tile.block_m)
    turned = {
        "PAD_H": geometry["DILATION_H"] * (p.R - 1) - p.pad_h,
        "PAD_W": geometry["DILATION_W"] * (p.S - 1) - p.pad_w,
        "ACTIVATION": "none", "FLIPPED": True, "UNROLLED": unrolled, "ROWS": rows,
    }  # fmt: skip
    return Launch(
        p.N * tiles * cdiv(p.C, tile.block_c),
        {"H": p.P, "W": p.Q, "P": p.H, "Q": p.W, "tiles": tiles},
        geometry | turned | _blocks(tile),
        tile.num_warps,
    )


@cached
def backward_weight(p: Conv2dProblem, processors: int) -> SplitLaunch:
    """dweight alone, of problems that `shares_dy` does not hold for."""
    tile = choose(BACKWARD, p)
    taps = min(p.S, _MOST_TAPS)
    pixels = p.N * p.P * p.Q
    tiles = p.R * cdiv(p.S, taps) * cdiv(p.K, tile.block_c)
    steps = cdiv(pixels, tile.block_m)
    splits = _splits(p, tiles, steps, tile.block_m, processors)
    return SplitLaunch(
        splits,
        Launch(
            splits * tiles,
            {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels, "steps": cdiv(steps, splits)},
            _geometry(p) | {"TAPS": taps} | _blocks(tile),
            tile.num_warps,
        ),
        total_of(p.K * p.R * p.S, splits),
    )
