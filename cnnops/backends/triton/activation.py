"""The activations and their gradients, for the epilogues of other kernels and by themselves.

    dz = dy * activation'(z), read off `saved`: z for silu and hardswish, y = activation(z) for the others.

Layout     any: dy, saved and dz share one dense layout of `count` numbers.
Tile       numbers i ->
           +- a program: BLOCK = 1024 numbers ------------------------+-----
           | [thread's] [thread's] ..    8 a thread: registers        | next
           +----------------------------------------------------------+-----
Ownership  One program owns BLOCK consecutive numbers of dz.
Traffic    backward: dy, saved + dz, once each; forward: none, it is part of the kernels whose result it maps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cnnops.backends.triton.launch import Launch, cdiv, launch
from cnnops.backends.triton.tensors import dense_as
from cnnops.geometry import is_channels_last


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """activation(z) of fp32 values. NaN passes through, and relu keeps -0.0, as in torch."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        z = tl.where(z >= 3, z, z * tl.where(z < -3, 0.0, z + 3) / 6)
    elif ACTIVATION == "sigmoid":
        z = 1 / (1 + tl.exp(-z))
    return z


@triton.jit
def gradient(dy, saved, ACTIVATION: tl.constexpr):
    """The gradient of z, in fp32. A masked gradient is 0 whatever dy is, as in torch."""
    if ACTIVATION == "relu":
        dy = tl.where(saved <= 0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dy = tl.where((saved > 0) & (saved < 6), dy, 0.0)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-saved))
        dy = dy * s * (1 + saved * (1 - s))
    elif ACTIVATION == "hardswish":
        dy = tl.where(saved <= -3, 0.0, tl.where(saved >= 3, dy, dy * (saved / 3 + 0.5)))
    elif ACTIVATION == "sigmoid":
        dy = dy * (1 - saved) * saved
    return dy


@triton.jit(do_not_specialize=["count"])
def backward_kernel(dy, saved, dz, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    found = gradient(
        tl.load(dy + i, mask=mask).to(tl.float32), tl.load(saved + i, mask=mask).to(tl.float32), ACTIVATION
    )
    tl.store(dz + i, found.to(dz.dtype.element_ty), mask=mask)


_BLOCK = 1024
"""Eight elements a thread: a vector of 16 bytes in 16-bit types, two in fp32."""


def activation_backward(dy: torch.Tensor, saved: torch.Tensor, activation: str) -> torch.Tensor:
    """dz of dy and saved, both [N, C, ...]; fp32, fp16 or bf16. channels_last if saved is."""
    channels_last = is_channels_last(saved)
    dy, saved = dense_as(dy, channels_last), dense_as(saved, channels_last)
    dz = torch.empty_like(saved)
    if count := dz.numel():
        how = Launch(cdiv(count, _BLOCK), {"count": count}, {"ACTIVATION": activation, "BLOCK": _BLOCK})
        launch(backward_kernel, how, dy, saved, dz)
    return dz
