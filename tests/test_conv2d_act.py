"""conv2d_act against the composition of torch's own ops, on every backend that claims it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import helpers
import pytest
import torch
from activations import ACTIVATIONS, away_from_kinks, of_activated
from cases import CONV2D, LAYOUTS, VIEWS, Conv2dCase, find
from helpers import Backend, on, on_dtypes, over
from tolerance import assert_close, assert_exact, assert_same_bits, assert_same_layout

import cnnops.functional as CF

NAMES = ("x", "weight", "bias", "residual")
KINDS = tuple(
    find(CONV2D, id)
    for id in ("3x3-pad-bias", "1x1-s2-uneven", "5x2-uneven-everything", "depthwise-3x3-ragged", "3x3-beyond-tile")
)


def fused(case: Conv2dCase, activation: str) -> helpers.Function:
    return lambda x, weight, bias, residual: CF.conv2d_act(
        x, weight, bias, **case.arguments(), residual=residual, activation=activation
    )


def composed(case: Conv2dCase, activation: str) -> helpers.Function:
    def function(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        z = helpers.torch_conv2d(case)(x, weight, bias)
        return ACTIVATIONS[activation](z if residual is None else z + residual)

    return function


def inputs_of(case: Conv2dCase, dtype: torch.dtype, layout: str, device: str, residual: bool) -> helpers.Tensors:
    inputs = helpers.conv2d_inputs(case, dtype, layout, device)
    random = helpers.generator("residual of " + case.id)
    other = helpers.randn(case.output_shape, dtype, device, random) if residual else None
    return [*inputs, None if other is None else helpers.laid_out(other, layout)]


def check(case: Conv2dCase, inputs: helpers.Tensors, activation: str) -> None:
    exact = helpers.mapped(lambda t: t, inputs)
    z = composed(case, "none")(*exact)
    dy = away_from_kinks(helpers.gradient_for(composed(case, activation), inputs), z, activation)
    got = helpers.evaluate(fused(case, activation), inputs, dy)
    same_dtype = helpers.evaluate(composed(case, activation), inputs, dy)
    reference = helpers.evaluate(composed(case, activation), exact, dy.cpu().double())
    # The first derivatives are at most 1.1 (silu), the second at most 0.5, and the latter carry z's own rounding into
    # the gradients: dz = dy activation'(z).
    plain = composed(case, "none")
    magnitude_of_z = plain(*helpers.mapped(torch.abs, inputs))
    length_of_z = plain(*helpers.mapped(torch.ones_like, inputs))
    dz = 1.1 * dy.cpu().double().abs() * (1 + magnitude_of_z)
    magnitude = helpers.evaluate(plain, helpers.mapped(torch.abs, inputs), dz)
    magnitude[0] = of_activated(magnitude[0], reference[0])
    length = helpers.evaluate(plain, *helpers.mapped(torch.ones_like, (inputs, dy)))
    longest = length_of_z.max() if length_of_z.numel() else 1
    length = [length[0], *[n * longest for n in length[1:]]]
    assert_same_layout(got[0], same_dtype[0], "y")
    names = helpers.result_names(NAMES, inputs)
    for name, a, b, c, d, e in zip(names, got, same_dtype, reference, magnitude, length, strict=True):
        assert_close(a, b, c, d, e, name, intermediate=None if name == "y" else a.dtype)


def check_twice(case: Conv2dCase, inputs: helpers.Tensors, activation: str) -> None:
    """The double backward, in float64, where no rounding comes near a kink."""
    dy, random = helpers.gradient_for(composed(case, activation), inputs), helpers.generator("directions")
    tensors = [inputs, dy, [None if t is None else helpers.like(t, random) for t in inputs]]
    got = helpers.evaluate_twice(fused(case, activation), *tensors)
    reference = helpers.evaluate_twice(composed(case, activation), *tensors)
    # With dz = dy activation'(z) and t, what the directions change z by: ddy = t activation'(z), and the other results
    # are the gradients of z for t dy activation''(z), and those in the directions for dz. No derivative is above 1.1.
    plain = composed(case, "none")
    absolute, dy, directions = helpers.mapped(torch.abs, tensors)
    z = 1 + plain(*absolute)
    ddy, *found = helpers.evaluate_twice(plain, absolute, 1.1 * dy * z, directions)
    through_z = helpers.evaluate(plain, absolute, 1.1 * dy * z * ddy)[1:]
    magnitude = [1.1 * ddy * z, *(a + b for a, b in zip(found, through_z, strict=True))]
    length = sum(t.numel() for t in inputs if t is not None)
    names = ["ddy", *helpers.result_names(NAMES, inputs)[1:]]
    for name, a, b, c in zip(names, got, reference, magnitude, strict=True):
        assert_close(a, b, b, c, length, name)


@over("conv2d_act_forward", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_forward_and_gradients(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str, activation: str, residual: bool
) -> None:
    check(case, inputs_of(case, dtype, layout, backend.device, residual), activation)


@on("conv2d_act_forward", "activation_backward")
@pytest.mark.parametrize("residual_layout", [*LAYOUTS, *VIEWS])
def test_layouts_of_residual(backend: Backend, residual_layout: str) -> None:
    for layout in LAYOUTS:
        *inputs, residual = inputs_of(KINDS[0], torch.float32, layout, backend.device, True)
        check(KINDS[0], [*inputs, helpers.laid_out(residual, residual_layout)], "relu")


@on("conv2d_act_forward", "activation_backward")
def test_activation_none_is_conv2d(backend: Backend) -> None:
    case = KINDS[0]
    inputs = inputs_of(case, torch.float32, "channels_last", backend.device, False)
    dy = helpers.gradient_for(composed(case, "none"), inputs)
    plain = helpers.evaluate(lambda x, w, b, _: CF.conv2d(x, w, b, **case.arguments()), inputs, dy)
    for a, b in zip(plain, helpers.evaluate(fused(case, "none"), inputs, dy), strict=True):
        assert_same_bits(a, b)


@on_dtypes("conv2d_act_forward", "activation_backward")
def test_integers_are_exact(backend: Backend, dtype: torch.dtype) -> None:
    precisions = [contextlib.nullcontext]
    if dtype == torch.float32 and backend.name in helpers.WITH_TF32:
        precisions.append(helpers.tf32)
    for case in KINDS:
        random = helpers.generator("integers")
        shapes = (case.x_shape, case.weight_shape, (case.K,), case.output_shape)
        inputs = [helpers.integers(shape, dtype, backend.device, random, 1) for shape in shapes]
        for activation, precision in itertools.product(("none", "relu", "relu6"), precisions):
            with precision():
                y = fused(case, activation)(*inputs)
            expected = composed(case, activation)(*helpers.mapped(lambda t: t, inputs))
            assert_exact(y.cpu(), expected.to(dtype).double(), f"{case.id}, {activation}")


@on("conv2d_act_forward", "activation_backward")
def test_relu_keeps_nan(backend: Backend) -> None:
    x = torch.tensor([torch.nan, -1.0, torch.inf, 2.0], device=backend.device).view(1, 1, 2, 2)
    y = CF.conv2d_act(x, torch.ones(1, 1, 1, 1, device=backend.device))
    assert_exact(y.cpu(), torch.tensor([torch.nan, 0.0, torch.inf, 2.0], dtype=torch.float64).view(1, 1, 2, 2), "y")


@on("conv2d_act_forward", "activation_backward", dtype=torch.float64)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend: Backend, activation: str, residual: bool) -> None:
    case = find(CONV2D, "1x1-s2-uneven")
    leaves = [
        t.detach().requires_grad_()
        for t in inputs_of(case, torch.float64, "channels_last", backend.device, residual)
        if t is not None
    ]

    def function(x: Any, weight: Any, bias: Any, residual: Any = None) -> torch.Tensor:
        return fused(case, activation)(x, weight, bias, residual)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@on("conv2d_act_forward", "activation_backward", dtype=torch.float64)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_backward(backend: Backend, activation: str, residual: bool) -> None:
    """To the last places of float64: gradgradcheck sees far fewer."""
    for case in KINDS:
        check_twice(case, inputs_of(case, torch.float64, "channels_last", backend.device, residual), activation)
