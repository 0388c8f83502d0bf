"""Batch norm, an activation and a maximum over windows, NHWC: the stem of an ImageNet network.

    y[n,p,q,c]  = max over (r,s) of a[n, p*stride_h - pad_h + r*dilation_h, q*.. + s*dilation_w, c]
    a           = activation((x - mean) * rstd * weight + bias), rounded to x's type as batch_norm_act rounds it
    da[n,h,w,c] = sum over the windows (p,q) whose kept tap is (h,w) of dy[n,p,q,c], rounded as max_pool2d rounds it
    dx, dweight and dbias are batch norm's, of da.

Layout     x, dx [N,H,W,C]; y, dy and the offsets r * S + s of the kept taps [N,P,Q,C]; everything else [C]. What is
           not NHWC is copied.
Tile       forward: BLOCK_M x BLOCK_C = 32 x 64, of up to 32 channels 64 x 32; columns w ->
                       +- x: what BLOCK_M windows read, in place -----------+
           rows h    | | [window m: R x S]        a, maximum and tap:       |  BLOCK_C channels c deep; m counts (n,p,q)
                     v |        [window m + 1] ..          registers        |  and so goes on in the next row, and image
                       +- halo: columns of both, rows of others: L1 --------+
           backward: (n,h,w) instead, da from the windows over it: registers; sums are split into slices.
Ownership  One program owns a tile of positions and channels: forward, of y's, backward of x's. It computes a at the
           taps of its windows, and gathers da from the windows over its positions, so that nothing is atomic and
           neither a nor da is written to memory. Sums are cut into slices of tiles, as batch norm's are.
Traffic    forward: x for the statistics, then x + y (+ offsets); backward: x, dy and offsets for the sums, then the
           same + dx. Windows overlap: what several read of x, dy and offsets comes from cache but for the first.
Offsets in memory are 64-bit; positions are counted in 32 bits (the backend's `supports` refuses more).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import bn_act_max_pool2d_plan as plans
from cnnops.backends.triton.activation import activate
from cnnops.backends.triton.batch_norm import (
    channel_map,
    finish_gradients,
    gradient_of_z,
    input_gradient,
    parameter_gradients,
    problem_of,
    statistics,
    vectors,
)
from cnnops.backends.triton.conv2d import _first_tap
from cnnops.backends.triton.launch import device_of, launch
from cnnops.backends.triton.pool2d import _split
from cnnops.backends.triton.tensors import empty, empty_nhwc, nhwc, result
from cnnops.geometry import NormPool2dProblem, Pool2dProblem, is_channels_last, output_size

# Integers of a batch: specialising on them would compile anew for every batch size.
_BATCH = ["H", "W", "P", "Q", "outputs", "pixels", "steps"]


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, mean, rstd, weight, bias, y, offsets, H, W, P, Q, outputs,
    ACTIVATION: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TAPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A window without a tap inside the input gives -inf and the offset 0. A NaN always replaces what is kept, and
    nothing replaces a NaN but another; a tie replaces nothing. offsets may be None."""
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    m = tl.program_id(0) // UNITS * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.program_id(0) % UNITS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = (m < outputs) & (c < C)
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    n, p, q = _split(m, P, Q)
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    kept = tl.full([BLOCK_M, BLOCK_C], -1, tl.int32)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        r = tap // S
        h = p * STRIDE_H - PAD_H + r * DILATION_H
        w = q * STRIDE_W - PAD_W + (tap - r * S) * DILATION_W
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        values = tl.load(x + ((n * H + h) * W + w).to(tl.int64) * C + c, mask=inside & exists, other=0.0)
        a = activate((values.to(tl.float32) - centre) * scale + shift, ACTIVATION)
        a = a.to(x.dtype.element_ty).to(tl.float32)
        wins = inside & ((a > best) | (a != a) | (kept < 0))
        best = tl.where(wins, a, best)
        kept = tl.where(wins, tap, kept)
    at = m.to(tl.int64) * C + c
    tl.store(y + at, best.to(y.dtype.element_ty), mask=exists)
    if offsets is not None:
        tl.store(offsets + at, tl.maximum(kept, 0).to(offsets.dtype.element_ty), mask=exists)


@triton.jit
def _gradients(
    dy, offsets, x, m, c, exists, centre, scale, shift, H, W, P, Q,
    ACTIVATION: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, COMMON_H: tl.constexpr,
    INVERSE_H: tl.constexpr, WINDOWS_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_W: tl.constexpr,
    WINDOWS_W: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dz and x at pixels m. x may be None where dz does not depend on it; it is then 0.

    Along an axis, the taps that reach an input are STRIDE / COMMON apart, and their windows DILATION / COMMON: WINDOWS
    at most, COMMON and INVERSE as `_first_tap` has them.
    """
    n, h, w = _split(m, H, W)
    r_first, taps_high, p_first = _first_tap(h, PAD_H, STRIDE_H, DILATION_H, R, COMMON_H, INVERSE_H)
    s_first, taps_wide, q_first = _first_tap(w, PAD_W, STRIDE_W, DILATION_W, S, COMMON_W, INVERSE_W)
    da = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in tl.range(0, WINDOWS_H * WINDOWS_W, loop_unroll_factor=UNROLL):
        i = WINDOWS_H - 1 - step // WINDOWS_W  # the last tap first: windows in order
        j = WINDOWS_W - 1 - step % WINDOWS_W
        p = p_first - i * (DILATION_H // COMMON_H)
        q = q_first - j * (DILATION_W // COMMON_W)
        tap = (r_first + i * (STRIDE_H // COMMON_H)) * S + s_first + j * (STRIDE_W // COMMON_W)
        asked = (i < taps_high) & (p >= 0) & (p < P) & (j < taps_wide) & (q >= 0) & (q < Q) & exists
        at = ((n * P + p) * Q + q).to(tl.int64) * C + c
        kept = tl.load(offsets + at, mask=asked, other=0).to(tl.int32)
        values = tl.load(dy + at, mask=asked, other=0.0).to(tl.float32)
        da += tl.where(asked & (kept == tap), values, 0.0)
    dz = da.to(dy.dtype.element_ty).to(tl.float32)
    values = tl.zeros_like(dz)
    if x is not None:
        values = tl.load(x + m.to(tl.int64) * C + c, mask=exists, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        dz = gradient_of_z(dz, (values - centre) * scale + shift, ACTIVATION)
    return dz, values


@triton.jit(do_not_specialize=_BATCH)
def backward_sums_kernel(
    dy, offsets, x, mean, rstd, weight, bias, partial, H, W, P, Q, pixels, steps,
    ACTIVATION: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, COMMON_H: tl.constexpr,
    INVERSE_H: tl.constexpr, WINDOWS_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_W: tl.constexpr,
    WINDOWS_W: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz * (x - mean) over one slice of the pixels. partial: [slices, 2, C].

    Where there is no gradient, an infinite x adds nothing.
    """
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // UNITS
    c = tl.program_id(0) % UNITS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(steps):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        exists = (m < pixels) & (c < C)
        dz, values = _gradients(
            dy, offsets, x, m, c, exists, centre, scale, shift, H, W, P, Q, ACTIVATION, C, BLOCK_M, BLOCK_C, R, S,
            STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, COMMON_H, INVERSE_H, WINDOWS_H, COMMON_W, INVERSE_W,
            WINDOWS_W, UNROLL,
        )  # fmt: skip
        dz = tl.where(exists, dz, 0.0)
        sums += dz
        products += tl.where(dz == 0, 0.0, dz * (values - centre))
    part = partial + split.to(tl.int64) * (2 * C) + c
    tl.store(part, tl.sum(sums, 0, keep_dims=True), mask=c < C)
    tl.store(part + C, tl.sum(products, 0, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def backward_kernel(
    dy, offsets, x, mean, rstd, weight, bias, shares, dx, H, W, P, Q, pixels,
    ACTIVATION: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, COMMON_H: tl.constexpr,
    INVERSE_H: tl.constexpr, WINDOWS_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_W: tl.constexpr,
    WINDOWS_W: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    m = tl.program_id(0) // UNITS * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.program_id(0) % UNITS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = (m < pixels) & (c < C)
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    dz, values = _gradients(
        dy, offsets, x, m, c, exists, centre, scale, shift, H, W, P, Q, ACTIVATION, C, BLOCK_M, BLOCK_C, R, S,
        STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, COMMON_H, INVERSE_H, WINDOWS_H, COMMON_W, INVERSE_W,
            WINDOWS_W, UNROLL,
    )  # fmt: skip
    found = input_gradient(dz, values, centre, scale, shares, c, C)
    tl.store(dx + m.to(tl.int64) * C + c, found.to(dx.dtype.element_ty), mask=exists)


def _problem(x, training, activation, P, Q, window) -> NormPool2dProblem:
    N, C, H, W = x.shape
    R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window
    pool = Pool2dProblem(
        N, C, H, W, R, S, P, Q, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, x.dtype, x.device.type, True
    )  # fmt: skip
    return NormPool2dProblem(problem_of(x, training, activation, True), pool)


def bn_act_max_pool2d_forward(
    x, weight, bias, running_mean, running_var, training, momentum, eps, activation,
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode, need_offsets,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y [N, C, P, Q] of x [N, C, H, W], fp32, fp16 or bf16, in x's layout; mean and rstd [C], fp32; and offsets
    [N, C, P, Q], channels_last, uint8 where the window has at most 256 taps, else int32, empty if not needed.

    weight, bias, running_mean and running_var: [C] in x's dtype or fp32, or None.
    """
    N, C, H, W = x.shape
    P = output_size(H, kernel_h, stride_h, pad_h, dilation_h, ceil=ceil_mode)
    Q = output_size(W, kernel_w, stride_w, pad_w, dilation_w, ceil=ceil_mode)
    channels_last = is_channels_last(x)
    y = empty_nhwc((N, C, P, Q), x, channels_last)
    dtype = torch.uint8 if kernel_h * kernel_w <= 256 else torch.int32
    offsets = empty(y.shape, x, True, dtype) if need_offsets else torch.empty(0, dtype=dtype, device=x.device)
    if not y.numel():
        mean, rstd = (torch.zeros(C, dtype=torch.float32, device=x.device) for _ in range(2))
        return result(y, channels_last), mean, rstd, offsets
    window = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    problem = _problem(x, training, activation, P, Q, window)
    x = nhwc(x)
    mean, rstd = statistics(problem.norm, x, running_mean, running_var, momentum, eps)
    kept = offsets if need_offsets else None
    launch(forward_kernel, plans.forward(problem), x, mean, rstd, *vectors(weight, bias), y, kept)
    return result(y, channels_last), mean, rstd, offsets


def bn_act_max_pool2d_backward(
    dy, offsets, x, weight, bias, mean, rstd, training, eps, activation,
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, need_dx, need_dweight, need_dbias,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dx, dweight and dbias, None where not asked for, of dy and offsets [N, C, P, Q] and x [N, C, H, W].

    dx has x's layout; dweight and dbias [C] have the parameters' dtype, fp32 without any.
    """
    channels_last = is_channels_last(x)
    dx = empty_nhwc(x.shape, x, channels_last) if need_dx else None
    dweight, dbias = parameter_gradients(x, weight, bias, need_dweight, need_dbias)
    if x.numel():
        window = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
        problem = _problem(x, training, activation, dy.shape[2], dy.shape[3], window)
        dy, offsets, x = nhwc(dy), nhwc(offsets), nhwc(x)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        parameters = mean, rstd, *vectors(weight, bias)
        shares = None
        if need_dweight or need_dbias or (training and need_dx):
            plan = plans.gradient_sums(problem, device_of(x).processors)
            partial = torch.empty(plan.slices * 2 * problem.norm.C, dtype=torch.float32, device=x.device)
            launch(backward_sums_kernel, plan.partial, dy, offsets, x, *parameters, partial)
            needs_shares = training and need_dx
            shares = finish_gradients(problem.norm, plan, partial, rstd, dweight, dbias, needs_shares)
        if need_dx:
            read = x if shares is not None or activation != "none" else None
            launch(backward_kernel, plans.backward(problem), dy, offsets, read, *parameters, shares, dx)
    return None if dx is None else result(dx, channels_last), dweight, dbias
