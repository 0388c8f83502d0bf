"""2-d convolution as implicit GEMM: NHWC, and NCHW where copies would cost most.

    y[n,p,q,k]      = bias[k] + sum over (r,s,c) of x[n, p*stride_h - pad_h + r*dilation_h, ..., c] * weight[k,r,s,c]
    dx[n,h,w,c]     = sum over (r,s,k) with p*stride_h = h + pad_h - r*dilation_h of dy[n,p,q,k] * weight[k,r,s,c]
    dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, ..., c]
    dbias[k]        = sum over (n,p,q) of dy[n,p,q,k]

Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S,C/groups]; y, dy [N,P,Q,K]; all dense. forward_nchw: torch's own.
Tile       forward: BLOCK_M x BLOCK_N x BLOCK_K up to 128 x 128 x 64 in 16 bits; 64 x 64 x 16, 64 x 16 x 16 in fp32.
                         sum over (r,s,c) ->        filters k ->               filters k ->
                       +------------------------+ +------------------------+ +------------------------+
           pixels    | | x: BLOCK_M x BLOCK_K,  |*| weight: BLOCK_K x      |=| y: BLOCK_M x BLOCK_N   |
           (n,p,q)   v | 2-3 in shared memory   | | BLOCK_N, likewise      | | sums: registers, TMEM  |
                       +------------------------+ +------------------------+ +------------------------+
           TMEM: tensor memory, of tcgen05 on sm_100. backward_weight: filters k down, (r,s,c) across; the sum over
           pixels is split. forward_nchw: filters k down, pixels (n,p,q) across, BLOCK_M x BLOCK_N up to 64 x 128.
Ownership  One program owns one block of outputs of one group, so nothing is atomic. Sums over pixels are split: each
           split fills its own fp32 slab, and a second kernel adds the slabs in a fixed order.
Traffic    forward: x once for each tap and each block of filters (mostly from L2), weight once for each block of
           pixels, y once. backward_input the same with dy for x; backward_weight reads dy once for each tap's tile.
Offsets are 64-bit; pixels are counted in 32 bits (the backend's `supports` refuses more). Grids have one axis, x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import conv2d_plan, conv2d_tma, depthwise_conv2d
from cnnops.backends.triton.activation import activate
from cnnops.backends.triton.conv2d_plan import Boxes
from cnnops.backends.triton.epilogue import empty_parts, finish, fold_batch_norm, merge, moments
from cnnops.backends.triton.launch import Descriptor, device_of, launch, launch_split
from cnnops.backends.triton.tensors import dense_as, empty_nhwc, nhwc, result
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
    x, weight, x_scale, x_shift, scale, bias, residual, y, z, counts, means, m2s, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr,
):  # fmt: skip
    """gemm_m = output pixels, gemm_n = the group's filters, gemm_k = (r, s, the group's channels).

    With x_scale and x_shift [C] it convolves PROLOGUE(x * x_scale + x_shift), rounded, whose padding is zero all the same.
    scale, bias, residual and z as epilogue.finish has them; with counts, means and m2s, the moments of each BLOCK_M
    pixels.
    """
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
        read = inside & exists[None, :] & (m < pixels)[:, None]
        a = tl.load(windows[:, None] + ((dh.to(tl.int64) * W + dw) * C + c)[None, :], mask=read, other=0.0)
        if x_scale is not None:
            factor = tl.load(x_scale + group * GROUP_C + c, mask=exists, other=0.0)[None, :]
            moved = tl.load(x_shift + group * GROUP_C + c, mask=exists, other=0.0)[None, :]
            normalised = activate(a.to(tl.float32) * factor + moved, PROLOGUE)
            a = tl.where(read, normalised, 0.0).to(x.dtype.element_ty)
        b = tl.load(
            filters[None, :] + ((r * S + s) * GROUP_C + c)[:, None],
            mask=exists[:, None] & (k < GROUP_K)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    channel = (group * GROUP_K + k)[None, :]
    channel_exists = (k < GROUP_K)[None, :]
    exists = (m < pixels)[:, None] & channel_exists
    at = m.to(tl.int64)[:, None] * K + channel
    found = finish(sums, scale, bias, residual, y, z, at, exists, channel, channel_exists, ACTIVATION)
    if means is not None:
        part = program // (N_TILES * GROUPS)
        count = tl.minimum(pixels - part * BLOCK_M, BLOCK_M)
        mean, m2 = moments(found, exists, count, 0)
        at_part = part.to(tl.int64) * K + group * GROUP_K + k
        tl.store(counts + part, count.to(tl.float32))
        tl.store(means + at_part, mean, mask=k < GROUP_K)
        tl.store(m2s + at_part, m2, mask=k < GROUP_K)


@triton.jit(do_not_specialize=_BATCH)
def forward_nchw_kernel(
    x, weight, scale, bias, residual, y, z, counts, means, m2s, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As forward_kernel, of x [N,C,H,W], weight [K,C/groups,R,S] and y [N,K,P,Q] as they lie.

    gemm_m = the group's filters, gemm_n = output pixels, gemm_k = (the group's channels, r, s): neighbouring threads
    read and write neighbouring pixels.
    """
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    M_TILES: tl.constexpr = (GROUP_K + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    group = program // M_TILES % GROUPS
    k = program % M_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    part = program // (M_TILES * GROUPS)
    m = part * BLOCK_N + tl.arange(0, BLOCK_N)

    n, p, q = _pixel(m, P, Q)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    windows = x + ((n.to(tl.int64) * C + group * GROUP_C) * H + h0) * W + w0
    filters = weight + (group * GROUP_K + k).to(tl.int64) * (GROUP_C * R * S)

    sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for step in range(STEPS):
        element = step * BLOCK_K + tl.arange(0, BLOCK_K)
        c = element // (R * S)
        tap = element - c * (R * S)
        dh = tap // S * DILATION_H
        dw = tap % S * DILATION_W
        exists = element < GROUP_C * R * S
        inside = _inside(h0[None, :] + dh[:, None], w0[None, :] + dw[:, None], H, W)
        a = tl.load(
            filters[:, None] + element[None, :], mask=(k < GROUP_K)[:, None] & exists[None, :], other=0.0
        )  # fmt: skip
        b = tl.load(
            windows[None, :] + ((c.to(tl.int64) * H + dh) * W + dw)[:, None],
            mask=inside & exists[:, None] & (m < pixels)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    channel = (group * GROUP_K + k)[:, None]
    channel_exists = (k < GROUP_K)[:, None]
    exists = (m < pixels)[None, :] & channel_exists
    at = (((n.to(tl.int64) * K) * P + p) * Q + q)[None, :] + channel.to(tl.int64) * P * Q
    found = finish(sums, scale, bias, residual, y, z, at, exists, channel, channel_exists, ACTIVATION)
    if means is not None:
        count = tl.minimum(pixels - part * BLOCK_N, BLOCK_N)
        mean, m2 = moments(found, exists, count, 1)
        at_part = part.to(tl.int64) * K + group * GROUP_K + k
        tl.store(counts + part, count.to(tl.float32))
        tl.store(means + at_part, mean, mask=k < GROUP_K)
        tl.store(m2s + at_part, m2, mask=k < GROUP_K)


@triton.jit(do_not_specialize=_BATCH)
def backward_input_kernel(
    dy, weight, bias, dx, H, W, P, Q, pixels,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    COMMON_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """gemm_m = input pixels of one class, gemm_n = the group's channels, gemm_k = (r, s, the group's filters).

    A class is the pixels of equal h mod STRIDE_H and w mod STRIDE_W. The same taps reach all of them, so each class is
    a convolution of stride 1 over its own taps; one without taps stores zeros, or `bias`, which a transposed convolution
    adds. STEPS = 0: as many as the class has.
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

    channel = (group * GROUP_C + c)[None, :]
    channel_exists = (c < GROUP_C)[None, :]
    at = (((n.to(tl.int64) * H + h) * W + w) * C)[:, None] + channel
    finish(
        sums, None, bias, None, dx, None, at, owned[:, None] & channel_exists, channel, channel_exists, "none"
    )  # fmt: skip


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


def _described(boxes: tuple[Boxes, ...], *tensors: torch.Tensor) -> list[Descriptor]:
    """Descriptors of the tensors' memory as NHWC."""
    return [
        Descriptor(nhwc(t), b.shape, tuple(math.prod(b.shape[i + 1 :]) for i in range(len(b.shape))), b.block)
        for t, b in zip(tensors, boxes, strict=True)
    ]


@dataclass(frozen=True)
class Epilogue:
    """What follows a convolution's sums, as epilogue.finish has it; residual is like y."""

    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"
    need_z: bool = False
    statistics: bool = False


@dataclass(frozen=True)
class Prologue:
    """What x goes through before it is convolved: activation(x * scale + shift), scale and shift [C] in fp32."""

    scale: torch.Tensor
    shift: torch.Tensor
    activation: str


@dataclass(frozen=True)
class Convolved:
    y: torch.Tensor
    z: torch.Tensor | None
    statistics: tuple[torch.Tensor, torch.Tensor] | None
    """mean and m2 [K] in fp32, where they were wanted."""


def convolve(
    problem: Conv2dProblem,
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue,
    prologue: Prologue | None = None,
) -> Convolved:
    """y [N, K, P, Q] of x [N, C, H, W] and weight [K, C/groups, R, S], in the problem's layout.

    A prologue, which each tap repeats, is for 1x1: there it saves the pass that would write its result.
    """
    if depthwise_conv2d.takes(problem) and not prologue:
        return _depthwise(problem, x, weight, epilogue)
    shape = (problem.N, problem.K, problem.P, problem.Q)
    nchw = not prologue and conv2d_plan.reads_nchw(problem)
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if nchw else empty_nhwc(shape, x, problem.channels_last)
    z = torch.empty_like(y) if epilogue.need_z else None
    if not y.numel():
        zeros = y.new_zeros(problem.K, dtype=torch.float32)
        return Convolved(y, z, (zeros, zeros.clone()) if epilogue.statistics else None)
    precision = conv2d_plan.input_precision(problem.dtype, problem.device)
    boxed = None
    if nchw:
        how = conv2d_plan.forward_nchw(problem, precision, epilogue.activation)
    elif not prologue and (
        boxed := conv2d_plan.forward_tma(problem, precision, device_of(x), epilogue.activation, epilogue.statistics)
    ):
        how = boxed.launch
    else:  # what boxes bring to shared memory goes to the tensor cores as it is, and so past a prologue
        through = prologue.activation if prologue else "none"
        how = conv2d_plan.forward(problem, precision, epilogue.activation, through)
    bias = None if epilogue.bias is None else epilogue.bias.contiguous()
    residual = None if epilogue.residual is None else dense_as(epilogue.residual, not nchw)
    parts = empty_parts(conv2d_plan.parts(how, nchw), problem.K, y) if epilogue.statistics else None
    tail = epilogue.scale, bias, residual, y, z, *(parts or [None] * 3)
    if boxed:
        launch(conv2d_tma.forward_kernel, how, *_described(boxed.inputs, x, weight), *tail)
    elif nchw:
        launch(forward_nchw_kernel, how, x.contiguous(), weight.contiguous(), *tail)
    else:
        affine = (prologue.scale, prologue.shift) if prologue else (None, None)
        launch(forward_kernel, how, nhwc(x), nhwc(weight), *affine, *tail)
    return Convolved(
        result(y, problem.channels_last),
        None if z is None else result(z, problem.channels_last),
        merge(*parts) if parts else None,
    )


def _depthwise(problem: Conv2dProblem, x: torch.Tensor, weight: torch.Tensor, e: Epilogue) -> Convolved:
    y, z, statistics, _ = depthwise_conv2d.forward(
        problem, x, weight, bias=e.bias, scale=e.scale, residual=e.residual, activation=e.activation, need_z=e.need_z,
        statistics=e.statistics,
    )  # fmt: skip
    return Convolved(y, z, statistics)


def backward_input(
    problem: Conv2dProblem, dy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """dx [N, C, H, W] of dy [N, K, P, Q] and weight [K, C/groups, R, S], plus bias [C], in the problem's layout."""
    if depthwise_conv2d.takes(problem):
        return depthwise_conv2d.backward_input(problem, dy, weight, bias)
    dx = empty_nhwc((problem.N, problem.C, problem.H, problem.W), dy, problem.channels_last)
    if dx.numel():
        precision = conv2d_plan.input_precision(problem.dtype, problem.device)
        bias = None if bias is None else bias.contiguous()
        if boxed := conv2d_plan.backward_input_tma(problem, precision, device_of(dy)):
            launch(conv2d_tma.backward_input_kernel, boxed.launch, *_described(boxed.inputs, dy, weight), bias, dx)
        else:
            how = conv2d_plan.backward_input(problem, precision)
            launch(backward_input_kernel, how, nhwc(dy), nhwc(weight), bias, dx)
    return result(dx, problem.channels_last)


def backward_weight(problem: Conv2dProblem, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dweight, like weight [K, C/groups, R, S], of dy [N, K, P, Q] and x [N, C, H, W]. channels_last if the weight is."""
    if depthwise_conv2d.takes(problem):
        return depthwise_conv2d.backward_weight(problem, dy, x, weight)
    channels_last = is_channels_last(weight)
    dweight = empty_nhwc(weight.shape, weight, channels_last)
    if dy.numel() and x.numel():
        precision = conv2d_plan.input_precision(problem.dtype, problem.device)
        if boxed := conv2d_plan.backward_weight_tma(problem, precision, device_of(x)):
            launch_split(conv2d_tma.backward_weight_kernel, boxed.launch, *_described(boxed.inputs, dy, x), dweight)
        else:
            how = conv2d_plan.backward_weight(problem, precision, device_of(x).processors)
            launch_split(backward_weight_kernel, how, nhwc(dy), nhwc(x), dweight)
    else:
        dweight.zero_()
    return result(dweight, channels_last)


def backward_bias(dy: torch.Tensor) -> torch.Tensor:
    """dbias [K]: the sums of dy [N, K, P, Q] over all but K."""
    K = dy.shape[1]
    dbias = torch.empty(K, dtype=dy.dtype, device=dy.device)
    if dy.numel():
        how = conv2d_plan.backward_bias(dy.numel() // K, K, device_of(dy).processors)
        launch_split(backward_bias_kernel, how, nhwc(dy), dbias)
    else:
        dbias.zero_()
    return dbias


def conv2d_forward(x, weight, bias, *geometry: int) -> torch.Tensor:
    """y [N, K, P, Q] of x [N, C, H, W], weight [K, C/groups, R, S], bias [K] or None; fp32, fp16 or bf16.

    geometry: stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pad_mode. channels_last if x or the
    weight is.
    """
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    return convolve(problem, x, weight, Epilogue(bias)).y


def conv2d_act_forward(x, weight, bias, residual, *args) -> tuple[torch.Tensor, torch.Tensor | None]:
    """activation(z) and, with need_z, z = conv2d + residual, which is like y. args: geometry, activation, need_z."""
    *geometry, activation, need_z = args
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    found = convolve(problem, x, weight, Epilogue(bias, None, residual, activation, need_z))
    return found.y, found.z


def conv2d_bn_act_forward(
    x, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias, *args
) -> torch.Tensor:
    """activation(batch_norm(conv2d) + residual) with running statistics. args: geometry, eps, activation.

    running_mean, running_var, bn_weight and bn_bias: [K] in any dtype, the latter two or None.
    """
    *geometry, eps, activation = args
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    scale, shift = fold_batch_norm(bias, running_mean, running_var, bn_weight, bn_bias, eps)
    return convolve(problem, x, weight, Epilogue(shift, scale, residual, activation)).y


def conv2d_statistics_forward(x, weight, bias, *geometry: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y as conv2d_forward has it, and of each filter's results, as rounded, the mean and the sum of squared deviations
    from it: [K] in fp32."""
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    found = convolve(problem, x, weight, Epilogue(bias, statistics=True))
    assert found.statistics
    return found.y, *found.statistics


def conv2d_backward(dy, x, weight, *args) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients asked for, None for the others, of dy [N, K, P, Q], x [N, C, H, W] and weight [K, C/groups, R, S].

    args: geometry, need_dx, need_dweight, need_dbias. dx is channels_last if x or the weight is; dweight if the weight
    is.
    """
    *geometry, need_dx, need_dweight, need_dbias = args
    problem = Conv2dProblem.of(x, weight, None, *geometry)
    if depthwise_conv2d.takes(problem):
        dx, dweight = depthwise_conv2d.backward(problem, dy, x, weight, need_dx, need_dweight)
    else:
        dy = nhwc(dy)
        dx = backward_input(problem, dy, weight) if need_dx else None
        dweight = backward_weight(problem, dy, x, weight) if need_dweight else None
    return dx, dweight, (backward_bias(dy) if need_dbias else None)
