"""Pooling over windows of R x S taps, and adaptive pooling.

    max       y[n,p,q,c]       = max over (r,s) of x[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
              offsets[n,p,q,c] = r * S + s of the tap that is kept
              dx[n,h,w,c]      = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c]
    average   y[n,p,q,c]       = 1/divisor(p,q) * sum over (r,s) of x[n, p*stride_h - pad_h + r, q*.. + s, c]
              dx[n,h,w,c]      = sum over the windows (p,q) that cover (h,w) of dy[n,p,q,c] / divisor(p,q)
    adaptive  either over rows floor(p*H/P) .. ceil((p+1)*H/P) - 1, and columns likewise

A NaN always replaces what is kept, and nothing replaces a NaN but a later one; a tie replaces nothing. A window without
a tap inside the input gives -inf and the offset 0.

Layout     x, dx [N,H,W,C] or [N,C,H,W], y and dy likewise; offsets [N,P,Q,C] for either: uint8 where R * S <= 256,
           else, and where windows are adaptive, int32 (r * S + s in a window's own S columns).
Tile       forward: BLOCK_M x BLOCK_C = 16 x 64 in 16 bits, 8 x 64 in fp32 (C >= 64), NCHW 32 x 32; columns w ->
                       +- x: what BLOCK_M windows read, in place -----------+
           rows h    | | [window m: R x S]          maximum and tap, or     |  BLOCK_C channels c deep; m counts (n,p,q)
                     v |        [window m + 1] ..        sum: registers     |  and so goes on in the next row, and image
                       +- halo: columns of both, rows of others: L1 --------+
           Adaptive windows of 8 taps or more: BLOCK_M = 1, split: BLOCK_T = 32 lanes (NCHW 64), merged as a tree.
Ownership  One program owns a block of outputs in a block of channels, or of inputs, which ask the windows over them:
           each result is written once, and every sum has a fixed order. Lanes run along the channels of NHWC, along the
           positions of NCHW, where offsets change order within the program. The taps of large adaptive windows, a whole
           plane's too, are lanes of their own, and what these kept is merged as a tree.
Traffic    forward: x once (overlapping windows meet in cache) + y (+ offsets); backward: dy (+ offsets) once + dx;
           indices: offsets once + indices.
Offsets in memory are 64-bit; positions are counted in 32 bits (the backend's `supports` refuses more).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import pool2d_plan
from cnnops.backends.triton.launch import launch
from cnnops.backends.triton.tensors import dense_as, empty
from cnnops.geometry import Pool2dProblem, is_channels_last, output_size

# Integers of a batch: specialising on them (1, multiples of 16) would compile anew for every batch size.
_BATCH = ["H", "W", "P", "Q", "outputs", "pixels", "wide", "steps"]

_NONE = tl.constexpr(2**31 - 1)
"""Where a tap is looked for, and there is none."""


@triton.jit
def tile(C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's positions and channels, [BLOCK_M, 1, 1] and [1, 1, BLOCK_C], or for planes [1, BLOCK_M, 1] and
    [BLOCK_C, 1, 1]: neighbours in memory are neighbours on an axis after which there are only taps."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    m = program // C_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        return m[:, None, None], c[None, None, :]
    else:
        return m[None, :, None], c[:, None, None]


@triton.jit
def place(n, position, c, plane, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where channel c of a position of image n lies, in elements."""
    if CHANNELS_LAST:
        return (n * plane + position).to(tl.int64) * C + c
    else:
        return (n.to(tl.int64) * C + c) * plane + position


@triton.jit
def _block(
    value, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST:
        return tl.full([BLOCK_M, BLOCK_T, BLOCK_C], value, DTYPE)
    else:
        return tl.full([BLOCK_C, BLOCK_M, BLOCK_T], value, DTYPE)


@triton.jit
def _tap(step, CHANNELS_LAST: tl.constexpr, BLOCK_T: tl.constexpr):
    """The taps of one step, along the block's own axis of taps."""
    if BLOCK_T == 1:
        return step
    elif CHANNELS_LAST:
        return step * BLOCK_T + tl.arange(0, BLOCK_T)[None, :, None]
    else:
        return step * BLOCK_T + tl.arange(0, BLOCK_T)[None, None, :]


@triton.jit
def _split(m, rows, columns):
    """Image, row and column of position `m` of images of `rows` x `columns`."""
    n = m // (rows * columns)
    within = m - n * (rows * columns)
    row = within // columns
    return n, row, within - row * columns


@triton.jit
def _covered(i, of, among, WIDE: tl.constexpr):
    """floor(i * of / among), and ceil((i + 1) * of / among)."""
    if WIDE:
        i = i.to(tl.int64)
    begin = i * of // among
    end = ((i + 1) * of + among - 1) // among
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _window(p, size, windows, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr):
    """Along one axis, where window p begins and how many taps it has. TAPS = 0: it is adaptive."""
    if TAPS:
        return p * STRIDE - PAD, tl.zeros_like(p) + TAPS
    else:
        begin, end = _covered(p, size, windows, WIDE)
        return begin, end - begin


@triton.jit
def _window_over(
    i, h, size, windows, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    WINDOWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Along one axis, of the windows that may see input h the i-th, in order, and the tap by which it does, if it does.

    WINDOWS: as many as may. With a dilation, there is one for each tap.
    """
    if TAPS == 0:
        begin, end = _covered(h, windows, size, WIDE)  # a window's own rule with sizes exchanged
        p = begin + i
        first, _ = _covered(p, size, windows, WIDE)
        return p, h - first, p < end
    elif DILATION == 1:
        p = (h + PAD) // STRIDE - (WINDOWS - 1) + i
        r = h + PAD - p * STRIDE
        return p, r, (p >= 0) & (p < windows) & (r < TAPS)
    else:
        r = TAPS - 1 - i
        reach = h + PAD - r * DILATION
        p = reach // STRIDE
        return p, tl.zeros_like(p) + r, (reach >= 0) & (p * STRIDE == reach) & (p < windows)


@triton.jit
def _counted(
    p, size, windows, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Along one axis, what window p of an average counts. Beyond the padded edge, which ceil_mode may pass, nothing."""
    first, taps = _window(p, size, windows, TAPS, STRIDE, PAD, WIDE)
    if TAPS and INCLUDE_PAD:
        taps = tl.minimum(taps, size + PAD - first)
    elif TAPS:
        taps = tl.minimum(first + taps, size) - tl.maximum(first, 0)
    return taps.to(tl.float32)


@triton.jit
def _divisor(
    p, q, H, W, P, Q, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, WIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """What the sum over window (p, q) is divided by: DIVISOR, or if that is 0 what the window counts."""
    if DIVISOR != 0:
        return tl.zeros_like(p).to(tl.float32) + DIVISOR
    else:
        rows = _counted(p, H, P, R, STRIDE_H, PAD_H, INCLUDE_PAD, WIDE)
        return rows * _counted(q, W, Q, S, STRIDE_W, PAD_W, INCLUDE_PAD, WIDE)


@triton.jit(do_not_specialize=_BATCH)
def max_forward_kernel(
    x, y, offsets, H, W, P, Q, outputs, steps,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """steps: over the taps of a window, BLOCK_T of them at once. offsets may be None."""
    STEPS: tl.constexpr = (R * S + BLOCK_T - 1) // BLOCK_T
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < outputs) & (c < C)
    n, p, q = _split(m, P, Q)
    top, rows = _window(p, H, P, R, STRIDE_H, PAD_H, WIDE)
    left, columns = _window(q, W, Q, S, STRIDE_W, PAD_W, WIDE)
    best = _block(float("-inf"), CHANNELS_LAST, BLOCK_M, BLOCK_T, BLOCK_C, tl.float32)
    kept = _block(-1, CHANNELS_LAST, BLOCK_M, BLOCK_T, BLOCK_C, tl.int32)
    for step in tl.range(0, STEPS if R else steps, loop_unroll_factor=UNROLL):
        t = _tap(step, CHANNELS_LAST, BLOCK_T)
        r = t // columns
        h = top + r * DILATION_H
        w = left + (t - r * columns) * DILATION_W
        inside = (r < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        v = tl.load(
            x + place(n, h * W + w, c, H * W, C, CHANNELS_LAST), mask=inside & exists, other=float("-inf")
        ).to(tl.float32)  # fmt: skip
        wins = inside & ((v > best) | (v != v) | (kept < 0))
        best = tl.where(wins, v, best)
        kept = tl.where(wins, t, kept)

    if BLOCK_T > 1:  # of each lane's choice, what all taps in order would have chosen
        AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
        nan = best != best
        last_nan = tl.max(tl.where(nan, kept, -1), AXIS, keep_dims=True)
        most = tl.max(tl.where(nan, float("-inf"), best), AXIS, keep_dims=True)
        first = tl.min(tl.where((best == most) & (kept >= 0), kept, _NONE), AXIS, keep_dims=True)
        chosen = tl.where(last_nan >= 0, last_nan, first)
        # The value itself, by its bits: a sum of numbers would lose -0.0.
        bits = tl.sum(tl.where(kept == chosen, best.to(tl.int32, bitcast=True), 0), AXIS, keep_dims=True)
        best = tl.where(chosen == _NONE, float("-inf"), bits.to(tl.float32, bitcast=True))
        kept = tl.where(chosen == _NONE, 0, chosen)

    tl.store(y + place(n, p * Q + q, c, P * Q, C, CHANNELS_LAST), best.to(y.dtype.element_ty), mask=exists)
    if offsets is not None:
        kept = tl.maximum(kept, 0).to(offsets.dtype.element_ty)
        tl.store(offsets + place(n, p * Q + q, c, P * Q, C, True), kept, mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def avg_forward_kernel(
    x, y, H, W, P, Q, outputs, steps,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """steps: over the taps of a window, BLOCK_T of them at once."""
    STEPS: tl.constexpr = (R * S + BLOCK_T - 1) // BLOCK_T
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < outputs) & (c < C)
    n, p, q = _split(m, P, Q)
    top, rows = _window(p, H, P, R, STRIDE_H, PAD_H, WIDE)
    left, columns = _window(q, W, Q, S, STRIDE_W, PAD_W, WIDE)
    sums = _block(0.0, CHANNELS_LAST, BLOCK_M, BLOCK_T, BLOCK_C, tl.float32)
    for step in tl.range(0, STEPS if R else steps, loop_unroll_factor=UNROLL):
        t = _tap(step, CHANNELS_LAST, BLOCK_T)
        r = t // columns
        h = top + r
        w = left + t - r * columns
        inside = (r < rows) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = place(n, h * W + w, c, H * W, C, CHANNELS_LAST)
        sums += tl.load(x + at, mask=inside & exists, other=0.0).to(tl.float32)

    if BLOCK_T > 1:
        sums = tl.sum(sums, 1 if CHANNELS_LAST else 2, keep_dims=True)
    divisor = _divisor(p, q, H, W, P, Q, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, WIDE, INCLUDE_PAD, DIVISOR)
    mean = tl.div_rn(sums, tl.broadcast_to(divisor, sums.shape))
    tl.store(y + place(n, p * Q + q, c, P * Q, C, CHANNELS_LAST), mean.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def max_backward_kernel(
    dy, offsets, dx, H, W, P, Q, pixels, wide, steps,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr,
    WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """steps: over the windows that may see an input, `wide` of them in a row. Sliding windows: WINDOWS_H x WINDOWS_W."""
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < pixels) & (c < C)
    n, h, w = _split(m, H, W)
    sums = _block(0.0, CHANNELS_LAST, BLOCK_M, 1, BLOCK_C, tl.float32)
    for step in tl.range(0, WINDOWS_H * WINDOWS_W if R else steps, loop_unroll_factor=UNROLL):
        i = step // (WINDOWS_W if S else wide)
        j = step - i * (WINDOWS_W if S else wide)
        p, r, in_rows = _window_over(i, h, H, P, R, STRIDE_H, PAD_H, DILATION_H, WINDOWS_H, WIDE)
        q, s, in_columns = _window_over(j, w, W, Q, S, STRIDE_W, PAD_W, DILATION_W, WINDOWS_W, WIDE)
        _, columns = _window(q, W, Q, S, STRIDE_W, PAD_W, WIDE)
        asked = in_rows & in_columns & exists
        kept = tl.load(offsets + place(n, p * Q + q, c, P * Q, C, True), mask=asked, other=0).to(tl.int32)
        v = tl.load(dy + place(n, p * Q + q, c, P * Q, C, CHANNELS_LAST), mask=asked, other=0.0)
        sums += tl.where(asked & (kept == r * columns + s), v.to(tl.float32), 0.0)
    tl.store(dx + place(n, h * W + w, c, H * W, C, CHANNELS_LAST), sums.to(dx.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def avg_backward_kernel(
    dy, dx, H, W, P, Q, pixels, wide, steps,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr,
    WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr, UNROLL: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """steps: over the windows that may see an input, `wide` of them in a row. Sliding windows: WINDOWS_H x WINDOWS_W."""
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < pixels) & (c < C)
    n, h, w = _split(m, H, W)
    sums = _block(0.0, CHANNELS_LAST, BLOCK_M, 1, BLOCK_C, tl.float32)
    for step in tl.range(0, WINDOWS_H * WINDOWS_W if R else steps, loop_unroll_factor=UNROLL):
        i = step // (WINDOWS_W if S else wide)
        j = step - i * (WINDOWS_W if S else wide)
        p, _, in_rows = _window_over(i, h, H, P, R, STRIDE_H, PAD_H, DILATION_H, WINDOWS_H, WIDE)
        q, _, in_columns = _window_over(j, w, W, Q, S, STRIDE_W, PAD_W, DILATION_W, WINDOWS_W, WIDE)
        asked = in_rows & in_columns
        divisor = _divisor(p, q, H, W, P, Q, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, WIDE, INCLUDE_PAD, DIVISOR)
        share = 1 / tl.where(asked, divisor, 1.0)
        v = tl.load(dy + place(n, p * Q + q, c, P * Q, C, CHANNELS_LAST), mask=asked & exists, other=0.0)
        sums += v.to(tl.float32) * share
    tl.store(dx + place(n, h * W + w, c, H * W, C, CHANNELS_LAST), sums.to(dx.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def max_indices_kernel(
    offsets, indices, H, W, P, Q, outputs,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The offset of a window without a tap inside the input points outside; the nearest position stands for it."""
    m, c = tile(C, CHANNELS_LAST, BLOCK_M, BLOCK_C)
    exists = (m < outputs) & (c < C)
    n, p, q = _split(m, P, Q)
    top, _ = _window(p, H, P, R, STRIDE_H, PAD_H, WIDE)
    left, columns = _window(q, W, Q, S, STRIDE_W, PAD_W, WIDE)
    at = place(n, p * Q + q, c, P * Q, C, CHANNELS_LAST)
    tap = tl.load(offsets + at, mask=exists, other=0).to(tl.int32)
    r = tap // columns
    h = tl.minimum(tl.maximum(top + r * DILATION_H, 0), H - 1)
    w = tl.minimum(tl.maximum(left + (tap - r * columns) * DILATION_W, 0), W - 1)
    tl.store(indices + at, (h * W + w).to(tl.int64), mask=exists)


def _problem(t, channels_last, sizes, windows, geometry=(0,) * 8) -> Pool2dProblem:
    """sizes: H and W; windows: P and Q; geometry: kernel, stride, pad and dilation, each of h and of w; 0: adaptive."""
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = geometry
    return Pool2dProblem(
        t.shape[0], t.shape[1], sizes[0], sizes[1], kernel_h, kernel_w, windows[0], windows[1],
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, t.dtype, t.device.type, channels_last,
    )  # fmt: skip


def _max_forward(x, p: Pool2dProblem, offset_dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (p.N, p.C, p.P, p.Q)
    y = empty(shape, x, p.channels_last)
    offsets = None if offset_dtype is None else empty(shape, x, True, offset_dtype)
    if y.numel():
        launch(max_forward_kernel, pool2d_plan.forward(p), dense_as(x, p.channels_last), y, offsets)
    return y, offsets


def _max_backward(dy, offsets, p: Pool2dProblem) -> torch.Tensor:
    dx = empty((p.N, p.C, p.H, p.W), dy, p.channels_last)
    if not dy.numel():
        return dx.zero_()
    if dx.numel():
        launch(max_backward_kernel, pool2d_plan.backward(p), dense_as(dy, p.channels_last), _checked(offsets), dx)
    return dx


def _max_indices(offsets, p: Pool2dProblem) -> torch.Tensor:
    indices = empty(offsets.shape, offsets, True, torch.int64)
    if indices.numel():
        launch(max_indices_kernel, pool2d_plan.indices(p), _checked(offsets), indices)
    return indices


def _checked(offsets) -> torch.Tensor:
    if not offsets.is_contiguous(memory_format=torch.channels_last):
        raise RuntimeError("expected the offsets as max_pool2d made them, channels_last and dense")
    return offsets


def _avg_forward(x, p: Pool2dProblem, include_pad: bool, divisor: int) -> torch.Tensor:
    y = empty((p.N, p.C, p.P, p.Q), x, p.channels_last)
    if y.numel():
        how = pool2d_plan.forward(p, INCLUDE_PAD=include_pad, DIVISOR=float(divisor))
        launch(avg_forward_kernel, how, dense_as(x, p.channels_last), y)
    return y


def _avg_backward(dy, p: Pool2dProblem, include_pad: bool, divisor: int) -> torch.Tensor:
    dx = empty((p.N, p.C, p.H, p.W), dy, p.channels_last)
    if not dy.numel():
        return dx.zero_()
    if dx.numel():
        how = pool2d_plan.backward(p, INCLUDE_PAD=include_pad, DIVISOR=float(divisor))
        launch(avg_backward_kernel, how, dense_as(dy, p.channels_last), dx)
    return dx


def max_pool2d_forward(
    x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode, need_offsets
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout; and offsets [N, C, P, Q], channels_last,
    uint8 where the window has at most 256 taps, else int32."""
    H, W = x.shape[2:]
    P = output_size(H, kernel_h, stride_h, pad_h, dilation_h, ceil=ceil_mode)
    Q = output_size(W, kernel_w, stride_w, pad_w, dilation_w, ceil=ceil_mode)
    window = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    p = _problem(x, is_channels_last(x), (H, W), (P, Q), window)
    dtype = torch.uint8 if kernel_h * kernel_w <= 256 else torch.int32
    return _max_forward(x, p, dtype if need_offsets else None)


def max_pool2d_backward(dy, offsets, H, W, channels_last, *window) -> torch.Tensor:
    """dx [N, C, H, W] of dy and offsets [N, C, P, Q]. window: kernel, stride, pad and dilation, each of h and of w."""
    return _max_backward(dy, offsets, _problem(dy, channels_last, (H, W), dy.shape[2:], window))


def max_pool2d_indices(offsets, H, W, *window) -> torch.Tensor:
    """Flat positions h * W + w, int64 [N, C, P, Q], channels_last. window: as in `max_pool2d_backward`."""
    return _max_indices(offsets, _problem(offsets, True, (H, W), offsets.shape[2:], window))


def adaptive_max_pool2d_forward(x, P, Q, need_offsets) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout; and offsets [N, C, P, Q], channels_last,
    int32."""
    p = _problem(x, is_channels_last(x), x.shape[2:], (P, Q))
    return _max_forward(x, p, torch.int32 if need_offsets else None)


def adaptive_max_pool2d_backward(dy, offsets, H, W, channels_last) -> torch.Tensor:
    """dx [N, C, H, W] of dy and offsets [N, C, P, Q]."""
    return _max_backward(dy, offsets, _problem(dy, channels_last, (H, W), dy.shape[2:]))


def adaptive_max_pool2d_indices(offsets, H, W) -> torch.Tensor:
    """Flat positions h * W + w, int64 [N, C, P, Q], channels_last."""
    return _max_indices(offsets, _problem(offsets, True, (H, W), offsets.shape[2:]))


def avg_pool2d_forward(
    x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, ceil_mode, count_include_pad, divisor_override
) -> torch.Tensor:
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout. divisor_override: 0 for none."""
    H, W = x.shape[2:]
    P = output_size(H, kernel_h, stride_h, pad_h, ceil=ceil_mode)
    Q = output_size(W, kernel_w, stride_w, pad_w, ceil=ceil_mode)
    window = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1
    p = _problem(x, is_channels_last(x), (H, W), (P, Q), window)
    return _avg_forward(x, p, count_include_pad, divisor_override)


def avg_pool2d_backward(
    dy, H, W, channels_last, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, ceil_mode, count_include_pad,
    divisor_override,
) -> torch.Tensor:  # fmt: skip
    """dx [N, C, H, W] of dy [N, C, P, Q]."""
    window = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1
    p = _problem(dy, channels_last, (H, W), dy.shape[2:], window)
    return _avg_backward(dy, p, count_include_pad, divisor_override)


def adaptive_avg_pool2d_forward(x, P, Q) -> torch.Tensor:
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout."""
    return _avg_forward(x, _problem(x, is_channels_last(x), x.shape[2:], (P, Q)), False, 0)


def adaptive_avg_pool2d_backward(dy, H, W, channels_last) -> torch.Tensor:
    """dx [N, C, H, W] of dy [N, C, P, Q]."""
    return _avg_backward(dy, _problem(dy, channels_last, (H, W), dy.shape[2:]), False, 0)
