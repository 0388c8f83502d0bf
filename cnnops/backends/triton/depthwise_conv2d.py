"""Depthwise 2-d convolution: groups of one channel each, with one or several filters of any size.

    y[n,p,q,k]     = activation(scale[k] * sum over (r,s) of x[n, p*stride - pad + r*dilation, .., c] * weight[k,r,s]
                                + bias[k] + residual[n,p,q,k]),   c = k / (K / C)
    dx[n,h,w,c]    = sum over (r,s) and c's filters k of dy[n, (h + pad - r*dilation) / stride, .., k] * weight[k,r,s],
                     where stride divides
    dweight[k,r,s] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride - pad + r*dilation, .., c]

Layout     x, dx [N,H,W,C] or [N,C,H,W]; y, dy, residual, z alike; weight, dweight [K,R,S], turned to [R,S,K] for loads of
           16 bytes. Lanes run along channels of NHWC, 16 bytes a thread, and along pixels of NCHW.
Tile       forward: ROWS x BLOCK_M x BLOCK_C = 7 x 32 x 32 in 16 bits, 7 x 32 x 16 in fp32; columns w ->
                       +- x: BLOCK_M columns for each of S taps, in place ----+
           rows h    | |  +- y: BLOCK_M columns q, ROWS rows p -------------+ |  BLOCK_C filters k deep; beyond Q the
                     v |  | sums and R taps of column s: registers          | |  columns go on ROWS rows further down;
                       |  +-------------------------------------------------+ |  taps that are not unrolled: ROWS = 1
                       +- halo: R - STRIDE_H rows, S - STRIDE_W columns: L1 --+
           NCHW: 4 x 128 x 8. Maps of up to 7 x 8: 7 x 8 x 128, fp32 7 x 8 x 64. dweight: the sum over pixels is split.
Ownership  forward: a program owns up to seven rows of some columns of an image, of some filters. dx: a program owns some
           positions of `stride` x `stride` pixels. dweight: a program sums a share of all pixels, for all taps of a
           filter of up to 3 x 3 together with dx, else for a row of up to eight taps; its sums fill an fp32 slab, and a
           second kernel adds the slabs in a fixed order. Statistics and means are merged the same way. Nothing is atomic.
Traffic    forward: y once; x, each row of it S times for all outputs of a tile that it meets, once from memory and else
           from L1; weight once for each program where taps are unrolled (up to 7 x 7, no dilation, strides up to 2).
           Both gradients of up to 3 x 3 and strides up to 2: dy once for each tap (once from memory), x and dx once.
           Larger filters: dx as forward, and dweight reads dy and x once for each row of taps, mostly from L2.
A tap beside the image counts zero; one times an infinity of the weight is NaN, as in a convolution of a padded image.
Offsets are 64-bit; pixels are counted in 32 bits (the backend's `supports` refuses more). Grids have one axis, x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import depthwise_conv2d_plan as plan
from cnnops.backends.triton.activation import activate
from cnnops.backends.triton.epilogue import empty_parts, fold_batch_norm, merge
from cnnops.backends.triton.launch import device_of, launch, launch_split
from cnnops.backends.triton.layout import (
    along_channels,
    along_pixels,
    channel_offset,
    over_pixels,
    pixel_offset,
    replaced,
    zeros,
)
from cnnops.backends.triton.tensors import dense_as, empty, empty_nhwc, result
from cnnops.geometry import Conv2dProblem, is_channels_last

takes = plan.takes

# Integers of a batch: specialising on them (1, multiples of 16) would compile anew for every batch size.
_BATCH = ["H", "W", "P", "Q", "tiles", "rows", "columns", "positions", "pixels", "count", "steps"]


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, weight, scale, bias, residual, z, y, totals, counts, means, m2s, H, W, P, Q, tiles,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, NCHW: tl.constexpr,
    ACTIVATION: tl.constexpr, FLIPPED: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_M columns of ROWS rows each, anywhere in an image, of BLOCK_C filters.

    totals: [N, tiles, K], the sums of a tile's results; counts [N * tiles], means and m2s [N * tiles, K]: how many they
    are, their means and squared deviations. FLIPPED takes the filter's taps in the reverse order.
    """
    K_TILES: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    part = program // K_TILES
    n = part // tiles
    k = program % K_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    m = part % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = m // Q * ROWS
    q = m % Q
    h0 = first * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    exists = k < K
    windows = x + along_pixels(pixel_offset(n, h0, w0, H, W, C, NCHW), NCHW)
    windows += along_channels(channel_offset(k // (K // C), H * W, NCHW), NCHW)
    pixel = 1 if NCHW else C
    taps = weight + k

    sums = (zeros(BLOCK_M, BLOCK_C, NCHW),) * ROWS
    if UNROLLED:
        filters = (tl.full([BLOCK_C], 0, tl.float32),) * R
        for s in range(S):  # a loop, so that no more than a column of loads is in flight
            reads = (w0 + s >= 0) & (w0 + s < W)
            for r in tl.static_range(R):
                tap = (R - 1 - r) * S + S - 1 - s if FLIPPED else r * S + s
                filters = replaced(filters, r, tl.load(taps + tap * K, mask=exists, other=0.0).to(tl.float32))
            for i in tl.static_range((ROWS - 1) * STRIDE_H + R):
                # The last rows of a tile may not exist; what they would read is read where it is inside.
                inside = reads & (h0 + i >= 0) & (h0 + i < H) & (first < P)
                tile = tl.load(
                    windows + (W.to(tl.int64) * i + s) * pixel,
                    mask=along_pixels(inside, NCHW) & along_channels(exists, NCHW), other=0.0,
                ).to(tl.float32)  # fmt: skip
                for t in tl.static_range(ROWS):
                    if i >= t * STRIDE_H and i < t * STRIDE_H + R:
                        factor = along_channels(filters[i - t * STRIDE_H], NCHW)
                        sums = replaced(sums, t, sums[t] + tile * factor)
    else:
        for tap in range(R * S):
            r = tap // S
            dh = r * DILATION_H
            dw = (tap - r * S) * DILATION_W
            inside = (h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W) & (first < P)
            tile = tl.load(
                windows + (W.to(tl.int64) * dh + dw) * pixel,
                mask=along_pixels(inside, NCHW) & along_channels(exists, NCHW), other=0.0,
            ).to(tl.float32)  # fmt: skip
            at = R * S - 1 - tap if FLIPPED else tap
            factor = tl.load(taps + at * K, mask=exists, other=0.0).to(tl.float32)
            sums = (sums[0] + tile * along_channels(factor, NCHW),)

    if scale is not None:
        by = along_channels(tl.load(scale + k, mask=exists, other=0.0), NCHW)
    if bias is not None:
        plus = along_channels(tl.load(bias + k, mask=exists, other=0.0).to(tl.float32), NCHW)
    outputs = along_pixels(pixel_offset(n, first, q, P, Q, K, NCHW), NCHW)
    outputs += along_channels(channel_offset(k, P * Q, NCHW), NCHW)
    for t in tl.static_range(ROWS):
        owned = along_pixels(first + t < P, NCHW) & along_channels(exists, NCHW)
        at = outputs + (t * Q).to(tl.int64) * (1 if NCHW else K)
        value = sums[t]
        if scale is not None:
            value *= by
        if bias is not None:
            value += plus
        if residual is not None:
            value += tl.load(residual + at, mask=owned, other=0.0).to(tl.float32)
        if z is not None:
            rounded = value.to(z.dtype.element_ty)
            tl.store(z + at, rounded, mask=owned)
            value = rounded.to(tl.float32)
        written = activate(value, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + at, written, mask=owned)
        sums = replaced(sums, t, tl.where(owned, written.to(tl.float32), 0.0))

    if totals is not None or m2s is not None:
        total = sums[0]
        for t in tl.static_range(1, ROWS):
            total += sums[t]
        total = over_pixels(total, NCHW)
        at = part.to(tl.int64) * K + k
        if totals is not None:
            tl.store(totals + at, total, mask=exists)
        if m2s is not None:
            count = tl.sum(tl.minimum(tl.maximum(P - first, 0), ROWS), 0).to(tl.float32)
            mean = total / count
            squares = zeros(BLOCK_M, BLOCK_C, NCHW)
            for t in tl.static_range(ROWS):
                deviation = sums[t] - along_channels(mean, NCHW)
                owned = along_pixels(first + t < P, NCHW) & along_channels(exists, NCHW)
                squares += tl.where(owned, deviation * deviation, 0.0)
            tl.store(counts + part, count)
            tl.store(means + at, mean, mask=exists)
            tl.store(m2s + at, over_pixels(squares, NCHW), mask=exists)


@triton.jit(do_not_specialize=_BATCH)
def means_kernel(totals, pooled, count, steps, area, K: tl.constexpr, BLOCK: tl.constexpr):
    """pooled [N, K], of the totals [N, steps, K] over `area` pixels."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = totals + i // K * steps * K + i % K
    sums = tl.full([BLOCK], 0, tl.float32)
    for step in range(steps):
        sums += tl.load(at + step * K, mask=i < count, other=0.0)
    tl.store(pooled + i, sums / area, mask=i < count)


@triton.jit
def _spread(m, rows, columns):
    """Image, row and column of position number `m` of images of `rows` x `columns`."""
    n = m // (rows * columns)
    within = m - n * (rows * columns)
    row = within // columns
    return n, row, within - row * columns


@triton.jit(do_not_specialize=_BATCH)
def backward_kernel(
    dy, x, weight, bias, dx, slabs, H, W, P, Q, rows, columns, positions, steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, NCHW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, or dweight's sums over the positions of one split, or both. slabs: [splits, K, R, S]. One filter a channel.

    Position (i, j) has the pixels h = i*STRIDE_H + a - PAD_H % STRIDE_H, 0 <= a < STRIDE_H, and so along W. A tap joins
    the pixels of one such `a` to a row of dy.
    """
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    split = program // C_TILES
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = along_channels(c < C, NCHW)
    pixel = 1 if NCHW else C
    taps = (zeros(BLOCK_M, BLOCK_C, NCHW),) * (R * S)
    for step in range(steps):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, i, j = _spread(m, rows, columns)
        h0 = i * STRIDE_H - PAD_H % STRIDE_H
        w0 = j * STRIDE_W - PAD_W % STRIDE_W
        p0 = i + PAD_H // STRIDE_H
        q0 = j + PAD_W // STRIDE_W
        pixels = along_pixels(pixel_offset(n, h0, w0, H, W, C, NCHW), NCHW)
        pixels += along_channels(channel_offset(c, H * W, NCHW), NCHW)
        gradients = dy + along_pixels(pixel_offset(n, p0, q0, P, Q, K, NCHW), NCHW)
        gradients += along_channels(channel_offset(c, P * Q, NCHW), NCHW)

        for a in tl.static_range(STRIDE_H):
            for b in tl.static_range(STRIDE_W):
                owned = (m < positions) & (h0 + a >= 0) & (h0 + a < H) & (w0 + b >= 0) & (w0 + b < W)
                at = pixels + (a * W + b).to(tl.int64) * pixel
                sums = zeros(BLOCK_M, BLOCK_C, NCHW)
                if slabs is not None:
                    mask = along_pixels(owned, NCHW) & exists
                    tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                for r in tl.static_range(R):
                    for s in tl.static_range(S):
                        if (r * DILATION_H) % STRIDE_H == a and (s * DILATION_W) % STRIDE_W == b:
                            p = p0 - (r * DILATION_H) // STRIDE_H
                            q = q0 - (s * DILATION_W) // STRIDE_W
                            joined = along_pixels(owned & (p >= 0) & (p < P) & (q >= 0) & (q < Q), NCHW) & exists
                            back = (r * DILATION_H) // STRIDE_H * Q + (s * DILATION_W) // STRIDE_W
                            gradient = tl.load(
                                gradients - back.to(tl.int64) * pixel, mask=joined, other=0.0
                            ).to(tl.float32)  # fmt: skip
                            if dx is not None:
                                factor = tl.load(weight + (r * S + s) * K + c, mask=c < C, other=0.0).to(tl.float32)
                                sums += gradient * along_channels(factor, NCHW)
                            if slabs is not None:
                                # A pixel that has no output at this tap: an infinity there must not meet a zero.
                                product = gradient * tl.where(joined, tile, 0.0)
                                taps = replaced(taps, r * S + s, taps[r * S + s] + product)
                if bias is not None:
                    sums += along_channels(tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32), NCHW)
                if dx is not None:
                    mask = along_pixels(owned, NCHW) & exists
                    tl.store(dx + at, sums.to(dx.dtype.element_ty), mask=mask)
    if slabs is not None:
        filters = slabs + (split.to(tl.int64) * K + c) * (R * S)
        for tap in tl.static_range(R * S):
            tl.store(filters + tap, over_pixels(taps[tap], NCHW).to(slabs.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def backward_input_kernel(
    dy, weight, bias, dx, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, NCHW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of any problem: each pixel asks every tap of each of its channel's filters whether the strides divide."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    FILTERS: tl.constexpr = K // C
    program = tl.program_id(0)
    m = program // C_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    n, h, w = _spread(m, H, W)
    images = dy + along_pixels(pixel_offset(n, 0, 0, P, Q, K, NCHW), NCHW)
    pixel = 1 if NCHW else K
    sums = zeros(BLOCK_M, BLOCK_C, NCHW)
    for step in range(R * S * FILTERS):
        tap = step // FILTERS
        r = tap // S
        k = c * FILTERS + (step - tap * FILTERS)
        u = h + PAD_H - r * DILATION_H
        v = w + PAD_W - (tap - r * S) * DILATION_W
        p = u // STRIDE_H
        q = v // STRIDE_W
        joined = (m < pixels) & (u >= 0) & (v >= 0) & (p * STRIDE_H == u) & (q * STRIDE_W == v) & (p < P) & (q < Q)
        gradient = tl.load(
            images + along_pixels((p.to(tl.int64) * Q + q) * pixel, NCHW)
            + along_channels(channel_offset(k, P * Q, NCHW), NCHW),
            mask=along_pixels(joined, NCHW) & along_channels(c < C, NCHW), other=0.0,
        ).to(tl.float32)  # fmt: skip
        factor = tl.load(weight + tap * K + k, mask=c < C, other=0.0).to(tl.float32)
        sums += gradient * along_channels(factor, NCHW)
    if bias is not None:
        sums += along_channels(tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32), NCHW)
    at = along_pixels(pixel_offset(n, h, w, H, W, C, NCHW), NCHW)
    at += along_channels(channel_offset(c, H * W, NCHW), NCHW)
    tl.store(
        dx + at,
        sums.to(dx.dtype.element_ty),
        mask=along_pixels(m < pixels, NCHW) & along_channels(c < C, NCHW),
    )


@triton.jit(do_not_specialize=_BATCH)
def backward_weight_kernel(
    dy, x, slabs, H, W, P, Q, pixels, steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, NCHW: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the output pixels of one split, for TAPS taps of a row. slabs: [splits, K, R, S].

    The programs of all rows of taps of the same pixels are neighbours, so that all but one of them read from L2.
    """
    K_TILES: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    TAP_TILES: tl.constexpr = (S + TAPS - 1) // TAPS
    program = tl.program_id(0)
    s0 = program % TAP_TILES * TAPS
    r = program // TAP_TILES % R
    k = program // (TAP_TILES * R) % K_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // (TAP_TILES * R * K_TILES)
    exists = along_channels(k < K, NCHW)
    pixel = 1 if NCHW else C
    sums = (zeros(BLOCK_M, BLOCK_C, NCHW),) * TAPS
    for step in range(steps):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, p, q = _spread(m, P, Q)
        h = p * STRIDE_H - PAD_H + r * DILATION_H
        w0 = q * STRIDE_W - PAD_W + s0 * DILATION_W
        gradient = tl.load(
            dy + along_pixels(pixel_offset(n, p, q, P, Q, K, NCHW), NCHW)
            + along_channels(channel_offset(k, P * Q, NCHW), NCHW),
            mask=along_pixels(m < pixels, NCHW) & exists, other=0.0,
        ).to(tl.float32)  # fmt: skip
        windows = x + along_pixels(pixel_offset(n, h, w0, H, W, C, NCHW), NCHW)
        windows += along_channels(channel_offset(k // (K // C), H * W, NCHW), NCHW)
        for j in tl.static_range(TAPS):
            w = w0 + j * DILATION_W
            inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = along_pixels(inside, NCHW) & exists
            tile = tl.load(windows + j * DILATION_W * pixel, mask=mask, other=0.0).to(tl.float32)
            # An infinity in dy must not meet the zeros beside x.
            sums = replaced(sums, j, sums[j] + tl.where(mask, gradient, 0.0) * tile)
    filters = slabs + ((split.to(tl.int64) * K + k) * R + r) * S + s0
    for j in tl.static_range(TAPS):
        end = tl.where(s0 + j < S, K, 0)
        tl.store(filters + j, over_pixels(sums[j], NCHW).to(slabs.dtype.element_ty), mask=k < end)


class Forward(NamedTuple):
    """What a forward pass gives: y, and of the rest what was asked for, else None."""

    y: torch.Tensor
    """[N, K, P, Q] in x's dtype, channels_last if x or the weight is."""
    z: torch.Tensor | None
    """Like y: before the activation."""
    statistics: tuple[torch.Tensor, torch.Tensor] | None
    """Of each filter's rounded results over N, P and Q, the mean and the sum of squared deviations from it: fp32 [K]."""
    pooled: torch.Tensor | None
    """fp32 [N, K]: of each image's rounded results, the mean over P and Q."""


def forward(
    problem,
    x,
    weight,
    *,
    bias=None,
    scale=None,
    residual=None,
    activation="none",
    need_z=False,
    statistics=False,
    pooled=False,
) -> Forward:
    """activation(sum * scale + bias + residual) of x [N, C, H, W] and weight [K, 1, R, S]; fp32, fp16 or bf16.

    bias, scale: [K] in any dtype, or None; residual: like y, or None.
    """
    p = problem
    y = empty((p.N, p.K, p.P, p.Q), x, p.channels_last)
    z = torch.empty_like(y) if need_z else None
    means = torch.empty((p.N, p.K), dtype=torch.float32, device=x.device) if pooled else None
    if not y.numel():
        zeros = y.new_zeros(p.K, dtype=torch.float32)
        return Forward(y, z, (zeros, zeros.clone()) if statistics else None, means)
    how = plan.forward(p, activation)
    count = plan.parts_of(how)
    totals = torch.empty(count * p.K, dtype=torch.float32, device=x.device) if pooled else None
    parts = empty_parts(count, p.K, x) if statistics else None
    more = None if residual is None else dense_as(residual, p.channels_last)
    vectors = (None if t is None else t.contiguous() for t in (scale, bias))
    launch(
        forward_kernel, how, dense_as(x, p.channels_last), _turned(weight), *vectors, more, z, y,
        totals, *(parts or (None, None, None)),
    )  # fmt: skip
    if means is not None:
        launch(means_kernel, plan.means(p, count // p.N), totals, means)
    return Forward(y, z, merge(*parts) if parts else None, means)


def backward(problem, dy, x, weight, need_dx, need_dweight) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients asked for, None for the others, of dy [N, K, P, Q], x [N, C, H, W] and weight [K, 1, R, S].

    dx is channels_last if x or the weight is; dweight if the weight is.
    """
    dx = dweight = None
    if need_dx and need_dweight and plan.shares_dy(problem):
        dx = empty(x.shape, x, problem.channels_last)
        dweight = backward_weight(problem, dy, x, weight, dx)
    else:
        if need_dx:
            dx = backward_input(problem, dy, weight)
        if need_dweight:
            dweight = backward_weight(problem, dy, x, weight)
    return dx, dweight


def backward_input(problem, dy, weight, bias=None) -> torch.Tensor:
    """dx [N, C, H, W] of dy [N, K, P, Q] and weight [K, 1, R, S], plus bias [C], in the problem's layout."""
    p = problem
    dx = empty((p.N, p.C, p.H, p.W), dy, p.channels_last)
    if dx.numel():
        kernel, how = plan.backward_input(p)
        dy, turned = dense_as(dy, p.channels_last), _turned(weight)
        bias = None if bias is None else bias.contiguous()
        if kernel == "forward_kernel":
            launch(forward_kernel, how, dy, turned, None, bias, None, None, dx, None, None, None, None)
        elif kernel == "backward_kernel":
            launch(backward_kernel, how, dy, None, turned, bias, dx, None)
        else:
            launch(backward_input_kernel, how, dy, turned, bias, dx)
    return dx


def backward_weight(problem, dy, x, weight, dx: Any = None) -> torch.Tensor:
    """dweight, like weight [K, 1, R, S], of dy [N, K, P, Q] and x [N, C, H, W]. channels_last if the weight is.

    dx: filled in the same pass where it is given, of problems whose gradients share a read of dy.
    """
    p = problem
    channels_last = is_channels_last(weight)
    dweight = empty_nhwc(weight.shape, weight, channels_last)
    if dy.numel() and x.numel():
        dy, x = dense_as(dy, p.channels_last), dense_as(x, p.channels_last)
        processors = device_of(x).processors
        if plan.shares_dy(p):
            nothing: Any = None
            launch_split(backward_kernel, plan.backward(p, processors), dy, x, _turned(weight), nothing, dx, dweight)
        else:
            launch_split(backward_weight_kernel, plan.backward_weight(p, processors), dy, x, dweight)
    else:
        dweight.zero_()
    return result(dweight, channels_last)


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """weight [K, 1, R, S] as dense [R, S, K]."""
    return weight.flatten(1).t().clone(memory_format=torch.contiguous_format)


def conv2d_bn_act_pooled_forward(
    x, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias, *args
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [N, K, P, Q] = activation(batch norm of the convolution + residual) and, in fp32, its means over P and Q [N, K].

    x: [N, C, H, W]; weight: [K, 1, R, S]; running statistics, bn_weight and bn_bias: [K]; args: the geometry, eps and
    the activation.
    """
    *geometry, eps, activation = args
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    scale, shift = fold_batch_norm(bias, running_mean, running_var, bn_weight, bn_bias, eps)
    done = forward(problem, x, weight, bias=shift, scale=scale, residual=residual, activation=activation, pooled=True)
    assert done.pooled is not None
    return done.y, done.pooled
