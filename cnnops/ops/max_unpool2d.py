"""Unpooling, which puts values back where their maxima were, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import Pool2dProblem, is_channels_last
from ..torch_private import autocast_keys, exclude_keys
from .batching import along
from .registry import Function, empty, library, register


class MaxUnpool2d(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, indices, *ctx.size, backend = inputs
        ctx.args = (is_channels_last(x), backend)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, max_unpool2d_backward(dy, *ctx.saved_tensors, *ctx.args), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Tensor, *__: Any) -> Any:
        return max_unpool2d(tx, *ctx.saved_tensors, *ctx.size, ctx.args[-1])


class MaxUnpool2dBackward(Function):
    """Gathers: values that met in one position each get its whole gradient, as in torch, so they add up there."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, indices, *ctx.args = inputs
        ctx.shape = dy.shape
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        N, C, P, Q = ctx.shape
        ddy = ddx.new_zeros((N, C, P * Q)).scatter_add(2, indices.flatten(2), ddx.flatten(2))
        return None, ddy.view(ctx.shape), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, tdy: Tensor, *__: Any) -> Any:
        return max_unpool2d_backward(tdy, *ctx.saved_tensors, *ctx.args)


def _describe(x: Tensor, indices: Tensor, P: int, Q: int, *_: Any) -> Pool2dProblem:
    return Pool2dProblem.unpooling(x, indices, P, Q)


def _describe_backward(dy: Tensor, indices: Tensor, channels_last: bool, *_: Any) -> Pool2dProblem:
    if indices.dtype != torch.int64:
        raise RuntimeError(f"max_unpool2d_backward: expected indices of dtype torch.int64, but got {indices.dtype}")
    if dy.dim() != 4 or indices.dim() != 4 or dy.shape[:2] != indices.shape[:2] or dy.device != indices.device:
        raise RuntimeError(
            f"max_unpool2d_backward: expected dy [N, C, P, Q] and indices [N, C, H, W] on one device, but got "
            f"{list(dy.shape)} on {dy.device} and {list(indices.shape)} on {indices.device}"
        )
    (N, C, H, W), (P, Q) = indices.shape, dy.shape[2:]
    return Pool2dProblem(N, C, H, W, 0, 0, P, Q, 0, 0, 0, 0, 0, 0, dy.dtype, dy.device.type, channels_last)


def _fake(problem: Pool2dProblem, x: Tensor, *_: Any) -> Tensor:
    return empty(x, (problem.N, problem.C, problem.P, problem.Q), problem.channels_last)


def _fake_backward(problem: Pool2dProblem, dy: Tensor, *_: Any) -> Tensor:
    return empty(dy, (problem.N, problem.C, problem.H, problem.W), problem.channels_last)


max_unpool2d = register(
    "max_unpool2d",
    "(Tensor x, Tensor indices, int P, int Q, str backend) -> Tensor",
    tensors=2,
    kernel="max_unpool2d_forward",
    describe=_describe,
    fake=_fake,
    function=MaxUnpool2d,
    batched=along((0, 0), 0),
)
max_unpool2d_backward = register(
    "max_unpool2d_backward",
    "(Tensor dy, Tensor indices, bool channels_last, str backend) -> Tensor",
    tensors=2,
    kernel="max_unpool2d_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=MaxUnpool2dBackward,
    batched=along((0, 0), 0),
)


def _widened(x: Tensor, *args: Any) -> Any:
    """The call as torch's autocast makes it on the CPU (on CUDA it leaves it alone): in float32."""
    with exclude_keys(autocast_keys("CPU")):
        return torch.ops.cnnops.max_unpool2d.default(
            x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, *args
        )


library.impl("max_unpool2d", _widened, "AutocastCPU")
