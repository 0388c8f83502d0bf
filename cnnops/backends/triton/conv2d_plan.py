"""What each launch of the Triton conv2d kernels takes: tile, grid, arguments. Imports no triton.

What a network fixes (channels, filters, geometry) is constant to the compiler; what a batch fixes (N, H, W) is not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from cnnops.backends.triton.launch import Launch, SplitLaunch, cdiv, splits_of, total_of
from cnnops.geometry import Conv2dProblem, ConvTranspose2dProblem
from cnnops.torch_private import tf32_allowed
from cnnops.tuning import choose
from cnnops.tuning.triton.conv2d import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, ConvTile


def input_precision(dtype: torch.dtype, device: str) -> str:
    """How ``tl.dot`` multiplies: exactly, or fp32 as TF32 where torch's own convolution would on CUDA."""
    if dtype == torch.float32 and device == "cuda" and tf32_allowed():
        return "tf32"
    return "ieee"


@dataclass(frozen=True)
class Adjoint(Conv2dProblem):
    """The convolution, from y to x, whose gradient a transposed convolution is.

    P and Q are x's extents, which output_padding may leave y room for more than.
    """

    P: int = 0
    Q: int = 0

    @classmethod
    def to(cls, p: ConvTranspose2dProblem) -> Adjoint:
        return cls(
            p.N, p.K, p.P, p.Q, p.C, p.R, p.S, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            p.groups, "zeros", p.dtype, p.device, p.channels_last, p.H, p.W,
        )  # fmt: skip


def _constants(p: Conv2dProblem, tile: ConvTile, precision: str) -> dict[str, int | str]:
    # An axis with one output has no stride and one with a single tap no dilation, whatever the call says: with huge
    # numbers there, products would leave 32 bits.
    return {
        "C": p.C, "K": p.K, "R": p.R, "S": p.S,
        "STRIDE_H": p.stride_h if p.P > 1 else 1, "STRIDE_W": p.stride_w if p.Q > 1 else 1,
        "PAD_H": p.pad_h, "PAD_W": p.pad_w,
        "DILATION_H": p.dilation_h if p.R > 1 else 1, "DILATION_W": p.dilation_w if p.S > 1 else 1,
        "GROUPS": p.groups,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "PRECISION": precision,
    }  # fmt: skip


def _steps(taps: int, channels: int, block: int) -> int:
    """Blocks that (tap, channel) takes: tap by tap where a tap fills a block, else run together."""
    return taps * cdiv(channels, block) if channels >= block else cdiv(taps * channels, block)


@functools.lru_cache(maxsize=1024)
def forward(p: Conv2dProblem, precision: str, activation: str = "none") -> Launch:
    tile = choose(FORWARD, p)
    pixels = p.N * p.P * p.Q
    return Launch(
        cdiv(pixels, tile.block_m) * p.groups * cdiv(p.K // p.groups, tile.block_n),
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels},
        _constants(p, tile, precision)
        | {"STEPS": _steps(p.R * p.S, p.C // p.groups, tile.block_k), "ACTIVATION": activation},
        tile.num_warps,
        tile.num_stages,
    )


@functools.lru_cache(maxsize=1024)
def backward_input(p: Conv2dProblem, precision: str) -> Launch:
    tile = choose(BACKWARD_INPUT, p)
    constants = _constants(p, tile, precision)
    most_taps = 1
    classes = 1
    pixels = p.N
    for axis, extent, taps in (("H", p.H, p.R), ("W", p.W, p.S)):
        stride, dilation = int(constants[f"STRIDE_{axis}"]), int(constants[f"DILATION_{axis}"])
        common = math.gcd(stride, dilation)
        constants[f"COMMON_{axis}"] = common
        constants[f"INVERSE_{axis}"] = pow(dilation // common, -1, stride // common)
        most_taps *= cdiv(taps, stride // common)
        classes *= stride
        pixels *= cdiv(extent, stride)
    # Triton 3.6's interpreter takes no run-time loop count under NumPy 2.4, so there every class runs the longest
    # class's count, and masks what it does not have.
    constants["STEPS"] = _steps(most_taps, p.K // p.groups, tile.block_k) if p.device == "cpu" else 0
    return Launch(
        cdiv(pixels, tile.block_m) * classes * p.groups * cdiv(p.C // p.groups, tile.block_n),
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels},
        constants,
        tile.num_warps,
        tile.num_stages,
    )


@functools.lru_cache(maxsize=1024)
def backward_weight(p: Conv2dProblem, precision: str, processors: int) -> SplitLaunch:
    tile = choose(BACKWARD_WEIGHT, p)
    pixels = p.N * p.P * p.Q
    group_c = p.C // p.groups
    tiles = p.groups * cdiv(p.K // p.groups, tile.block_m) * _steps(p.R * p.S, group_c, tile.block_n)
    steps = cdiv(pixels, tile.block_k)
    splits = splits_of(tiles, steps, processors)
    partial = Launch(
        splits * tiles,
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels, "steps": cdiv(steps, splits)},
        _constants(p, tile, precision) | {"COLUMN_TILES": _steps(p.R * p.S, group_c, tile.block_n)},
        tile.num_warps,
        tile.num_stages,
    )
    return SplitLaunch(splits, partial, total_of(p.K * p.R * p.S * group_c, splits))


@functools.lru_cache(maxsize=1024)
def backward_bias(pixels: int, K: int, processors: int) -> SplitLaunch:
    block_m, block_k = 64, 64
    tiles = cdiv(K, block_k)
    steps = cdiv(pixels, block_m)
    splits = splits_of(tiles, steps, processors)
    partial = Launch(
        splits * tiles,
        {"pixels": pixels, "steps": cdiv(steps, splits)},
        {"K": K, "BLOCK_M": block_m, "BLOCK_K": block_k},
        4,
        1,
    )
    return SplitLaunch(splits, partial, total_of(K, splits))


def most_programs(p: Conv2dProblem) -> int:
    """The largest grid of `p`, splits aside: they only fill what few programs leave idle."""
    launches = (forward(p, "ieee"), backward_input(p, "ieee"), backward_weight(p, "ieee", 1).partial)
    return max(launch.programs for launch in launches)
