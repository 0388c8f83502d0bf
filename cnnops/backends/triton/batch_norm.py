"""Batch norm, a residual's addition and an activation.

    y       = activation(z),  z = (x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual
    mean[c], rstd[c] = 1 / sqrt(var[c] + eps)   over N and L of x when training, else the running statistics
    dz      = dy * activation'(z), which is dresidual too
    dbias[c]   = sum of dz
    dweight[c] = rstd[c] * sum of dz * (x - mean[c])
    dx      = rstd[c] * weight[c] * dz; when training,
              rstd[c] * weight[c] * (dz - dbias[c] / NL - (x - mean[c]) * rstd[c] * dweight[c] / NL)

Layout     x, y, residual and their gradients [N,L,C] or [N,C,L], L being all positions; everything else [C]. The
           kernels know [N,C,L] alone: of [N,L,C], the positions are its images, of which each has a plane of one.
           Vectors of 16 bytes go along the channels of [N,L,C], or along the positions of [N,C,L]; shorter ones where
           those are no multiple of a vector.
Tile       sums and sweeps, [N,L,C]: BLOCK_N x BLOCK_C = 64 x 64, of up to 32 channels 128 x 32.
                         channels c ->
                       +- BLOCK_C channels ---------------------------+
           positions | | tile: BLOCK_N positions at once;             |  a program: a slice of `steps` tiles for
           (n,l)     v | sums: registers                              |  sums, a tile for sweeps
                       +- split: the next slice, another program's ---+
           [N,C,L]: BLOCK_N x BLOCK_C x BLOCK_L = 8 x 1 x 512; planes of up to 256: 16 x 1 x 256, up to 64: 16 x 4 x 64.
Ownership  One program owns a tile: the same run of the planes of some images and channels. Sums are cut into slices of
           tiles: each leaves its part in fp32, and a second kernel merges the slices' parts in a fixed order, in
           double. A tile's moments are its mean, then the squared deviations from that; tiles and slices are merged by
           Chan's formula, never made of raw sums of squares.
Traffic    forward: x for the statistics, then x (+ residual) + y; backward: dy, x (+ y or residual) for the sums, then
           the same + dx (+ dresidual). A sweep that nothing asks for is left out, and so is an operand that the
           activation does not need.
Offsets are 64-bit. Grids have one axis, x.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from cnnops.backends.triton import batch_norm_plan
from cnnops.backends.triton.activation import activate, gradient
from cnnops.backends.triton.launch import Launch, device_of, launch
from cnnops.backends.triton.tensors import dense_as, empty
from cnnops.geometry import NormProblem, is_channels_last

# Integers of a batch: specialising on them would compile anew for every batch size. L, which is counted in VECTORs, is
# specialised on being 1.
_BATCH = ["N", "steps", "count"]


@triton.jit
def _channels(unit, BLOCK_C: tl.constexpr):
    return (unit * BLOCK_C + tl.arange(0, BLOCK_C))[None, :, None]


@triton.jit
def _tile(tile, c, N, L, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """Offsets of a tile's elements, which of them there are, and how many of each channel."""
    across = (L + BLOCK_L - 1) // BLOCK_L
    image = (tile // across).to(tl.int64) * BLOCK_N
    position = (tile % across).to(tl.int64) * BLOCK_L
    row = (image + tl.arange(0, BLOCK_N))[:, None, None]
    column = (position + tl.arange(0, BLOCK_L))[None, None, :]
    count = tl.maximum(tl.minimum(N - image, BLOCK_N), 0) * tl.minimum(L - position, BLOCK_L)
    return (row * C + c) * L + column, (row < N) & (c < C) & (column < L), count


@triton.jit
def _over_positions(values):
    """The sums over a tile's images and positions."""
    return tl.sum(tl.sum(values, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def channel_map(mean, rstd, weight, bias, c, C: tl.constexpr):
    """What normalises channels: (x - mean) * scale + shift, in fp32. weight and bias may be None."""
    centre = tl.load(mean + c, mask=c < C, other=0.0)
    scale = tl.load(rstd + c, mask=c < C, other=0.0)
    if weight is not None:
        scale *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return centre, scale, shift


@triton.jit
def gradient_of_z(dy, z, ACTIVATION: tl.constexpr):
    """dz by z: the masks of relu and relu6 are the same by their input as by their output."""
    return gradient(dy, activate(z, ACTIVATION) if ACTIVATION == "sigmoid" else z, ACTIVATION)


@triton.jit
def _gradients(dy, x, residual, y, at, there, centre, scale, shift, ACTIVATION: tl.constexpr):
    """dz and x of a tile. x may be None where dz does not depend on it; it is then 0."""
    dz = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    values = tl.zeros_like(dz)
    if x is not None:
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        if y is not None:
            dz = gradient(dz, tl.load(y + at, mask=there, other=0.0).to(tl.float32), ACTIVATION)
        else:
            z = (values - centre) * scale + shift
            if residual is not None:
                z += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
            dz = gradient_of_z(dz, z, ACTIVATION)
    return dz, values


@triton.jit
def input_gradient(dz, x, centre, scale, shares, c, C: tl.constexpr):
    """dx of dz and x. shares [2, C], what training takes away; None where statistics are fixed."""
    if shares is not None:
        dz -= tl.load(shares + c, mask=c < C, other=0.0)
        dz -= (x - centre) * tl.load(shares + C + c, mask=c < C, other=0.0)
    return dz * scale


@triton.jit(do_not_specialize=_BATCH)
def moments_kernel(
    x, partial, N, L, steps,
    C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of one slice. partial: [slices, 3, C]."""
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = _channels(tl.program_id(0) % UNITS, BLOCK_C)
    split = tl.program_id(0) // UNITS
    count = tl.full([1, 1, 1], 0, tl.float32)
    mean = tl.zeros(c.shape, tl.float32)
    m2 = tl.zeros(c.shape, tl.float32)
    for step in range(steps):
        at, there, number = _tile(split * steps + step, c, N, L * VECTOR, C, BLOCK_N, BLOCK_L)
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        more = number.to(tl.float32)
        tile_mean = _over_positions(values) / tl.where(more > 0, more, 1.0)
        deviation = tl.where(there, values - tile_mean, 0.0)
        total = count + more
        share = more / tl.where(total > 0, total, 1.0)
        apart = tile_mean - tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # inf - inf would forget the mean
        mean += apart * share
        m2 += _over_positions(deviation * deviation) + apart * (apart * (count * share))
        count = total
    part = partial + split.to(tl.int64) * (3 * C) + c
    tl.store(part, count + tl.zeros(c.shape, tl.float32), mask=c < C)
    tl.store(part + C, mean, mask=c < C)
    tl.store(part + 2 * C, m2, mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def finish_statistics_kernel(
    partial, running_mean, running_var, mean, rstd, count, momentum,
    EPS: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the slices' moments. running_mean and running_var, if not None, are brought up to date."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SLICES).to(tl.int64)
    parts = partial + (split * (3 * C))[:, None] + c[None, :]
    there = (c < C)[None, :]
    number = tl.load(parts, mask=there, other=0.0).to(tl.float64)
    means = tl.load(parts + C, mask=there, other=0.0).to(tl.float64)
    m2 = tl.load(parts + 2 * C, mask=there, other=0.0).to(tl.float64)
    positions = count.to(tl.float64)
    centre = tl.sum(number * means, 0) / positions
    apart = means - centre[None, :]
    squares = tl.sum(m2 + number * apart * apart, 0)
    tl.store(mean + c, centre.to(tl.float32), mask=c < C)
    tl.store(rstd + c, (1 / tl.sqrt(squares / positions + EPS)).to(tl.float32), mask=c < C)
    if running_mean is not None:
        _update(running_mean + c, centre, momentum, c < C)
        _update(running_var + c, squares / (positions - 1), momentum, c < C)


@triton.jit
def _update(running, of_batch, momentum, mask):
    before = tl.load(running, mask=mask, other=0.0).to(tl.float64)
    after = (1 - momentum) * before + momentum * of_batch
    tl.store(running, after.to(running.dtype.element_ty), mask=mask)


@triton.jit
def running_statistics_kernel(
    running_mean, running_var, mean, rstd, EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """mean and rstd of fixed statistics."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(mean + c, tl.load(running_mean + c, mask=c < C, other=0.0).to(tl.float32), mask=c < C)
    variance = tl.load(running_var + c, mask=c < C, other=1.0).to(tl.float64)
    tl.store(rstd + c, (1 / tl.sqrt(variance + EPS)).to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, residual, mean, rstd, weight, bias, y, N, L,
    ACTIVATION: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = _channels(tl.program_id(0) % UNITS, BLOCK_C)
    at, there, _ = _tile(tl.program_id(0) // UNITS, c, N, L * VECTOR, C, BLOCK_N, BLOCK_L)
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    z = (tl.load(x + at, mask=there, other=0.0).to(tl.float32) - centre) * scale + shift
    if residual is not None:
        z += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_BATCH)
def backward_sums_kernel(
    dy, x, residual, y, mean, rstd, weight, bias, partial, N, L, steps,
    ACTIVATION: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz * (x - mean) over one slice. partial: [slices, 2, C]."""
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = _channels(tl.program_id(0) % UNITS, BLOCK_C)
    split = tl.program_id(0) // UNITS
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    sums = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_L], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_L], tl.float32)
    for step in range(steps):
        at, there, _ = _tile(split * steps + step, c, N, L * VECTOR, C, BLOCK_N, BLOCK_L)
        dz, values = _gradients(dy, x, residual, y, at, there, centre, scale, shift, ACTIVATION)
        sums += tl.where(there, dz, 0.0)
        products += tl.where(there, dz * (values - centre), 0.0)
    part = partial + split.to(tl.int64) * (2 * C) + c
    tl.store(part, _over_positions(sums), mask=c < C)
    tl.store(part + C, _over_positions(products), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def finish_gradients_kernel(
    partial, rstd, dweight, dbias, shares, count, C: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the slices' sums. dweight, dbias and shares [2, C], of which `input_gradient` makes dx, may be None."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SLICES).to(tl.int64)
    parts = partial + (split * (2 * C))[:, None] + c[None, :]
    there = (c < C)[None, :]
    of_dz = tl.sum(tl.load(parts, mask=there, other=0.0).to(tl.float64), 0)
    inverse = tl.load(rstd + c, mask=c < C, other=0.0).to(tl.float64)
    spread = tl.sum(tl.load(parts + C, mask=there, other=0.0).to(tl.float64), 0) * inverse
    if dweight is not None:
        tl.store(dweight + c, spread.to(dweight.dtype.element_ty), mask=c < C)
    if dbias is not None:
        tl.store(dbias + c, of_dz.to(dbias.dtype.element_ty), mask=c < C)
    if shares is not None:
        positions = count.to(tl.float64)
        tl.store(shares + c, (of_dz / positions).to(tl.float32), mask=c < C)
        tl.store(shares + C + c, (spread * inverse / positions).to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def backward_kernel(
    dy, x, residual, y, mean, rstd, weight, bias, shares, dx, dresidual, N, L,
    ACTIVATION: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = _channels(tl.program_id(0) % UNITS, BLOCK_C)
    at, there, _ = _tile(tl.program_id(0) // UNITS, c, N, L * VECTOR, C, BLOCK_N, BLOCK_L)
    centre, scale, shift = channel_map(mean, rstd, weight, bias, c, C)
    dz, values = _gradients(dy, x, residual, y, at, there, centre, scale, shift, ACTIVATION)
    if dresidual is not None:
        tl.store(dresidual + at, dz.to(dresidual.dtype.element_ty), mask=there)
    if dx is not None:
        found = input_gradient(dz, values, centre, scale, shares, c, C)
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=there)


def statistics(
    problem: NormProblem,
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd [C] in fp32 that `problem` normalises with, of x dense in its layout.

    Training brings running_mean and running_var [C], of any float dtype, up to date; else they are what is used.
    """
    mean, rstd = (torch.empty(problem.C, dtype=torch.float32, device=x.device) for _ in range(2))
    running = [None if t is None else t.contiguous() for t in (running_mean, running_var)]
    if not problem.training:
        how = batch_norm_plan.finish(problem, 1)
        constants = {"EPS": eps, "C": problem.C, "BLOCK": how.constants["BLOCK"]}
        launch(running_statistics_kernel, Launch(how.programs, {}, constants), *running, mean, rstd)
        return mean, rstd
    plan = batch_norm_plan.moments(problem, device_of(x).processors)
    partial = torch.empty(plan.slices * 3 * problem.C, dtype=torch.float32, device=x.device)
    launch(moments_kernel, plan.partial, x, partial)
    finish = replace(
        plan.finish,
        scalars=plan.finish.scalars | {"momentum": float(momentum)},
        constants={"EPS": eps} | plan.finish.constants,
    )
    launch(finish_statistics_kernel, finish, partial, *running, mean, rstd)
    for given, held in zip((running_mean, running_var), running, strict=True):
        if given is not None and held is not None and held is not given:
            given.copy_(held)
    return mean, rstd


def finish_gradients(
    problem: NormProblem,
    plan: batch_norm_plan.Sums,
    partial: torch.Tensor,
    rstd: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    need_shares: bool,
) -> torch.Tensor | None:
    """Fills dweight and dbias [C] where they are asked for. The shares [2, C] that training takes away from dz."""
    shares = torch.empty(2 * problem.C, dtype=torch.float32, device=rstd.device) if need_shares else None
    launch(finish_gradients_kernel, plan.finish, partial, rstd, dweight, dbias, shares)
    return shares


def problem_of(x: torch.Tensor, training: bool, activation: str, channels_last: bool) -> NormProblem:
    """x [N, C, ...], dense in the layout that channels_last says."""
    N, C = x.shape[:2]
    L = math.prod(x.shape[2:])
    return NormProblem(N, C, L, training, activation, x.dtype, torch.float32, x.device.type, channels_last)


def parameter_gradients(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, need_dweight: bool, need_dbias: bool
) -> list[torch.Tensor | None]:
    """dweight and dbias [C], of the parameters' dtype, yet to be filled; zeros if x has no elements."""
    dtype = next((t.dtype for t in (weight, bias) if t is not None), torch.float32)
    make = torch.empty if x.numel() else torch.zeros
    return [make(x.shape[1], dtype=dtype, device=x.device) if need else None for need in (need_dweight, need_dbias)]


def vectors(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Channel arrays, dense."""
    return [None if t is None else t.contiguous() for t in tensors]


def batch_norm_act_forward(
    x, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y like x [N, C, ...], fp32, fp16 or bf16, and the mean and rstd [C], fp32, that were used.

    residual: like x, or None; weight, bias, running_mean and running_var: [C] in x's dtype or fp32, or None. y is
    channels_last if x is.
    """
    channels_last = is_channels_last(x)
    y = empty(x.shape, x, channels_last)
    if not y.numel():
        mean, rstd = (torch.zeros(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
        return y, mean, rstd
    problem = problem_of(x, training, activation, channels_last)
    x = dense_as(x, channels_last)
    mean, rstd = statistics(problem, x, running_mean, running_var, momentum, eps)
    residual = None if residual is None else dense_as(residual, channels_last)
    how = batch_norm_plan.everywhere(problem)
    launch(forward_kernel, how, x, residual, mean, rstd, *vectors(weight, bias), y)
    return y, mean, rstd


def batch_norm_act_backward(
    dy,
    x,
    weight,
    bias,
    residual,
    y,
    mean,
    rstd,
    training,
    eps,
    activation,
    need_dx,
    need_dweight,
    need_dbias,
    need_dresidual,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dweight, dbias and dresidual, None where not asked for, of dy, x, residual and y [N, C, ...].

    y: where the activation's gradient is read off its output; None where z is computed again. dx and dresidual are
    channels_last if x is; dweight and dbias [C] have the parameters' dtype, fp32 without any.
    """
    channels_last = is_channels_last(x)
    dx, dresidual = (empty(x.shape, x, channels_last) if need else None for need in (need_dx, need_dresidual))
    dweight, dbias = parameter_gradients(x, weight, bias, need_dweight, need_dbias)
    if not x.numel():
        return dx, dweight, dbias, dresidual
    problem = problem_of(x, training, activation, channels_last)
    dy, x = dense_as(dy, channels_last), dense_as(x, channels_last)
    residual, y = (None if t is None or activation == "none" else dense_as(t, channels_last) for t in (residual, y))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    parameters = mean, rstd, *vectors(weight, bias)
    shares = None
    if need_dweight or need_dbias or (training and need_dx):
        plan = batch_norm_plan.gradient_sums(problem, device_of(x).processors)
        partial = torch.empty(plan.slices * 2 * problem.C, dtype=torch.float32, device=x.device)
        launch(backward_sums_kernel, plan.partial, dy, x, residual, y, *parameters, partial)
        shares = finish_gradients(problem, plan, partial, rstd, dweight, dbias, training and need_dx)
    if need_dx or need_dresidual:
        recomputes = activation != "none" and y is None
        read = x if shares is not None or recomputes else None
        how = batch_norm_plan.everywhere(problem)
        launch(backward_kernel, how, dy, read, residual, y, *parameters, shares, dx, dresidual)
    return dx, dweight, dbias, dresidual
