"""Batch norm, residual addition and activation in one op, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.aten import activation_gradient
from ..geometry import ACTIVATIONS_FROM_INPUT, NormProblem, is_channels_last
from .registry import Function, differentiate, empty, register


class BatchNormAct(Function):
    """y = activation((x - mean) * rstd * weight + bias + residual).

    The pre-activation is recomputed from x; with a residual, the activation's derivative is read off y where it can be,
    so that the residual need not live until backward.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, weight, bias, residual, _, _, training, _, eps, activation, backend = inputs
        y, mean, rstd = output
        ctx.args = training, eps, activation, backend
        fused = residual is not None and activation != "none"
        keep_residual = fused and activation in ACTIVATIONS_FROM_INPUT
        saved_y = y if fused and not keep_residual else None
        ctx.save_for_backward(x, weight, bias, residual if keep_residual else None, saved_y, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 12
        *tensors, mean, rstd = ctx.saved_tensors
        *args, backend = ctx.args
        grads = batch_norm_act_backward(dy, *tensors, mean, rstd, *args, *ctx.needs_input_grad[1:5], backend)
        return (None, *grads, *[None] * 7)


class BatchNormActBackward(Function):
    """The second derivative is rare, so it is torch's own differentiation of the formula for the first."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *tensors, training, eps, activation, _, _, _, _, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.args = training, eps, activation
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        results = differentiate(
            lambda *tensors: _gradients(*tensors, *ctx.args), ctx.saved_tensors, ctx.needs_input_grad[1:7], upstream
        )
        return (None, *results, *[None] * 10)


def _gradients(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual by torch's own differentiable ops.

    dx = weight * rstd * (dz - mean(dz) - xhat * mean(dz * xhat)) with batch statistics, weight * rstd * dz with fixed
    ones, dz = dy * activation'.  Ioffe and Szegedy, 2015, section 3.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    xw = x.to(wide)
    if training:
        mean = xw.mean(axes)
        rstd = ((xw - mean.reshape(shape)).square().mean(axes) + eps).rsqrt()
    xhat = (xw - mean.reshape(shape)) * rstd.reshape(shape)
    scale = torch.ones_like(mean) if weight is None else weight.to(wide)
    if y is not None and activation == "sigmoid":
        dz = dy.to(wide) * y.to(wide) * (1 - y.to(wide))
    elif y is not None:
        dz = dy.to(wide) * activation_gradient(y.to(wide), activation)
    else:
        z = xhat * scale.reshape(shape)
        z = z if bias is None else z + bias.to(wide).reshape(shape)
        z = z if residual is None else z + residual.to(wide)
        dz = dy.to(wide) * activation_gradient(z, activation)
    dbias, dweight = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz
    if training:
        count = x.numel() // x.shape[1]
        dx = dz - (dbias.reshape(shape) + xhat * dweight.reshape(shape)) / count
    dx = dx * (scale * rstd).reshape(shape)
    param = x.dtype if weight is None and bias is None else (weight if weight is not None else bias).dtype  # type: ignore[union-attr]
    return dx.to(x.dtype), dweight.to(param), dbias.to(param), dz.to(x.dtype)


def _describe(
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
    *_: Any,
) -> NormProblem:
    return NormProblem.of(x, weight, bias, residual, running_mean, running_var, training, eps, activation)


def _describe_backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> NormProblem:
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise RuntimeError(
            f"batch_norm_act_backward: expected dy like x, {list(x.shape)} {x.dtype}, but got {list(dy.shape)} {dy.dtype}"
        )
    for name, t in zip(("mean", "rstd"), args[2:4], strict=True):
        if list(t.shape) != [x.shape[1]] or t.dtype != _accumulation(x.dtype):
            raise RuntimeError(
                f"batch_norm_act_backward: expected {name} of shape [{x.shape[1]}] and dtype {_accumulation(x.dtype)}, "
                f"but got {list(t.shape)} {t.dtype}"
            )
    training, _, activation = args[4:7]
    N, C = x.shape[:2]
    L = x.numel() // max(N * C, 1)
    param = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    return NormProblem(N, C, L, training, activation, x.dtype, param, x.device.type, is_channels_last(x))


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(problem: NormProblem, x: Tensor, *_: Any) -> Any:
    statistics = _accumulation(x.dtype)
    return (
        empty(x, x.shape, problem.channels_last),
        empty(x, (problem.C,), False, statistics),
        empty(x, (problem.C,), False, statistics),
    )


def _fake_backward(
    problem: NormProblem, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
) -> Any:
    need_dx, need_dweight, need_dbias, need_dresidual = args[7:11]
    return (
        empty(x, x.shape, problem.channels_last) if need_dx else None,
        empty(x, (problem.C,), False, problem.param_dtype) if need_dweight else None,
        empty(x, (problem.C,), False, problem.param_dtype) if need_dbias else None,
        empty(x, x.shape, problem.channels_last) if need_dresidual else None,
    )


def _written(*args: Any) -> list[Tensor]:
    running, training = args[4:6], args[6]
    return [t for t in running if t is not None] if training else []


batch_norm_act = register(
    "batch_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps, str activation, str backend) -> (Tensor, Tensor, Tensor)",
    tensors=6,
    kernel="batch_norm_act_forward",
    describe=_describe,
    fake=_fake,
    function=BatchNormAct,
    written=_written,
)
batch_norm_act_backward = register(
    "batch_norm_act_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, Tensor mean, Tensor rstd, "
    "bool training, float eps, str activation, bool need_dx, bool need_dweight, bool need_dbias, bool need_dresidual, "
    "str backend) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    tensors=8,
    kernel="batch_norm_act_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=BatchNormActBackward,
)
