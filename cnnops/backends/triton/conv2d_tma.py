"""2-d convolution, NHWC, as implicit GEMM over boxes that tensor descriptors (TMA) load: sm_90 and sm_100.

    y[n,p,q,k]  = activation(scale[k] * sum over (r,s,c) of x[n, p*stride_h - pad_h + r*dilation_h, ..., c] * weight[k,r,s,c]
                             + bias[k] + residual[n,p,q,k])
    dx[n,h,w,c] = sum over (r,s,k) of dy[n, h + pad_h - r*dilation_h, ..., k] * weight[k,r,s,c]   (stride 1)
    dweight[k,r,s,c] = sum over (n,p,q) of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dilation_h, ..., c]

Layout     x, dx [N,H,W,C]; weight, dweight [K,R,S,C]; y, dy [N,P,Q,K]; all dense. A tile of BLOCK_M pixels is a box of
           images x TILE_H x TILE_W outputs; the inputs that one tap gives them are a box too, and what of it lies outside
           the input reads as zero: there is no halo, and no mask, to compute. Of stride 2 it is a box of the view
           [N, H/2, 2, W/2, 2C], which has a row's and a column's parity as coordinates of their own. Weights are boxes of
           [K, R*S, C]. A 1x1 convolution without padding is a plain GEMM over [N*H*W, C]: a single row of pixels.
Ownership  As many programs as multiprocessors can hold, or fewer with equal shares, walk over the tiles; each tile is one
           program's, so nothing is atomic. Sums over pixels are split as conv2d's are.
Traffic    forward: x once for each tap and each block of filters, weight once for each tile, y once. Tiles of the same
           pixels run side by side, so that x comes from memory once and from L2 after that, where the weights stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cnnops.backends.triton.epilogue import finish, moments

# Integers of a batch: specialising on them (1, multiples of 16) would compile anew for every batch size.
_BATCH = ["N", "P", "Q", "tile_steps", "steps"]


@triton.jit
def _origin(tile, P, Q, IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """First image, row and column of box number `tile` of images of P x Q."""
    across = tl.cdiv(Q, TILE_W)
    down = tl.cdiv(P, TILE_H)
    image = tile // (down * across)
    within = tile - image * (down * across)
    row = within // across
    return image * IMAGES, row * TILE_H, (within - row * across) * TILE_W


@triton.jit
def _box(
    images, n, h, w, channel, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):
    """[PIXELS, BLOCK] of `images`, WIDTH channels deep: every STRIDE-th pixel from (n, h, w) on, of `channel` on."""
    if STRIDE == 1:
        found = images.load([n, h, w, channel])
    else:
        # Shifts round down, as coordinates in the padding need.
        found = images.load([n, h >> 1, h & 1, w >> 1, (w & 1) * WIDTH + channel])
    return found.reshape(PIXELS, BLOCK)


@triton.jit
def _store(
    sums, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
    K: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """epilogue.finish of a box of pixels of [N, P, Q, K] from (n0, p0, q0) on, and their moments as number `part`."""
    IMAGES: tl.constexpr = sums.shape[0] // (TILE_H * TILE_W)
    pixel = tl.arange(0, sums.shape[0])
    n = n0 + pixel // (TILE_H * TILE_W)
    p = p0 + pixel // TILE_W % TILE_H
    q = q0 + pixel % TILE_W
    k = k0 + tl.arange(0, sums.shape[1])
    channel = k[None, :]
    channel_exists = (k < K)[None, :]
    exists = ((n < N) & (p < P) & (q < Q))[:, None] & channel_exists
    at = (((n.to(tl.int64) * P + p) * Q + q) * K)[:, None] + channel
    found = finish(sums, scale, bias, residual, y, z, at, exists, channel, channel_exists, ACTIVATION)
    if means is not None:
        count = tl.maximum(tl.minimum(N - n0, IMAGES), 0) * tl.minimum(P - p0, TILE_H) * tl.minimum(Q - q0, TILE_W)
        mean, m2 = moments(found, exists, count, 0)
        mask = k < tl.where(n0 < N, K, 0)  # a program's last steps may be beyond the last part
        tl.store(counts + part, count.to(tl.float32), mask=n0 < N)
        tl.store(means + part.to(tl.int64) * K + k, mean, mask=mask)
        tl.store(m2s + part.to(tl.int64) * K + k, m2, mask=mask)


@triton.jit
def _halves(sums):
    return tl.split(sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _store_halves(
    sums, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
    K: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    left, right = _halves(sums)
    _store(
        left, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
        K, TILE_H, TILE_W, ACTIVATION,
    )  # fmt: skip
    _store(
        right, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0 + left.shape[1], N, P, Q,
        K, TILE_H, TILE_W, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _store_tile(
    sums, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
    K: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`_store`, of wide tiles by halves and quarters: what a thread holds beside the sums is so much less."""
    FULL: tl.constexpr = residual is not None or means is not None or y.dtype.element_ty == tl.float32
    WIDE: tl.constexpr = 64 if FULL else 128
    if sums.shape[1] >= 2 * WIDE:
        left, right = _halves(sums)
        _store_halves(
            left, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
            K, TILE_H, TILE_W, ACTIVATION,
        )  # fmt: skip
        _store_halves(
            right, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0 + left.shape[1], N, P, Q,
            K, TILE_H, TILE_W, ACTIVATION,
        )  # fmt: skip
    elif sums.shape[1] >= WIDE:
        _store_halves(
            sums, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
            K, TILE_H, TILE_W, ACTIVATION,
        )  # fmt: skip
    else:
        _store(
            sums, scale, bias, residual, y, z, counts, means, m2s, part, n0, p0, q0, k0, N, P, Q,
            K, TILE_H, TILE_W, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=_BATCH)
def forward_kernel(
    x, weight, scale, bias, residual, y, z, counts, means, m2s, N, P, Q, tile_steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """gemm_m = output pixels, gemm_n = filters, gemm_k = (r, s, channels). Its tail is epilogue.finish."""
    IMAGES: tl.constexpr = BLOCK_M // (TILE_H * TILE_W)
    N_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for tile_step in tl.range(tile_steps, flatten=True):
        tile = tile_step * tl.num_programs(0) + tl.program_id(0)
        k0 = tile % N_TILES * BLOCK_N
        n0, p0, q0 = _origin(tile // N_TILES, P, Q, IMAGES, TILE_H, TILE_W)
        sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
        for step in range(R * S * CHUNKS):
            tap = step // CHUNKS
            c = (step - tap * CHUNKS) * BLOCK_K
            h = p0 * STRIDE - PAD_H + tap // S * DILATION_H
            w = q0 * STRIDE - PAD_W + tap % S * DILATION_W
            a = _box(x, n0, h, w, c, STRIDE, C, BLOCK_M, BLOCK_K)
            b = weight.load([k0, tap, c]).reshape(BLOCK_N, BLOCK_K)
            sums = tl.dot(a, b.T, sums, input_precision=PRECISION)

        _store_tile(
            sums, scale, bias, residual, y, z, counts, means, m2s, tile // N_TILES, n0, p0, q0, k0, N, P, Q,
            K, TILE_H, TILE_W, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=_BATCH)
def backward_input_kernel(
    dy, weight, bias, dx, N, H, W, tile_steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gemm_m = input pixels, gemm_n = channels, gemm_k = (r, s, filters): forward of dy with taps walked backwards.

    The weights' boxes are [filters, channels] as they lie, so nothing is transposed.
    """
    IMAGES: tl.constexpr = BLOCK_M // (TILE_H * TILE_W)
    N_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for tile_step in tl.range(tile_steps, flatten=True):
        tile = tile_step * tl.num_programs(0) + tl.program_id(0)
        c0 = tile % N_TILES * BLOCK_N
        n0, h0, w0 = _origin(tile // N_TILES, H, W, IMAGES, TILE_H, TILE_W)
        sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
        for step in range(R * S * CHUNKS):
            tap = step // CHUNKS
            k = (step - tap * CHUNKS) * BLOCK_K
            p = h0 + PAD_H - tap // S * DILATION_H
            q = w0 + PAD_W - tap % S * DILATION_W
            a = _box(dy, n0, p, q, k, 1, K, BLOCK_M, BLOCK_K)
            b = weight.load([k, tap, c0]).reshape(BLOCK_K, BLOCK_N)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)

        _store_tile(
            sums, None, bias, None, dx, None, None, None, None, 0, n0, h0, w0, c0, N, H, W, C, TILE_H, TILE_W, "none"
        )  # fmt: skip


@triton.jit(do_not_specialize=_BATCH)
def backward_weight_kernel(
    dy, x, slabs, P, Q, steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gemm_m = filters, gemm_n = channels of one tap, gemm_k = output pixels of one split. slabs: [splits, K, R, S, C].

    Boxes tile each image exactly: beside it dy would read as zero, but x may not, and zero times NaN is NaN.
    """
    IMAGES: tl.constexpr = BLOCK_K // (TILE_H * TILE_W)
    M_TILES: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    c0 = program % N_TILES * BLOCK_N
    tap = program // N_TILES % (R * S)
    k0 = program // (N_TILES * R * S) % M_TILES * BLOCK_M
    split = program // (N_TILES * R * S * M_TILES)
    dh = tap // S * DILATION_H - PAD_H
    dw = tap % S * DILATION_W - PAD_W
    sums = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for step in range(steps):
        n0, p0, q0 = _origin(split * steps + step, P, Q, IMAGES, TILE_H, TILE_W)
        a = _box(dy, n0, p0, q0, k0, 1, K, BLOCK_K, BLOCK_M)
        b = _box(x, n0, p0 * STRIDE + dh, q0 * STRIDE + dw, c0, STRIDE, C, BLOCK_K, BLOCK_N)
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)

    k = k0 + tl.arange(0, BLOCK_M)
    c = c0 + tl.arange(0, BLOCK_N)
    rows = ((split.to(tl.int64) * K + k) * (R * S) + tap) * C
    tl.store(
        slabs + rows[:, None] + c[None, :],
        sums.to(slabs.dtype.element_ty),
        mask=(k < K)[:, None] & (c < C)[None, :],
    )
