"""Batch norm, residual addition and activation in one op, and its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.aten import activation_gradient
from ..geometry import ACTIVATIONS_FROM_INPUT, NormProblem, accumulation_dtype, is_channels_last
from .batching import Dims, Rule, along, fold, unfold
from .registry import Function, differentiate, empty, register, tangents_of


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

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, tweight: Any, tbias: Any, tresidual: Any, *__: Any) -> Any:
        x, weight, bias, residual, y, mean, rstd = ctx.saved_tensors
        training, eps, activation, _ = ctx.args
        (tz,) = tangents_of(affine, (x, weight, bias), (tx, tweight, tbias), mean, rstd, training, eps)
        if tresidual is not None:
            tz = tresidual if tz is None else tz + tresidual
        (z,) = affine(x, weight, bias, mean, rstd, training, eps)
        ty = tz * _slope(z if residual is None else z + residual, y, activation)
        return ty.to(x.dtype), None, None


class BatchNormActBackward(Function):
    """The second derivative is rare, so it is torch's own differentiation of the formula for the first."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *tensors, training, eps, activation, need_dx, need_dweight, need_dbias, need_dresidual, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.args = training, eps, activation
        ctx.needs = need_dx, need_dweight, need_dbias, need_dresidual
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        results = differentiate(
            lambda *tensors: norm_gradients(*tensors, *ctx.args), ctx.saved_tensors, ctx.needs_input_grad[1:7], upstream
        )
        return (None, *results, *[None] * 10)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        grads = tangents_of(norm_gradients, ctx.saved_tensors, tangents[:8], *ctx.args)
        return tuple(t if need else None for t, need in zip(grads, ctx.needs, strict=True))


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, training: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd and rstd, in the accumulation type; batch statistics as functions of x."""
    x = x.to(accumulation_dtype(x.dtype))
    if training:
        axes = [0, *range(2, x.dim())]
        mean = x.mean(axes)
        rstd = ((x - _per_channel(mean, x)).square().mean(axes) + eps).rsqrt()
    return (x - _per_channel(mean, x)) * _per_channel(rstd, x), rstd


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.to(accumulation_dtype(x.dtype)).reshape(1, -1, *[1] * (x.dim() - 2))


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, training: bool, eps: float
) -> tuple[Tensor]:
    z, _ = _normalized(x, mean, rstd, training, eps)
    z = z if weight is None else z * _per_channel(weight, x)
    return (z if bias is None else z + _per_channel(bias, x),)


def _slope(z: Tensor, y: Tensor | None, activation: str) -> Tensor:
    """activation'(z), read off y where that was kept."""
    if y is None:
        return activation_gradient(z, activation)
    y = y.to(z.dtype)
    return y * (1 - y) if activation == "sigmoid" else activation_gradient(y, activation)


def norm_gradients(
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
    axes = [0, *range(2, x.dim())]
    xhat, rstd = _normalized(x, mean, rstd, training, eps)
    z = xhat if weight is None else xhat * _per_channel(weight, x)
    z = z if bias is None else z + _per_channel(bias, x)
    dz = dy * _slope(z if residual is None else z + residual, y, activation)
    dbias, dweight = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz
    if training:
        count = x.numel() // x.shape[1]
        dx = dz - (_per_channel(dbias, x) + xhat * _per_channel(dweight, x)) / count
    dx = dx * _per_channel(rstd, x)
    dx = dx if weight is None else dx * _per_channel(weight, x)
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
        if list(t.shape) != [x.shape[1]] or t.dtype != accumulation_dtype(x.dtype):
            raise RuntimeError(
                f"batch_norm_act_backward: expected {name} of shape [{x.shape[1]}] and dtype {accumulation_dtype(x.dtype)}, "
                f"but got {list(t.shape)} {t.dtype}"
            )
    training, _, activation = args[4:7]
    N, C = x.shape[:2]
    L = x.numel() // max(N * C, 1)
    param = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    return NormProblem(N, C, L, training, activation, x.dtype, param, x.device.type, is_channels_last(x))


def _fake(problem: NormProblem, x: Tensor, *_: Any) -> Any:
    statistics = accumulation_dtype(x.dtype)
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


def along_norm(tensors: str, results: str) -> Rule:
    """The rule of a batch norm: samples become channels; images where they share every number that a channel has.

    tensors: a letter for each, "x" for images, "c" for a number for each channel; the last two are the running
    statistics, training follows them. results: likewise, "-" for one that is left alone.
    """
    last = slice(len(tensors) - 2, len(tensors))

    def rule(op: Any, size: int, dims: Dims, *args: Any) -> Any:
        training = args[last.stop]
        axes = _axes_of_norm(tensors, dims, training)
        # Folded here, so that what the call writes to them can go back to the samples.
        running = [fold(t, dim, axes["c"], size) for t, dim in zip(args[last], dims[last], strict=True)]
        folded = along([axes[kind] for kind in tensors[:-2]], tuple(axes[kind] for kind in results))
        found = folded(op, size, dims, *args[: last.start], *running, *args[last.stop :])
        if training:
            for t, dim, updated in zip(args[last], dims[last], running, strict=True):
                if t is not None:
                    t.movedim(dim, 0).copy_(unfold(updated, 0, size)[0])
        return found

    return rule


def along_norm_backward(tensors: str, results: str) -> Rule:
    """As `along_norm`, of its gradient; training follows the tensors."""

    def rule(op: Any, size: int, dims: Dims, *args: Any) -> Any:
        first = len(args) - 1 - len(results)
        sums = any(need for need, kind in zip(args[first:-1], results, strict=True) if kind == "c")
        axes = _axes_of_norm(tensors, dims, args[len(tensors)] or sums)
        folded = along([axes[kind] for kind in tensors], tuple(axes[kind] for kind in results))
        return folded(op, size, dims, *args)

    return rule


def _axes_of_norm(tensors: str, dims: Dims, apart: bool) -> dict[str, int | None]:
    """Where the samples go. apart: whether something is summed over the images of each."""
    shared = all(dim is None for dim, kind in zip(dims, tensors, strict=False) if kind == "c")
    return {"x": 0, "c": None, "-": None} if shared and not apart else {"x": 1, "c": 0, "-": None}


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
    batched=along_norm("xccxcc", "xcc"),
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
    batched=along_norm_backward("xxccxxcc", "xccx"),
)
