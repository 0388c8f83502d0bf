"""Tiles of pixels and channels in either memory layout.

The layout's contiguous axis is a tile's last, so that lanes run along it: a tile is [pixels, channels] of NHWC and
[channels, pixels] of NCHW.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def along_pixels(values, NCHW: tl.constexpr):
    """One value for each pixel, to be broadcast over a tile."""
    if NCHW:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def along_channels(values, NCHW: tl.constexpr):
    """One value for each channel, to be broadcast over a tile."""
    if NCHW:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def zeros(PIXELS: tl.constexpr, CHANNELS: tl.constexpr, NCHW: tl.constexpr):
    if NCHW:
        return tl.full([CHANNELS, PIXELS], 0, tl.float32)
    else:
        return tl.full([PIXELS, CHANNELS], 0, tl.float32)


@triton.jit
def over_pixels(tile, NCHW: tl.constexpr):
    """The sum over a tile's pixels, for each channel."""
    return tl.sum(tile, 1 if NCHW else 0)


@triton.jit
def pixel_offset(n, h, w, H, W, CHANNELS: tl.constexpr, NCHW: tl.constexpr):
    """Where the first channel of pixel (n, h, w) lies, in 64 bits; whether it is inside is the caller's to ask."""
    image = n.to(tl.int64) * H
    if NCHW:
        return (image * CHANNELS + h) * W + w
    else:
        return ((image + h) * W + w) * CHANNELS


@triton.jit
def channel_offset(channel, plane, NCHW: tl.constexpr):
    """How far a channel lies from the first one's: `plane` is H * W."""
    if NCHW:
        return channel.to(tl.int64) * plane
    else:
        return channel


@triton.jit
def replaced(values, AT: tl.constexpr, value):
    """The tuple `values` with `value` at place AT."""
    return values[:AT] + (value,) + values[AT + 1 :]  # noqa: RUF005 (kernels have no star)
