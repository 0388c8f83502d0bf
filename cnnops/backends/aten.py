"""torch's own kernels: the last row of the table, so that a valid call never fails because we lack a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PADDING_MODES, accumulation_dtype, is_channels_last
from . import YES, Support
from .native import Problem

NAME = "aten"
devices = ("cpu", "cuda")
named_only = False

aten = torch.ops.aten
_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


def usable() -> Support:
    """Always."""
    return YES


def supports(function: str, problem: Problem) -> Support:
    """Whatever torch does; what it does not, it says itself."""
    return YES


def function(name: str) -> Callable[..., Any]:
    """The function of this name in this module."""
    return globals()[name]


def activate(z: Tensor, activation: str) -> Tensor:
    """activation(z), elementwise."""
    return _ACTIVATE[activation](z)


def activation_gradient(z: Tensor, activation: str) -> Tensor:
    """d activation / dz at z, made of differentiable ops."""
    if activation == "none":
        return torch.ones_like(z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).to(z.dtype)
    s = torch.sigmoid(z)
    if activation == "sigmoid":
        return s * (1 - s)
    if activation == "silu":
        return s * (1 + z * (1 - s))
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    pad_mode: int,
) -> Tensor:
    x, pad = _padded(x, (pad_h, pad_w), pad_mode)
    return F.conv2d(x, weight, bias, (stride_h, stride_w), pad, (dilation_h, dilation_w), groups)


def _padded(x: Tensor, pad: tuple[int, int], pad_mode: int) -> tuple[Tensor, tuple[int, int]]:
    """x, and the padding that is left to the convolution, which knows zeros alone."""
    if PADDING_MODES[pad_mode] == "zeros":
        return x, pad
    return F.pad(x, (pad[1], pad[1], pad[0], pad[0]), PADDING_MODES[pad_mode]), (0, 0)


def _unpadded(dpadded: Tensor, x: Tensor, pad: tuple[int, int], mode: str) -> Tensor:
    """The gradient of x, given that of x padded: what each repetition of a row or a column got goes to the original."""
    for axis, width in ((2, pad[0]), (3, pad[1])):
        positions = torch.arange(x.shape[axis], dtype=torch.float64, device=x.device)[None, None]
        originals = F.pad(positions, (width, width), mode).long().flatten()
        sums = torch.zeros_like(dpadded.narrow(axis, 0, x.shape[axis]))
        dpadded = sums.index_add_(axis, originals, dpadded)
    return dpadded


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    pad_mode: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    padded, pad = _padded(x, (pad_h, pad_w), pad_mode)
    dx, dweight, dbias = aten.convolution_backward(
        dy,
        padded,
        weight,
        [weight.shape[0]],
        (stride_h, stride_w),
        pad,
        (dilation_h, dilation_w),
        False,
        (0, 0),
        groups,
        (need_dx, need_dweight, need_dbias),
    )
    if need_dx and padded is not x:
        dx = _unpadded(dx, x, (pad_h, pad_w), PADDING_MODES[pad_mode])
    return (dx if need_dx else None), (dweight if need_dweight else None), (dbias if need_dbias else None)


def conv_transpose2d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    stride, padding, output_padding, dilation, groups = _transposed(*geometry)
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _transposed(*geometry: int) -> tuple[Any, Any, Any, Any, int]:
    """stride, padding, output_padding, dilation and groups of a transposed convolution's nine ints."""
    return (*[geometry[i : i + 2] for i in range(0, 8, 2)], geometry[8])  # type: ignore[return-value]


def conv_transpose2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *geometry, need_dx, need_dweight, need_dbias = args
    stride, padding, output_padding, dilation, groups = _transposed(*geometry)
    dx, dweight, dbias = aten.convolution_backward(
        dy,
        x,
        weight,
        [weight.shape[1] * groups],
        stride,
        padding,
        dilation,
        True,
        output_padding,
        groups,
        (need_dx, need_dweight, need_dbias),
    )
    return (dx if need_dx else None), (dweight if need_dweight else None), (dbias if need_dbias else None)


def conv2d_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor | None]:
    *geometry, activation, need_z = args
    z = conv2d_forward(x, weight, bias, *geometry)
    if residual is not None:
        z = z + residual
    y = activate(z, activation)
    return (y.clone() if y is z else y), (z if need_z else None)


def conv2d_bn_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *args: Any,
) -> Tensor:
    *geometry, eps, activation = args
    z = conv2d_forward(x, weight, bias, *geometry)
    z = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, eps=eps)
    return activate(z if residual is None else z + residual, activation)


def activation_backward(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return dy * saved * (1 - saved)
    return dy * activation_gradient(saved, activation)


def _taps_to_plane(
    offsets: Tensor,
    H: int,
    W: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    p = torch.arange(offsets.shape[2], device=offsets.device)[:, None]
    q = torch.arange(offsets.shape[3], device=offsets.device)
    taps = offsets.long()
    h = p * stride_h - pad_h + taps // kernel_w * dilation_h
    w = q * stride_w - pad_w + taps % kernel_w * dilation_w
    return h.clamp(0, H - 1) * W + w.clamp(0, W - 1)


def max_pool2d_forward(
    x: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    ceil_mode: bool,
    need_offsets: bool,
) -> tuple[Tensor, Tensor | None]:
    y, indices = aten.max_pool2d_with_indices(
        x,
        (kernel_h, kernel_w),
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        ceil_mode,
    )
    if not need_offsets:
        return y, None
    p = torch.arange(y.shape[2], device=x.device)[:, None]
    q = torch.arange(y.shape[3], device=x.device)
    r = (indices // x.shape[3] - (p * stride_h - pad_h)) // dilation_h
    s = (indices % x.shape[3] - (q * stride_w - pad_w)) // dilation_w
    offsets = (r * kernel_w + s).to(torch.uint8 if kernel_h * kernel_w <= 256 else torch.int32)
    return y, offsets.contiguous(memory_format=torch.channels_last)


def _pooled(dy: Tensor, H: int, W: int, channels_last: bool) -> Tensor:
    """An input that dy may be the gradient of: torch's pool gradients take shape and layout from it, not values."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*dy.shape[:2], H, W), dtype=dy.dtype, device=dy.device, memory_format=layout)


def max_pool2d_backward(
    dy: Tensor, offsets: Tensor, H: int, W: int, channels_last: bool, kernel_h: int, kernel_w: int, *window: int
) -> Tensor:
    stride, pad, dilation = window[0:2], window[2:4], window[4:6]
    x = _pooled(dy, H, W, channels_last)
    indices = _taps_to_plane(offsets, H, W, kernel_w, *window)
    return aten.max_pool2d_with_indices_backward(dy, x, (kernel_h, kernel_w), stride, pad, dilation, False, indices)


def max_pool2d_indices(offsets: Tensor, H: int, W: int, kernel_h: int, kernel_w: int, *window: int) -> Tensor:
    return _taps_to_plane(offsets, H, W, kernel_w, *window)


def _windows(size: int, windows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each adaptive window begins along an axis, and how long it is."""
    at = torch.arange(windows, device=device)
    begin, end = at * size // max(windows, 1), ((at + 1) * size + windows - 1) // max(windows, 1)
    return begin, end - begin


def adaptive_max_pool2d_forward(x: Tensor, P: int, Q: int, need_offsets: bool) -> tuple[Tensor, Tensor | None]:
    y, indices = aten.adaptive_max_pool2d(x, (P, Q))
    if not need_offsets:
        return y, None
    (top, _), (left, width) = _windows(x.shape[2], P, x.device), _windows(x.shape[3], Q, x.device)
    offsets = (indices // x.shape[3] - top[:, None]) * width + indices % x.shape[3] - left
    return y, offsets.to(torch.int32).contiguous(memory_format=torch.channels_last)


def adaptive_max_pool2d_backward(dy: Tensor, offsets: Tensor, H: int, W: int, channels_last: bool) -> Tensor:
    x = _pooled(dy, H, W, channels_last)
    if dy.numel() == 0:
        return x.zero_()
    return aten.adaptive_max_pool2d_backward(dy, x, adaptive_max_pool2d_indices(offsets, H, W))


def adaptive_max_pool2d_indices(offsets: Tensor, H: int, W: int) -> Tensor:
    (top, _), (left, width) = (
        _windows(size, count, offsets.device) for size, count in zip((H, W), offsets.shape[2:], strict=True)
    )
    taps = offsets.long()
    return (top[:, None] + taps // width) * W + left + taps % width


def max_unpool2d_forward(x: Tensor, indices: Tensor, P: int, Q: int) -> Tensor:
    return aten.max_unpool2d(x, indices, (P, Q))


def max_unpool2d_backward(dy: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = dy.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
    return dx.contiguous(memory_format=layout)


def avg_pool2d_forward(
    x: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int,
) -> Tensor:
    return F.avg_pool2d(
        x,
        (kernel_h, kernel_w),
        (stride_h, stride_w),
        (pad_h, pad_w),
        ceil_mode,
        count_include_pad,
        divisor_override or None,
    )


def avg_pool2d_backward(
    dy: Tensor,
    H: int,
    W: int,
    channels_last: bool,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int,
) -> Tensor:
    x = _pooled(dy, H, W, channels_last)
    return aten.avg_pool2d_backward(
        dy,
        x,
        (kernel_h, kernel_w),
        (stride_h, stride_w),
        (pad_h, pad_w),
        ceil_mode,
        count_include_pad,
        divisor_override or None,
    )


def adaptive_avg_pool2d_forward(x: Tensor, P: int, Q: int) -> Tensor:
    return aten._adaptive_avg_pool2d(x, (P, Q))


def adaptive_avg_pool2d_backward(dy: Tensor, H: int, W: int, channels_last: bool) -> Tensor:
    x = _pooled(dy, H, W, channels_last)
    return aten._adaptive_avg_pool2d_backward(dy, x)


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, rstd = aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if not training:
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean.float(), (running_var.float() + eps).rsqrt()
    if residual is not None:
        z = z + residual
    return activate(z, activation), mean, rstd


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    activation: str,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dresidual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if y is not None:
        dz = activation_backward(dy, y, activation)
    else:
        z = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
        if weight is not None:
            z = z * _per_channel(weight, x)
        if bias is not None:
            z = z + _per_channel(bias, x)
        dz = dy * activation_gradient(z if residual is None else z + residual, activation).to(dy.dtype)
    variance = rstd.square().reciprocal() - eps
    dx, dweight, dbias = aten.native_batch_norm_backward(
        dz, x, weight, mean, variance, mean, rstd, training, eps, (need_dx, need_dweight, need_dbias)
    )
    return (
        dx if need_dx else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        dz if need_dresidual else None,
    )


def bn_act_max_pool2d_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    *window: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    activated, mean, rstd = batch_norm_act_forward(
        x, weight, bias, None, running_mean, running_var, training, momentum, eps, activation
    )
    y, offsets = max_pool2d_forward(activated, *window)
    tap = torch.uint8 if window[0] * window[1] <= 256 else torch.int32
    return y, mean, rstd, x.new_empty(0, dtype=tap) if offsets is None else offsets


def bn_act_max_pool2d_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    activation: str,
    *window_and_needs: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *window, need_dx, need_dweight, need_dbias = window_and_needs
    through = max_pool2d_backward(dy, offsets, *x.shape[2:], is_channels_last(x), *window)
    needs = need_dx, need_dweight, need_dbias, False
    dx, dweight, dbias, _ = batch_norm_act_backward(
        through, x, weight, bias, None, None, mean, rstd, training, eps, activation, *needs
    )
    return dx, dweight, dbias


def squeeze_excite_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    pooled = x.mean((2, 3), dtype=wide)
    hidden = F.linear(pooled, weight1.to(wide).flatten(1), None if bias1 is None else bias1.to(wide))
    gated = F.linear(
        activate(hidden, activation), weight2.to(wide).flatten(1), None if bias2 is None else bias2.to(wide)
    )
    scale = torch.sigmoid(gated) if gate == "sigmoid" else F.relu6(gated + 3) / 6
    return (x * scale[:, :, None, None]).to(x.dtype), pooled, hidden, scale


def squeeze_excite_backward(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    pooled: Tensor,
    hidden: Tensor,
    scale: Tensor,
    activation: str,
    gate: str,
    need_dx: bool,
    need_dweight1: bool,
    need_dbias1: bool,
    need_dweight2: bool,
    need_dbias2: bool,
) -> tuple[Tensor | None, ...]:
    """Made of differentiable ops, like `squeeze_excite_forward`: the second derivative is made of these two."""
    wide = scale.dtype
    slope = scale * (1 - scale) if gate == "sigmoid" else ((scale > 0) & (scale < 1)).to(wide) / 6
    dgated = (dy.to(wide) * x).sum((2, 3)) * slope
    dhidden = dgated @ weight2.to(wide).flatten(1) * activation_gradient(hidden, activation)
    dpooled = dhidden @ weight1.to(wide).flatten(1) / (x.shape[2] * x.shape[3])
    dx = dy * scale[:, :, None, None] + dpooled[:, :, None, None]
    dweight1, dweight2 = dhidden.T @ pooled, dgated.T @ activate(hidden, activation)
    return (
        dx.to(x.dtype) if need_dx else None,
        dweight1.view(weight1.shape).to(weight1.dtype) if need_dweight1 else None,
        dhidden.sum(0).to(x.dtype) if need_dbias1 else None,
        dweight2.view(weight2.shape).to(weight2.dtype) if need_dweight2 else None,
        dgated.sum(0).to(x.dtype) if need_dbias2 else None,
    )
