"""conv2d and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import Conv2dProblem, is_channels_last
from .batching import Dims, Rule, fold, unfold
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

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, tweight: Any, tbias: Any, *__: Any) -> Any:
        return tangent(conv2d, describe, *ctx.saved_tensors, tx, tweight, tbias, *ctx.args)


def tangent(
    conv: Any, problem_of: Any, x: Tensor, weight: Tensor, tx: Any, tweight: Any, tbias: Any, *args: Any
) -> Tensor | None:
    """The tangent of `conv`, which is bilinear, given its operands' where they have any."""
    terms = []
    if tx is not None:
        terms.append(conv(tx, weight, tbias, *args))
    if tweight is not None:
        terms.append(conv(x, tweight, None if terms else tbias, *args))
    if tbias is not None and not terms:
        problem = problem_of(x, weight, None, *args)
        terms.append(tbias[None, :, None, None].repeat(problem.N, 1, problem.P, problem.Q))
    return sum(terms[1:], terms[0]) if terms else None


class Conv2dBackward(Function):
    """Both gradients are bilinear, so theirs are convolutions again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, x, weight, *ctx.args = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None) -> Any:
        grads = gradients_backward(conv2d, conv2d_backward, ctx, ddx, ddweight, ddbias)
        return (None, *grads, *[None] * 12)

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None, *__: Any) -> Any:
        _, _, weight = ctx.saved_tensors
        return gradients_tangent(conv2d_backward, weight.shape[0], *ctx.saved_tensors, tdy, tx, tweight, *ctx.args)


def gradients_backward(
    conv: Any, gradients: Any, ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by dy, x and weight of what `gradients` of the convolution `conv` computes, given those by its results."""
    dy, x, weight = ctx.saved_tensors
    *geometry, _, _, _, backend = ctx.args
    need_dy, need_x, need_weight = ctx.needs_input_grad[1:4]
    terms, dx, dweight = [], None, None
    if need_dy:
        if ddx is not None:
            terms.append(conv(ddx, weight, None, *geometry, backend))
        if ddweight is not None:
            terms.append(conv(x, ddweight, None, *geometry, backend))
        if ddbias is not None:
            terms.append(ddbias[None, :, None, None].expand_as(dy))
    if need_x and ddweight is not None:
        dx = gradients(dy, x, ddweight, *geometry, True, False, False, backend)[0]
    if need_weight and ddx is not None:
        dweight = gradients(dy, ddx, weight, *geometry, False, True, False, backend)[1]
    return sum(terms[1:], terms[0]) if terms else None, dx, dweight


def gradients_tangent(
    gradients: Any, K: int, dy: Tensor, x: Tensor, weight: Tensor, tdy: Any, tx: Any, tweight: Any, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tangents of what `gradients` of a convolution computes, given its operands' where they have any."""
    *geometry, need_dx, need_dweight, need_dbias, backend = args
    if tdy is not None:
        tdx, tdweight, tdbias = gradients(tdy, x, weight, *args)
    else:
        tdx = torch.zeros_like(x) if need_dx else None
        tdweight = torch.zeros_like(weight) if need_dweight else None
        tdbias = weight.new_zeros(K) if need_dbias else None
    if need_dx and tweight is not None:
        tdx = tdx + gradients(dy, x, tweight, *geometry, True, False, False, backend)[0]
    if need_dweight and tx is not None:
        tdweight = tdweight + gradients(dy, tx, weight, *geometry, False, True, False, backend)[1]
    return tdx, tdweight, tdbias


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


class Folded(NamedTuple):
    """How one convolution computes a batch of them: into which axis of each operand the samples go."""

    x: int | None
    weight: int | None
    y: int
    inner_groups: int
    """Filters of a group lie together, so samples go between the groups and their filters."""
    groups: int

    @classmethod
    def along_images(cls, size: int, groups: int) -> Folded:
        return cls(0, None, 0, 1, groups)

    @classmethod
    def along_filters(cls, size: int, groups: int) -> Folded:
        return cls(None, 0, 1, groups, groups)

    @classmethod
    def along_groups(cls, size: int, groups: int) -> Folded:
        return cls(1, 0, 1, 1, size * groups)

    @classmethod
    def forward(cls, size: int, groups: int, x_mapped: bool, weight_mapped: bool) -> Folded:
        way = cls.along_images if not weight_mapped else cls.along_groups if x_mapped else cls.along_filters
        return way(size, groups)

    @classmethod
    def backward(cls, size: int, groups: int, dims: Dims, need_dx: bool, need_parameters: bool) -> Folded:
        if dims[2] is None and not need_parameters:
            return cls.along_images(size, groups)
        if dims[1] is None and not need_dx:
            return cls.along_filters(size, groups)
        return cls.along_groups(size, groups)


def _batched(op: Any, size: int, dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    if dims[2] is not None and dims[1] is None and bias is not None:
        return batched_bias(op, _batched, size, dims, x, weight, bias, *args)
    *geometry, groups, pad_mode, backend = args
    way = Folded.forward(size, groups, dims[0] is not None, dims[1] is not None)
    y = op(
        fold(x, dims[0], way.x, size),
        fold(weight, dims[1], way.weight, size, way.inner_groups),
        fold(bias, dims[2], way.weight, size, way.inner_groups),
        *geometry, way.groups, pad_mode, backend,
    )  # fmt: skip
    return unfold(y, way.y, size, way.inner_groups)


def batched_bias(
    op: Any, rule: Rule, size: int, dims: Dims, x: Tensor, weight: Tensor, bias: Tensor, *args: Any
) -> Any:
    """A bias for each sample and one weight for all: the convolution knows no such bias, so it is added."""
    if dims[0] is None:
        y = op(x, weight, None, *args)
    else:
        y = rule(op, size, (dims[0], None, None), x, weight, None, *args)[0]  # along axis 0, as images
    return y + (bias if dims[2] == 0 else bias.mT)[:, None, :, None, None], 0


def _batched_backward(op: Any, size: int, dims: Dims, dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    *geometry, groups, pad_mode, need_dx, need_dweight, need_dbias, backend = args
    way = Folded.backward(size, groups, dims, need_dx, need_dweight or need_dbias)
    dx, dweight, dbias = op(
        fold(dy, dims[0], way.y, size, way.inner_groups),
        fold(x, dims[1], way.x, size),
        fold(weight, dims[2], way.weight, size, way.inner_groups),
        *geometry, way.groups, pad_mode, need_dx, need_dweight, need_dbias, backend,
    )  # fmt: skip
    grads = (
        unfold(dx, way.x, size),
        unfold(dweight, way.weight, size, way.inner_groups),
        unfold(dbias, way.weight, size, way.inner_groups),
    )
    return tuple(t for t, _ in grads), tuple(dim for _, dim in grads)


conv2d = register(
    "conv2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, str backend) -> Tensor",
    tensors=3,
    kernel="conv2d_forward",
    describe=describe,
    fake=_fake,
    function=Conv2d,
    autocast=3,
    batched=_batched,
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
    batched=_batched_backward,
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
