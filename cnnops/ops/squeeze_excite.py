"""Squeeze and excitation in one op, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import aten
from ..geometry import SqueezeExciteProblem
from .registry import Function, differentiate, empty, register


class SqueezeExcite(Function):
    """y = x * scale. Keeps the means, the hidden values before their activation, and scale: all of them small."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *tensors, activation, gate, backend = inputs
        _, *small = output
        ctx.args = activation, gate, backend
        ctx.save_for_backward(*tensors, *small)
        ctx.mark_non_differentiable(*small)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 9
        activation, gate, backend = ctx.args
        needs = ctx.needs_input_grad[1:6]
        grads = squeeze_excite_backward(dy, *ctx.saved_tensors, activation, gate, *needs, backend)
        return (None, *grads, None, None, None)


class SqueezeExciteBackward(Function):
    """The second derivative is rare, so it is torch's own differentiation of the formula for the first."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, x, weight1, bias1, weight2, bias2, _, _, _, *ctx.args = inputs
        ctx.save_for_backward(dy, x, weight1, bias1, weight2, bias2)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        activation, gate = ctx.args[:2]

        def formula(*tensors: Any) -> tuple[Tensor | None, ...]:
            forward: tuple[Any, ...] = (*tensors[1:], activation, gate)
            _, *small = aten.squeeze_excite_forward(*forward)
            given = [t is not None for t in tensors[1:]]
            arguments: tuple[Any, ...] = (*tensors, *small, activation, gate, *given)
            return aten.squeeze_excite_backward(*arguments)

        results = differentiate(formula, ctx.saved_tensors, ctx.needs_input_grad[1:7], upstream)
        return (None, *results, *[None] * 11)


def _describe(*args: Any) -> SqueezeExciteProblem:
    return SqueezeExciteProblem.of(*args[:7])


def _describe_backward(dy: Tensor, *args: Any) -> SqueezeExciteProblem:
    *tensors, pooled, hidden, scale = args[:8]
    problem = SqueezeExciteProblem.of(*tensors, *args[8:10])
    x = tensors[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, C, M = problem.N, problem.C, problem.M
    for name, t, shape, dtype in (
        ("dy", dy, list(x.shape), x.dtype),
        ("pooled", pooled, [N, C], wide),
        ("hidden", hidden, [N, M], wide),
        ("scale", scale, [N, C], wide),
    ):
        if list(t.shape) != shape or t.dtype != dtype:
            raise RuntimeError(
                f"squeeze_excite_backward: expected {name} of shape {shape} and dtype {dtype}, "
                f"but got {list(t.shape)} {t.dtype}"
            )
    return problem


def _fake(problem: SqueezeExciteProblem, x: Tensor, *_: Any) -> Any:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, C, M = problem.N, problem.C, problem.M
    small = (empty(x, shape, False, wide) for shape in ((N, C), (N, M), (N, C)))
    return (empty(x, x.shape, problem.channels_last), *small)


def _fake_backward(problem: SqueezeExciteProblem, dy: Tensor, x: Tensor, weight1: Tensor, *args: Any) -> Any:
    weight2 = args[1]
    need_dx, need_dweight1, need_dbias1, need_dweight2, need_dbias2 = args[8:13]
    return (
        empty(x, x.shape, problem.channels_last) if need_dx else None,
        empty(weight1, weight1.shape, False) if need_dweight1 else None,
        empty(x, (problem.M,), False) if need_dbias1 else None,
        empty(weight2, weight2.shape, False) if need_dweight2 else None,
        empty(x, (problem.C,), False) if need_dbias2 else None,
    )


squeeze_excite = register(
    "squeeze_excite",
    "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str activation, str gate, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=5,
    kernel="squeeze_excite_forward",
    describe=_describe,
    fake=_fake,
    function=SqueezeExcite,
    autocast=5,
)
squeeze_excite_backward = register(
    "squeeze_excite_backward",
    "(Tensor dy, Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor pooled, Tensor hidden, "
    "Tensor scale, str activation, str gate, bool need_dx, bool need_dweight1, bool need_dbias1, bool need_dweight2, "
    "bool need_dbias2, str backend) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    tensors=9,
    kernel="squeeze_excite_backward",
    describe=_describe_backward,
    fake=_fake_backward,
    function=SqueezeExciteBackward,
)


def _layer(x: Any, weight1: Any) -> int:
    """Multiplications and additions of one of the two layers."""
    return int(2 * x[0] * weight1[0] * weight1[1])


def _flops(x: Any, weight1: Any, *_: Any, **__: Any) -> int:
    return 2 * _layer(x, weight1)


def _flops_backward(dy: Any, x: Any, weight1: Any, *args: Any, **_: Any) -> int:
    need_dx, need_dweight1, need_dbias1, need_dweight2 = args[8:12]
    products = (need_dx or need_dweight1 or need_dbias1, need_dx, need_dweight1, need_dweight2)
    return sum(map(bool, products)) * _layer(x, weight1)


register_flop_formula(torch.ops.cnnops.squeeze_excite)(_flops)
register_flop_formula(torch.ops.cnnops.squeeze_excite_backward)(_flops_backward)
