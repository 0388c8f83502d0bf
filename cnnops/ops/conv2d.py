"""conv2d and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import Conv2dProblem, is_channels_last
from .registry import Function, empty, register

GEOMETRY = "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups, int pad_mode"
"""pad_mode is the place in `cnnops.geometry.PADDING_MODES`."""


class Conv2d(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, weight, _, *ctx.args = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *geometry, backend = ctx.args  # the forward's backend, wherever backward runs
        grads = conv2d_backward(dy, *ctx.saved_tensors, *geometry, *ctx.needs_input_grad[1:4], backend)
        return (None, *grads, *[None] * 9)


class Conv2dBackward(Function):
    """Both gradients are bilinear, so theirs are convolutions again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, x, weight, *ctx.args = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None) -> Any:
        dy, x, weight = ctx.saved_tensors
        *geometry, _, _, _, backend = ctx.args
        need_dy, need_x, need_weight = ctx.needs_input_grad[1:4]
        terms, dx, dweight = [], None, None
        if need_dy:
            if ddx is not None:
                terms.append(conv2d(ddx, weight, None, *geometry, backend))
            if ddweight is not None:
                terms.append(conv2d(x, ddweight, None, *geometry, backend))
            if ddbias is not None:
                terms.append(ddbias[None, :, None, None].expand_as(dy))
        if need_x and ddweight is not None:
            dx = conv2d_backward(dy, x, ddweight, *geometry, True, False, False, backend)[0]
        if need_weight and ddx is not None:
            dweight = conv2d_backward(dy, ddx, weight, *geometry, False, True, False, backend)[1]
        return (None, sum(terms[1:], terms[0]) if terms else None, dx, dweight, *[None] * 12)


def describe(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Conv2dProblem:
    """The problem of cnnops::conv2d's arguments."""
    return Conv2dProblem.of(x, weight, bias, *args[:8])


def output_shape(problem: Conv2dProblem) -> tuple[int, int, int, int]:
    """[N, K, P, Q]; without input channels there are no output channels, as in torch."""
    return problem.N, problem.K if problem.C else 0, problem.P, problem.Q


def _describe_backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Conv2dProblem:
    problem = Conv2dProblem.of(x, weight, None, *args[:8])
    if tuple(dy.shape) != output_shape(problem):
        raise RuntimeError(
            f"conv2d_backward: expected dy of shape {list(output_shape(problem))}, but got {list(dy.shape)}"
        )
    return problem


def _fake(problem: Conv2dProblem, x: Tensor, *_: Any) -> Tensor:
    return empty(x, output_shape(problem), problem.channels_last)


def _fake_backward(problem: Conv2dProblem, dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    need_dx, need_dweight, need_dbias = args[8:11]
    return (
        empty(x, x.shape, problem.channels_last) if need_dx else None,
        empty(weight, weight.shape, is_channels_last(weight)) if need_dweight else None,
        empty(x, (problem.K,), False) if need_dbias else None,
    )


conv2d = register(
    "conv2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, str backend) -> Tensor",
    tensors=3,
    kernel="conv2d_forward",
    describe=describe,
    fake=_fake,
    function=Conv2d,
    autocast=3,
)
conv2d_backward = register(
    "conv2d_backward",
    f"(Tensor dy, Tensor x, Tensor weight, {GEOMETRY}, bool need_dx, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor?, Tensor?, Tensor?)",
    tensors=3,
    kernel="conv2d_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=Conv2dBackward,
)


def _flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    N, _K, P, Q = out_shape
    K, C, R, S = weight
    return int(2 * N * P * Q * K * C * R * S)


def _flops_backward(dy: Any, x: Any, weight: Any, *args: Any, **_: Any) -> int:
    need_dx, need_dweight = args[8:10]
    return (int(need_dx) + int(need_dweight)) * _flops(x, weight, out_shape=dy)


register_flop_formula(torch.ops.cnnops.conv2d)(_flops)
register_flop_formula(torch.ops.cnnops.conv2d_backward)(_flops_backward)
