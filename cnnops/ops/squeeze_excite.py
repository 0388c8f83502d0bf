"""Squeeze and excitation in one op, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import aten
from ..geometry import SqueezeExciteProblem, accumulation_dtype
from .batching import Dims, along, for_each_sample
from .registry import Function, differentiate, empty, register, tangents_of


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

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        activation, gate, _ = ctx.args

        def formula(x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any) -> tuple[Tensor]:
            return aten.squeeze_excite_forward(x, weight1, bias1, weight2, bias2, activation, gate)[:1]

        return (*tangents_of(formula, ctx.saved_tensors[:5], tangents[:5]), None, None, None)


class SqueezeExciteBackward(Function):
    """The second derivative is rare, so it is torch's own differentiation of the formula for the first."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dy, x, weight1, bias1, weight2, bias2, _, _, _, *ctx.args, _ = inputs
        ctx.save_for_backward(dy, x, weight1, bias1, weight2, bias2)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        results = differentiate(
            lambda *tensors: _gradients(*tensors, *ctx.args), ctx.saved_tensors, ctx.needs_input_grad[1:7], upstream
        )
        return (None, *results, *[None] * 11)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        def formula(*tensors: Any) -> list[Tensor]:
            return [t for t in _gradients(*tensors, *ctx.args) if t is not None]

        found = iter(tangents_of(formula, ctx.saved_tensors, tangents[:6]))
        return tuple(next(found) if need else None for need in ctx.args[2:])


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    gate: str,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    """The wanted gradients by torch's own differentiable ops."""
    layers = weight1, bias1, weight2, bias2
    _, *small = aten.squeeze_excite_forward(x, *layers, activation, gate)
    arguments: tuple[Any, ...] = (dy, x, *layers, *small, activation, gate, *needs)
    return aten.squeeze_excite_backward(*arguments)


def _describe(*args: Any) -> SqueezeExciteProblem:
    return SqueezeExciteProblem.of(*args[:7])


def _describe_backward(dy: Tensor, *args: Any) -> SqueezeExciteProblem:
    *tensors, pooled, hidden, scale = args[:8]
    problem = SqueezeExciteProblem.of(*tensors, *args[8:10])
    x = tensors[0]
    wide = accumulation_dtype(x.dtype)
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
    wide = accumulation_dtype(x.dtype)
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


_IMAGES = along((0, None, None, None, None), (0, 0, 0, 0))
_IMAGES_BACKWARD = along((0, 0, None, None, None, None, 0, 0, 0), (0, None, None, None, None))


def _batched(op: Any, size: int, dims: Dims, *args: Any) -> Any:
    """Samples become images. Layers of their own are no axis of one layer: a block diagonal of them would multiply the
    other samples by zeros, which costs the square, and lets a NaN through."""
    rule = _IMAGES if all(dim is None for dim in dims[1:5]) else for_each_sample
    return rule(op, size, dims, *args)


def _batched_backward(op: Any, size: int, dims: Dims, *args: Any) -> Any:
    """As `_batched`; a layer's gradient is summed over the images of each sample."""
    layers_needed = any(args[12:16])
    rule = _IMAGES_BACKWARD if all(dim is None for dim in dims[2:6]) and not layers_needed else for_each_sample
    return rule(op, size, dims, *args)


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
    batched=_batched,
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
    batched=_batched_backward,
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
