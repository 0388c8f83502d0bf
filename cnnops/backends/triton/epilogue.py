"""What follows a convolution's sums, whichever kernel made them: dense or depthwise.

    z = sum * scale[k] + bias[k] + residual,  y = activation(z)
    scale[k] = bn_weight[k] / sqrt(running_var[k] + eps),  shift[k] = (bias[k] - running_mean[k]) * scale[k] + bn_bias[k]

Layout     residual and z like y; scale and bias [K]. Statistics come in parts, one for each tile of pixels: counts
           [parts], means and m2s [parts, K] in fp32.
Ownership  A tile's program owns its part; one program of the merging kernel owns BLOCK channels of a share of the parts,
           so statistics are made in a fixed order.
Traffic    residual once, z once, 8 bytes for each filter of each tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton.activation import activate
from cnnops.backends.triton.launch import Launch, cdiv, launch


@triton.jit
def finish(sums, scale, bias, residual, y, z, at, exists, channel, channel_exists, ACTIVATION: tl.constexpr):
    """Write activation(sums * scale + bias + residual) to `y`, and return it in fp32 as it was rounded.

    at: offsets in y, and in residual and z, of sums that exist. channel and channel_exists: each sum's filter, of a shape
    that broadcasts to sums. scale, bias, residual and z may be None; y is made of z as it was rounded where z is wanted.
    """
    if scale is not None:
        sums *= tl.load(scale + channel, mask=channel_exists, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + channel, mask=channel_exists, other=0.0).to(tl.float32)
    if residual is not None:
        sums += tl.load(residual + at, mask=exists, other=0.0).to(tl.float32)
    if z is not None:
        rounded = sums.to(z.dtype.element_ty)
        tl.store(z + at, rounded, mask=exists)
        sums = rounded.to(tl.float32)
    result = activate(sums, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + at, result, mask=exists)
    return result.to(tl.float32)


@triton.jit
def moments(values, exists, count, AXIS: tl.constexpr):
    """Mean of the values that exist along AXIS, and the sum of their squared deviations from it. count: how many."""
    mean = tl.sum(tl.where(exists, values, 0.0), AXIS) / tl.maximum(count, 1)
    deviations = tl.where(exists, values - tl.expand_dims(mean, AXIS), 0.0)
    return mean, tl.sum(deviations * deviations, AXIS)


@triton.jit(do_not_specialize=["parts", "steps"])
def merge_kernel(
    counts, means, m2s, merged_counts, merged_means, merged_m2s, parts, steps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan's formula: ROWS parts at a time make one, which is merged into those before."""
    K_TILES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    share = program // K_TILES
    k = program % K_TILES * BLOCK + tl.arange(0, BLOCK)
    count = 0.0
    mean = tl.full([BLOCK], 0, tl.float32)
    m2 = tl.full([BLOCK], 0, tl.float32)
    for step in range(steps):
        part = (share * steps + step) * ROWS + tl.arange(0, ROWS)
        at = part.to(tl.int64)[:, None] * K + k[None, :]
        exists = (part < parts)[:, None] & (k < K)[None, :]
        each = tl.load(counts + part, mask=part < parts, other=0.0)
        each_mean = tl.load(means + at, mask=exists, other=0.0)
        each_m2 = tl.load(m2s + at, mask=exists, other=0.0)
        more = tl.sum(each, 0)
        more_mean = tl.sum(each[:, None] * each_mean, 0) / tl.maximum(more, 1.0, propagate_nan=tl.PropagateNan.NONE)
        apart = each_mean - more_mean[None, :]
        more_m2 = tl.sum(each_m2 + each[:, None] * apart * apart, 0)

        total = tl.maximum(count + more, 1.0, propagate_nan=tl.PropagateNan.NONE)
        deviation = more_mean - tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # inf - inf would forget the mean
        mean += deviation * (more / total)
        m2 += more_m2 + deviation * deviation * (count * (more / total))
        count += more
    tl.store(merged_counts + share, count)
    tl.store(merged_means + share.to(tl.int64) * K + k, mean, mask=k < K)
    tl.store(merged_m2s + share.to(tl.int64) * K + k, m2, mask=k < K)


@triton.jit
def fold_kernel(
    conv_bias, running_mean, running_var, bn_weight, bn_bias, scale, shift, eps, K: tl.constexpr, BLOCK: tl.constexpr
):
    """In fp64: a mean far from zero and a small variance take digits."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = k < K
    factor = tl.full([BLOCK], 1, tl.float64)
    if bn_weight is not None:
        factor = tl.load(bn_weight + k, mask=exists, other=0.0).to(tl.float64)
    factor = (factor / tl.sqrt(tl.load(running_var + k, mask=exists, other=1.0).to(tl.float64) + eps)).to(tl.float32)
    moved = -tl.load(running_mean + k, mask=exists, other=0.0).to(tl.float64)
    if conv_bias is not None:
        moved += tl.load(conv_bias + k, mask=exists, other=0.0).to(tl.float64)
    moved *= factor.to(tl.float64)  # as the sums are multiplied: a mean that cancels them does so exactly
    if bn_bias is not None:
        moved += tl.load(bn_bias + k, mask=exists, other=0.0).to(tl.float64)
    tl.store(scale + k, factor, mask=exists)
    tl.store(shift + k, moved.to(tl.float32), mask=exists)


_FOLD_BLOCK = 128
_MERGE_ROWS, _MERGE_BLOCK = 64, 32
_MERGE_STEPS = 8
"""Steps of one merging program: what takes more is shared, and the shares are merged again."""


def fold_batch_norm(
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and shift [K] in fp32, of a batch norm with running statistics that follows a convolution with `bias`."""
    K = running_mean.shape[0]
    scale, shift = (torch.empty(K, dtype=torch.float32, device=running_mean.device) for _ in range(2))
    arrays = [None if t is None else t.contiguous() for t in (bias, running_mean, running_var, bn_weight, bn_bias)]
    how = Launch(cdiv(K, _FOLD_BLOCK), {"eps": eps}, {"K": K, "BLOCK": _FOLD_BLOCK})
    launch(fold_kernel, how, *arrays, scale, shift)
    return scale, shift


def empty_parts(parts: int, K: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """counts [parts], means and m2s [parts, K] in fp32, for kernels to fill."""
    counts, means, m2s = (
        torch.empty(shape, dtype=torch.float32, device=like.device) for shape in ((parts,), (parts, K), (parts, K))
    )
    return counts, means, m2s


def merge(counts: torch.Tensor, means: torch.Tensor, m2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and M2 [K] in fp32 of all parts together."""
    parts, K = means.shape
    steps = cdiv(parts, _MERGE_ROWS)
    shares = cdiv(steps, _MERGE_STEPS)
    merged = empty_parts(shares, K, means)
    how = Launch(
        shares * cdiv(K, _MERGE_BLOCK),
        {"parts": parts, "steps": min(steps, _MERGE_STEPS)},
        {"K": K, "ROWS": _MERGE_ROWS, "BLOCK": _MERGE_BLOCK},
    )
    launch(merge_kernel, how, counts, means, m2s, *merged)
    return merge(*merged) if shares > 1 else (merged[1].view(K), merged[2].view(K))
