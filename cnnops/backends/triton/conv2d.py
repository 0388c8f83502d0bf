"""2-d convolution, NHWC, as implicit GEMM.

    y[n,p,q,k]      = bias[k] + sum over (r,s,c) of x[n, p*stride_h - pad_h + r*dilation_h, ..., c] * weight[k,r,s,c]
    dx[n,h,w,c]     = sum over (r,s,k) with p*stride_h = h + pad_h - r*dilation_h of dy[n,p,q,k] * weight[k,r,s,c]
    dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, ..., c]
    dbias[k]        = sum over (n,p,q) of dy[n,p,q,k]

Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S,C/groups]; y, dy [N,P,Q,K]; all dense.
Ownership  One program owns one block of outputs of one group, so nothing is atomic. Sums over pixels are split: each
           split fills its own fp32 slab, and a second kernel adds the slabs in a fixed order.
Traffic    forward: x once for each tap and each block of filters (mostly from L2), weight once for each block of
           pixels, y once. backward_input the same with dy for x; backward_weight reads dy once for each tap's tile.
Offsets are 64-bit; pixels are counted in 32 bits (the backend's `supports` refuses more). Grids have one axis, x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import conv2d_plan, depthwise_conv2d
from cnnops.backends.triton.launch import device_of, launch, launch_split
from cnnops.backends.triton.tensors import empty_nhwc, nhwc, result
from cnnops.geometry import Conv2dProblem, is_channels_last

# Integers of a batch: specialising on them (1, multiples of 16) would compile anew for every batch size.
_BATCH = ["H", "W", "P", "Q", "pixels", "steps"]


@triton.jit
def _tap_and_channel(step, taps_wide, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Tap row, tap column and channel of each element of one block of (tap row, tap column, channel).

    Where a tap fills a block, blocks keep to one tap, so that loads along channels are vectors. The caller masks
    channels and taps that do not exist.
    """
    if CHANNELS >= BLOCK:
        chunks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        tap = step // chunks
        r = tap // taps_wide
        zeros = tl.full([BLOCK], 0, tl.int32)
        channel = (step - tap * chunks) * BLOCK + tl.arange(0, BLOCK)
        return zeros + r, zeros + (tap - r * taps_wide), channel
    else:
        element = step * BLOCK + tl.arange(0, BLOCK)
        tap = element // CHANNELS
        r = tap // taps_wide
        return r, tap - r * taps_wide, element - tap * CHANNELS


@triton.jit
def _pixel(m, rows, columns):
    """Image, row and column of pixel number `m` of images of `rows` x `columns`."""
    n = m // (rows * columns)
    within = m - n * (rows * columns)
    row = within // columns
    return n, row, within - row * columns


@triton.jit
def _inside(h, w, H, W):
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _first_tap(
    residue,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    COMMON: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Which taps reach the inputs i * STRIDE + residue: the first, how many, and the output that it joins to i = 0.

    Tap r does where STRIDE divides residue + PAD - r * DILATION. Such taps are STRIDE / COMMON apart, COMMON being the
    greatest common divisor of STRIDE and DILATION, and there are none unless it divides residue + PAD.
    INVERSE is that of DILATION / COMMON modulo STRIDE / COMMON.
    """
    APART: tl.constexpr = STRIDE // COMMON
    shifted = residue + PAD
    first = ((shifted // COMMON % APART).to(tl.int64) * INVERSE % APART).to(tl.int32)
    taps = tl.where(shifted % COMMON == 0, (TAPS - first + APART - 1) // APART, 0)
    return first, taps, (shifted - first * DILATION) // STRIDE


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, weight, bias, y, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """gemm_m = output pixels, gemm_n = the group's filters, gemm_k = (r, s, the group's channels)."""
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    N_TILES: tl.constexpr = (GROUP_K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // N_TILES % GROUPS
    m = program // (N_TILES * GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = program % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)

    n, p, q = _pixel(m, P, Q)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    windows = x + ((n.to(tl.int64) * H + h0) * W + w0) * C + group * GROUP_C
    filters = weight + (group * GROUP_K + k).to(tl.int64) * (R * S * GROUP_C)

    sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for step in range(STEPS):
        r, s, c = _tap_and_channel(step, S, GROUP_C, BLOCK_K)
        exists = (r < R) & (c < GROUP_C)
        dh = r * DILATION_H
        dw = s * DILATION_W
        inside = _inside(h0[:, None] + dh[None, :], w0[:, None] + dw[None, :], H, W)
        a = tl.load(
            windows[:, None] + ((dh.to(tl.int64) * W + dw) * C + c)[None, :],
            mask=inside & exists[None, :] & (m < pixels)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            filters[None, :] + ((r * S + s) * GROUP_C + c)[:, None],
            mask=exists[:, None] & (k < GROUP_K)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    if bias is not None:
        sums += tl.load(bias + group * GROUP_K + k, mask=k < GROUP_K, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m.to(tl.int64)[:, None] * K + (group * GROUP_K + k)[None, :],
        sums.to(y.dtype.element_ty),
        mask=(m < pixels)[:, None] & (k < GROUP_K)[None, :],
    )


@triton.jit(do_not_specialize=_BATCH)
def backward_input_kernel(
    dy, weight, dx, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    COMMON_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """gemm_m = input pixels of one class, gemm_n = the group's channels, gemm_k = (r, s, the group's filters).

    A class is the pixels of equal h mod STRIDE_H and w mod STRIDE_W. The same taps reach all of them, so each class is
    a convolution of stride 1 over its own taps; one without taps stores zeros. STEPS = 0: as many as the class has.
    """
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    N_TILES: tl.constexpr = (GROUP_C + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // N_TILES % GROUPS
    residue = program // (N_TILES * GROUPS) % (STRIDE_H * STRIDE_W)
    m = program // (N_TILES * GROUPS * STRIDE_H * STRIDE_W) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = program % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)

    first_r, taps_high, p_of_first = _first_tap(
        residue // STRIDE_W, PAD_H, STRIDE_H, DILATION_H, R, COMMON_H, INVERSE_H
    )
    first_s, taps_wide, q_of_first = _first_tap(residue % STRIDE_W, PAD_W, STRIDE_W, DILATION_W, S, COMMON_W, INVERSE_W)
    n, row, column = _pixel(m, (H + STRIDE_H - 1) // STRIDE_H, (W + STRIDE_W - 1) // STRIDE_W)
    h = row * STRIDE_H + residue // STRIDE_W
    w = column * STRIDE_W + residue % STRIDE_W
    owned = (m < pixels) & (h < H) & (w < W)
    p0 = row + p_of_first
    q0 = column + q_of_first
    windows = dy + ((n.to(tl.int64) * P + p0) * Q + q0) * K + group * GROUP_K

    if GROUP_K >= BLOCK_K:
        steps = taps_high * taps_wide * ((GROUP_K + BLOCK_K - 1) // BLOCK_K)
    else:
        steps = (taps_high * taps_wide * GROUP_K + BLOCK_K - 1) // BLOCK_K
    sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for step in range(STEPS if STEPS else steps):
        i, j, k = _tap_and_channel(step, tl.maximum(taps_wide, 1), GROUP_K, BLOCK_K)
        exists = (i < taps_high) & (j < taps_wide) & (k < GROUP_K)
        dp = i * (DILATION_H // COMMON_H)
        dq = j * (DILATION_W // COMMON_W)
        inside = _inside(p0[:, None] - dp[None, :], q0[:, None] - dq[None, :], P, Q)
        a = tl.load(
            windows[:, None] + (k - (dp.to(tl.int64) * Q + dq) * K)[None, :],
            mask=inside & exists[None, :] & owned[:, None], other=0.0,
        )  # fmt: skip
        r = first_r + i * (STRIDE_H // COMMON_H)
        s = first_s + j * (STRIDE_W // COMMON_W)
        taps = (((group * GROUP_K + k).to(tl.int64) * R + r) * S + s) * GROUP_C
        b = tl.load(
            weight + taps[:, None] + c[None, :], mask=exists[:, None] & (c < GROUP_C)[None, :], other=0.0
        )  # fmt: skip
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    tl.store(
        dx + (((n.to(tl.int64) * H + h) * W + w) * C)[:, None] + (group * GROUP_C + c)[None, :],
        sums.to(dx.dtype.element_ty),
        mask=owned[:, None] & (c < GROUP_C)[None, :],
    )


@triton.jit(do_not_specialize=_BATCH)
def backward_weight_kernel(
    dy, x, slabs, H, W, P, Q, pixels, steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """gemm_m = the group's filters, gemm_n = (r, s, the group's channels), gemm_k = output pixels of one split.

    slabs: [splits, K, R, S, C/groups].
    """
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    M_TILES: tl.constexpr = (GROUP_K + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    group = program // (COLUMN_TILES * M_TILES) % GROUPS
    split = program // (COLUMN_TILES * M_TILES * GROUPS)
    k = program // COLUMN_TILES % M_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    r, s, c = _tap_and_channel(program % COLUMN_TILES, S, GROUP_C, BLOCK_N)
    exists = (r < R) & (c < GROUP_C)
    dh = r * DILATION_H - PAD_H
    dw = s * DILATION_W - PAD_W
    channels = x + (dh.to(tl.int64) * W + dw) * C + group * GROUP_C + c
    filters = dy + group * GROUP_K + k

    sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for step in range(steps):
        m = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        n, p, q = _pixel(m, P, Q)
        h0 = p * STRIDE_H
        w0 = q * STRIDE_W
        a = tl.load(
            filters[None, :] + (m.to(tl.int64) * K)[:, None],
            mask=(m < pixels)[:, None] & (k < GROUP_K)[None, :], other=0.0,
        )  # fmt: skip
        inside = _inside(h0[:, None] + dh[None, :], w0[:, None] + dw[None, :], H, W)
        b = tl.load(
            channels[None, :] + (((n.to(tl.int64) * H + h0) * W + w0) * C)[:, None],
            mask=inside & exists[None, :] & (m < pixels)[:, None], other=0.0,
        )  # fmt: skip
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)

    rows = (split.to(tl.int64) * K + group * GROUP_K + k) * (R * S * GROUP_C)
    tl.store(
        slabs + rows[:, None] + ((r * S + s) * GROUP_C + c)[None, :],
        sums.to(slabs.dtype.element_ty),
        mask=(k < GROUP_K)[:, None] & exists[None, :],
    )


@triton.jit(do_not_specialize=_BATCH)
def backward_bias_kernel(dy, slabs, pixels, steps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of dy over the pixels of one split. slabs: [splits, K]."""
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    split = program // K_TILES
    k = program % K_TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.full([BLOCK_M, BLOCK_K], 0, tl.float32)
    for step in range(steps):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        sums += tl.load(
            dy + (m.to(tl.int64) * K)[:, None] + k[None, :], mask=(m < pixels)[:, None] & (k < K)[None, :], other=0.0
        ).to(tl.float32)
    tl.store(slabs + split * K + k, tl.sum(sums, 0).to(slabs.dtype.element_ty), mask=k < K)


def conv2d_forward(
    x, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode
) -> torch.Tensor:
    """y [N, K, P, Q] of x [N, C, H, W], weight [K, C/groups, R, S], bias [K] or None; fp32, fp16 or bf16.

    channels_last if x or the weight is.
    """
    problem = Conv2dProblem.of(
        x, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode
    )
    if depthwise_conv2d.takes(problem):
        return depthwise_conv2d.forward(problem, x, weight, bias=bias).y
    shape = (problem.N, problem.K, problem.P, problem.Q)
    y = empty_nhwc(shape, x, problem.channels_last)
    if y.numel():
        precision = conv2d_plan.input_precision(problem.dtype, problem.device)
        bias = None if bias is None else bias.contiguous()
        launch(forward_kernel, conv2d_plan.forward(problem, precision), nhwc(x), nhwc(weight), bias, y)
    return result(y, problem.channels_last)


def conv2d_backward(
    dy,
    x,
    weight,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    pad_mode,
    need_dx,
    need_dweight,
    need_dbias,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients asked for, None for the others, of dy [N, K, P, Q], x [N, C, H, W] and weight [K, C/groups, R, S].

    dx is channels_last if x or the weight is; dweight if the weight is.
    """
    problem = Conv2dProblem.of(
        x, weight, None, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode
    )
    precision = conv2d_plan.input_precision(problem.dtype, problem.device)
    empty = problem.N == 0
    dx = dweight = dbias = None
    if depthwise_conv2d.takes(problem):
        dx, dweight = depthwise_conv2d.backward(problem, dy, x, weight, need_dx, need_dweight)
        if not need_dbias:
            return dx, dweight, None
        need_dx = need_dweight = False
    dy = nhwc(dy)
    if need_dx:
        dx = empty_nhwc(x.shape, x, problem.channels_last)
        if not empty:
            launch(backward_input_kernel, conv2d_plan.backward_input(problem, precision), dy, nhwc(weight), dx)
        dx = result(dx, problem.channels_last)
    if need_dweight:
        weight_channels_last = is_channels_last(weight)
        dweight = empty_nhwc(weight.shape, weight, weight_channels_last)
        if empty:
            dweight.zero_()
        else:
            how = conv2d_plan.backward_weight(problem, precision, device_of(x).processors)
            launch_split(backward_weight_kernel, how, dy, nhwc(x), dweight)
        dweight = result(dweight, weight_channels_last)
    if need_dbias:
        dbias = torch.empty(problem.K, dtype=dy.dtype, device=dy.device)
        if empty:
            dbias.zero_()
        else:
            launch_split(backward_bias_kernel, conv2d_plan.backward_bias(problem, device_of(x).processors), dy, dbias)
    return dx, dweight, dbias
