"""Tensors as the kernels want them, and results as torch would lay them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nhwc(t: torch.Tensor) -> torch.Tensor:
    """`t` [N, C, H, W] with its memory in the order N, H, W, C."""
    return t.contiguous(memory_format=torch.channels_last)


def empty_nhwc(shape: Sequence[int], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A tensor whose memory is NHWC; where that is NCHW too, with the strides that the caller will want."""
    N, C, H, W = shape
    nchw = not channels_last and (N == 0 or C == 1 or H * W == 1)
    layout = torch.contiguous_format if nchw else torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def result(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """What a kernel wrote as NHWC, in the layout that torch would give it."""
    return t if channels_last else t.contiguous()


def dense_as(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`t` dense, as NHWC where channels_last."""
    return nhwc(t) if channels_last else t.contiguous()


def empty(
    shape: Sequence[int], like: torch.Tensor, channels_last: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A dense tensor [N, C, H, W], NHWC where channels_last, of `like`'s dtype or of another."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)
