"""Maximum and average pooling, over sliding and adaptive windows, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import Pool2dProblem, is_channels_last
from .batching import along
from .registry import Function, empty, register

WINDOW = "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w"
MAX_POOL = f"{WINDOW}, int dilation_h, int dilation_w"
AVG_POOL = f"{WINDOW}, bool ceil_mode, bool count_include_pad, int divisor_override"


class MaxPool2d(Function):
    """Keeps where each maximum was, as offsets inside the window."""

    @staticmethod
    def forward(run: Any, x: Tensor, *args: Any) -> Any:
        *window, ceil_mode, _, backend = args
        return run(x, *window, ceil_mode, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, *window, _, _, backend = inputs
        ctx.args = (*x.shape[2:], is_channels_last(x), *window, backend)
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        dx = None if dy is None else max_pool2d_backward(dy, *ctx.saved_tensors, *ctx.args)
        return (None, dx, *[None] * 11)

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Tensor, *__: Any) -> Any:
        H, W, _, *window = ctx.args
        return at_maxima(tx, *ctx.saved_tensors, H, W, *window), None


class MaxPool2dBackward(Function):
    """Scatters dy to the maxima; so its gradient gathers from there."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, offsets, H, W, channels_last, *window, backend = inputs
        ctx.args = (H, W, *window, backend)
        ctx.channels_last = channels_last
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        return (None, at_maxima(ddx, *ctx.saved_tensors, *ctx.args), *[None] * 13)

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor, *__: Any) -> Any:
        H, W, *rest = ctx.args
        return max_pool2d_backward(tdy, *ctx.saved_tensors, H, W, ctx.channels_last, *rest)


def at_maxima(x: Tensor, offsets: Tensor, H: int, W: int, *window_and_backend: Any) -> Tensor:
    """The elements of x where the maxima were; zeros for windows that have none."""
    *window, _ = window_and_backend
    found = _gather(x, max_pool2d_indices(offsets, H, W, *window_and_backend))
    return torch.zeros_like(found) if _tapless(H, W, *window) else found


def _tapless(H: int, W: int, *window: int) -> bool:
    """Whether no window has a tap inside the input: along one axis there is one window, which begins in the padding and
    steps over the input. Where a second one fits, both have a tap inside."""
    _, _, _, _, pad_h, pad_w, dilation_h, dilation_w = window
    return -pad_h % dilation_h >= H or -pad_w % dilation_w >= W


class AdaptiveMaxPool2d(Function):
    """Keeps where each maximum was, as offsets inside its window."""

    @staticmethod
    def forward(run: Any, x: Tensor, *args: Any) -> Any:
        P, Q, _, backend = args
        return run(x, P, Q, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, *_, backend = inputs
        ctx.args = (*x.shape[2:], is_channels_last(x), backend)
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        dx = None if dy is None else adaptive_max_pool2d_backward(dy, *ctx.saved_tensors, *ctx.args)
        return None, dx, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Tensor, *__: Any) -> Any:
        H, W, _, backend = ctx.args
        return _gather(tx, adaptive_max_pool2d_indices(*ctx.saved_tensors, H, W, backend)), None


class AdaptiveMaxPool2dBackward(Function):
    """Scatters dy to the maxima; so its gradient gathers from there."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, offsets, *ctx.args = inputs
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        H, W, _, backend = ctx.args
        indices = adaptive_max_pool2d_indices(*ctx.saved_tensors, H, W, backend)
        return None, _gather(ddx, indices), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor, *__: Any) -> Any:
        return adaptive_max_pool2d_backward(tdy, *ctx.saved_tensors, *ctx.args)


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """The elements of each plane of x at flat positions in it."""
    return x.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


class AvgPool2d(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, *args = inputs
        ctx.args = (*x.shape[2:], is_channels_last(x), *args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return (None, avg_pool2d_backward(dy, *ctx.args), *[None] * 10)

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Tensor, *__: Any) -> Any:
        return avg_pool2d(tx, *ctx.args[3:])


class AvgPool2dBackward(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, *ctx.args = inputs

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        return (None, avg_pool2d(ddx, *ctx.args[3:]), *[None] * 13)

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor, *__: Any) -> Any:
        return avg_pool2d_backward(tdy, *ctx.args)


class AdaptiveAvgPool2d(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, *ctx.output_size, backend = inputs
        ctx.args = (*x.shape[2:], is_channels_last(x), backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, adaptive_avg_pool2d_backward(dy, *ctx.args), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Tensor, *__: Any) -> Any:
        return adaptive_avg_pool2d(tx, *ctx.output_size, ctx.args[-1])


class AdaptiveAvgPool2dBackward(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, *ctx.args = inputs
        ctx.output_size = dy.shape[2:]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        return None, adaptive_avg_pool2d(ddx, *ctx.output_size, ctx.args[-1]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor, *__: Any) -> Any:
        return adaptive_avg_pool2d_backward(tdy, *ctx.args)


def _describe_max(x: Tensor, *args: Any) -> Pool2dProblem:
    return Pool2dProblem.of("max_pool2d", x, *args[:9])


def _describe_avg(x: Tensor, *args: Any) -> Pool2dProblem:
    return Pool2dProblem.of("avg_pool2d", x, *_six(args[:6]), 1, 1, args[6])


def _describe_adaptive(x: Tensor, P: int, Q: int, *_: Any) -> Pool2dProblem:
    return Pool2dProblem.adaptive("adaptive_avg_pool2d", x, P, Q)


def _six(v: Any) -> tuple[int, int, int, int, int, int]:
    return tuple(v)


def _of_gradient(name: str, dy: Tensor, H: int, W: int, channels_last: bool, window: Any) -> Pool2dProblem:
    if dy.dim() != 4:
        raise RuntimeError(f"{name}: expected dy of 4 dimensions [N, C, P, Q], but got {list(dy.shape)}")
    N, C, P, Q = dy.shape
    R, S, *geometry = window
    return Pool2dProblem(N, C, H, W, R, S, P, Q, *_six(geometry), dy.dtype, dy.device.type, channels_last)


def offset_dtype(R: int, S: int) -> torch.dtype:
    """What a maximum's tap in an R x S window is kept in."""
    return torch.uint8 if R * S <= 256 else torch.int32


def _describe_max_backward(dy: Tensor, offsets: Tensor, H: int, W: int, channels_last: bool, *args: Any) -> Any:
    dtype = offset_dtype(args[0], args[1])
    if offsets.dtype != dtype:
        raise RuntimeError(f"max_pool2d_backward: expected offsets of dtype {dtype}, but got {offsets.dtype}")
    if dy.shape != offsets.shape:
        raise RuntimeError(
            f"max_pool2d_backward: expected dy like offsets, {list(offsets.shape)}, but got {list(dy.shape)}"
        )
    return _of_gradient("max_pool2d_backward", dy, H, W, channels_last, args[:8])


def _describe_max_indices(offsets: Tensor, H: int, W: int, *args: Any) -> Pool2dProblem:
    N, C, P, Q = offsets.shape
    R, S, *geometry = args[:8]
    return Pool2dProblem(N, C, H, W, R, S, P, Q, *_six(geometry), torch.float32, offsets.device.type, True)


def _describe_adaptive_max(x: Tensor, P: int, Q: int, *_: Any) -> Pool2dProblem:
    return Pool2dProblem.adaptive("adaptive_max_pool2d", x, P, Q, least_channels=1)


def _describe_adaptive_max_backward(dy: Tensor, offsets: Tensor, H: int, W: int, channels_last: bool, *_: Any) -> Any:
    if offsets.dtype != torch.int32:
        raise RuntimeError(
            f"adaptive_max_pool2d_backward: expected offsets of dtype torch.int32, but got {offsets.dtype}"
        )
    if dy.shape != offsets.shape:
        raise RuntimeError(
            f"adaptive_max_pool2d_backward: expected dy like offsets, {list(offsets.shape)}, but got {list(dy.shape)}"
        )
    return _of_gradient("adaptive_max_pool2d_backward", dy, H, W, channels_last, (0,) * 8)


def _describe_adaptive_max_indices(offsets: Tensor, H: int, W: int, *_: Any) -> Pool2dProblem:
    return _describe_max_indices(offsets, H, W, *(0,) * 8)


def _describe_avg_backward(dy: Tensor, H: int, W: int, channels_last: bool, *args: Any) -> Pool2dProblem:
    return _of_gradient("avg_pool2d_backward", dy, H, W, channels_last, (*args[:6], 1, 1))


def _describe_adaptive_backward(dy: Tensor, H: int, W: int, channels_last: bool, *_: Any) -> Pool2dProblem:
    return _of_gradient("adaptive_avg_pool2d_backward", dy, H, W, channels_last, (0,) * 8)


def _fake(problem: Pool2dProblem, x: Tensor, *_: Any) -> Tensor:
    return empty(x, (problem.N, problem.C, problem.P, problem.Q), problem.channels_last)


def _fake_max(problem: Pool2dProblem, x: Tensor, *args: Any) -> Any:
    offsets = None
    if args[-2]:
        dtype = offset_dtype(problem.R, problem.S)
        offsets = empty(x, (problem.N, problem.C, problem.P, problem.Q), True, dtype)
    return _fake(problem, x), offsets


def _fake_adaptive_max(problem: Pool2dProblem, x: Tensor, P: int, Q: int, need_offsets: bool, backend: str) -> Any:
    offsets = empty(x, (problem.N, problem.C, P, Q), True, torch.int32) if need_offsets else None
    return _fake(problem, x), offsets


def _fake_indices(problem: Pool2dProblem, offsets: Tensor, *_: Any) -> Tensor:
    return empty(offsets, offsets.shape, True, torch.int64)


def _fake_gradient(problem: Pool2dProblem, dy: Tensor, *_: Any) -> Tensor:
    return empty(dy, (problem.N, problem.C, problem.H, problem.W), problem.channels_last)


max_pool2d = register(
    "max_pool2d",
    f"(Tensor x, {MAX_POOL}, bool ceil_mode, bool need_offsets, str backend) -> (Tensor, Tensor?)",
    tensors=1,
    kernel="max_pool2d_forward",
    describe=_describe_max,
    fake=_fake_max,
    function=MaxPool2d,
    batched=along((0,), (0, 0)),
)
max_pool2d_backward = register(
    "max_pool2d_backward",
    f"(Tensor dy, Tensor offsets, int H, int W, bool channels_last, {MAX_POOL}, str backend) -> Tensor",
    tensors=2,
    kernel="max_pool2d_backward",
    describe=_describe_max_backward,
    fake=_fake_gradient,
    function=MaxPool2dBackward,
    batched=along((0, 0), 0),
)
max_pool2d_indices = register(
    "max_pool2d_indices",
    f"(Tensor offsets, int H, int W, {MAX_POOL}, str backend) -> Tensor",
    tensors=1,
    kernel="max_pool2d_indices",
    describe=_describe_max_indices,
    fake=_fake_indices,
    batched=along((0,), 0),
)
adaptive_max_pool2d = register(
    "adaptive_max_pool2d",
    "(Tensor x, int P, int Q, bool need_offsets, str backend) -> (Tensor, Tensor?)",
    tensors=1,
    kernel="adaptive_max_pool2d_forward",
    describe=_describe_adaptive_max,
    fake=_fake_adaptive_max,
    function=AdaptiveMaxPool2d,
    batched=along((0,), (0, 0)),
)
adaptive_max_pool2d_backward = register(
    "adaptive_max_pool2d_backward",
    "(Tensor dy, Tensor offsets, int H, int W, bool channels_last, str backend) -> Tensor",
    tensors=2,
    kernel="adaptive_max_pool2d_backward",
    describe=_describe_adaptive_max_backward,
    fake=_fake_gradient,
    function=AdaptiveMaxPool2dBackward,
    batched=along((0, 0), 0),
)
adaptive_max_pool2d_indices = register(
    "adaptive_max_pool2d_indices",
    "(Tensor offsets, int H, int W, str backend) -> Tensor",
    tensors=1,
    kernel="adaptive_max_pool2d_indices",
    describe=_describe_adaptive_max_indices,
    fake=_fake_indices,
    batched=along((0,), 0),
)
avg_pool2d = register(
    "avg_pool2d",
    f"(Tensor x, {AVG_POOL}, str backend) -> Tensor",
    tensors=1,
    kernel="avg_pool2d_forward",
    describe=_describe_avg,
    fake=_fake,
    function=AvgPool2d,
    batched=along((0,), 0),
)
avg_pool2d_backward = register(
    "avg_pool2d_backward",
    f"(Tensor dy, int H, int W, bool channels_last, {AVG_POOL}, str backend) -> Tensor",
    tensors=1,
    kernel="avg_pool2d_backward",
    describe=_describe_avg_backward,
    fake=_fake_gradient,
    function=AvgPool2dBackward,
    batched=along((0,), 0),
)
adaptive_avg_pool2d = register(
    "adaptive_avg_pool2d",
    "(Tensor x, int P, int Q, str backend) -> Tensor",
    tensors=1,
    kernel="adaptive_avg_pool2d_forward",
    describe=_describe_adaptive,
    fake=_fake,
    function=AdaptiveAvgPool2d,
    batched=along((0,), 0),
)
adaptive_avg_pool2d_backward = register(
    "adaptive_avg_pool2d_backward",
    "(Tensor dy, int H, int W, bool channels_last, str backend) -> Tensor",
    tensors=1,
    kernel="adaptive_avg_pool2d_backward",
    describe=_describe_adaptive_backward,
    fake=_fake_gradient,
    function=AdaptiveAvgPool2dBackward,
    batched=along((0,), 0),
)
