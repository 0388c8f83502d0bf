"""Squeeze and excitation: each channel of an image is scaled by what a small network makes of all channels' means.

    pooled[n,c] = mean over L of x;  hidden[n,m] = bias1[m] + sum over c of weight1[m,c] * pooled[n,c]
    scale[n,c]  = gate(bias2[c] + sum over m of weight2[c,m] * activation(hidden[n,m]));  y = x * scale

    dscale[n,c] = sum over L of dy * x
    dgated      = dscale * gate';  dweight2 = dgated^T activation(hidden),  dbias2 = sum over n of dgated
    dhidden     = dgated weight2 * activation';  dweight1 = dhidden^T pooled,  dbias1 = sum over n of dhidden
    dx          = dy * scale + dhidden weight1 / L

Layout     x, y and their gradients [N,L,C] or [N,C,L], lanes along the last axis; weight1 [M,C], weight2 [C,M]; the rest
           [N,C] and [N,M], in fp32.
Tile       an image, sums and y: BLOCK_L x BLOCK_C = 64 x 64 in 16 bits, 64 x 32 in fp32; [N,C,L] 512 x 8 or 64 x 64.
                         channels c ->
                       +- BLOCK_C channels ---------------------------+
           positions | | slice: BLOCK_L positions at once;            |  the layers, a program: an image, all M,
           l         v | sums: registers                              |  4096 elements of a matrix at once
                       +- split: the next slice, another program's ---+
Ownership  Sums over L: a program owns some channels of a slice of an image's positions. The layers: a program owns an
           image; it adds its slices in order, and runs both layers. Sums over images: a program owns a tile of dweight,
           or some of a dbias. Nothing is atomic, so the result is deterministic.
Traffic    forward: x for the means, then x + y; backward: dy + x for dscale, then dy + dx. The matrices once for each
           image, mostly from L2; the gradients of the matrices once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from cnnops.backends.triton.activation import activate, gradient
from cnnops.backends.triton.launch import Launch, cdiv, device_of, launch, power_of_2
from cnnops.backends.triton.layout import along_channels, along_pixels, channel_offset, over_pixels, pixel_offset, zeros
from cnnops.backends.triton.tensors import dense_as, empty
from cnnops.geometry import ACTIVATIONS_FROM_INPUT, SqueezeExciteProblem
from cnnops.tuning import cached, choose
from cnnops.tuning.triton.squeeze_excite import SWEEP

# A batch's integers; L is none of them, for loads of 16 bytes along L want to know whether 16 divides it.
_BATCH = ["N", "steps", "tiles"]


@triton.jit
def _gated(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return 1 / (1 + tl.exp(-z))
    else:
        shifted = z + 3
        # The gradient tells a saturated gate by 1, which an approximate 6 / 6 may miss.
        return tl.where(shifted < 0, 0.0, tl.where(shifted >= 6, 1.0, shifted / 6))


@triton.jit
def _gate_gradient(dscale, scale, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return dscale * (1 - scale) * scale
    else:
        return tl.where((scale > 0) & (scale < 1), dscale / 6, 0.0)


@triton.jit(do_not_specialize=_BATCH)
def sums_kernel(
    dy, x, partial, L, steps,
    C: tl.constexpr, SLICES: tl.constexpr, NCHW: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [N, SLICES, C]: sums over a slice's positions of x, or of dy * x."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    slice = program // C_TILES % SLICES
    n = program // (C_TILES * SLICES)
    sums = zeros(BLOCK_L, BLOCK_C, NCHW)
    for step in range(steps):
        l = (slice * steps + step) * BLOCK_L + tl.arange(0, BLOCK_L)
        at = along_pixels(pixel_offset(n, 0, l, 1, L, C, NCHW), NCHW)
        at += along_channels(channel_offset(c, L, NCHW), NCHW)
        mask = along_pixels(l < L, NCHW) & along_channels(c < C, NCHW)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if dy is not None:
            values *= tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        sums += values
    to = partial + (n.to(tl.int64) * SLICES + slice) * C + c
    tl.store(to, over_pixels(sums, NCHW), mask=c < C)


@triton.jit
def _sum_of_slices(partial, n, c, C: tl.constexpr, SLICES: tl.constexpr):
    slices = n * SLICES + tl.arange(0, SLICES)
    values = tl.load(partial + slices[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
    return tl.sum(values, 0)


@triton.jit
def layers_kernel(
    partial, weight1, bias1, weight2, bias2, pooled, hidden, scale, area,
    C: tl.constexpr, M: tl.constexpr, SLICES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """An image's means over `area` positions, and both layers. BLOCK_M is no less than M."""
    n = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    products = tl.full([BLOCK_M, BLOCK_C], 0, tl.float32)
    for tile in range((C + BLOCK_C - 1) // BLOCK_C):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mean = _sum_of_slices(partial, n, c, C, SLICES) / area
        tl.store(pooled + n * C + c, mean, mask=c < C)
        row = tl.load(weight1 + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        products += row.to(tl.float32) * mean[None, :]
    z = tl.sum(products, 1)
    if bias1 is not None:
        z += tl.load(bias1 + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(hidden + n * M + m, z, mask=m < M)
    activated = activate(z, ACTIVATION)
    for tile in range((C + BLOCK_C - 1) // BLOCK_C):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.load(weight2 + c[:, None] * M + m[None, :], mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
        # Of an m that is not there the activation may be anything but infinite.
        gated = tl.sum(row.to(tl.float32) * activated[None, :], 1)
        if bias2 is not None:
            gated += tl.load(bias2 + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(scale + n * C + c, _gated(gated, GATE), mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def scale_kernel(
    x, scale, shift, y, L, tiles, C: tl.constexpr, NCHW: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y = x * scale, or dx = dy * scale + shift, the shift being dpooled."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    l = program // C_TILES % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    n = program // C_TILES // tiles
    at = along_pixels(pixel_offset(n, 0, l, 1, L, C, NCHW), NCHW)
    at += along_channels(channel_offset(c, L, NCHW), NCHW)
    mask = along_pixels(l < L, NCHW) & along_channels(c < C, NCHW)
    planes = n.to(tl.int64) * C + c
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values *= along_channels(tl.load(scale + planes, mask=c < C, other=0.0), NCHW)
    if shift is not None:
        values += along_channels(tl.load(shift + planes, mask=c < C, other=0.0), NCHW)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def layers_backward_kernel(
    partial, weight1, weight2, hidden, scale, dgated, activated, dhidden, dpooled, area,
    C: tl.constexpr, M: tl.constexpr, SLICES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    READS_INPUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of an image's means and hidden values. READS_INPUT: whether the activation's derivative does."""
    n = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    products = tl.full([BLOCK_C, BLOCK_M], 0, tl.float32)
    for tile in range((C + BLOCK_C - 1) // BLOCK_C):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        dscale = _sum_of_slices(partial, n, c, C, SLICES)
        found = _gate_gradient(dscale, tl.load(scale + n * C + c, mask=c < C, other=0.0), GATE)
        tl.store(dgated + n * C + c, found, mask=c < C)
        row = tl.load(weight2 + c[:, None] * M + m[None, :], mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
        products += row.to(tl.float32) * found[:, None]
    z = tl.load(hidden + n * M + m, mask=m < M, other=0.0)
    a = activate(z, ACTIVATION)
    tl.store(activated + n * M + m, a, mask=m < M)
    dz = gradient(tl.sum(products, 0), z if READS_INPUT else a, ACTIVATION)
    tl.store(dhidden + n * M + m, dz, mask=m < M)
    if dpooled is not None:
        for tile in range((C + BLOCK_C - 1) // BLOCK_C):
            c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            row = tl.load(weight1 + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
            tl.store(dpooled + n * C + c, tl.sum(row.to(tl.float32) * dz[:, None], 0) / area, mask=c < C)


@triton.jit(do_not_specialize=_BATCH)
def backward_weight_kernel(
    left, right, dweight, N, steps,
    A: tl.constexpr, B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """dweight [A, B]: the sum over images of left [N, A] times right [N, B]."""
    B_TILES: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    program = tl.program_id(0)
    a = program // B_TILES * BLOCK_A + tl.arange(0, BLOCK_A)
    b = program % B_TILES * BLOCK_B + tl.arange(0, BLOCK_B)
    sums = tl.full([BLOCK_A, BLOCK_B], 0, tl.float32)
    for step in range(steps):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        images = n.to(tl.int64)
        rows = tl.load(
            left + images[None, :] * A + a[:, None], mask=(a < A)[:, None] & (n < N)[None, :], other=0.0
        )  # fmt: skip
        columns = tl.load(
            right + images[:, None] * B + b[None, :], mask=(n < N)[:, None] & (b < B)[None, :], other=0.0
        )  # fmt: skip
        sums = tl.dot(rows, columns, sums, input_precision="ieee")
    to = dweight + a.to(tl.int64)[:, None] * B + b[None, :]
    tl.store(to, sums.to(dweight.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


@triton.jit(do_not_specialize=_BATCH)
def backward_bias_kernel(values, dbias, N, steps, A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr):
    """dbias [A]: the sum over images of values [N, A]."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    sums = tl.full([BLOCK_N, BLOCK_A], 0, tl.float32)
    for step in range(steps):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (a < A)[None, :]
        sums += tl.load(values + n.to(tl.int64)[:, None] * A + a[None, :], mask=mask, other=0.0)
    tl.store(dbias + a, tl.sum(sums, 0).to(dbias.dtype.element_ty), mask=a < A)


# Sums over L: programs that are to be in flight on each multiprocessor, and slices that one program can add.
_PROGRAMS_PER_PROCESSOR = 8
_MOST_SLICES = 32

_LAYER_ELEMENTS = 4096
"""Of a matrix, that the program of an image holds at once: 16 a thread."""

_IMAGES = 32
"""Whose outer products are summed at once."""


def _nchw(p: SqueezeExciteProblem) -> bool:
    return not p.channels_last and p.L > 1  # one position has the same memory in both layouts


def _sweep(p: SqueezeExciteProblem) -> tuple[dict[str, Any], int, int, int]:
    """Constants, tiles along L and along C, warps."""
    tile = choose(SWEEP, p)
    constants = {"C": p.C, "NCHW": _nchw(p), "BLOCK_L": tile.block_l, "BLOCK_C": tile.block_c}
    return constants, cdiv(p.L, tile.block_l), cdiv(p.C, tile.block_c), tile.num_warps


@cached
def _summing(p: SqueezeExciteProblem, processors: int) -> tuple[int, Launch]:
    """Slices, and how `sums_kernel` fills them."""
    constants, tiles, channel_tiles, warps = _sweep(p)
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, p.N * channel_tiles)
    slices = min(_MOST_SLICES, power_of_2(wanted), power_of_2(tiles))
    scalars = {"L": p.L, "steps": cdiv(tiles, slices)}
    return slices, Launch(p.N * slices * channel_tiles, dict(scalars), constants | {"SLICES": slices}, warps)


@cached
def _scaling(p: SqueezeExciteProblem) -> Launch:
    constants, tiles, channel_tiles, warps = _sweep(p)
    return Launch(p.N * tiles * channel_tiles, {"L": p.L, "tiles": tiles}, constants, warps)


def _layers(p: SqueezeExciteProblem, slices: int, **more: Any) -> Launch:
    hidden = 1 << (p.M - 1).bit_length()
    channels = min(max(8, _LAYER_ELEMENTS // hidden), 1 << (p.C - 1).bit_length())
    constants = {
        "C": p.C, "M": p.M, "SLICES": slices, "ACTIVATION": p.activation, "GATE": p.gate,
        "BLOCK_M": hidden, "BLOCK_C": channels,
    }  # fmt: skip
    # Bounded, even so generously, the assembler does not spill for the sake of more programs on a multiprocessor.
    return Launch(p.N, {"area": float(p.L)}, {**constants, **more}, 8, max_registers=128)


def _partial(p: SqueezeExciteProblem, dy: torch.Tensor | None, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Slices, and their sums over L [N, slices, C] of x, or of dy * x."""
    slices, how = _summing(p, device_of(x).processors)
    partial = torch.empty(p.N * slices * p.C, dtype=torch.float32, device=x.device)
    launch(sums_kernel, how, dy, x, partial)
    return slices, partial


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).contiguous()


def squeeze_excite_forward(
    x, weight1, bias1, weight2, bias2, activation, gate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y like x [N, C, H, W], and in fp32 the means [N, C], the hidden values before their activation [N, M], scale [N, C].

    weight1: [M, C]; weight2: [C, M]; or the same with two axes of one more; biases [M], [C] or None; fp32, fp16 or bf16.
    """
    p = SqueezeExciteProblem.of(x, weight1, bias1, weight2, bias2, activation, gate)
    y = empty(x.shape, x, p.channels_last)
    pooled, hidden, scale = (
        torch.empty((p.N, size), dtype=torch.float32, device=x.device) for size in (p.C, p.M, p.C)
    )  # fmt: skip
    if p.N:
        x = dense_as(x, p.channels_last)
        slices, partial = _partial(p, None, x)
        bias1, bias2 = (None if t is None else t.contiguous() for t in (bias1, bias2))
        layers = _matrix(weight1), bias1, _matrix(weight2), bias2
        launch(layers_kernel, _layers(p, slices), partial, *layers, pooled, hidden, scale)
        launch(scale_kernel, _scaling(p), x, scale, None, y)
    return y, pooled, hidden, scale


def squeeze_excite_backward(
    dy,
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    pooled,
    hidden,
    scale,
    activation,
    gate,
    need_dx,
    need_dweight1,
    need_dbias1,
    need_dweight2,
    need_dbias2,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients asked for, None for the others, of dy and x [N, C, H, W] and the layers; dx is laid out like x.

    pooled, hidden, scale: what the forward pass gave.
    """
    p = SqueezeExciteProblem.of(x, weight1, bias1, weight2, bias2, activation, gate)
    dx = empty(x.shape, x, p.channels_last) if need_dx else None
    dweight1, dbias1, dweight2, dbias2 = (
        torch.empty(shape, dtype=x.dtype, device=x.device) if need else None
        for need, shape in (
            (need_dweight1, weight1.shape), (need_dbias1, (p.M,)), (need_dweight2, weight2.shape), (need_dbias2, (p.C,))
        )
    )  # fmt: skip
    gradients = dweight1, dbias1, dweight2, dbias2
    if not p.N:
        for t in gradients:
            if t is not None:
                t.zero_()
        return dx, *gradients
    dy, x = dense_as(dy, p.channels_last), dense_as(x, p.channels_last)
    pooled, hidden, scale = (t.contiguous() for t in (pooled, hidden, scale))
    slices, partial = _partial(p, dy, x)
    dgated, activated, dhidden = (torch.empty_like(t) for t in (scale, hidden, hidden))
    dpooled = torch.empty_like(pooled) if need_dx else None
    launch(
        layers_backward_kernel, _layers(p, slices, READS_INPUT=activation in ACTIVATIONS_FROM_INPUT),
        partial, _matrix(weight1), _matrix(weight2), hidden, scale, dgated, activated, dhidden, dpooled,
    )  # fmt: skip
    for left, right, dweight in ((dhidden, pooled, dweight1), (dgated, activated, dweight2)):
        if dweight is not None:
            _sum_outer_products(left, right, dweight)
    for values, dbias in ((dhidden, dbias1), (dgated, dbias2)):
        if dbias is not None:
            _sum_images(values, dbias)
    if dx is not None:
        launch(scale_kernel, _scaling(p), dy, scale, dpooled, dx)
    return dx, *gradients


def _sum_outer_products(left: torch.Tensor, right: torch.Tensor, dweight: torch.Tensor) -> None:
    (N, A), B = left.shape, right.shape[1]
    block_a, block_b = 32, 64
    how = Launch(
        cdiv(A, block_a) * cdiv(B, block_b),
        {"N": N, "steps": cdiv(N, _IMAGES)},
        {"A": A, "B": B, "BLOCK_N": _IMAGES, "BLOCK_A": block_a, "BLOCK_B": block_b},
    )
    launch(backward_weight_kernel, how, left, right, dweight)


def _sum_images(values: torch.Tensor, dbias: torch.Tensor) -> None:
    N, A = values.shape
    block = 64
    scalars: dict[str, int | float] = {"N": N, "steps": cdiv(N, _IMAGES)}
    launch(
        backward_bias_kernel, Launch(cdiv(A, block), scalars, {"A": A, "BLOCK_N": _IMAGES, "BLOCK_A": block}), values, dbias
    )  # fmt: skip
