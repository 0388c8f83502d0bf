"""What each launch of the Triton kernels of batch norm and a pool in one takes. Imports no triton."""

from __future__ import annotations

import math

from cnnops.backends.triton import batch_norm_plan
from cnnops.backends.triton.launch import Launch, cdiv
from cnnops.backends.triton.pool2d_plan import _sizes, _windows
from cnnops.geometry import NormPool2dProblem
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.bn_act_max_pool2d import TILES

_UNROLLED = 16
"""Loops of so many steps are unrolled, so that all of their loads are under way at once; of longer ones, four steps
would take a stack on sm_90."""


def _launch(p: NormPool2dProblem, programs: int, scalars: dict[str, int | float], taps: dict[str, int]) -> Launch:
    tile = choose(TILES, p)
    steps = taps["TAPS"] if "TAPS" in taps else taps["WINDOWS_H"] * taps["WINDOWS_W"]
    constants = {"ACTIVATION": p.norm.activation, "C": p.norm.C, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c}
    windows = _windows(p.pool)
    del windows["WIDE"]  # of adaptive windows
    return Launch(
        programs,
        _sizes(p.pool) | scalars,
        constants | windows | taps | {"UNROLL": steps if steps <= _UNROLLED else 2},
        tile.num_warps,
    )


def _tiles_and_units(p: NormPool2dProblem, positions: int) -> tuple[int, int]:
    tile = choose(TILES, p)
    return cdiv(positions, tile.block_m), cdiv(p.norm.C, tile.block_c)


@cached
def forward(p: NormPool2dProblem) -> Launch:
    """The pass that owns outputs and walks over their windows' taps."""
    outputs = p.pool.N * p.pool.P * p.pool.Q
    tiles, units = _tiles_and_units(p, outputs)
    return _launch(p, tiles * units, {"outputs": outputs}, {"TAPS": p.pool.R * p.pool.S})


def _taps(p: NormPool2dProblem) -> dict[str, int]:
    """Which taps reach an input: constants of a kernel that owns inputs."""
    windows = _windows(p.pool)
    constants = {}
    for axis, taps in (("H", p.pool.R), ("W", p.pool.S)):
        stride, dilation = int(windows[f"STRIDE_{axis}"]), int(windows[f"DILATION_{axis}"])
        common = math.gcd(stride, dilation)
        constants[f"COMMON_{axis}"] = common
        constants[f"INVERSE_{axis}"] = pow(dilation // common, -1, stride // common)
        constants[f"WINDOWS_{axis}"] = cdiv(taps, stride // common)
    return constants


@cached
def backward(p: NormPool2dProblem) -> Launch:
    """The pass that writes dx: one program for each tile of inputs."""
    pixels = p.norm.N * p.norm.L
    tiles, units = _tiles_and_units(p, pixels)
    return _launch(p, tiles * units, {"pixels": pixels}, _taps(p))


@cached
def gradient_sums(p: NormPool2dProblem, processors: int) -> batch_norm_plan.Sums:
    """The sums of dz and dz * (x - mean) of each channel."""
    pixels = p.norm.N * p.norm.L
    tiles, units = _tiles_and_units(p, pixels)
    slices = batch_norm_plan.slices_of(tiles, units, processors)
    scalars: dict[str, int | float] = {"pixels": pixels, "steps": cdiv(tiles, slices)}
    partial = _launch(p, slices * units, scalars, _taps(p))
    return batch_norm_plan.Sums(slices, partial, batch_norm_plan.finish(p.norm, slices))


def most_programs(p: NormPool2dProblem) -> int:
    """The largest grid of `p`."""
    return max(forward(p).programs, backward(p).programs, batch_norm_plan.most_programs(p.norm))
