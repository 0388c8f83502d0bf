"""What each launch of the Triton batch norm kernels takes: tile, grid, arguments. Imports no triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnops.backends.triton.launch import Launch, cdiv, power_of_2
from cnnops.geometry import NormProblem
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.batch_norm import TILES, by_lines

# A sum's programs: so many for each multiprocessor hide the latency of memory, and after so many steps a program's
# part of 12 bytes a channel is little beside what it is of.
_PROGRAMS_PER_PROCESSOR = 4
_LEAST_STEPS = 4
_MAX_SLICES = 512

_VECTOR_BYTES = 16

_FINISH_ELEMENTS = 2048
"""Parts that one program merges at once: 16 a thread, in double."""


@dataclass(frozen=True)
class Sums:
    """A sum over positions: each of `slices` programs leaves a part of its channels, `finish` merges them in order."""

    slices: int
    partial: Launch
    finish: Launch


def _extents(p: NormProblem) -> tuple[int, int]:
    """The kernels' N and L, as if x were [N, C, L]."""
    if by_lines(p):
        return p.N * p.L, 1
    return (1, p.N * p.L) if p.C == 1 else (p.N, p.L)


def _tiles_and_units(p: NormProblem) -> tuple[int, int]:
    """Tiles of each block of channels, and blocks of channels."""
    tile = choose(TILES, p)
    N, L = _extents(p)
    return cdiv(N, tile.block_n) * cdiv(L, tile.block_l), cdiv(p.C, tile.block_c)


def _launch(p: NormProblem, programs: int, scalars: dict[str, int | float], constants: dict[str, object]) -> Launch:
    tile = choose(TILES, p)
    N, L = _extents(p)
    vector = math.gcd(L, _VECTOR_BYTES // p.dtype.itemsize)
    shape = {"C": p.C, "VECTOR": vector, "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c, "BLOCK_L": tile.block_l}
    return Launch(programs, {"N": N, "L": L // vector} | scalars, constants | shape, tile.num_warps)


@cached
def everywhere(p: NormProblem) -> Launch:
    """A kernel that maps x element by element: one program for each tile."""
    tiles, units = _tiles_and_units(p)
    return _launch(p, tiles * units, {}, {"ACTIVATION": p.activation})


@cached
def moments(p: NormProblem, processors: int) -> Sums:
    """Count, mean and squared deviations of each channel."""
    return _sums(p, processors, {})


@cached
def gradient_sums(p: NormProblem, processors: int) -> Sums:
    """The sums of dz and dz * (x - mean) of each channel."""
    return _sums(p, processors, {"ACTIVATION": p.activation})


def _sums(p: NormProblem, processors: int, constants: dict[str, object]) -> Sums:
    tiles, units = _tiles_and_units(p)
    slices = slices_of(tiles, units, processors)
    partial = _launch(p, slices * units, {"steps": cdiv(tiles, slices)}, constants)
    return Sums(slices, partial, finish(p, slices))


def slices_of(tiles: int, units: int, processors: int) -> int:
    """Programs that share a unit's tiles: a power of two, from shapes and the device alone."""
    return min(
        _MAX_SLICES,
        power_of_2(cdiv(_PROGRAMS_PER_PROCESSOR * processors, units)),
        power_of_2(cdiv(tiles, _LEAST_STEPS)),
    )


def finish(p: NormProblem, slices: int) -> Launch:
    """The second pass, which merges the parts of `slices` programs."""
    block = _FINISH_ELEMENTS // slices
    return Launch(cdiv(p.C, block), {"count": p.N * p.L}, {"C": p.C, "SLICES": slices, "BLOCK": block})


def most_programs(p: NormProblem) -> int:
    """The largest grid of `p`."""
    return everywhere(p).programs if p.N * p.C * p.L else 0
