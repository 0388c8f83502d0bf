"""Batch norm, an activation and a maximum pool in one op, and its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.aten import activation_gradient
from ..geometry import NormPool2dProblem, NormProblem, Pool2dProblem, accumulation_dtype, is_channels_last
from .batch_norm import affine, along_norm, along_norm_backward, batch_norm_act_backward, norm_gradients
from .batching import Dims
from .pool2d import MAX_POOL, at_maxima, max_pool2d_backward, offset_dtype
from .registry import Function, differentiate, empty, register, tangents_of


class BnActMaxPool2d(Function):
    """Keeps x and where each maximum was; what lies between is recomputed from x."""

    @staticmethod
    def forward(run: Any, *args: Any) -> Any:
        *rest, _, backend = args
        return run(*rest, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, weight, bias, _, _, training, _, eps, activation, *window, _, _, backend = inputs
        _, *small = output
        mean, rstd, offsets = small
        ctx.args = training, eps, activation, *window
        ctx.backend = backend
        ctx.save_for_backward(offsets, x, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(*small)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 21
        needs = ctx.needs_input_grad[1:4]
        # The kernel converts x to channels_last, and dx back: without that layout the separate gradients are faster.
        saved = ctx.saved_tensors
        gradients = bn_act_max_pool2d_backward if is_channels_last(saved[1]) else _separately
        grads = gradients(dy, *saved, *ctx.args, *needs, ctx.backend)
        return (None, *grads, *[None] * 17)

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, tweight: Any, tbias: Any, *__: Any) -> Any:
        offsets, x, weight, bias, mean, rstd = ctx.saved_tensors
        training, eps, activation, *window = ctx.args
        statistics = mean, rstd, training, eps
        (tz,) = tangents_of(affine, (x, weight, bias), (tx, tweight, tbias), *statistics)
        (z,) = affine(x, weight, bias, *statistics)
        through = (tz * activation_gradient(z, activation)).to(x.dtype)
        return at_maxima(through, offsets, *x.shape[2:], *window, ctx.backend), None, None, None


class BnActMaxPool2dBackward(Function):
    """The same gradient is that of a pool, then that of batch norm, which both have derivatives of their own."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, offsets, x, weight, bias, mean, rstd, *rest = inputs
        *ctx.args, need_dx, need_dweight, need_dbias, ctx.backend = rest
        ctx.needs = need_dx, need_dweight, need_dbias
        ctx.save_for_backward(dy, x, weight, bias, offsets, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        *tensors, offsets, mean, rstd = ctx.saved_tensors

        def formula(dy: Any, x: Any, weight: Any, bias: Any) -> tuple[Tensor | None, ...]:
            needs = True, weight is not None, bias is not None
            return _separately(dy, offsets, x, weight, bias, mean, rstd, *ctx.args, *needs, ctx.backend)

        need_dy, _, *needs = ctx.needs_input_grad[1:6]
        ddy, *results = differentiate(formula, tensors, (need_dy, *needs), upstream)
        return (None, ddy, None, *results, *[None] * 17)

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor | None, __: Any, tx: Any, tweight: Any, tbias: Any, *___: Any) -> Any:
        dy, x, weight, bias, offsets, mean, rstd = ctx.saved_tensors
        training, eps, activation, *window = ctx.args
        pool = offsets, *x.shape[2:], is_channels_last(x), *window, ctx.backend
        primals = max_pool2d_backward(dy, *pool), x, weight, bias, None, None, mean, rstd
        tangents = None if tdy is None else max_pool2d_backward(tdy, *pool), tx, tweight, tbias, *[None] * 4
        found = tangents_of(norm_gradients, primals, tangents, training, eps, activation)
        return tuple(t if need else None for t, need in zip(found, ctx.needs, strict=False))


def _separately(
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
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """What `bn_act_max_pool2d_backward` computes, by the gradients of a pool and of batch norm."""
    *window, need_dx, need_dweight, need_dbias, backend = rest
    through = max_pool2d_backward(dy, offsets, *x.shape[2:], is_channels_last(x), *window, backend)
    norm = mean, rstd, training, eps, activation, need_dx, need_dweight, need_dbias, False, backend
    found: tuple[Tensor | None, ...] = batch_norm_act_backward(through, x, weight, bias, None, None, *norm)
    return found[:3]


def _describe(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> NormPool2dProblem:
    running_mean, running_var, training, _, eps, activation, *window = args[:15]
    if x.dim() != 4:
        raise RuntimeError(f"bn_act_max_pool2d: expected input of 4 dimensions [N, C, H, W], but got {list(x.shape)}")
    pool = Pool2dProblem.of("bn_act_max_pool2d", x, *window)
    norm = NormProblem.of(x, weight, bias, None, running_mean, running_var, training, eps, activation)
    return NormPool2dProblem(norm, pool)


def _describe_backward(
    dy: Tensor, offsets: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
) -> NormPool2dProblem:
    mean, rstd, training, _, activation, *window = args[:13]
    R, S = window[:2]
    wide = accumulation_dtype(x.dtype)
    for name, t, shape, dtype in (
        ("dy", dy, list(offsets.shape), x.dtype),
        ("offsets", offsets, [*x.shape[:2], *offsets.shape[2:]], offset_dtype(R, S)),
        ("mean", mean, [x.shape[1]], wide),
        ("rstd", rstd, [x.shape[1]], wide),
    ):
        if list(t.shape) != shape or t.dtype != dtype:
            raise RuntimeError(
                f"bn_act_max_pool2d_backward: expected {name} of shape {shape} and dtype {dtype}, "
                f"but got {list(t.shape)} {t.dtype}"
            )
    N, C, H, W = x.shape
    param = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    device, last = x.device.type, is_channels_last(x)
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window[2:]
    return NormPool2dProblem(
        NormProblem(N, C, H * W, training, activation, x.dtype, param, device, last),
        Pool2dProblem(
            N,
            C,
            H,
            W,
            R,
            S,
            dy.shape[2],
            dy.shape[3],
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dilation_h,
            dilation_w,
            x.dtype,
            device,
            last,
        ),
    )


def _fake(problem: NormPool2dProblem, x: Tensor, *args: Any) -> Any:
    norm, pool = problem.norm, problem.pool
    wide = accumulation_dtype(x.dtype)
    shape = (pool.N, pool.C, pool.P, pool.Q)
    tap = offset_dtype(pool.R, pool.S)
    offsets = empty(x, shape, True, tap) if args[-2] else empty(x, (0,), False, tap)
    statistics = (empty(x, (pool.C,), False, wide) for _ in range(2))
    return (empty(x, shape, norm.channels_last), *statistics, offsets)


def _fake_backward(problem: NormPool2dProblem, dy: Tensor, offsets: Tensor, x: Tensor, *args: Any) -> Any:
    norm = problem.norm
    need_dx, need_dweight, need_dbias = args[-4:-1]
    return (
        empty(x, x.shape, norm.channels_last) if need_dx else None,
        empty(x, (norm.C,), False, norm.param_dtype) if need_dweight else None,
        empty(x, (norm.C,), False, norm.param_dtype) if need_dbias else None,
    )


def _written(*args: Any) -> list[Tensor]:
    running, training = args[3:5], args[5]
    return [t for t in running if t is not None] if training else []


def _batched(op: Any, size: int, dims: Dims, *args: Any) -> Any:
    need_offsets = args[-2]
    return along_norm("xcccc", "xccx" if need_offsets else "xcc-")(op, size, dims, *args)


bn_act_max_pool2d = register(
    "bn_act_max_pool2d",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, "
    f"float momentum, float eps, str activation, {MAX_POOL}, bool ceil_mode, bool need_offsets, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=5,
    kernel="bn_act_max_pool2d_forward",
    describe=_describe,
    fake=_fake,
    function=BnActMaxPool2d,
    written=_written,
    batched=_batched,
)
bn_act_max_pool2d_backward = register(
    "bn_act_max_pool2d_backward",
    "(Tensor dy, Tensor offsets, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool training, "
    f"float eps, str activation, {MAX_POOL}, bool need_dx, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor?, Tensor?, Tensor?)",
    tensors=7,
    kernel="bn_act_max_pool2d_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=BnActMaxPool2dBackward,
    batched=along_norm_backward("xxxcccc", "xcc"),
)
