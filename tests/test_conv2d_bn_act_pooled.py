"""The depthwise convolution with folded batch norm that gives the mean of each image's results too, for squeeze-excite.

An op of the backends made of the CUDA sources.
"""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from activations import of_activated
from cases import CONV2D, Conv2dCase, find, of_suite
from helpers import Backend, over
from test_conv2d_bn_act import composed
from test_conv2d_statistics import geometry
from tolerance import assert_close, assert_same_bits

FUNCTION = "conv2d_bn_act_pooled_forward"
DEPTHWISE = tuple(case for case in of_suite(CONV2D, "corner") if case.C and case.depthwise)


def inputs_of(case: Conv2dCase, dtype: torch.dtype, layout: str, device: str, residual: bool) -> tuple[Any, ...]:
    random = helpers.generator(case.id)
    more = helpers.randn(case.output_shape, dtype, device, random) if residual else None
    mean, weight, bias = (helpers.randn((case.K,), torch.float32, device, random) for _ in range(3))
    return (*helpers.conv2d_inputs(case, dtype, layout, device), more, mean, torch.ones_like(mean), weight, bias)


def run(backend: Backend, case: Conv2dCase, inputs: Any, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    function = helpers.row(backend.name).function
    y, pooled = function(FUNCTION)(*inputs, *geometry(case), 1e-5, activation)
    plain = function("conv2d_bn_act_forward")(*inputs, *geometry(case), 1e-5, activation)
    if inputs[0].dtype == torch.float32 or min(case.R, case.S) < 7:
        assert_same_bits(y, plain, "y")
        return y, pooled

    # The tensor cores, which pool nothing, add up large filters in another order.
    def theirs(tensors: Any, activation: str) -> torch.Tensor:
        x, weight, bias, residual, mean, var, *affine = tensors
        return composed(case, (mean, var), activation, 1e-5)(x, weight, bias, residual, *affine)

    reference = theirs(helpers.mapped(torch.Tensor.double, inputs), activation)
    magnitudes = helpers.mapped(lambda t: t.double().abs(), inputs)
    magnitude = theirs((*magnitudes[:4], -magnitudes[4], *magnitudes[5:]), "none")
    length = case.R * case.S + len(inputs)
    assert_close(y, theirs(inputs, activation), reference, of_activated(magnitude, reference), length, "y")
    return y, pooled


@over(FUNCTION, [case for case in DEPTHWISE if case.N], backends=helpers.WITH_TF32)
@pytest.mark.parametrize(("activation", "residual"), [("silu", False), ("none", True)])
def test_the_mean_of_what_was_written(
    backend: Backend, case: Conv2dCase, dtype: torch.dtype, layout: str, activation: str, residual: bool
) -> None:
    y, pooled = run(backend, case, inputs_of(case, dtype, layout, backend.device, residual), activation)
    helpers.check_pooled(y, pooled)


@pytest.mark.parametrize("backend", helpers.WITH_TF32, indirect=True)
def test_of_nothing(backend: Backend) -> None:
    case = find(CONV2D, "depthwise-3x3").with_batch(0)
    y, pooled = run(backend, case, inputs_of(case, torch.float32, "nchw", backend.device, False), "relu")
    assert (y.shape, pooled.shape) == (case.output_shape, (0, case.K))


@pytest.mark.parametrize("backend", helpers.WITH_TF32, indirect=True)
def test_others_are_refused(backend: Backend) -> None:
    case = find(CONV2D, "3x3-pad-bias")
    with pytest.raises(RuntimeError, match="only depthwise kernels pool their results, but the plan is"):
        run(backend, case, inputs_of(case, torch.float32, "nchw", backend.device, False), "relu")
    problem = helpers.problem_of(FUNCTION, case, torch.float32, "nchw", "cpu")
    assert "depthwise" in helpers.row(backend.name).supports(FUNCTION, problem).reason
