"""conv_transpose2d and its gradients.

Geometry is conv2d's with output padding in place of a padding mode. output_pad rather than the output's extents, so
that it says all that the op's arguments say, and the extents follow from it as conv2d's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import ConvTranspose2dProblem, is_channels_last
from .batching import Dims, fold, unfold
from .conv2d import Folded, batched_bias, gradients_backward, gradients_tangent, tangent
from .registry import Function, empty, register

_GEOMETRY = (
    "int stride_h, int stride_w, int pad_h, int pad_w, int output_pad_h, int output_pad_w, int dilation_h, "
    "int dilation_w, int groups"
)


class ConvTranspose2d(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, weight, _, *ctx.args = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *geometry, backend = ctx.args  # the forward's backend, wherever backward runs
        grads = conv_transpose2d_backward(dy, *ctx.saved_tensors, *geometry, *ctx.needs_input_grad[1:4], backend)
        return (None, *grads, *[None] * 10)

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, tweight: Any, tbias: Any, *__: Any) -> Any:
        return tangent(conv_transpose2d, _describe, *ctx.saved_tensors, tx, tweight, tbias, *ctx.args)


class ConvTranspose2dBackward(Function):
    """Both gradients are bilinear, so theirs are transposed convolutions and their gradients again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, x, weight, *ctx.args = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None) -> Any:
        grads = gradients_backward(conv_transpose2d, conv_transpose2d_backward, ctx, ddx, ddweight, ddbias)
        return (None, *grads, *[None] * 13)

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None, *__: Any) -> Any:
        dy, _, _ = ctx.saved_tensors
        tangents = tdy, tx, tweight
        return gradients_tangent(conv_transpose2d_backward, dy.shape[1], *ctx.saved_tensors, *tangents, *ctx.args)


def _describe(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> ConvTranspose2dProblem:
    return ConvTranspose2dProblem.of(x, weight, bias, *args[:9])


def _output_shape(problem: ConvTranspose2dProblem) -> tuple[int, int, int, int]:
    return problem.N, problem.K, problem.P, problem.Q


def _describe_backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> ConvTranspose2dProblem:
    problem = _describe(x, weight, None, *args)
    if tuple(dy.shape) != _output_shape(problem):
        raise RuntimeError(
            f"conv_transpose2d_backward: expected dy of shape {list(_output_shape(problem))}, but got {list(dy.shape)}"
        )
    return problem


def _fake(problem: ConvTranspose2dProblem, x: Tensor, *_: Any) -> Tensor:
    return empty(x, _output_shape(problem), problem.channels_last)


def _fake_backward(problem: ConvTranspose2dProblem, dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    need_dx, need_dweight, need_dbias = args[9:12]
    return (
        empty(x, x.shape, problem.channels_last) if need_dx else None,
        empty(weight, weight.shape, is_channels_last(weight)) if need_dweight else None,
        empty(x, (problem.K,), False) if need_dbias else None,
    )


def _filters(way: Folded) -> int | None:
    """Where the samples go in weight: its filters lie along axis 1, in each group by themselves."""
    return 1 if way.x is None else way.weight


def _batched(op: Any, size: int, dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    if dims[2] is not None and dims[1] is None and bias is not None:
        return batched_bias(op, _batched, size, dims, x, weight, bias, *args)
    *geometry, groups, backend = args
    way = Folded.forward(size, groups, dims[0] is not None, dims[1] is not None)
    y = op(
        fold(x, dims[0], way.x, size),
        fold(weight, dims[1], _filters(way), size),
        fold(bias, dims[2], way.weight, size, way.inner_groups),
        *geometry, way.groups, backend,
    )  # fmt: skip
    return unfold(y, way.y, size, way.inner_groups)


def _batched_backward(op: Any, size: int, dims: Dims, dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    *geometry, groups, need_dx, need_dweight, need_dbias, backend = args
    way = Folded.backward(size, groups, dims, need_dx, need_dweight or need_dbias)
    dx, dweight, dbias = op(
        fold(dy, dims[0], way.y, size, way.inner_groups),
        fold(x, dims[1], way.x, size),
        fold(weight, dims[2], _filters(way), size),
        *geometry, way.groups, need_dx, need_dweight, need_dbias, backend,
    )  # fmt: skip
    grads = (
        unfold(dx, way.x, size),
        unfold(dweight, _filters(way), size),
        unfold(dbias, way.weight, size, way.inner_groups),
    )
    return tuple(t for t, _ in grads), tuple(dim for _, dim in grads)


conv_transpose2d = register(
    "conv_transpose2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str backend) -> Tensor",
    tensors=3,
    kernel="conv_transpose2d_forward",
    describe=_describe,
    fake=_fake,
    function=ConvTranspose2d,
    autocast=3,
    batched=_batched,
)
conv_transpose2d_backward = register(
    "conv_transpose2d_backward",
    f"(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}, bool need_dx, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor?, Tensor?, Tensor?)",
    tensors=3,
    kernel="conv_transpose2d_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=ConvTranspose2dBackward,
    batched=_batched_backward,
)


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    N, C, H, W = x
    _C, K, R, S = weight
    return int(2 * N * H * W * C * K * R * S)


def _flops_backward(dy: Any, x: Any, weight: Any, *args: Any, **_: Any) -> int:
    need_dx, need_dweight = args[9:11]
    return (int(need_dx) + int(need_dweight)) * _flops(x, weight)


register_flop_formula(torch.ops.cnnops.conv_transpose2d)(_flops)
register_flop_formula(torch.ops.cnnops.conv_transpose2d_backward)(_flops_backward)
