"""conv2d, residual addition and activation in one pass, and the activations' gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import (
    ACTIVATIONS_FROM_INPUT,
    Conv2dProblem,
    NormProblem,
    check_activation,
    check_residual,
    is_channels_last,
)
from .batching import Dims, along, fold, unfold
from .conv2d import GEOMETRY, Folded, _flops, conv2d, conv2d_backward, describe, output_shape, tangent
from .registry import Function, empty, register


class Conv2dAct(Function):
    """activation(z), z = conv(x, weight) + bias + residual. Saves y where the derivative can be read off it, else z."""

    @staticmethod
    def forward(run: Any, *args: Any) -> Any:
        *rest, activation, _, backend = args
        return run(*rest, activation, activation in ACTIVATIONS_FROM_INPUT, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, weight, _, _, *geometry, activation, _, backend = inputs
        y, z = output
        ctx.args = geometry, activation, backend
        ctx.save_for_backward(x, weight, z if z is not None else y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> Any:
        x, weight, saved = ctx.saved_tensors
        geometry, activation, backend = ctx.args
        if dy is not None:
            through = dy if activation == "none" else activation_backward(dy, saved, activation, backend)
            dz = through if dz is None else dz + through
        if dz is None:
            return (None,) * 16
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[1:5]
        grads: tuple[Any, ...] = (None, None, None)
        if need_x or need_weight or need_bias:
            grads = conv2d_backward(dz, x, weight, *geometry, need_x, need_weight, need_bias, backend)
        return (None, *grads, dz if need_residual else None, *[None] * 11)

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, tweight: Any, tbias: Any, tresidual: Any, *__: Any) -> Any:
        x, weight, saved = ctx.saved_tensors
        geometry, activation, backend = ctx.args
        tz = tangent(conv2d, describe, x, weight, tx, tweight, tbias, *geometry, backend)
        if tresidual is not None:
            tz = tresidual if tz is None else tz + tresidual
        ty = tz if activation == "none" else activation_backward(tz, saved, activation, backend)
        return ty, tz if activation in ACTIVATIONS_FROM_INPUT else None


class ActivationBackward(Function):
    """dz = dy * activation'(saved), saved being y or z as the activation needs it."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, saved, *ctx.args = inputs
        ctx.save_for_backward(dy, saved)

    @staticmethod
    def backward(ctx: Any, ddz: Tensor) -> Any:
        dy, saved = ctx.saved_tensors
        activation, backend = ctx.args
        ddy = activation_backward(ddz, saved, activation, backend) if ctx.needs_input_grad[1] else None
        dsaved = ddz * dy * _curvature(saved, activation) if ctx.needs_input_grad[2] else None
        return None, ddy, dsaved, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor | None, tsaved: Tensor | None, *__: Any) -> Any:
        dy, saved = ctx.saved_tensors
        tdz = None if tdy is None else activation_backward(tdy, saved, *ctx.args)
        if tsaved is not None:
            term = tsaved * dy * _curvature(saved, ctx.args[0])
            tdz = term if tdz is None else tdz + term
        return tdz


def _curvature(saved: Tensor, activation: str) -> Tensor:
    """The derivative of activation'(saved) by saved."""
    if activation == "sigmoid":
        return 1 - 2 * saved
    if activation == "silu":
        s = torch.sigmoid(saved)
        return s * (1 - s) * (2 + saved * (1 - 2 * s))
    if activation == "hardswish":
        return ((saved > -3) & (saved < 3)).to(saved.dtype) / 3
    return torch.zeros_like(saved)


def _describe(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *args: Any) -> Conv2dProblem:
    problem = Conv2dProblem.of(x, weight, bias, *args[:8])
    check_activation("conv2d_act", args[8])
    if residual is not None:
        check_residual("conv2d_act", residual, output_shape(problem), x)
    return problem


def _fake(problem: Conv2dProblem, x: Tensor, *args: Any) -> Any:
    y = empty(x, output_shape(problem), problem.channels_last)
    return y, (torch.empty_like(y) if args[-2] else None)


def _describe_activation(dy: Tensor, saved: Tensor, activation: str, *_: Any) -> NormProblem:
    check_activation("activation_backward", activation)
    if dy.shape != saved.shape or dy.dtype != saved.dtype:
        raise RuntimeError(
            f"activation_backward: expected dy like saved, {list(saved.shape)} {saved.dtype}, "
            f"but got {list(dy.shape)} {dy.dtype}"
        )
    N, C, H, W = saved.shape
    return NormProblem(
        N, C, H * W, False, activation, saved.dtype, saved.dtype, saved.device.type, is_channels_last(saved)
    )


def _fake_activation(problem: NormProblem, dy: Tensor, saved: Tensor, *_: Any) -> Tensor:
    return empty(saved, saved.shape, problem.channels_last)


def _batched(
    op: Any, size: int, dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *args: Any
) -> Any:
    *geometry, groups, pad_mode, activation, need_z, backend = args
    mapped = [dim is not None for dim in dims]
    way = Folded.forward(size, groups, mapped[0], mapped[1] or mapped[2])
    y, z = op(
        fold(x, dims[0], way.x, size),
        fold(weight, dims[1], way.weight, size, way.inner_groups),
        fold(bias, dims[2], way.weight, size, way.inner_groups),
        fold(residual, dims[3], way.y, size, way.inner_groups),
        *geometry, way.groups, pad_mode, activation, need_z, backend,
    )  # fmt: skip
    results = unfold(y, way.y, size, way.inner_groups), unfold(z, way.y, size, way.inner_groups)
    return tuple(t for t, _ in results), tuple(dim for _, dim in results)


conv2d_act = register(
    "conv2d_act",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, str activation, bool need_z, str backend)"
    " -> (Tensor, Tensor?)",
    tensors=4,
    kernel="conv2d_act_forward",
    describe=_describe,
    fake=_fake,
    function=Conv2dAct,
    autocast=4,
    batched=_batched,
)
activation_backward = register(
    "activation_backward",
    "(Tensor dy, Tensor saved, str activation, str backend) -> Tensor",
    tensors=2,
    kernel="activation_backward",
    describe=_describe_activation,
    fake=_fake_activation,
    function=ActivationBackward,
    batched=along((0, 0), 0),
)


def _flops_act(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return _flops(x, weight, out_shape=out_shape[0])


register_flop_formula(torch.ops.cnnops.conv2d_act)(_flops_act)
