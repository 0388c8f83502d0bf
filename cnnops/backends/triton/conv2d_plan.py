"""Which Triton conv2d kernel a pass takes, and what its launch takes: tile, grid, arguments. Imports no triton.

What a network fixes (channels, filters, geometry) is constant to the compiler; what a batch fixes (N, H, W) is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from cnnops.backends.triton.launch import AMD, Device, Launch, SplitLaunch, cdiv, splits_of, total_of
from cnnops.geometry import Conv2dProblem, ConvTranspose2dProblem
from cnnops.torch_private import tf32_allowed
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.conv2d import (
    BACKWARD_INPUT,
    BACKWARD_INPUT_TMA,
    BACKWARD_WEIGHT,
    BACKWARD_WEIGHT_TMA,
    FORWARD,
    FORWARD_NCHW,
    FORWARD_TMA,
    ConvTile,
)


def input_precision(dtype: torch.dtype, device: str) -> str:
    """How ``tl.dot`` multiplies: exactly, or fp32 as TF32 where torch's own convolution would on CUDA. Of AMD's, not
    every one has it."""
    if dtype == torch.float32 and device == "cuda" and not AMD and tf32_allowed():
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


def reads_nchw(p: Conv2dProblem) -> bool:
    """Whether forward takes and gives NCHW as it lies.

    Where each element is read but once or twice, the copies of x and y to NHWC and back would move more bytes than the
    convolution. Elsewhere taps read it again and again, in vectors of channels that NCHW does not have.
    """
    return not p.channels_last and (p.R * p.S == 1 or p.C // p.groups < 8)


@cached
def forward(p: Conv2dProblem, precision: str, activation: str = "none", prologue: str = "none") -> Launch:
    tile = choose(FORWARD, p)
    pixels = p.N * p.P * p.Q
    return Launch(
        cdiv(pixels, tile.block_m) * p.groups * cdiv(p.K // p.groups, tile.block_n),
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels},
        _constants(p, tile, precision)
        | {"STEPS": _steps(p.R * p.S, p.C // p.groups, tile.block_k), "ACTIVATION": activation, "PROLOGUE": prologue},
        tile.num_warps,
        tile.num_stages,
        tile.max_registers,
    )


@cached
def forward_nchw(p: Conv2dProblem, precision: str, activation: str = "none") -> Launch:
    tile = choose(FORWARD_NCHW, p)
    pixels = p.N * p.P * p.Q
    return Launch(
        cdiv(pixels, tile.block_n) * p.groups * cdiv(p.K // p.groups, tile.block_m),
        {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "pixels": pixels},
        _constants(p, tile, precision)
        | {"STEPS": cdiv(p.C // p.groups * p.R * p.S, tile.block_k), "ACTIVATION": activation},
        tile.num_warps,
        tile.num_stages,
        tile.max_registers,
    )


def parts(forward: Launch, nchw: bool) -> int:
    """Tiles of pixels that a forward pass has, each of which has statistics of its own."""
    constants, scalars = forward.constants, forward.scalars
    if "pixels" in scalars:
        return cdiv(int(scalars["pixels"]), constants["BLOCK_N" if nchw else "BLOCK_M"])
    rows, columns = constants["TILE_H"], constants["TILE_W"]
    box = constants["BLOCK_M"] // (rows * columns), rows, columns
    return _count((int(scalars["N"]), int(scalars["P"]), int(scalars["Q"])), box)


@cached
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
        tile.max_registers,
    )


@cached
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
        tile.max_registers,
    )
    return SplitLaunch(splits, partial, total_of(p.K * p.R * p.S * group_c, splits))


@cached
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


@dataclass(frozen=True)
class Boxes:
    """A dense tensor as its descriptor has it: a view of this shape, loaded by boxes of `block`."""

    shape: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class TmaLaunch:
    """A launch of conv2d_tma's kernels: `inputs` are the descriptors that a pass takes first, in order."""

    inputs: tuple[Boxes, Boxes]
    launch: Launch


@dataclass(frozen=True)
class TmaSplitLaunch:
    inputs: tuple[Boxes, Boxes]
    launch: SplitLaunch


def _has_boxes(p: Conv2dProblem, precision: str, device: Device, *channels: int) -> bool:
    """Whether tensors with so many channels can be loaded by descriptors, and whether that is worth while."""
    if device.architecture // 10 not in (9, 10) or p.groups > 1:
        return False
    if p.device == "cuda" and p.dtype == torch.float32 and precision == "ieee":  # no tensor cores that want feeding
        return False
    # A descriptor's strides are multiples of 16 bytes; below 32 the pointer kernel, which mixes taps, has fuller blocks.
    return all(c * p.dtype.itemsize % 16 == 0 and c * p.dtype.itemsize >= 32 for c in channels)


def _stride(p: Conv2dProblem, block: int) -> int:
    """The stride, 1 or 2, that boxes of `block` channels of x can have; 0 for another.

    A block of stride 2 must not reach beyond a pixel's channels: the next ones are those of another column.
    """
    strides = (p.stride_h if p.P > 1 else 1, p.stride_w if p.Q > 1 else 1)
    if strides == (1, 1):
        return 1
    return 2 if strides == (2, 2) and p.H % 2 == p.W % 2 == 0 and p.C % block == 0 else 0


def _is_gemm(p: Conv2dProblem) -> bool:
    """Whether each output pixel is made of the input pixel of its own number."""
    return p.R == p.S == 1 and (p.H, p.W) == (p.P, p.Q) and p.pad_h == p.pad_w == 0


def _images(p: Conv2dProblem, N: int, H: int, W: int) -> tuple[int, int, int]:
    """Extents of a tensor of pixels: a plain GEMM knows a single row of them."""
    return (1, 1, N * H * W) if _is_gemm(p) else (N, H, W)


def _tile(extents: tuple[int, int, int], pixels: int, exact: bool = False) -> tuple[int, int, int]:
    """The box [images, rows, columns] of so many pixels, a power of two, of which fewest cover `extents`.

    exact: rows and columns divide their extents.
    """
    _, P, Q = extents
    sides = [1 << i for i in range(pixels.bit_length())]
    candidates = [
        (pixels // (rows * columns), rows, columns)
        for rows in sides
        for columns in sides
        if rows * columns <= pixels
        and (not exact or (P % rows == 0 and Q % columns == 0))
        and max(pixels // (rows * columns), rows, columns) <= 256  # a descriptor's limit
    ]
    return min(candidates, key=lambda box: (_count(extents, box), box[0], -box[2]))


def _count(extents: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    return math.prod(map(cdiv, extents, box))


def _walk(tiles: int, programs: int) -> tuple[int, int]:
    """Programs, at most so many, that walk over the tiles, and steps of each: as few programs as those steps allow."""
    steps = cdiv(tiles, programs)
    return cdiv(tiles, steps), steps


def _geometry(p: Conv2dProblem) -> dict[str, int | str]:
    return {
        "C": p.C, "K": p.K, "R": p.R, "S": p.S, "PAD_H": p.pad_h, "PAD_W": p.pad_w,
        "DILATION_H": p.dilation_h if p.R > 1 else 1, "DILATION_W": p.dilation_w if p.S > 1 else 1,
    }  # fmt: skip


def _view(extents: tuple[int, int, int], channels: int, box: tuple[int, int, int], block: int, stride: int) -> Boxes:
    """Pixels by boxes of so many, every stride-th one, and so many of their channels."""
    N, H, W = extents
    images, rows, columns = box
    if stride == 1:
        return Boxes((N, H, W, channels), (images, rows, columns, block))
    return Boxes((N, H // 2, 2, W // 2, 2 * channels), (images, rows, 1, columns, block))


@cached
def forward_tma(
    p: Conv2dProblem, precision: str, device: Device, activation: str = "none", statistics: bool = False
) -> TmaLaunch | None:
    """None: the pointer kernel's."""
    if not _has_boxes(p, precision, device, p.C):
        return None
    tile = choose(FORWARD_TMA, p)
    if statistics and tile.block_n > 64:
        tile = replace(tile, resident=1)  # in half of the registers the moments of so many columns spill
    stride = _stride(p, tile.block_k)
    if not stride:
        return None
    outputs = _images(p, p.N, p.P, p.Q)
    box = _tile(outputs, tile.block_m)
    tiles = _count(outputs, box) * cdiv(p.K, tile.block_n)
    programs, steps = _walk(tiles, tile.resident * device.processors)
    return TmaLaunch(
        (
            _view(_images(p, p.N, p.H, p.W), p.C, box, tile.block_k, stride),
            Boxes((p.K, p.R * p.S, p.C), (tile.block_n, 1, tile.block_k)),
        ),
        Launch(
            programs,
            {"N": outputs[0], "P": outputs[1], "Q": outputs[2], "tile_steps": steps},
            _geometry(p)
            | {"STRIDE": stride, "TILE_H": box[1], "TILE_W": box[2]}
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            | {"PRECISION": precision, "ACTIVATION": activation},
            tile.num_warps,
            tile.num_stages,
            tile.max_registers,
        ),
    )


@cached
def backward_input_tma(p: Conv2dProblem, precision: str, device: Device) -> TmaLaunch | None:
    """None: the pointer kernel's."""
    if _stride(p, 1) != 1 or not _has_boxes(p, precision, device, p.C, p.K):
        return None
    tile = choose(BACKWARD_INPUT_TMA, p)
    outputs = _images(p, p.N, p.H, p.W)
    box = _tile(outputs, tile.block_m)
    tiles = _count(outputs, box) * cdiv(p.C, tile.block_n)
    programs, steps = _walk(tiles, tile.resident * device.processors)
    return TmaLaunch(
        (
            _view(_images(p, p.N, p.P, p.Q), p.K, box, tile.block_k, 1),
            Boxes((p.K, p.R * p.S, p.C), (tile.block_k, 1, tile.block_n)),
        ),
        Launch(
            programs,
            {"N": outputs[0], "H": outputs[1], "W": outputs[2], "tile_steps": steps},
            _geometry(p)
            | {"TILE_H": box[1], "TILE_W": box[2]}
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PRECISION": precision},
            tile.num_warps,
            tile.num_stages,
            tile.max_registers,
        ),
    )


@cached
def backward_weight_tma(p: Conv2dProblem, precision: str, device: Device) -> TmaSplitLaunch | None:
    """None: the pointer kernel's."""
    stride = _stride(p, 1)
    if not stride or not _has_boxes(p, precision, device, p.C, p.K):
        return None
    tile = choose(BACKWARD_WEIGHT_TMA, p)
    outputs = _images(p, p.N, p.P, p.Q)
    box = _tile(outputs, tile.block_k, exact=not _is_gemm(p))
    steps = _count(outputs, box)
    if steps > 1 and 4 * steps * tile.block_k > 5 * math.prod(outputs):
        return None  # more than a fifth of the products would be of images that are not there
    tiles = cdiv(p.K, tile.block_m) * p.R * p.S * cdiv(p.C, tile.block_n)
    splits = splits_of(tiles, steps, device.processors)
    partial = Launch(
        splits * tiles,
        {"P": outputs[1], "Q": outputs[2], "steps": cdiv(steps, splits)},
        _geometry(p)
        | {"STRIDE": stride, "TILE_H": box[1], "TILE_W": box[2]}
        | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PRECISION": precision},
        tile.num_warps,
        tile.num_stages,
        tile.max_registers,
    )
    return TmaSplitLaunch(
        (
            _view(outputs, p.K, box, tile.block_m, 1),
            _view(_images(p, p.N, p.H, p.W), p.C, box, tile.block_n, stride),
        ),
        SplitLaunch(splits, partial, total_of(p.K * p.R * p.S * p.C, splits)),
    )


def most_programs(p: Conv2dProblem) -> int:
    """The largest grid of `p`, splits aside: they only fill what few programs leave idle."""
    gathered = forward_nchw(p, "ieee") if reads_nchw(p) else forward(p, "ieee")
    launches = (gathered, backward_input(p, "ieee"), backward_weight(p, "ieee", 1).partial)
    return max(launch.programs for launch in launches)
