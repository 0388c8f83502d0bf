"""conv2d, batch norm with running statistics, residual addition and activation in one pass: what inference computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import Conv2dProblem, NormProblem
from .batch_norm import batch_norm_act
from .conv2d import GEOMETRY, _flops, conv2d, output_shape
from .registry import empty, register


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *args: Any,
) -> Tensor:
    *geometry, eps, activation, backend = args
    z = conv2d(x, weight, bias, *geometry, backend)
    y: Tensor = batch_norm_act(
        z, bn_weight, bn_bias, residual, running_mean, running_var, False, 0.0, eps, activation, backend
    )[0]
    return y


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *args: Any,
) -> Conv2dProblem:
    *geometry, eps, activation, _ = args
    problem = Conv2dProblem.of(x, weight, bias, *geometry)
    z = x.new_empty(()).expand(output_shape(problem))
    NormProblem.of(z, bn_weight, bn_bias, residual, running_mean, running_var, False, eps, activation)
    return problem


def _fake(problem: Conv2dProblem, x: Tensor, *_: Any) -> Tensor:
    return empty(x, output_shape(problem), problem.channels_last)


conv2d_bn_act = register(
    "conv2d_bn_act",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "
    f"Tensor? bn_weight, Tensor? bn_bias, {GEOMETRY}, float eps, str activation, str backend) -> Tensor",
    tensors=8,
    kernel="conv2d_bn_act_forward",
    describe=_describe,
    fake=_fake,
    composite=_composite,
    autocast=4,
)


register_flop_formula(torch.ops.cnnops.conv2d_bn_act)(_flops)
