"""Frozen problem descriptions and the one output-size rule.

A problem says all that a backend needs to decide whether it can do a call: extents, geometry, dtype, device, layout.
Building one checks the call; a bad call raises the exception type that torch raises for it, before any kernel starts.
Extents are in torch order and in the field's letters: ``N C H W`` input, ``K R S`` filters and taps, ``P Q`` output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "sigmoid")
"""Activations that the fused ops know."""

ACTIVATIONS_FROM_INPUT = ("silu", "hardswish")
"""Activations whose derivative cannot be read off their output."""

GATES = ("sigmoid", "hardsigmoid")
"""What squeeze and excitation may bound its scale by; hardsigmoid is relu6(z + 3) / 6."""

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
"""What a convolution reads beside its input, as in ``torch.nn.Conv2d(padding_mode=...)``."""

_PAD_AT_MOST: dict[str, Callable[[int], float]] = {
    "zeros": lambda size: math.inf,
    "reflect": lambda size: size - 1,
    "replicate": lambda size: math.inf,
    "circular": lambda size: size,
}


def output_size(size: int, kernel: int, stride: int = 1, pad: int = 0, dilation: int = 1, *, ceil: bool = False) -> int:
    """Output extent of a sliding window: ``floor((size + 2 pad - dilation (kernel - 1) - 1) / stride) + 1``.

    ceil: round up instead, but never start a window beyond the input and its left padding (torch's ``ceil_mode``).
    """
    reach = size + 2 * pad - dilation * (kernel - 1) - 1
    if not ceil:
        return reach // stride + 1
    out = -(-reach // stride) + 1
    return out - 1 if (out - 1) * stride >= size + pad else out


def transposed_output_size(
    size: int, kernel: int, stride: int = 1, pad: int = 0, output_pad: int = 0, dilation: int = 1
) -> int:
    """Output extent of a transposed convolution: the least that a convolution makes `size` of, plus output_pad.

    ``(size - 1) stride - 2 pad + dilation (kernel - 1) + output_pad + 1``.
    """
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + output_pad + 1


def is_channels_last(t: Tensor) -> bool:
    """torch's layout rule, by strides alone: channels innermost, then W, H, N.

    A one-channel map counts if its strides say so. Anything but a 4-d tensor is not channels_last.
    """
    if t.dim() != 4:
        return False
    (N, C, H, W), (image, channel, row, column) = t.shape, t.stride()
    # Of single values in a row, torch decides on the dense copy that it makes, whose strides are all 1.
    if channel == 0 or (N > 1 and C == 1 and H == 1 and W == 1):
        return False
    least = 0
    for size, stride in ((C, channel), (W, column), (H, row)):
        if size == 0 or stride < least:
            return False
        least = stride * size if size > 1 else stride
    return not (N == 0 or image < least or least == channel)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` are made in, and the statistics that come of them are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _text(sizes: Sequence[int]) -> str:
    return str(list(sizes))


def _check_pairs(name: str, groups: int, **pairs: tuple[int, int]) -> None:
    """Raise RuntimeError unless groups, strides and dilations are at least 1, and paddings not negative."""
    for argument, (a, b) in pairs.items():
        least = 0 if "padding" in argument else 1
        if a < least or b < least:
            wanted = "at least 1" if least else "not negative"
            raise RuntimeError(f"{name}: {argument} must be {wanted}, but got {argument}={(a, b)}")
    if groups < 1:
        raise RuntimeError(f"{name}: groups must be at least 1, but got groups={groups}")


def _check_operands(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, filters: int) -> None:
    """Raise RuntimeError unless weight and bias [filters] have x's dtype and device; of a meta x torch asks no device."""
    if x.dtype != weight.dtype:
        raise RuntimeError(f"{name}: input and weight must have the same dtype, but got {x.dtype} and {weight.dtype}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != filters:
            raise RuntimeError(
                f"{name}: expected bias of shape [{filters}] (one per filter), but got {_text(bias.shape)}"
            )
        if bias.dtype != x.dtype:
            raise RuntimeError(f"{name}: input and bias must have the same dtype, but got {x.dtype} and {bias.dtype}")
    for other, argument in ((weight, "weight"), (bias, "bias")):
        if other is not None and other.device != x.device and not x.is_meta:
            raise RuntimeError(f"{name}: {argument} is on {other.device}, but input is on {x.device}")


@dataclass(frozen=True)
class Conv2dProblem:
    """y[n,k,p,q] = sum over (c,r,s) of x[n, c, p*stride_h - pad_h + r*dilation_h, ...] * weight[k,c,r,s]."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    pad_mode: str
    dtype: torch.dtype
    device: str
    channels_last: bool
    """The layout of the output: channels_last if x or the weight is."""

    @property
    def P(self) -> int:
        return output_size(self.H, self.R, self.stride_h, self.pad_h, self.dilation_h)

    @property
    def Q(self) -> int:
        return output_size(self.W, self.S, self.stride_w, self.pad_w, self.dilation_w)

    @classmethod
    def of(
        cls,
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
        pad_mode: int = 0,
    ) -> Conv2dProblem:
        """Check a call and describe it. x: [N, C, H, W]; weight: [K, C/groups, R, S]; bias: [K] or None; pad_mode: a
        place in `PADDING_MODES`."""
        if x.dim() != 4:
            raise RuntimeError(f"conv2d: expected input of 4 dimensions [N, C, H, W], but got {_text(x.shape)}")
        if weight.dim() != 4:
            raise RuntimeError(
                f"conv2d: expected weight of 4 dimensions [K, C/groups, R, S], but got {_text(weight.shape)}"
            )
        _check_pairs(
            "conv2d",
            groups,
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            dilation=(dilation_h, dilation_w),
        )
        K, channels, R, S = weight.shape
        if K < 1 or R < 1 or S < 1:
            raise RuntimeError(
                f"conv2d: weight must have at least one filter and one tap, but got {_text(weight.shape)}"
            )
        if K % groups:
            raise RuntimeError(
                f"conv2d: weight's {K} filters cannot be divided by groups={groups} (weight of {_text(weight.shape)})"
            )
        N, C, H, W = x.shape
        if channels * groups != C:
            raise RuntimeError(
                f"conv2d: with groups={groups} and weight of {_text(weight.shape)}, expected input to have "
                f"{channels * groups} channels, but got {C} (input of {_text(x.shape)})"
            )
        _check_operands("conv2d", x, weight, bias, K)
        taller, wider = dilation_h * (R - 1) + 1 > H + 2 * pad_h, dilation_w * (S - 1) + 1 > W + 2 * pad_w
        if taller or wider:
            raise RuntimeError(
                f"conv2d: the kernel, {dilation_h * (R - 1) + 1} x {dilation_w * (S - 1) + 1} with its dilation, is larger "
                f"than the padded input, {H + 2 * pad_h} x {W + 2 * pad_w}"
            )
        mode = PADDING_MODES[pad_mode]
        for axis, pad, size in (("height", pad_h, H), ("width", pad_w, W)):
            if pad > _PAD_AT_MOST[mode](size):
                raise RuntimeError(
                    f"conv2d: padding_mode={mode!r} can pad a {axis} of {size} by at most {_PAD_AT_MOST[mode](size)}, "
                    f"but got padding={(pad_h, pad_w)}"
                )
        if N and C and (H < 1 or W < 1):
            raise RuntimeError(f"conv2d: expected input with at least one row and column, but got {_text(x.shape)}")
        return cls(
            N,
            C,
            H,
            W,
            K,
            R,
            S,
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dilation_h,
            dilation_w,
            groups,
            mode,
            x.dtype,
            x.device.type,
            is_channels_last(x) or is_channels_last(weight),
        )


@dataclass(frozen=True)
class ConvTranspose2dProblem:
    """y[n,k,p,q] = sum of x[n,c,h,w] * weight[c,k,r,s] over the (c,r,s,h,w) with h*stride_h - pad_h + r*dilation_h = p
    and so for q: the gradient of a convolution from y to x. K counts all groups' filters."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    output_pad_h: int
    output_pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    dtype: torch.dtype
    device: str
    channels_last: bool
    """The layout of the output: channels_last if x or the weight is."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        output_pad_h: int,
        output_pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
    ) -> ConvTranspose2dProblem:
        """Check a call and describe it. x: [N, C, H, W]; weight: [C, K/groups, R, S]; bias: [K] or None."""
        name = "conv_transpose2d"
        if x.dim() != 4:
            raise RuntimeError(f"{name}: expected input of 4 dimensions [N, C, H, W], but got {_text(x.shape)}")
        if weight.dim() != 4:
            raise RuntimeError(
                f"{name}: expected weight of 4 dimensions [C, K/groups, R, S], but got {_text(weight.shape)}"
            )
        _check_pairs(
            name,
            groups,
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            output_padding=(output_pad_h, output_pad_w),
            dilation=(dilation_h, dilation_w),
        )
        if output_pad_h >= max(stride_h, dilation_h) or output_pad_w >= max(stride_w, dilation_w):
            raise RuntimeError(
                f"{name}: output_padding must be smaller than stride or dilation, but got "
                f"output_padding={(output_pad_h, output_pad_w)}, stride={(stride_h, stride_w)} and "
                f"dilation={(dilation_h, dilation_w)}"
            )
        channels, filters, R, S = weight.shape
        if channels < 1 or filters < 1 or R < 1 or S < 1:
            raise RuntimeError(
                f"{name}: weight must have at least one channel, filter and tap, but got {_text(weight.shape)}"
            )
        if channels % groups:
            raise RuntimeError(
                f"{name}: weight's {channels} channels cannot be divided by groups={groups} "
                f"(weight of {_text(weight.shape)})"
            )
        N, C, H, W = x.shape
        if channels != C:
            raise RuntimeError(
                f"{name}: with weight of {_text(weight.shape)}, expected input to have {channels} channels, but got {C} "
                f"(input of {_text(x.shape)})"
            )
        K = filters * groups
        _check_operands(name, x, weight, bias, K)
        if H < 1 or W < 1:
            raise RuntimeError(f"{name}: expected input with at least one row and column, but got {_text(x.shape)}")
        P = transposed_output_size(H, R, stride_h, pad_h, output_pad_h, dilation_h)
        Q = transposed_output_size(W, S, stride_w, pad_w, output_pad_w, dilation_w)
        if P < 0 or Q < 0:
            raise RuntimeError(
                f"{name}: the output would be {P} x {Q}: padding={(pad_h, pad_w)} takes more than input {H} x {W} gives"
            )
        return cls(
            N,
            C,
            H,
            W,
            K,
            R,
            S,
            P,
            Q,
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            output_pad_h,
            output_pad_w,
            dilation_h,
            dilation_w,
            groups,
            x.dtype,
            x.device.type,
            is_channels_last(x) or is_channels_last(weight),
        )


@dataclass(frozen=True)
class Pool2dProblem:
    """Windows of R x S taps over x [N, C, H, W], giving [N, C, P, Q]. Adaptive pools and unpooling have no window
    (R = S = 0)."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    dtype: torch.dtype
    device: str
    channels_last: bool

    @classmethod
    def of(
        cls,
        name: str,
        x: Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int = 1,
        dilation_w: int = 1,
        ceil_mode: bool = False,
    ) -> Pool2dProblem:
        """Check a call of the pool `name` and describe it. x: [N, C, H, W]."""
        if x.dim() != 4:
            missing_axis = name == "avg_pool2d" and x.dim() < 4  # which torch looks up before it counts the axes
            kind = IndexError if missing_axis else RuntimeError
            raise kind(f"{name}: expected input of 3 or 4 dimensions, but got {_text(x.shape)}")
        N, C, H, W = x.shape
        if C < 1 or H < 1 or W < 1:
            raise RuntimeError(f"{name}: only the batch may be empty, but got input of {_text(x.shape)}")
        for argument, (a, b) in (
            ("kernel_size", (kernel_h, kernel_w)),
            ("stride", (stride_h, stride_w)),
            ("dilation", (dilation_h, dilation_w)),
        ):
            if a < 1 or b < 1:
                raise RuntimeError(f"{name}: {argument} must be at least 1, but got {argument}={(a, b)}")
        if pad_h < 0 or pad_w < 0 or pad_h > kernel_h // 2 or pad_w > kernel_w // 2:
            raise RuntimeError(
                f"{name}: padding must be between 0 and half of kernel_size={(kernel_h, kernel_w)}, "
                f"but got padding={(pad_h, pad_w)}"
            )
        P = output_size(H, kernel_h, stride_h, pad_h, dilation_h, ceil=ceil_mode)
        Q = output_size(W, kernel_w, stride_w, pad_w, dilation_w, ceil=ceil_mode)
        if P < 1 or Q < 1:
            raise RuntimeError(
                f"{name}: a window of {dilation_h * (kernel_h - 1) + 1} x {dilation_w * (kernel_w - 1) + 1} leaves no output "
                f"of input {H} x {W} with padding={(pad_h, pad_w)}"
            )
        return cls(
            N,
            C,
            H,
            W,
            kernel_h,
            kernel_w,
            P,
            Q,
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dilation_h,
            dilation_w,
            x.dtype,
            x.device.type,
            is_channels_last(x),
        )

    @classmethod
    def adaptive(cls, name: str, x: Tensor, P: int, Q: int, *, least_channels: int = 0) -> Pool2dProblem:
        """Check a call of the adaptive pool `name` and describe it. x: [N, C, H, W], C at least `least_channels`."""
        if x.dim() != 4:
            raise RuntimeError(f"{name}: expected input of 3 or 4 dimensions, but got {_text(x.shape)}")
        N, C, H, W = x.shape
        if H < 1 or W < 1:
            raise RuntimeError(f"{name}: expected input with at least one row and column, but got {_text(x.shape)}")
        if least_channels > C:
            raise RuntimeError(f"{name}: only the batch may be empty, but got input of {_text(x.shape)}")
        if P < 0 or Q < 0:
            raise RuntimeError(f"{name}: output_size must not be negative, but got output_size={(P, Q)}")
        return cls(N, C, H, W, 0, 0, P, Q, 0, 0, 0, 0, 0, 0, x.dtype, x.device.type, is_channels_last(x))

    @classmethod
    def unpooling(cls, x: Tensor, indices: Tensor, P: int, Q: int) -> Pool2dProblem:
        """Check a call of max_unpool2d and describe it. x: [N, C, H, W]; indices: like x, int64 positions in P x Q."""
        if x.dim() != 4:
            raise RuntimeError(f"max_unpool2d: expected input of 3 or 4 dimensions, but got {_text(x.shape)}")
        if indices.dtype != torch.int64:
            raise RuntimeError(f"max_unpool2d: expected indices of dtype torch.int64, but got {indices.dtype}")
        if indices.shape != x.shape:
            raise RuntimeError(
                f"max_unpool2d: expected indices of input's shape {_text(x.shape)}, but got {_text(indices.shape)}"
            )
        if indices.device != x.device:
            raise RuntimeError(f"max_unpool2d: indices are on {indices.device}, but input is on {x.device}")
        N, C, H, W = x.shape
        if C < 1 or H < 1 or W < 1:
            raise RuntimeError(f"max_unpool2d: only the batch may be empty, but got input of {_text(x.shape)}")
        if P < 0 or Q < 0:
            raise ValueError(f"max_unpool2d: output_size must not be negative, but got output_size={(P, Q)}")
        return cls(N, C, H, W, 0, 0, P, Q, 0, 0, 0, 0, 0, 0, x.dtype, x.device.type, is_channels_last(x))


@dataclass(frozen=True)
class NormProblem:
    """Per-channel statistics of x [N, C, ...] over the batch and all L positions."""

    N: int
    C: int
    L: int
    training: bool
    activation: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    device: str
    channels_last: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
        activation: str,
    ) -> NormProblem:
        """Check a call of batch_norm_act and describe it. x: [N, C, ...]; the rest: [C] or None; residual like x."""
        if x.dim() < 2:
            raise RuntimeError(
                f"batch_norm: expected input of at least 2 dimensions [N, C, ...], but got {_text(x.shape)}"
            )
        N, C = x.shape[:2]
        L = 1
        for extent in x.shape[2:]:
            L *= extent
        if not training and (running_mean is None or running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"batch_norm: {missing} must be given when training=False, but got None")
        if (running_mean is None) != (running_var is None):
            raise ValueError("batch_norm: running_mean and running_var must be given together, but only one was")
        params = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
        given = {name: t for name, t in params.items() if t is not None}
        param_dtype = next((t.dtype for t in given.values()), x.dtype)
        for name, t in given.items():
            if t.dim() != 1 or t.shape[0] != C:
                raise RuntimeError(
                    f"batch_norm: expected {name} of shape [{C}] (one per channel), but got {_text(t.shape)}"
                )
            if t.device != x.device:
                raise RuntimeError(f"batch_norm: {name} is on {t.device}, but input is on {x.device}")
            if t.dtype not in (x.dtype, torch.float32):
                wanted = " or ".join(dict.fromkeys((str(x.dtype), "torch.float32")))
                raise RuntimeError(f"batch_norm: expected {name} of dtype {wanted}, but got {t.dtype}")
            if t.dtype != param_dtype:
                raise RuntimeError(
                    f"batch_norm: expected {name} of the dtype of {next(iter(given))}, {param_dtype}, but got {t.dtype}"
                )
        if training and eps <= 0:
            raise ValueError(f"batch_norm: eps must be positive during training, but got eps={eps}")
        if training and N * L == 1:
            raise ValueError(
                f"batch_norm: expected more than 1 value per channel when training, but got input of {_text(x.shape)}"
            )
        check_activation("batch_norm_act", activation)
        if residual is not None:
            check_residual("batch_norm_act", residual, x.shape, x)
        return cls(N, C, L, training, activation, x.dtype, param_dtype, x.device.type, is_channels_last(x))


def pad_mode_of(name: str, padding_mode: str) -> int:
    """The place of `padding_mode` in `PADDING_MODES`. Raises ValueError for another."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{name}: padding_mode must be one of {', '.join(PADDING_MODES)}, but got padding_mode={padding_mode!r}"
        )
    return PADDING_MODES.index(padding_mode)


@dataclass(frozen=True)
class NormPool2dProblem:
    """Batch norm and an activation, then the maximum over windows of the result."""

    norm: NormProblem
    pool: Pool2dProblem

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> str:
        return self.pool.device


@dataclass(frozen=True)
class SqueezeExciteProblem:
    """x [N, C, H, W], of L = H W positions, scaled per channel by what M hidden channels make of its means."""

    N: int
    C: int
    L: int
    M: int
    activation: str
    gate: str
    dtype: torch.dtype
    device: str
    channels_last: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: str,
        gate: str,
    ) -> SqueezeExciteProblem:
        """Check a call and describe it. x: [N, C, H, W]; weight1: [M, C], weight2: [C, M], or as filters of one tap;
        bias1: [M], bias2: [C], or None."""
        if x.dim() != 4:
            raise RuntimeError(f"squeeze_excite: expected input of 4 dimensions [N, C, H, W], but got {_text(x.shape)}")
        N, C, H, W = x.shape
        if C < 1 or H < 1 or W < 1:
            raise RuntimeError(f"squeeze_excite: only the batch may be empty, but got input of {_text(x.shape)}")
        M = weight1.shape[0] if weight1.dim() else 0
        for name, weight, shape, wanted in (
            ("weight1", weight1, [M, C], f"[M, {C}]"),
            ("weight2", weight2, [C, M], f"[{C}, {M}]"),
        ):
            if M < 1 or list(weight.shape) not in (shape, [*shape, 1, 1]):
                raise RuntimeError(
                    f"squeeze_excite: expected {name} of shape {wanted} or the same with [.., 1, 1], "
                    f"but got {_text(weight.shape)} (input of {_text(x.shape)}, weight1 of {_text(weight1.shape)})"
                )
        for name, bias, size in (("bias1", bias1, M), ("bias2", bias2, C)):
            if bias is not None and list(bias.shape) != [size]:
                raise RuntimeError(f"squeeze_excite: expected {name} of shape [{size}], but got {_text(bias.shape)}")
        for name, t in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
            if t is not None and t.dtype != x.dtype:
                raise RuntimeError(
                    f"squeeze_excite: input and {name} must have the same dtype, but got {x.dtype} and {t.dtype}"
                )
            if t is not None and t.device != x.device:
                raise RuntimeError(f"squeeze_excite: {name} is on {t.device}, but input is on {x.device}")
        check_activation("squeeze_excite", activation)
        check_gate("squeeze_excite", gate)
        return cls(N, C, H * W, M, activation, gate, x.dtype, x.device.type, is_channels_last(x))


def check_gate(name: str, gate: str) -> None:
    """Raise ValueError unless squeeze and excitation knows `gate`."""
    if gate not in GATES:
        raise ValueError(f"{name}: gate must be one of {', '.join(GATES)}, but got gate={gate!r}")


def check_activation(name: str, activation: str) -> None:
    """Raise ValueError unless the fused ops know `activation`."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, but got activation={activation!r}"
        )


def check_residual(name: str, residual: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """Raise RuntimeError unless `residual` can be added to an output of `shape` and of x's dtype and device."""
    if list(residual.shape) != list(shape):
        raise RuntimeError(f"{name}: expected residual of shape {_text(shape)}, but got {_text(residual.shape)}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise RuntimeError(
            f"{name}: expected residual of {x.dtype} on {x.device}, but got {residual.dtype} on {residual.device}"
        )
