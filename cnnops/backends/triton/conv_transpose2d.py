"""Transposed 2-d convolution, NHWC: the gradient of a convolution from y to x, and what follows from that.

    y[n,p,q,k]       = bias[k] + sum over (r,s,c) with h*stride_h = p + pad_h - r*dilation_h of x[n,h,w,c] * weight[c,r,s,k]
    dx[n,h,w,c]      = sum over (r,s,k) of dy[n, h*stride_h - pad_h + r*dilation_h, ..., k] * weight[c,r,s,k]
    dweight[c,r,s,k] = sum over (n,h,w) of x[n,h,w,c] * dy[n, h*stride_h - pad_h + r*dilation_h, ..., k]
    dbias[k]         = sum over (n,p,q) of dy[n,p,q,k]

Layout     x, dx [N,H,W,C]; weight, dweight [C,R,S,K/groups]; y, dy [N,P,Q,K]; all dense.
Ownership  conv2d's: forward is its backward_input, which adds the bias; backward is its forward, of dy, and its
           backward_weight, with x and dy in each other's place. Nothing is atomic.
Traffic    forward: x once for each tap and each block of filters (mostly from L2), weight once for each block of pixels,
           y once. backward the same with dy for x; for dweight, x once for each tap's tile.
"""

from __future__ import annotations

import torch

from cnnops.backends.triton.conv2d import Epilogue, backward_bias, backward_input, backward_weight, convolve
from cnnops.backends.triton.conv2d_plan import Adjoint
from cnnops.geometry import ConvTranspose2dProblem


def conv_transpose2d_forward(x, weight, bias, *geometry: int) -> torch.Tensor:
    """y [N, K, P, Q] of x [N, C, H, W], weight [C, K/groups, R, S], bias [K] or None; fp32, fp16 or bf16.

    geometry: stride_h, stride_w, pad_h, pad_w, output_pad_h, output_pad_w, dilation_h, dilation_w, groups. channels_last
    if x or the weight is.
    """
    problem = Adjoint.to(ConvTranspose2dProblem.of(x, weight, bias, *geometry))
    return backward_input(problem, x, weight, bias)


def conv_transpose2d_backward(
    dy, x, weight, *args
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients asked for, None for the others, of dy [N, K, P, Q], x [N, C, H, W] and weight [C, K/groups, R, S].

    args: geometry, need_dx, need_dweight, need_dbias. dx is channels_last if x or the weight is; dweight if the weight
    is.
    """
    *geometry, need_dx, need_dweight, need_dbias = args
    problem = Adjoint.to(ConvTranspose2dProblem.of(x, weight, None, *geometry))
    dx = dweight = None
    if need_dx and dy.numel():
        dx = convolve(problem, dy, weight, Epilogue()).y
    elif need_dx:
        dx = torch.zeros_like(x)
    if need_dweight:
        dweight = backward_weight(problem, x, dy, weight)
    return dx, dweight, (backward_bias(dy) if need_dbias else None)
