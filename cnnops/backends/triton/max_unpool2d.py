"""Unpooling: values go back to where their maxima were.

    y[n,c,i]    = x[n,c,h,w] where i = indices[n,c,h,w], a flat position of the P x Q plane; elsewhere 0. Of several
                  values for one position the last in row-major order stays.
    dx[n,c,h,w] = dy[n,c,indices[n,c,h,w]]

Layout     x, dx, y, dy, indices dense, all [N,C,..] or all [N,..,C].
Tile       forward: BLOCK_M x BLOCK_C = 16 x 64 in 16 bits, 8 x 64 in fp32 (C >= 64), NCHW 32 x 32, in both passes.
                         columns w ->                               columns q ->
                       +--------------------------------+         +------------------------------------+
           rows h    | | 1. indices: BLOCK_M positions, |  index  | notes: all of P x Q, 4 bytes each; | | rows p
                     v | at (h,w) of H x W              | ------->| 2. y, and x by these: BLOCK_M      | v
                       +--------------------------------+         +------------------------------------+
           The notes are in memory, in L2 where they fit. backward: BLOCK_M positions of dx. No halo, no split.
Ownership  forward: one pass over the inputs notes for each position of y the last of those that point there, an integer
           maximum that is the same in every order; another one owns a block of y. backward: a program owns a block of
           dx. The first wrong index is a minimum over all.
Traffic    forward: indices once, the notes (4 bytes for each element of y) three times, x once + y; backward: indices
           once, what they point to of dy + dx.
Offsets in memory are 64-bit; positions are counted in 32 bits (the backend's `supports` refuses more).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import pool2d_plan
from cnnops.backends.triton.launch import answers, launch
from cnnops.backends.triton.pool2d import place, tile
from cnnops.backends.triton.tensors import dense_as, empty
from cnnops.geometry import Pool2dProblem, is_channels_last

# Integers of a batch: specialising on them (1, multiples of 16) would compile anew for every batch size.
_BATCH = ["places", "positions", "count"]


@triton.jit
def _refuse(misplaced, wrong, n, at, c, places, C: tl.constexpr):
    """Note the first of the block's misplaced indices, by its number in row-major order of [N, C, H, W]."""
    number = (n.to(tl.int64) * C + c) * places + at
    first = tl.min(tl.where(misplaced, number, 2**63 - 1))
    tl.atomic_min(wrong, first, mask=first < 2**63 - 1, sem="relaxed")


@triton.jit(do_not_specialize=_BATCH)
def mark_kernel(
    indices, last, wrong, places, positions, count,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """last: for each element of y, 1 + the last place of x's plane that points there; 0 as it was for none."""
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < count) & (c < C)
    n = m // places
    at = m - n * places
    index = tl.load(indices + place(n, at, c, places, C, CHANNELS_LAST), mask=exists, other=0)
    inside = (index >= 0) & (index < positions)
    to = last + place(n, index, c, positions, C, CHANNELS_LAST)
    tl.atomic_max(to, tl.broadcast_to(at + 1, exists.shape), mask=exists & inside, sem="relaxed")
    _refuse(exists & ~inside, wrong, n, at, c, places, C)


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, last, y, places, positions, count,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < count) & (c < C)
    n = m // positions
    to = place(n, m - n * positions, c, positions, C, CHANNELS_LAST)
    at = tl.load(last + to, mask=exists, other=0)
    v = tl.load(x + place(n, at - 1, c, places, C, CHANNELS_LAST), mask=at > 0, other=0.0)
    tl.store(y + to, v, mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def backward_kernel(
    dy, indices, dx, wrong, places, positions, count,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < count) & (c < C)
    n = m // places
    at = m - n * places
    to = place(n, at, c, places, C, CHANNELS_LAST)
    index = tl.load(indices + to, mask=exists, other=0)
    inside = (index >= 0) & (index < positions)
    v = tl.load(dy + place(n, index, c, positions, C, CHANNELS_LAST), mask=exists & inside, other=0.0)
    tl.store(dx + to, v, mask=exists)
    _refuse(exists & ~inside, wrong, n, at, c, places, C)


def _problem(t, indices, P, Q, channels_last) -> Pool2dProblem:
    N, C, H, W = indices.shape
    return Pool2dProblem(N, C, H, W, 0, 0, P, Q, 0, 0, 0, 0, 0, 0, t.dtype, t.device.type, channels_last)


def _first_wrong(indices) -> torch.Tensor:
    """What `_refuse` lowers: int64 [1], beyond all of the indices' numbers."""
    return torch.full((1,), indices.numel(), dtype=torch.int64, device=indices.device)


def _check(indices, wrong, P, Q) -> None:
    """Raise RuntimeError that names the first misplaced index. Where the host may not wait for it, it is not named:
    nothing was read or written through it."""
    if not answers(indices.device):
        return
    number = int(wrong)
    if number < indices.numel():
        raise RuntimeError(
            f"max_unpool2d: indices must be positions of a {P}x{Q} plane, at least 0 and below {P * Q}, "
            f"but got {int(indices.flatten()[number])}"
        )


def max_unpool2d_forward(x, indices, P, Q) -> torch.Tensor:
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout; indices like x, int64."""
    p = _problem(x, indices, P, Q, is_channels_last(x))
    y = empty((p.N, p.C, P, Q), x, p.channels_last)
    if y.numel():
        wrong = _first_wrong(indices)
        last = torch.zeros(y.numel(), dtype=torch.int32, device=y.device)
        launch(mark_kernel, pool2d_plan.unpooling(p, False), dense_as(indices, p.channels_last), last, wrong)
        _check(indices, wrong, P, Q)
        launch(forward_kernel, pool2d_plan.unpooling(p, True), dense_as(x, p.channels_last), last, y)
    return y


def max_unpool2d_backward(dy, indices, channels_last) -> torch.Tensor:
    """dx [N, C, H, W] of dy [N, C, P, Q], fp32, fp16 or bf16; indices like dx, int64."""
    P, Q = dy.shape[2:]
    p = _problem(dy, indices, P, Q, channels_last)
    dx = empty(indices.shape, dy, channels_last)
    if dx.numel():
        wrong = _first_wrong(indices)
        how = pool2d_plan.unpooling(p, False)
        launch(backward_kernel, how, dense_as(dy, channels_last), dense_as(indices, channels_last), dx, wrong)
        _check(indices, wrong, P, Q)
    return dx
